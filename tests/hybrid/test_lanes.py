"""hybrid.lanes: two halves of a step give the answers of the whole one, and take turns at the experts."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid.batch import Batch, Row, RowOutput, Sampling
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.lanes import Block, Lane, run
from hybrid.random_checkpoint import write_checkpoint
from offload.config import PoolConfig
from offload.pool import PoolError
from tests import families

PAGE, PAGES_EACH, REQUESTS = 8, 6, 9
GREEDY = Sampling(temperature=0.0, logprobs=4)
# Halves multiply the same float32 numbers in matrices of another height: sums may round otherwise in the last places.
ROUNDING = 2e-4
NEAR = 2e-3  # with experts on the device, which does not round their inner values to 16 bits


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    out = tmp_path_factory.mktemp("lanes") / "model"
    write_checkpoint(families.kimi_k25(), out, seed=3, tokenizer=None)
    pool = PoolConfig(threads=1, precision="a16")
    engine = Engine(EngineConfig(out, "cpu", "float32", "native", pool, PAGES_EACH * REQUESTS, PAGE))
    yield engine
    engine.close()


class Requests:
    """Greedy requests in steps of random rows, prompts in random pieces beside decoding ones."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.known = {i: self._ids(int(self._rng.integers(1, 25))) for i in range(REQUESTS)}
        self._written = dict.fromkeys(self.known, 0)

    def _ids(self, n: int) -> tuple[int, ...]:
        return tuple(self._rng.integers(0, 512, n).tolist())

    def batch(self) -> Batch:
        """Some of the requests, in any order."""
        some = self._rng.permutation(REQUESTS)[: self._rng.integers(2, REQUESTS + 1)]
        rows = []
        for i in some.tolist():
            ids, start = self.known[i], self._written[i]
            stop = start + int(self._rng.integers(1, len(ids) - start + 1))
            pages = tuple(range(PAGES_EACH * i, PAGES_EACH * (i + 1)))
            targets = ids[start + 1 : stop]
            rows.append(Row(i, ids[start:stop], start, pages, GREEDY if stop == len(ids) else None, targets=targets))
        return Batch(tuple(rows))

    def commit(self, batch: Batch, outputs: tuple[RowOutput, ...]) -> None:
        for row, output in zip(batch.rows, outputs, strict=True):
            self._written[row.request_id] = row.position + len(row.ids)
            if output.token is not None:
                self.known[row.request_id] += (output.token,)


def logprobs(outputs: tuple[RowOutput, ...]) -> list[float]:
    drawn = [row.logprob.logprob for row in outputs if row.logprob is not None]
    return drawn + [target.logprob for row in outputs for target in row.scored]


@pytest.mark.parametrize("seed", range(4))
def test_halves_give_the_tokens_and_logprobs_of_the_whole(engine: Engine, seed: int) -> None:
    requests, decoded = Requests(seed), 0
    for _ in range(12):
        batch = requests.batch()
        engine.use_ping_pong("off")
        whole = engine.step(batch).rows
        engine.use_ping_pong("on")
        halves = engine.step(batch).rows  # writes the same places of the cache again
        assert [row.token for row in halves] == [row.token for row in whole]
        np.testing.assert_allclose(logprobs(halves), logprobs(whole), rtol=0, atol=ROUNDING)
        requests.commit(batch, halves)
        decoded += sum(row.token is not None for row in halves)
    assert decoded > 20


def test_a_cache_written_in_halves_serves_whole_steps(engine: Engine) -> None:
    found = []
    for modes in (("off", "off"), ("on", "off"), ("off", "on")):
        requests, answers = Requests(11), []
        for mode in itertools.islice(itertools.cycle(modes), 16):
            engine.use_ping_pong(mode)
            batch = requests.batch()
            answers.append(engine.step(batch).rows)
            requests.commit(batch, answers[-1])
        found.append(requests.known)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("slots", [False, True], ids=["host", "slots"])
def test_everything_that_overlaps_gives_the_plain_tokens(engine: Engine, slots: bool) -> None:
    """The hand-off by a flag, halves and warmed caches at once, and under experts that the device runs as well."""
    n_layers = len(engine.model.moe_layers)
    config = replace(engine.config, ping_pong="on", handoff=True, warm=True, vram_slots=(2,) * n_layers * slots)
    other, requests = Engine(config), Requests(21)
    engine.use_ping_pong("off")
    for _ in range(16):
        batch = requests.batch()
        plain, overlapped = engine.step(batch), other.step(batch)
        assert [row.token for row in overlapped.rows] == [row.token for row in plain.rows]
        np.testing.assert_allclose(logprobs(overlapped.rows), logprobs(plain.rows), rtol=0, atol=NEAR)
        requests.commit(batch, plain.rows)
    warming, vram = other.warming(), other.vram()
    assert warming is not None and warming.started > 0
    assert slots == (vram is not None)
    other.close()


class Order:
    """A lane that writes down what it is asked."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log, self._running = name, log, False

    def attend(self, block: object) -> None:
        self.settle()
        self._log.append(f"attend {self._name}")

    def hand_over(self) -> None:
        assert not any(lane._running for lane in LANES), "the experts take one half at a time"
        self._running = True
        self._log.append(f"experts {self._name}")

    def collect(self) -> None:
        self._running = False

    def settle(self) -> None:
        self.collect()


LANES: list[Order] = []


def test_one_half_is_on_the_device_while_the_others_experts_run() -> None:
    log: list[str] = []
    LANES[:] = [Order("A", log), Order("B", log)]
    run([object()] * 2, LANES)  # type: ignore[list-item, arg-type]
    turn = ["attend A", "experts A", "attend B", "experts B"]
    assert log == turn * 2
    assert not any(lane._running for lane in LANES)


def test_a_failed_layer_ends_the_step_and_not_the_next_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.use_ping_pong("on")
    batch = Requests(5).batch()
    expected = [row.token for row in engine.step(batch).rows]
    pool = engine._experts._pool  # type: ignore[union-attr]
    real, calls = pool.wait, 0

    def fail_once() -> None:
        nonlocal calls
        real()
        calls += 1
        if calls == 3:
            raise PoolError("planted")

    monkeypatch.setattr(pool, "wait", fail_once)
    with pytest.raises(PoolError, match="planted"):
        engine.step(batch)
    assert [row.token for row in engine.step(batch).rows] == expected
    assert torch.isfinite(engine._cache.entries).all()


def test_a_fault_on_the_device_leaves_the_experts_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.use_ping_pong("on")
    batch = Requests(6).batch()
    expected = [row.token for row in engine.step(batch).rows]
    real, calls = Lane.attend, 0

    def fail_once(lane: Lane, block: Block) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the second half's second layer, while the first half's experts run
            raise MemoryError("planted")
        real(lane, block)

    monkeypatch.setattr(Lane, "attend", fail_once)
    with pytest.raises(MemoryError, match="planted"):
        engine.step(batch)
    assert [row.token for row in engine.step(batch).rows] == expected
