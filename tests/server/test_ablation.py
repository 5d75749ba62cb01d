"""server.ablation: every policy left out in turn, over a small swarm with a user."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hybrid.batch import Batch
from placement.cost import StepCost
from server.ablation import ALONE, Ablation, ablate, plot, text, to_plain, variants
from server.policy import FIRST_COME, Policy
from server.scheduler import SchedulerConfig
from server.simulate import simulate
from server.workload import Distribution, Workload, swarm, with_users

CONFIG = SchedulerConfig(n_pages=1600, page_size=4, max_batch_tokens=64, max_running=8)
SWARM = swarm(12, 40, Distribution.parse("4..12"), Distribution.parse("5..90"), seed=1)
WORK = with_users(SWARM, 1, start=5.0)


def by_rows(batch: Batch) -> StepCost:
    """A second, and a fifth for each new id."""
    return StepCost(1.0 + batch.n_tokens / 5, {}, {}, distinct=1.0, binding="work")


@pytest.fixture(scope="module")
def found() -> Ablation:
    return ablate(WORK, CONFIG, by_rows, None)


def test_each_variant_lacks_one_policy() -> None:
    switches = [field.name for field in fields(Policy) if field.name != "slowdown"]
    configs = variants(CONFIG)
    lacking = [
        tuple(name for name in switches if not getattr(config.policy, name))
        for config in configs.values()
        if config.policy != FIRST_COME
    ]
    assert sorted(lacking) == sorted([(), *((name,) for name in switches)])
    assert [config.max_running for config in configs.values() if config.policy == FIRST_COME] == [8, 4]


def test_reports_are_those_of_simulate(found: Ablation) -> None:
    first = replace(CONFIG, policy=FIRST_COME)
    by_name = {variant.name: variant.report for variant in found.variants}
    assert by_name["first come, first served"] == simulate(WORK, first, by_rows)
    assert by_name["all policies"] == simulate(WORK, CONFIG, by_rows)
    assert found.alone == simulate(Workload(WORK.agents[-1:]), CONFIG, by_rows)


def test_the_policies_do_what_they_are_for(found: Ablation) -> None:
    alone = {variant.name: variant for variant in ablate(SWARM, CONFIG, by_rows, None).variants}
    best, plain = alone["all policies"], alone["first come, 4 at once"]
    assert best.swarm_seconds < plain.swarm_seconds
    assert best.last_first_token < plain.last_first_token
    assert best.report.prefilled < alone["without reading a prefix once"].report.prefilled
    best = found.variants[0]
    assert best.users is not None and found.alone is not None
    assert max(best.users.tpot) < 2.2 * max(found.alone.tpot)


def test_the_table(found: Ablation) -> None:
    lines = text(found).splitlines()
    assert len(lines) == 1 + len(found.variants) + 1
    assert lines[-1].startswith(ALONE)
    assert "1.00x" in lines[-2]
    alone = ablate(SWARM, CONFIG, by_rows, None)
    assert alone.alone is None
    assert "user" not in text(alone)


def test_json_holds_the_same(found: Ablation) -> None:
    plain = json.loads(json.dumps(to_plain(found)))
    assert [one["policies"] for one in plain["variants"]] == [variant.name for variant in found.variants]
    assert plain["variants"][0]["swarm_seconds"] == found.variants[0].swarm_seconds


def test_the_picture(found: Ablation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is optional")
    plot(found, tmp_path / "bars.svg")
    drawn = (tmp_path / "bars.svg").read_text()
    assert drawn.startswith("<?xml") and drawn.count("<path") > 2 * len(found.variants)


def test_users_come_later_and_wait_between_turns() -> None:
    (user,) = WORK.agents[len(SWARM.agents) :]
    assert WORK.agents[: len(SWARM.agents)] == SWARM.agents
    assert not user.patient and user.group == ""
    assert user.turns[0].wait >= 5.0 + 5.0 and all(5 <= turn.wait <= 25 for turn in user.turns[1:])
    assert with_users(SWARM, 1, 5.0) == WORK
    assert user.own_id not in {agent.own_id for agent in SWARM.agents}


def test_a_swarm_that_is_refused_is_not_counted() -> None:
    """The user's requests alone would look like a very quick swarm."""
    refused = ablate(with_users(SWARM, 1, 5.0), replace(CONFIG, n_pages=12), by_rows, None)
    assert refused.variants == ()
    assert "refused" in text(refused)
