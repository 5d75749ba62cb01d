"""server.simulate: cases worked out by hand, and laws that hold for every workload."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.batch import Batch, Row, Sampling
from placement.cost import Load, StepCost
from server import simulate as module
from server.scheduler import SchedulerConfig
from server.simulate import Report, clock, simulate
from server.simulate_report import percentiles, text, to_json
from server.workload import Agent, Distribution, Turn, Workload, read_trace, swarm
from tests.reference.fake_step import FakeStep

ROOMY = SchedulerConfig(n_pages=4096, page_size=4, max_batch_tokens=64, max_running=16)
BUSY = SchedulerConfig(n_pages=40, page_size=4, max_batch_tokens=16, max_running=8)  # preempts


def linear(batch: Batch) -> StepCost:
    """A second for the step and one for each new id, half of it on the link: all sums are exact in binary."""
    seconds = 1.0 + batch.n_tokens
    return StepCost(
        seconds, {"work": seconds, "link": seconds / 2}, {"link": 8.0 * batch.n_tokens}, distinct=1.0, binding="work"
    )


def checked(config: SchedulerConfig) -> Callable[[Batch], StepCost]:
    """Likewise, and every row's pages must hold what was written for it."""
    step = FakeStep(config.n_pages, config.page_size)

    def cost(batch: Batch) -> StepCost:
        step(batch)
        return linear(batch)

    return cost


def agent(i: int, *turns: tuple[int, int, float]) -> Agent:
    """Turns as (new prompt tokens, output, wait), nothing shared."""
    return Agent(-1 - i, tuple(Turn(((-1 - i, new),), output, wait) for new, output, wait in turns))


def mixed(seed: int, output: str = "1..12", turns: str = "1..4") -> Workload:
    """Agents with a shared prompt of ten tokens that come, wait and return."""
    dist = Distribution.parse
    return swarm(12, 10, dist("1..30"), dist(output), dist(turns), dist("0..9"), dist("0..80"), seed)


# By hand


def test_two_requests_step_by_step() -> None:
    """0-7: prompt of A (6 ids). 7-13: one id of A, prompt of B (4), which came at 1. 13-16: one id each, both end."""
    report = simulate(Workload((agent(0, (6, 3, 0.0)), agent(1, (4, 2, 1.0)))), ROOMY, linear)
    assert [(s.start, s.seconds, s.decoding, s.prefilled) for s in report.steps] == [
        (0.0, 7.0, 0, 6),
        (7.0, 6.0, 1, 4),
        (13.0, 3.0, 2, 0),
    ]
    assert [(r.agent, r.arrived, r.started, r.first_token, r.finished) for r in report.served] == [
        (0, 0.0, 0.0, 7.0, 16.0),
        (1, 1.0, 7.0, 13.0, 16.0),
    ]
    assert report.makespan == report.busy == 16.0
    assert report.ttft == [7.0, 12.0]
    assert report.tpot == [4.5, 3.0]
    assert report.queued == [0.0, 6.0]
    assert (report.generated, report.prefilled, report.cached, report.preemptions) == (5, 10, 0, 0)
    assert report.moved == {"link": 8.0 * 13}
    assert report.utilisation == {"work": 1.0, "link": 0.5}
    assert report.binding == {"work": 16.0}


def test_a_turn_after_a_tool_finds_its_own_pages() -> None:
    """0-7: 6 ids. 7-9, 9-11: two tokens more. Waits 10 s. Prompt of 6 + 3 + 2 ids; 8 were computed, two pages of 4."""
    report = simulate(Workload((agent(0, (6, 3, 0.0), (2, 1, 10.0)),)), ROOMY, linear)
    assert [(r.turn, r.arrived, r.prompt, r.cached, r.finished) for r in report.served] == [
        (0, 0.0, 6, 0, 11.0),
        (1, 21.0, 11, 8, 25.0),
    ]
    assert (report.makespan, report.busy) == (25.0, 15.0)
    assert report.utilisation["work"] == 15 / 25
    assert report.tpot == [2.0]  # an answer of one token has no time between tokens


def test_an_agent_that_waits_holds_no_page() -> None:
    """While A waits, B takes all four pages: it starts at once, and A's prompt is computed anew."""
    small = SchedulerConfig(n_pages=4, page_size=4, max_batch_tokens=64, max_running=4)
    work = Workload((agent(0, (8, 1, 0.0), (2, 1, 100.0)), agent(1, (15, 2, 20.0))))
    report = simulate(work, small, checked(small))
    assert [(r.agent, r.turn, r.started - r.arrived, r.cached) for r in report.served] == [
        (0, 0, 0.0, 0),
        (1, 0, 0.0, 0),
        (0, 1, 0.0, 0),
    ]
    roomy = simulate(work, ROOMY, linear)
    assert [(r.agent, r.turn, r.cached) for r in roomy.served] == [(0, 0, 0), (1, 0, 0), (0, 1, 8)]


def test_a_shared_prompt_is_computed_once() -> None:
    """64 shared tokens fill the first step; those who come after it find 16 whole pages."""
    shared = swarm(5, 64, Distribution.parse("3"), Distribution.parse("2"))
    report = simulate(shared, ROOMY, checked(ROOMY))
    assert report.steps[0].prefilled == 64
    assert sorted(r.cached for r in report.served) == [0, 64, 64, 64, 64]
    assert report.prefilled == 64 + 5 * 3


def test_a_trace_keeps_its_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [(5000, 3, 1), (105_000, 700, 2), (105_000, 4, 1), (105_500, 600, 1)]
    hashes: dict[int, list[int]] = {1: [7, 8], 3: [7, 9]}
    path.write_text(
        "\n".join(
            json.dumps(
                {"timestamp": t, "input_length": n, "output_length": m}
                | ({"hash_ids": hashes[i]} if i in hashes else {})
            )
            for i, (t, n, m) in enumerate(lines)
        )
    )
    roomy = replace(ROOMY, max_batch_tokens=2048)
    report = simulate(read_trace(path), roomy, checked(roomy))
    assert sorted((r.arrived, r.prompt, r.output) for r in report.served) == [
        (0.0, 3, 1), (100.0, 4, 1), (100.0, 700, 2), (100.5, 600, 1),
    ]  # fmt: skip
    assert report.steps[1].start == 100.0  # nothing ran in between
    assert {r.agent: r.cached for r in report.served} == {0: 0, 1: 0, 2: 0, 3: 512}


# Laws


def assert_lawful(report: Report, work: Workload) -> None:
    asked = {(i, t): turn for i, one in enumerate(work.agents) for t, turn in enumerate(one.turns)}
    assert Counter((r.agent, r.turn) for r in report.served) == Counter(asked.keys())
    assert all(r.output == asked[r.agent, r.turn].output for r in report.served)
    assert report.generated == sum(turn.output for turn in asked.values())
    gaps = [b.start - (a.start + a.seconds) for a, b in itertools.pairwise(report.steps)]
    assert min(gaps, default=0.0) >= 0
    last = report.steps[-1]
    assert report.makespan == last.start + last.seconds
    assert report.makespan == pytest.approx(report.steps[0].start + report.busy + sum(gaps))
    assert all(0 <= share <= 1 for share in report.utilisation.values())
    assert sum(report.binding.values()) == pytest.approx(report.busy)
    for r in report.served:
        assert r.arrived <= r.started < r.first_token <= r.finished
        assert r.prompt == work.agents[r.agent].prompt_tokens(r.turn)
    ends = {(r.agent, r.turn): r.finished for r in report.served}
    for r in report.served:
        assert r.arrived == ends.get((r.agent, r.turn - 1), 0.0) + asked[r.agent, r.turn].wait


@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_computed_and_sampled_once(seed: int) -> None:
    work = mixed(seed)
    report = simulate(work, ROOMY, checked(ROOMY))
    assert_lawful(report, work)
    assert report.preemptions == 0
    assert report.prefilled + report.cached == sum(r.prompt for r in report.served)
    # The first token of an answer comes with its prompt, each other one from a row that decodes.
    assert sum(step.decoding for step in report.steps) == report.generated - len(report.served)


@pytest.mark.parametrize("seed", range(5))
def test_few_pages_cost_time_and_lose_nothing(seed: int) -> None:
    work = mixed(seed, output="20..40", turns="1..2")
    report = simulate(work, BUSY, checked(BUSY))
    assert_lawful(report, work)
    assert report.preemptions > 0
    assert report.prefilled + report.cached > sum(r.prompt for r in report.served)


def test_the_same_seed_gives_the_same_report() -> None:
    assert simulate(mixed(3), BUSY, linear) == simulate(mixed(3), BUSY, linear)
    assert simulate(mixed(3), BUSY, linear) != simulate(mixed(4), BUSY, linear)


def test_where_batching_pays_more_running_agents_end_sooner() -> None:
    """Steps that cost the same with 4 rows and with 100: 25 waves of ten steps, or one after a few prompt steps."""

    def cost(batch: Batch) -> StepCost:
        return StepCost(1.0 + 0.001 * len(batch.rows), {}, {}, 1.0, "weights")

    work = swarm(100, 64, Distribution.parse("8"), Distribution.parse("10"))
    ends = [simulate(work, SchedulerConfig(4096, 16, 512, max_running=n), cost).makespan for n in (4, 100)]
    assert 240 < ends[0] < 300
    assert 10 < ends[1] < 20


# Refusals


def test_what_the_scheduler_refuses_is_named_and_ends_its_agent() -> None:
    small = replace(ROOMY, n_pages=4)
    work = Workload((agent(0, (4, 2, 0.0), (20, 1, 0.0), (1, 1, 0.0)), agent(1, (3, 1, 0.0))))
    report = simulate(work, small, checked(small))
    assert [(r.agent, r.turn) for r in report.served] == [(1, 0), (0, 0)]
    (refused,) = report.refused
    assert (refused.agent, refused.turn, refused.turns_lost) == (0, 1, 2)
    assert "26 prompt tokens" in refused.reason
    assert "the KV pages hold 16" in refused.reason
    assert "refused     1 requests, and with them 2 turns" in text(report)
    assert "agent 0, turn 1: 26 prompt tokens" in text(report)


def test_the_servers_longest_request_counts() -> None:
    work = Workload((agent(0, (6, 4, 0.0)), agent(1, (6, 5, 0.0))))
    report = simulate(work, ROOMY, linear, max_model_len=10)
    assert [r.agent for r in report.served] == [0]
    assert [r.reason for r in report.refused] == [
        "6 prompt tokens and an answer of 5 are more than the 10 that a request may have"
    ]


def test_a_prompt_that_is_refused_is_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million ids are 80 MB."""

    def prompt(self: Agent, turn: int) -> tuple[int, ...]:
        raise AssertionError("written out")

    monkeypatch.setattr(Agent, "prompt", prompt)
    report = simulate(Workload((agent(0, (10_000_000, 5, 0.0)),)), ROOMY, linear, 1000)
    assert [r.reason for r in report.refused] == [
        "10000000 prompt tokens and an answer of 5 are more than the 1000 that a request may have"
    ]


def test_nothing_but_refusals() -> None:
    work = Workload(tuple(agent(i, (60_000, 1, 0.0)) for i in range(7)))
    report = simulate(work, ROOMY, linear)
    assert (report.makespan, report.served, len(report.refused)) == (0.0, (), 7)
    assert "0 requests answered in 0.0 s" in text(report)
    assert "and 4 more" in text(report)
    assert json.loads(json.dumps(to_json(report)))["ttft_seconds"] == {}


# What is said


def test_progress_reaches_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    work = Workload((agent(0, (4, 2, 0.0), (90_000, 1, 5.0), (1, 1, 0.0)), agent(1, (3, 1, 0.0))))
    simulate(work, ROOMY, linear, progress=lambda *news: told.append(news))
    assert [done for _, done, _ in told] == [1, 2, 4]
    assert {(stage, total) for stage, _, total in told} == {("simulating", 4)}


@pytest.mark.parametrize("n", [2, 3, 10, 101, 1000])
def test_percentiles_are_numpys(n: int) -> None:
    values = np.random.default_rng(n).exponential(size=n)
    assert list(percentiles(list(values)).values()) == pytest.approx(np.percentile(values, [50, 90, 95, 99]))


def test_percentiles_of_one_and_of_none() -> None:
    assert percentiles([3.5]) == {"p50": 3.5, "p90": 3.5, "p95": 3.5, "p99": 3.5}
    assert percentiles([]) == {}


def test_both_forms_of_the_report_say_the_same() -> None:
    report = simulate(Workload((agent(0, (6, 3, 0.0)), agent(1, (4, 2, 1.0)))), ROOMY, linear)
    values: dict[str, Any] = json.loads(json.dumps(to_json(report)))
    assert values["makespan_seconds"] == 16.0
    assert values["ttft_seconds"]["p50"] == 9.5
    assert values["generated_tokens_per_second"] == 5 / 16
    assert values["moved_bytes"] == {"link": 104.0}
    assert values["utilisation"] == {"work": 1.0, "link": 0.5}
    shown = text(report)
    assert "2 agents, 2 requests answered in 16.0 s" in shown
    assert "TTFT        p50    9.50 s" in shown
    assert "generated   5 tokens, 0.3 tok/s" in shown
    assert "at work     work 100%, link 50% of the time" in shown


def test_the_clock_tells_the_cost_model_what_the_batch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Load] = []
    monkeypatch.setattr(module, "step_cost", lambda rates, load: loads.append(load))
    rows = (
        Row(1, ids=(5,), position=99, pages=(), sampling=Sampling()),
        Row(2, ids=(5,), position=49, pages=(), sampling=Sampling()),
        Row(3, ids=(5,) * 30, position=16, pages=()),
    )
    clock(None)(Batch(rows))  # type: ignore[arg-type]
    assert loads == [Load(decode_rows=2, context=100 + 50, chunks=((30, 16),), sampled=2)]
