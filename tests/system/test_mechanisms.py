"""Every mechanism of the step on and off, alone and together: the same greedy tokens and logprobs (float32).

200 random schedules: requests that share beginnings arrive, are read in chunks, preempted and cancelled under the real
scheduler. Each runs on an engine with some of the mechanisms and on one with none.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hybrid import random_checkpoint
from hybrid.batch import Sampling
from hybrid.config import EngineConfig, ModelConfig
from hybrid.engine import Engine
from offload.config import PoolConfig
from offload.stream_split import StreamRates
from server.request import EngineStats, Progress, Request
from server.scheduler import Scheduler, SchedulerConfig
from tests import families

PAGE, PAGES, RAM_PAGES = 4, 9, 20  # few: requests are preempted, and their prefixes leave the device
GREEDY = Sampling(temperature=0.0, logprobs=1)
# An upload that costs nothing and a CPU that costs much: experts with more than one row go over the link.
RATES = StreamRates(1e-6, 1e-7, (1.0, 2.0), (1e-7, 1e-3), 1e-3, 1e-7, 1e-8)
# The same terms are added in another order. A wrong expert, row or page moves a logprob by 0.1 and more.
NEAR = 5e-4
SETS = (
    {"slots"}, {"ring"}, {"halves"}, {"flag"}, {"warm"}, {"tier"}, {"embedding"},
    {"slots", "ring", "tier"}, {"halves", "flag", "warm"},
    {"slots", "ring", "halves", "flag", "warm", "tier", "embedding"},
)  # fmt: skip
SCHEDULES = 200


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """No mechanism, and pages for all."""
    out = tmp_path_factory.mktemp("mechanisms") / "model"
    random_checkpoint.write_checkpoint(families.kimi_k25(), out, 5, None)
    pool = PoolConfig(threads=1, precision="a16")
    engine = Engine(EngineConfig(out, "cpu", "float32", "native", pool, 400, PAGE, handoff=False))
    yield engine
    engine.close()


def equipped(config: EngineConfig, chosen: set[str]) -> EngineConfig:
    """The configuration with these mechanisms."""
    model = ModelConfig.from_directory(config.model)
    expert = model.expert_geometry.expert_bytes(model.expert_format)
    return replace(
        config,
        n_pages=PAGES,
        vram_slots=(2,) * len(model.moe_layers) if "slots" in chosen else (),
        ring_bytes=3 * expert if "ring" in chosen else 0,
        stream_rates=RATES if "ring" in chosen else None,
        ping_pong="on" if "halves" in chosen else "off",
        handoff="flag" in chosen,
        warm="warm" in chosen,
        n_ram_pages=RAM_PAGES if "tier" in chosen else 0,
        embedding_in_ram="embedding" in chosen,
    )


def requests(seed: int) -> list[Request]:
    """Some of two beginnings, the later ones longer."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(256) for _ in range(draw.randint(4, 14))] for _ in range(2)]
    made = []
    for number in range(6):
        prompt = [*draw.choice(beginnings), *(draw.randrange(256) for _ in range(draw.randint(1, 6 + number)))]
        made.append(Request(number, tuple(prompt), draw.randint(1, 4), GREEDY, patient=draw.random() < 0.3))
    return made


def run(engine: Engine, seed: int) -> tuple[dict[int, list[Progress]], EngineStats]:
    """Every request's answer, and what the scheduler counted."""
    draw, config = random.Random(seed), engine.config
    sizes = SchedulerConfig(config.n_pages, PAGE, 9, max_running=4, n_ram_pages=config.n_ram_pages)
    scheduler, waiting = Scheduler(sizes), requests(seed)
    found: dict[int, list[Progress]] = {}
    while waiting or not scheduler.idle:
        if waiting and (scheduler.idle or draw.random() < 0.6):
            assert scheduler.add(waiting.pop(0)) is None
        batch = scheduler.next()
        if batch is not None:
            for progress in scheduler.commit(engine.step(batch)):
                found.setdefault(progress.request_id, []).append(progress)
        scheduler.check()
    return found, scheduler.stats()


def check(found: dict[int, list[Progress]], expected: dict[int, list[Progress]], where: object) -> None:
    assert found.keys() == expected.keys(), where
    for request_id, progress in expected.items():
        assert [one.token for one in found[request_id]] == [one.token for one in progress], (where, request_id)
        for mine, theirs in zip(found[request_id], progress, strict=True):
            if theirs.logprob is not None:
                assert mine.logprob is not None
                assert mine.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=NEAR), (where, request_id)


@pytest.mark.parametrize("number", range(len(SETS)), ids=["+".join(sorted(one)) for one in SETS])
def test_the_same_answers(plain: Engine, number: int) -> None:
    """20 schedules for each set, 200 in all; and each mechanism really was at work."""
    chosen = SETS[number]
    engine = Engine(equipped(plain.config, chosen))
    preempted = promoted = 0
    try:
        for seed in range(number, SCHEDULES, len(SETS)):
            found, stats = run(engine, seed)
            check(found, run(plain, seed)[0], (chosen, seed))
            preempted, promoted = preempted + stats.preemptions, promoted + stats.promoted
        assert promoted if "tier" in chosen else preempted and not promoted, "no page was ever short"
        slots, ring = engine.vram(), engine.streamed()
        assert (slots is not None and slots.hits > 0) == ("slots" in chosen)
        assert (ring is not None and ring.experts > 0) == ("ring" in chosen)
    finally:
        engine.close()
