"""offload.warming: idle workers read the experts that are expected, all of them, no others, and stop when told."""

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import offload.warming
from offload.config import LINE, ExpertGeometry, PoolConfig
from offload.experts import Experts
from offload.kernels.warm import LOOK, PIECE
from offload.warming import SHARE, shared_cache
from tests.reference.expert_memory import MemoryStore, memory_store, unpinned

LAYERS = (3, 4)
GEOMETRY = ExpertGeometry(6, 512, 448)  # gate_up and down of an expert: 258,048 and 129,024 bytes, no whole pieces
K = 2


@pytest.fixture(scope="module", params=[1, 2], ids=["one node", "two nodes"])
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return memory_store("int4", GEOMETRY, LAYERS, n_nodes=request.param)


@pytest.fixture
def experts(store: MemoryStore) -> Iterator[Experts]:
    made = Experts(store, PoolConfig(threads=2), unpinned(2, store.n_nodes), None, True)  # type: ignore[arg-type]
    yield made
    made.close()


def scores(*order: int) -> torch.Tensor:
    """One token's scores under which the experts fit in this order, the others worst."""
    row = torch.full((1, GEOMETRY.n_experts), -5.0)
    row[0, list(order)] = torch.arange(len(order), 0, -1.0)
    return row


def lines_of(store: MemoryStore, layer: int, expert: int) -> list[np.ndarray]:
    """The expert's bytes of every node and matrix, as lines."""
    g, index = store.geometry, store.layers.index(layer)
    found = []
    for node in range(store.n_nodes):
        for matrix, name in enumerate(("gate_up", "down")):
            size = len(g.units_of(name, node, store.n_nodes)) * g.unit_bytes(name, "int4")  # type: ignore[arg-type]
            raw = ctypes.string_at(int(store.addresses[index, expert, node, matrix]), size)
            found.append(np.frombuffer(raw, np.uint8).reshape(-1, LINE))
    return found


def first_words(store: MemoryStore, layer: int, expert: int) -> int:
    """Sum of the first word of every line, as int64 wraps it."""
    with np.errstate(over="ignore"):
        return int(sum(lines[:, :8].copy().view(np.int64).sum() for lines in lines_of(store, layer, expert)))


def warm(experts: Experts, layer: int, expected: torch.Tensor) -> np.ndarray:
    """Run a layer before which `expected` was heard for `layer`, let the reading end; returns the job's record."""
    x, ids = torch.ones(1, GEOMETRY.hidden), torch.tensor([list(range(K))])
    pending = experts.submit(3, x, ids, torch.ones(1, K))
    experts.hint(layer, expected)
    pending.wait()
    warmer = experts._warmer
    assert warmer is not None and warmer.running
    experts._pool._join()  # as `stop`, but with time to end
    return warmer._record


def test_all_lines_of_the_expected_experts_are_read_and_no_others(experts: Experts, store: MemoryStore) -> None:
    record = warm(experts, 4, scores(5, 2))
    expected = {e: sum(len(lines) for lines in lines_of(store, 4, e)) for e in (5, 2)}
    assert int(record["lines"]) == sum(expected.values()) > 2 * PIECE // LINE
    words = np.int64(0)
    with np.errstate(over="ignore"):
        for expert in expected:
            words += np.int64(first_words(store, 4, expert))
    assert np.int64(record["sink"]) == words
    stats = experts.warming()
    assert stats is not None and stats.started == 1
    assert stats.bytes_read == int(record["lines"]) * LINE


def test_likeliest_first_and_no_more_than_the_cache_has_room_for(
    experts: Experts, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmer = experts._warmer
    assert warmer is not None
    assert int(warmer._record["n_pieces"]) == int(shared_cache() * SHARE) // PIECE
    warmer._record["n_pieces"] = 1
    record = warm(experts, 4, scores(3, 1))
    first = [lines_of(store, 4, 3)[2 * node][: PIECE // LINE] for node in range(store.n_nodes)]
    assert int(record["lines"]) == sum(len(lines) for lines in first)
    with np.errstate(over="ignore"):
        words = sum((lines[:, :8].copy().view(np.int64).sum() for lines in first), np.int64(0))
    assert np.int64(record["sink"]) == words


def test_tokens_end_the_reading(experts: Experts, store: MemoryStore) -> None:
    warmer = experts._warmer
    assert warmer is not None
    warm(experts, 4, scores(0, 1))
    warmer.stop(experts._pool)
    before = int(warmer._record["lines"])
    again = np.zeros(400_000, np.int64)  # the first expert over and over: 155 GB, many seconds
    warmer._record["experts"], warmer._record["n_experts"] = again.ctypes.data, len(again)
    warmer._record["n_pieces"] = np.iinfo(np.int64).max
    warmer._record["stop"] = 0
    experts._pool.submit(warmer._code.address, warmer.stop_word, again)
    warmer.running = True
    time.sleep(0.02)
    x, ids = torch.ones(1, GEOMETRY.hidden), torch.tensor([list(range(K))])
    experts.submit(3, x, ids, torch.ones(1, K)).wait()
    assert not warmer.running
    read = int(warmer._record["lines"]) - before
    whole = len(again) * sum(len(lines) for lines in lines_of(store, 4, 0))
    assert 0 < read < whole / 5


def test_a_stop_before_the_start_reads_nothing(experts: Experts) -> None:
    warmer = experts._warmer
    assert warmer is not None
    warmer._record["stop"], warmer._record["n_experts"] = 1, 1
    one = np.zeros(1, np.int64)
    warmer._record["experts"], warmer._record["addresses"] = one.ctypes.data, experts._job.layer_addresses[0]
    experts._pool.submit(warmer._code.address, warmer.stop_word)
    experts._pool.wait()
    assert int(warmer._record["lines"]) == 0


def test_a_look_is_a_part_of_a_piece() -> None:
    assert PIECE % LOOK == 0 and LOOK % LINE == 0


def test_sizes_of_caches_as_linux_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, size in enumerate(("32K", "512K", "32M", "what")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    monkeypatch.setattr(offload.warming, "CACHES", tmp_path)
    assert shared_cache() == 32 * 2**20
    monkeypatch.setattr(offload.warming, "CACHES", tmp_path / "nothing")
    assert shared_cache() == 0
