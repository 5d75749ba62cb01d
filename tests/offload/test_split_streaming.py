"""Slots in VRAM, the ring and the CPU together against the CPU alone: prompts and decoding steps in random order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from offload.config import ExpertFormat, ExpertGeometry, PoolConfig
from offload.copies import PlainCopies
from offload.device_product import DeviceProduct
from offload.experts import Experts
from offload.ring import Ring
from offload.slots import Rules
from offload.split import SplitExperts
from offload.stopwatch import PlainStopwatch
from offload.stream_split import StreamRates
from offload.streaming import Streaming, open_streaming
from offload.uploads import Uploads
from offload.vram import VramSlots
from tests.reference.expert_memory import MemoryStore, memory_store, paged, unpinned

GEOMETRY = ExpertGeometry(10, 96, 64)
LAYERS = (1, 4, 5)
CPU = torch.device("cpu")
EAGER = Rules(horizon=4, tax=0, margin=0, dwell=0, uploads=4)
# An upload takes as long as six rows on the CPU: steps of up to six tokens only decode.
RATES = StreamRates(6.0, 0.05, (1.0, 100.0), (1.0, 100.0), 1.0, 0.0, 0.02)
SAME = 1e-3  # a16 rounds h to 16 bits for the CPU and not for the device


def split_of(store: MemoryStore, slots: tuple[int, ...], places: int) -> SplitExperts:
    copies = PlainCopies()
    product = DeviceProduct(store.geometry, store.format, torch.float32, CPU)
    host = Experts(store, PoolConfig(1, "a16"), unpinned(1, store.n_nodes))  # type: ignore[arg-type]
    uploads = Uploads(copies, product.n_bytes, staged=False)
    vram = VramSlots(store, slots, copies, uploads, pytest.fail, EAGER)  # type: ignore[arg-type]
    ring = Ring(copies, places, product.n_bytes, staged=False, checked=True)
    return SplitExperts(host, vram, product, PlainStopwatch(), Streaming(store, product, RATES, ring))  # type: ignore[arg-type]


def question(rng: np.random.Generator, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fame = 0.7 ** np.arange(GEOMETRY.n_experts)
    ids = np.array([rng.choice(GEOMETRY.n_experts, 3, False, fame / fame.sum()) for _ in range(tokens)])
    ids[rng.random(ids.shape) < 0.1] = -1
    x = torch.from_numpy(rng.standard_normal((tokens, GEOMETRY.hidden)).astype(np.float32))
    return x, torch.from_numpy(ids), torch.from_numpy(rng.uniform(0.1, 1, ids.shape).astype(np.float32))


@pytest.mark.parametrize(("fmt", "nodes"), [("int4", 1), ("bf16", 2)])
@pytest.mark.parametrize("slots", [(0, 0, 0), (3, 0, 5)])
def test_sums_and_counts_are_those_of_the_cpu_alone(fmt: ExpertFormat, nodes: int, slots: tuple[int, ...]) -> None:
    rng = np.random.default_rng(nodes)
    store = memory_store(fmt, GEOMETRY, LAYERS, n_nodes=nodes)
    alone = Experts(store, PoolConfig(1, "a16"), unpinned(1, nodes))  # type: ignore[arg-type]
    split = split_of(store, slots, 2 + nodes)
    hinted = 0
    for _ in range(40):
        tokens = int(rng.choice([1, 2, 6, 20, 60]))
        split.begin()
        for layer in LAYERS:
            x, ids, weights = question(rng, tokens)
            expected = alone.submit(layer, x, ids, weights).wait()
            pending = split.submit(layer, x, ids, weights)
            assert split.wants_hints == (tokens > 6)
            if split.wants_hints and layer != LAYERS[-1]:
                split.hint(LAYERS[LAYERS.index(layer) + 1], torch.from_numpy(rng.random((tokens, GEOMETRY.n_experts))))
                hinted += 1
            found = pending.wait()
            assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)) < SAME
        split.end(tokens <= 6)
        split.check()
    stats, ours, theirs = split.streamed(), split.choices(), alone.choices()
    assert stats is not None and hinted > 10
    assert min(stats.experts, stats.ahead) > 10
    assert (split.vram().hits > 50) == any(slots)
    assert np.array_equal(ours.counts, theirs.counts) and ours.tokens == theirs.tokens
    assert split.stats().bytes_read < alone.stats().bytes_read
    split.close()
    alone.close()


def test_a_layer_that_fails_leaves_the_ring_usable() -> None:
    rng, store = np.random.default_rng(2), memory_store("int4", GEOMETRY, LAYERS)
    split = split_of(store, (2, 2, 2), 2)
    x, ids, weights = question(rng, 50)
    split.begin()
    pending = split.submit(LAYERS[0], x, ids, weights)
    with pytest.raises(RuntimeError, match="a layer is running"):
        split.submit(LAYERS[1], x, ids, weights)
    first = pending.wait()
    assert torch.equal(split.submit(LAYERS[0], x, ids, weights).wait(), first)
    split.end(False)
    split.check()
    split.close()


def test_experts_on_the_disk_are_not_streamed(tmp_path: Path) -> None:
    behind = paged(memory_store("int8", GEOMETRY, LAYERS), tmp_path / "packed", 12)
    product, told = DeviceProduct(GEOMETRY, "int8", torch.float32, CPU), list[str]()
    assert open_streaming(behind, product, RATES, 10**6, CPU, told.append) is None  # type: ignore[arg-type]
    assert told == ["prompts do not stream experts to the device: not all of them are in RAM"]
    assert behind.pager is not None
    behind.pager.close()
