"""Experts larger than memory: the same results bit for bit under any schedule, and no slot that is taken from under a
running layer."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from offload.config import ExpertGeometry, PoolConfig
from offload.experts import Experts
from offload.pool import PoolError
from offload.ram_slots import Slots
from tests.reference.expert_memory import MemoryStore, memory_store, paged, unpinned

GEOMETRY = ExpertGeometry(6, 96, 64)
LAYERS = (1, 2, 4)
WHOLE = memory_store("int4", GEOMETRY, LAYERS)


def opened(store: MemoryStore, workers: int = 1) -> Experts:
    return Experts(store, PoolConfig(threads=workers), unpinned(workers, store.n_nodes))  # type: ignore[arg-type]


def question(draw: random.Random, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, scores and weights of so many tokens, two experts each; the choice leans on a few experts."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    x = torch.randn((tokens, GEOMETRY.hidden), generator=generator)
    scores = torch.rand((tokens, GEOMETRY.n_experts), generator=generator)
    scores[:, draw.randrange(GEOMETRY.n_experts)] += draw.random()
    return x, scores, torch.rand((tokens, 2), generator=generator)


@pytest.fixture(scope="module")
def resident() -> Iterator[Experts]:
    made = opened(WHOLE)
    yield made
    made.close()


def schedule(draw: random.Random, experts: Experts, resident: Experts) -> None:
    """Some steps over all layers, with hints that are good, bad or missing; every result against the whole store's."""
    pager = experts._pager
    assert pager is not None
    for _ in range(draw.randint(3, 8)):
        for layer in LAYERS:
            x, scores, weights = question(draw, draw.choice((1, 1, 2, 9)))
            ids = scores.topk(2, -1).indices
            if draw.random() < 0.2:
                ids[0] = -1
            if draw.random() < 0.7:
                experts.hint(layer, draw.choice((scores, torch.rand_like(scores))))
            found = experts.submit(layer, x, ids, weights)
            if draw.random() < 0.5:
                experts.hint(draw.choice(LAYERS), torch.rand_like(scores))
            expected = resident.submit(layer, x, ids, weights).wait()
            assert torch.equal(found.wait(), expected)
    pager._collect()
    for read in [*pager._ahead.values(), *pager._vain.values()]:
        pager._reader.settle(read)
    pager._collect()
    pager.check()
    assert not pager._slots._locked.any()


@pytest.mark.parametrize("n_slots", [2, 3, 5, 8, 12, 17])
def test_the_same_as_with_all_in_memory(n_slots: int, tmp_path: Path, resident: Experts) -> None:
    """34 schedules for each size, 204 in all."""
    for seed in range(34):
        draw = random.Random(1000 * n_slots + seed)
        read_ahead = draw.choice((True, False, None))
        store = paged(WHOLE, tmp_path / "experts", n_slots, draw.choice((0, 512, 4096, 4992)), read_ahead)
        experts = opened(store, draw.choice((1, 2)))
        schedule(draw, experts, resident)
        stats = experts.paging()
        assert stats is not None and stats.wanted > stats.hits and (stats.hits or n_slots < 8)
        assert not (read_ahead is False and stats.ahead)
        experts.close()
        store.pager.close()  # type: ignore[union-attr]


def test_several_memory_nodes(tmp_path: Path) -> None:
    whole = memory_store("int8", GEOMETRY, LAYERS, n_nodes=2)
    store = paged(whole, tmp_path / "experts", 4)
    experts, resident = opened(store, 2), opened(whole, 2)
    schedule(random.Random(5), experts, resident)
    experts.close()
    store.pager.close()  # type: ignore[union-attr]
    resident.close()


@pytest.fixture
def small(tmp_path: Path) -> MemoryStore:
    return paged(WHOLE, tmp_path / "experts", 5, read_ahead=True)


def run(experts: Experts, layer: int, chosen: list[int]) -> torch.Tensor:
    ids = torch.tensor([chosen])
    return experts.submit(layer, torch.ones((1, GEOMETRY.hidden)), ids, torch.ones(ids.shape)).wait()


def test_a_slot_taken_from_a_running_layer_is_caught(small: MemoryStore) -> None:
    """Were locks not heeded, the next part's reads would overwrite what the workers read: provoked here."""
    experts = opened(small)
    real = np.flatnonzero

    def heedless(self: Slots, count: int) -> list[int]:
        gone = self._owner[real(self._owner != -1)[: max(0, count)]].tolist()
        for expert in gone:
            self._vacate(int(self._slot_of[expert]))
        return gone

    with patch.object(Slots, "_evict", heedless), pytest.raises(AssertionError, match="a slot in use"):
        run(experts, 1, [0, 1, 2, 3, 4, 5])
    experts.close()


def test_a_table_changed_while_its_layer_waits_is_caught(small: MemoryStore) -> None:
    experts = opened(small)
    ids = torch.tensor([[0, 1]])
    pending = experts.submit(1, torch.ones((1, GEOMETRY.hidden)), ids, torch.ones(ids.shape))
    small.addresses[0, 0] = 0
    with pytest.raises(AssertionError, match="without an address"):
        pending.wait()
    experts.close()


def test_counters(small: MemoryStore) -> None:
    experts, expert = opened(small), GEOMETRY.expert_bytes("int4")
    run(experts, 1, [0, 1])
    stats = experts.paging()
    assert stats is not None
    assert (stats.wanted, stats.hits, stats.bytes_on_demand, stats.ahead) == (2, 0, 2 * expert, 0)
    run(experts, 1, [0, 2])
    assert (stats.wanted, stats.hits, stats.bytes_on_demand) == (4, 1, 3 * expert)
    scores = torch.zeros((1, 6))
    scores[0, 3], scores[0, 4] = 2.0, 1.0
    experts.hint(2, scores)  # room for one: a quarter of the slots
    pager = experts._pager
    assert pager is not None
    pager._reader.settle(next(iter(pager._ahead.values())))
    run(experts, 2, [3, 5])
    assert (stats.ahead, stats.ahead_used, stats.useful, stats.bytes_ahead) == (1, 1, 1.0, expert)
    assert (stats.wanted, stats.hits, stats.bytes_on_demand) == (6, 2, 4 * expert)
    assert [recall.share for recall in stats.recall] == [None, 0.5, None]
    assert stats.hit_rate == 2 / 6 and stats.waited > 0
    run(experts, 2, [1, 2])  # a hint is for one run
    assert stats.recall[1].wanted == 2
    experts.close()


def test_a_wrong_guess_is_no_hit_and_not_useful(small: MemoryStore) -> None:
    experts = opened(small)
    run(experts, 1, [0, 1])
    scores = torch.zeros((1, 6))
    scores[0, 5] = 1.0
    experts.hint(2, scores)
    small.pager._reader.settle(small.pager._ahead[6 + 5])  # type: ignore[union-attr]
    run(experts, 2, [3, 4])
    for layer, chosen in ((4, [0, 1]), (1, [2, 3]), (2, [0, 1]), (4, [2, 3])):
        run(experts, layer, chosen)
    stats = experts.paging()
    assert stats is not None and (stats.ahead, stats.ahead_used, stats.hits) == (1, 0, 0)
    experts.close()


def test_a_broken_disk_is_one_line_and_not_the_end(small: MemoryStore, resident: Experts) -> None:
    experts, pager = opened(small), small.pager
    assert pager is not None
    path = pager._file.path
    whole = path.read_bytes()
    for chosen in ([4, 5], [0, 1, 2, 3, 4, 5]):  # at once, and in parts
        os.truncate(path, 2 * GEOMETRY.expert_bytes("int4"))
        with pytest.raises(PoolError, match=r"experts cannot be read \(it ends at byte \d+\); check the disk"):
            run(experts, 1, chosen)
        pager._collect()
        pager.check()
        path.write_bytes(whole)
        assert torch.equal(run(experts, 1, chosen), run(resident, 1, chosen))
    experts.close()


def test_other_workers_take_the_slots_over(small: MemoryStore, resident: Experts) -> None:
    experts = opened(small)
    run(experts, 1, [0, 1])
    other = experts.with_pool(PoolConfig(threads=2), unpinned(2))
    assert torch.equal(run(other, 1, [0, 1]), run(resident, 1, [0, 1]))
    stats = other.paging()
    assert stats is not None and stats.hits == 2
    other.close()


def test_an_interrupted_layer_is_never_half_an_answer(tmp_path: Path, resident: Experts) -> None:
    """Ctrl-C between two parts: the job's record stays as it is while workers run, and the result is refused."""
    experts = opened(paged(WHOLE, tmp_path / "experts", 2, 0, False))
    x, weights = torch.randn(3, GEOMETRY.hidden), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    pending = experts.submit(1, x, ids, weights)
    wait, waits = experts._pool.wait, []

    def interrupted() -> None:
        waits.append(1)
        wait()
        if len(waits) == 2:
            raise KeyboardInterrupt

    with patch.object(experts._pool, "wait", interrupted), pytest.raises(KeyboardInterrupt):
        pending.wait()
    with pytest.raises(RuntimeError, match="submit it again"):
        pending.wait()
    expected = resident.submit(1, x, ids, weights).wait()
    assert torch.equal(experts.submit(1, x, ids, weights).wait(), expected)
    experts.close()


def test_a_layer_in_parts_keeps_what_it_still_has_to_run(tmp_path: Path) -> None:
    """Six experts run in parts of one with five slots: those in memory that are due give way last, and a hit is counted
    when its part begins, not while it may still be evicted."""
    experts = opened(paged(WHOLE, tmp_path / "experts", 5, read_ahead=False))
    for _ in range(9):
        run(experts, 2, [0, 1])  # far likelier for the layer's next run than the others are for theirs
    run(experts, 1, [3, 4, 5])
    run(experts, 1, [0, 1, 2, 3, 4, 5])
    stats = experts.paging()
    assert stats is not None
    assert (stats.wanted, stats.hits) == (18 + 3 + 6, 16 + 0 + 3)
    assert stats.bytes_on_demand == (stats.wanted - stats.hits) * GEOMETRY.expert_bytes("int4")
    experts.close()
