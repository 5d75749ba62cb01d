"""placement.report: what people read, against the plan it is made from."""

import re
from dataclasses import replace

import pytest

from placement import report
from placement.facts import Facts
from placement.ledger import Wishes, human, place
from placement.plan import Goal, Plan, Point
from placement.planner import facts_from, make_plan, shipped_profiles
from placement.profile import read_profile
from placement.routing import uniform
from tests.reference.k25 import K25

GIB = 2**30
BUFFERS = 512 * (2 * 4 * 7168 + 9 * 7168 // 4 + 8 * 9 * 2048 // 4)  # of a step's 512 tokens, 2.25 bytes a value


def made(goal: Goal, name: str = "ddr5-5600-12ch_h200", servable: bool = False) -> Plan:
    profile = read_profile(shipped_profiles()[name])
    return make_plan(K25, facts_from(profile), profile, goal, Wishes(), uniform(K25), servable, name="K2.5")


@pytest.fixture(scope="module")
def swarm() -> Plan:
    return made(Goal("swarm", 9792, 100))


@pytest.fixture(scope="module")
def latency() -> Plan:
    return made(Goal("latency", 8192, 1))


@pytest.mark.parametrize(
    ("facts", "sums"),
    [
        (Facts("cuda", "GPU", 48 * GIB, 47 * GIB, 768 * GIB, 760 * GIB), ("device", "RAM")),
        (Facts("cpu", "CPU", *[900 * GIB] * 4), ("device + RAM: memory",)),
    ],
)
def test_the_ledger_has_every_entry_and_adds_up(facts: Facts, sums: tuple[str, ...]) -> None:
    plan = make_plan(K25, facts, None, Goal(), Wishes(), uniform(K25), True)
    shown = report.ledger(plan).splitlines()[1:]
    for entry in place(K25, facts, Wishes()).entries:
        assert f"  {entry.where:<7}{entry.what:<52}{human(entry.n_bytes):>11}" in shown
    totals = [line.removeprefix("  = ") for line in shown if line.startswith("  =")]
    assert len(totals) == len(sums)
    free = {"device": facts.device_free, "RAM": facts.ram_free, "device + RAM: memory": facts.ram_free}
    for name, line in zip(sums, totals, strict=True):
        places = ("device", "RAM") if name.startswith("device +") else (name,)
        used = sum(line.size for line in plan.ledger if line.where in places and line.what != "unused")
        assert line.split() == f"{name} {human(used)} of {human(free[name])} free".split()


def test_table_shows_every_line_figure_and_note(swarm: Plan) -> None:
    swarm = replace(swarm, settings=replace(swarm.settings, experts_leave_ram=True))
    text = report.table(swarm)
    assert text.startswith("plan for K2.5 on ddr5-5600-12ch_h200: swarm, 100 at once, 9792 tokens of context\n")
    for line in swarm.ledger:
        shown = re.search(rf"^  {line.where} +{re.escape(line.what)} +{re.escape(human(line.size))}$", text, re.M)
        assert (shown is None) == (line.what == "unused"), line
    assert swarm.prediction is not None
    assert len(re.findall(r"^  decode, batch ", text, re.M)) == len(swarm.prediction.decode)
    assert len(re.findall(r"^  prompt of ", text, re.M)) == len(swarm.prediction.prefill)
    assert "  swarm of 100: " in text
    assert len(re.findall(r"^  note: ", text, re.M)) == len(swarm.notes) + 1
    assert f"this version's engine does not do: {', '.join(swarm.lacking)}" in text


def test_a_fast_prompt_keeps_its_distance_from_what_binds_it(latency: Plan) -> None:
    assert latency.prediction is not None
    points = tuple(Point(8192, seconds, 8192 / seconds, "link") for seconds in (0.0043023, 4302.3))
    text = report.table(replace(latency, prediction=replace(latency.prediction, prefill=points, decode=points)))
    assert len(re.findall(r" tok/s  +link$| a step  +link$", text, re.M)) == 4
    assert "1,904,098 tok/s" in text


def test_table_without_rates_or_needs() -> None:
    plan = make_plan(K25, Facts("cpu", "CPU", *[900 * GIB] * 4), None, Goal(), Wishes(), uniform(K25), True)
    text = report.table(plan)
    assert "what it will bring" not in text and "does not do" not in text


def test_measured_figures_stand_beside_predicted_ones(latency: Plan) -> None:
    assert latency.prediction is not None
    point = Point(1, 0.030, 33.3, "CPU experts", measured=0.025)
    plan = replace(latency, prediction=replace(latency.prediction, decode=(point,)))
    assert re.search(r"decode, batch 1 .*30 ms a step.*; measured 25 ms \(\+20% predicted\)$", report.table(plan), re.M)


def test_explain_gives_a_line_to_every_choice(swarm: Plan) -> None:
    lines = report.explain(swarm).splitlines()
    assert lines[0] == "why" and len(lines) == 1 + len(swarm.choices)
    for line, choice in zip(lines[1:], swarm.choices, strict=True):
        assert line.split(maxsplit=1)[0] == choice.what.split()[0]
        assert line.endswith(f"{choice.value}: {choice.reason}")


def test_compare(swarm: Plan, latency: Plan) -> None:
    lines = {line[: line.index("  ", 2)].strip(): line for line in report.compare(swarm, latency).splitlines()[1:]}
    assert lines["goal"].split("  ")[-1].strip() == "latency, 1 at once, 8192 tokens"
    assert "threads" not in lines, "equal choices are left out"
    assert swarm.prediction is not None and latency.prediction is not None
    ratio = latency.prediction.decode[0].tokens_per_second / swarm.prediction.decode[0].tokens_per_second
    assert lines["decode tok/s, batch 1"].endswith(f"({ratio:.2f}×)")
    assert lines["decode tok/s, batch 100"].rstrip().endswith("–")
    assert lines["seconds of a swarm of 100"].rstrip().endswith("–")


def test_a_plan_compared_with_itself_differs_in_nothing(latency: Plan) -> None:
    assert latency.prediction is not None
    lines = report.compare(latency, latency).splitlines()
    assert len(lines) == 1 + len(latency.prediction.decode) + len(latency.prediction.prefill)
    assert all(line.endswith("(1.00×)") for line in lines[1:])
