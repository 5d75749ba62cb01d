"""offload.handoff with the CPU as device: the workers wait for the flag, the same sums, faults, the end."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numba import cfunc, types

import offload.handoff
from offload.config import ExpertGeometry, PoolConfig
from offload.experts import Experts
from offload.kernels.intrinsics import NOPYTHON
from offload.pool import PoolError
from tests.reference.expert_memory import MemoryStore, memory_store, unpinned

LAYERS = (3, 4)
GEOMETRY = ExpertGeometry(6, 160, 96)
CPU = torch.device("cpu")


@cfunc(types.int64(types.int64, types.int64, types.int64), **NOPYTHON)
def fail(pool, argument, worker):  # type: ignore[no-untyped-def]
    """A job that goes wrong."""
    return 7


def open_experts(store: MemoryStore, sender: torch.device | None, warm: bool = False) -> Experts:
    return Experts(store, PoolConfig(threads=2), unpinned(2), sender, warm)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return memory_store("int4", GEOMETRY, LAYERS)


@pytest.fixture
def direct(store: MemoryStore) -> Iterator[Experts]:
    made = open_experts(store, None)
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["cold", "warm"])
def sent(store: MemoryStore, request: pytest.FixtureRequest) -> Iterator[Experts]:
    made = open_experts(store, CPU, request.param)
    yield made
    made.close()


def question(seed: int, tokens: int, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((tokens, GEOMETRY.hidden)).astype(np.float32))
    ids = np.array([rng.permutation(GEOMETRY.n_experts)[:k] for _ in range(tokens)])
    ids[rng.random(ids.shape) < 0.1] = -1
    return x, torch.from_numpy(ids), torch.from_numpy(rng.uniform(0.1, 1, ids.shape).astype(np.float32))


def test_sums_are_those_of_a_direct_submit_and_stay_what_they_are(direct: Experts, sent: Experts) -> None:
    kept = []
    for seed in range(60):
        asked = question(seed, int(np.random.default_rng(seed).integers(1, 20)), 1 + seed % 4)
        layer = LAYERS[seed % 2]
        pending = sent.submit(layer, *asked)
        if sent.wants_hints:
            scores = torch.randn(len(asked[0]), GEOMETRY.n_experts, generator=torch.Generator().manual_seed(seed))
            sent.hint(LAYERS[1 - seed % 2], scores)
        kept.append((direct.submit(layer, *asked).wait(), pending.wait()))
    for expected, found in kept:
        assert torch.equal(found, expected)
    assert sent.choices().counts.tolist() == direct.choices().counts.tolist()
    assert sent.choices().tokens == direct.choices().tokens
    ours, theirs = sent.stats(), direct.stats()
    assert (ours.distinct_experts, ours.bytes_read, ours.tokens) == (
        theirs.distinct_experts,
        theirs.bytes_read,
        theirs.tokens,
    )
    warming = sent.warming()
    assert warming is None or (warming.started > 50 and warming.bytes_read > 0)


def test_many_tokens_go_without_a_buffer_on_the_device(
    direct: Experts, sent: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.handoff, "MOST_PACKED", 40 * 4 * GEOMETRY.hidden)
    monkeypatch.setattr(offload.handoff, "PIECE_ROWS", 7)
    for seed, tokens in enumerate((3, 70, 35, 140, 2)):
        asked = question(seed, tokens)
        assert torch.equal(sent.submit(3, *asked).wait(), direct.submit(3, *asked).wait())
    assert sent._handoff is not None
    assert sent._handoff._staging._there.numel() < 50 * 4 * GEOMETRY.hidden


def test_fetched_tokens_are_there_and_may_be_changed(direct: Experts, sent: Experts) -> None:
    x, ids, weights = question(11, 5)
    tokens = sent.fetch(x, ids, weights)
    assert torch.equal(tokens.x, x) and torch.equal(tokens.ids, ids) and torch.equal(tokens.weights, weights)
    masked = torch.where(ids == 2, -1, ids)
    found = sent.start(4, x, tokens._replace(ids=masked)).wait()
    assert torch.equal(found, direct.submit(4, x, masked, weights).wait())


def test_bfloat16_comes_back_in_its_own_type(direct: Experts, sent: Experts) -> None:
    x, ids, weights = question(1, 5)
    found = sent.submit(3, x.bfloat16(), ids.int(), weights).wait()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, direct.submit(3, x.bfloat16(), ids, weights).wait())


def hold_back(experts: Experts) -> torch.Tensor:
    """Let the flag of the next layer stay one short of what is waited for; raise it by hand."""
    handoff = experts._handoff
    assert handoff is not None
    handoff._sent += 1
    return handoff._flag


def test_nothing_runs_before_the_flag(direct: Experts, sent: Experts) -> None:
    asked = question(2, 4)
    sent.submit(3, *asked).wait()
    flag = hold_back(sent)
    pending = sent.submit(4, *asked)
    pending._tokens.result.fill_(-1)
    time.sleep(0.05)  # well past the spinning
    assert (pending._tokens.result == -1).all(), "the workers did not wait for the data"
    flag += 1
    assert torch.equal(pending.wait(), direct.submit(4, *asked).wait())


def test_a_flag_that_never_comes_is_an_error_and_a_late_one_does_no_harm(direct: Experts, sent: Experts) -> None:
    asked = question(3, 3)
    sent.submit(3, *asked).wait()
    handoff = sent._handoff
    assert handoff is not None
    naps, handoff._ticket["naps"] = int(handoff._ticket["naps"]), 100
    flag = hold_back(sent)
    pending = sent.submit(4, *asked)
    with pytest.raises(PoolError, match="did not hand a layer over"):
        pending.wait()
    with pytest.raises(RuntimeError, match="waited for already"):
        pending.wait()
    handoff._ticket["naps"] = naps
    other = question(4, 3)
    pending = sent.submit(3, *other)  # its own number is one higher than the flag that is late
    time.sleep(0.02)
    assert int(flag) == handoff._sent - 1
    handoff._counter += 1
    flag += 1
    assert torch.equal(pending.wait(), direct.submit(3, *other).wait())


def test_a_failed_worker_is_an_error_of_its_layer_alone(direct: Experts, sent: Experts) -> None:
    asked, real = question(5, 3), sent._kernels
    object.__setattr__(sent, "_kernels", type("Failing", (), {"layer": fail.address}))
    with pytest.raises(PoolError, match="status 7"):
        sent.submit(3, *asked).wait()
    object.__setattr__(sent, "_kernels", real)
    assert torch.equal(sent.submit(3, *asked).wait(), direct.submit(3, *asked).wait())


@pytest.mark.parametrize("wrong", [6, -2])
def test_ids_that_are_no_experts_are_refused_by_wait(direct: Experts, sent: Experts, wrong: int) -> None:
    x, ids, weights = question(6, 3)
    spoilt = ids.clone()
    spoilt[1, 1] = wrong
    pending = sent.submit(3, x, spoilt, weights)
    with pytest.raises(ValueError, match="ids: experts are 0 to 5"):
        pending.wait()
    assert sent.stats().distinct_experts == 0
    assert torch.equal(sent.submit(3, x, ids, weights).wait(), direct.submit(3, x, ids, weights).wait())


def test_one_layer_at_a_time(sent: Experts) -> None:
    pending = sent.submit(3, *question(7, 2))
    with pytest.raises(RuntimeError, match="a layer is running"):
        sent.submit(4, *question(7, 2))
    pending.wait()


def test_closing_ends_the_thread_and_finishes_a_layer_under_way(store: MemoryStore) -> None:
    experts = open_experts(store, CPU)
    handoff = experts._handoff
    assert handoff is not None
    first = experts.submit(3, *question(8, 2))  # at once: the thread may not have looked yet
    experts.close()
    assert int(handoff._ticket["answer"]) > 0 and not experts._pool.busy
    assert (first._tokens.result != 0).any()
    assert not handoff._thread.is_alive()
    handoff.close()  # once more does nothing


def test_closing_does_not_wait_for_a_flag_for_ever(store: MemoryStore) -> None:
    experts = open_experts(store, CPU, warm=True)
    handoff = experts._handoff
    assert handoff is not None
    handoff._ticket["naps"] = 50
    hold_back(experts)
    experts.submit(3, *question(12, 2))
    began = time.monotonic()
    experts.close()
    assert time.monotonic() - began < 20, "the pool gives a stuck job up after 30 s only"
    assert not experts._pool.broken


def test_other_workers_take_the_thread_over(direct: Experts, sent: Experts) -> None:
    asked = question(9, 4)
    sent.submit(3, *asked).wait()
    other = sent.with_pool(PoolConfig(threads=1), unpinned(1))
    assert other._handoff is not None and other.wants_hints == sent.wants_hints
    assert torch.equal(other.submit(3, *asked).wait(), direct.submit(3, *asked).wait())
    other.close()
