"""Few device pages and a second tier in RAM: the same answers as without pressure, and prefixes that come back."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid import random_checkpoint
from hybrid.batch import Sampling
from hybrid.config import EngineConfig, ModelConfig
from hybrid.engine import Engine
from offload.config import PoolConfig
from server.request import EngineStats, Progress, Request
from server.scheduler import Scheduler, SchedulerConfig
from tests import families
from tests.system.serving import Serve, complete

PAGE, FEW, RAM, MANY = 4, 12, 60, 400
GREEDY = Sampling(temperature=0.0, logprobs=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiers") / "model"
    random_checkpoint.write_checkpoint(families.kimi_k25(), out, 5, None)
    return out


@pytest.fixture(scope="module")
def engines(directory: Path) -> Iterator[dict[str, Engine]]:
    """With few pages and a tier in RAM, and with pages for all."""
    config = EngineConfig(directory, "cpu", "float32", "native", PoolConfig(threads=1, precision="a16"), FEW, PAGE)
    made = {
        "large": Engine(replace(config, n_ram_pages=RAM)),
        "small": Engine(replace(config, n_ram_pages=9)),
        "plain": Engine(replace(config, n_pages=MANY)),
    }
    yield made
    for engine in made.values():
        engine.close()


def conversations(seed: int) -> list[list[Request]]:
    """Five agents of a shared beginning, each in turns that go on with what was said before."""
    draw = random.Random(seed)
    shared = [draw.randrange(256) for _ in range(draw.randint(4, 14))]
    made, number = [], 0
    for _ in range(5):
        prompt, turns = [*shared, *(draw.randrange(256) for _ in range(draw.randint(1, 8)))], []
        for _ in range(4):
            turns.append(Request(number, tuple(prompt), draw.randint(1, 4), GREEDY, patient=draw.random() < 0.5))
            prompt = [*prompt, *(draw.randrange(256) for _ in range(draw.randint(2, 7)))]
            number += 1
        made.append(turns)
    return made


def run(engine: Engine, seed: int) -> tuple[dict[int, list[Progress]], EngineStats]:
    """Every turn's answers, and what the scheduler counted. Turns arrive by chance, in the order of their agent."""
    draw, config = random.Random(seed), engine.config
    sizes = SchedulerConfig(config.n_pages, config.page_size, 7, max_running=4, n_ram_pages=config.n_ram_pages)
    scheduler, waiting = Scheduler(sizes), conversations(seed)
    found: dict[int, list[Progress]] = {}
    while any(waiting) or not scheduler.idle:
        if any(waiting) and (scheduler.idle or draw.random() < 0.6):
            assert scheduler.add(draw.choice([turns for turns in waiting if turns]).pop(0)) is None
        batch = scheduler.next()
        if batch is not None:
            for progress in scheduler.commit(engine.step(batch)):
                found.setdefault(progress.request_id, []).append(progress)
        scheduler.check()
    return found, scheduler.stats()


def test_the_same_tokens_and_logprobs_under_pressure(engines: dict[str, Engine]) -> None:
    demoted = promoted = preempted = small = 0
    for seed in range(8):
        plain, calm = run(engines["plain"], seed)
        assert calm.demoted == calm.promoted == 0
        for name in ("large", "small"):
            found, stats = run(engines[name], seed)
            assert found.keys() == plain.keys()
            for i, expected in plain.items():
                assert [p.token for p in found[i]] == [p.token for p in expected]
                for one, other in zip(found[i], expected, strict=True):
                    assert one.logprob and other.logprob
                    assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
            if name == "small":
                small += stats.promoted
            else:
                demoted, promoted = demoted + stats.demoted, promoted + stats.promoted
                preempted += stats.preemptions
    assert demoted > 100 and promoted > 50 and preempted > 3 and small > 30, (demoted, promoted, preempted, small)


def test_a_request_comes_back_after_its_pages_were_needed(serve: Serve, model_dir: Path) -> None:
    """Through the real server: pages for one long prompt, so that each of three pushes the one before it into RAM."""
    page = 16 * ModelConfig.from_directory(model_dir).kv_bytes_per_token(4)
    draw = random.Random(4)
    prompts = [[draw.randrange(256) for _ in range(190)] for _ in range(3)]
    flags = ("--expert-precision", "a16", "--kv-memory", str(16 * page), "--max-model-len", "256")
    with serve(model_dir, *flags, "--kv-ram", str(64 * page)) as server, server.client() as client:
        first = [complete(client, server.name, ids, 8) for ids in prompts]
        second = [complete(client, server.name, ids, 8) for ids in prompts]
        seen, info = server.metrics(), json.loads(server.get("/v1/server/info")[1])
    assert [answer.cached for answer in first] == [0, 0, 0]
    assert [answer.cached for answer in second] == [176, 176, 176]
    assert [answer.tokens for answer in second] == [answer.tokens for answer in first]
    assert len({answer.tokens for answer in first}) == 3, "the prompts do not tell answers apart"
    assert seen["prefix_ram_hits_total"] == seen["kv_pages_promoted_total"] * 16 >= 3 * 176 - 16 * 16
    assert seen["kv_pages_demoted_total"] >= 22
    assert info["kv_pages"]["ram"]["total"] == info["plan"]["settings"]["pages_kept"] == 64
    assert info["kv_pages"]["ram"]["used"] == seen["kv_ram_pages_used"] > 0
