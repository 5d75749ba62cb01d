"""Streamed experts beside the CPU's against the CPU's alone, over random routings, sizes, places and looks ahead."""

from contextlib import closing

import numpy as np
import pytest
import torch

from offload.config import ExpertFormat, ExpertGeometry, PoolConfig
from offload.copies import PlainCopies
from offload.device_product import DeviceProduct
from offload.experts import Experts
from offload.ring import Loan, Ring, RingError
from offload.stream_split import StreamRates
from offload.streaming import Streaming, ring_places
from tests.reference.expert_memory import MemoryStore, memory_store, unpinned

GEOMETRY = ExpertGeometry(12, 96, 64)
LAYERS = (2, 3, 7)
# An upload takes as long as four rows on the CPU: some experts go, some stay.
RATES = StreamRates(4.0, 0.05, (1.0, 100.0), (1.0, 100.0), 1.0, 0.0, 0.01)


def streaming_of(store: MemoryStore, n_places: int, rates: StreamRates = RATES, ring: Ring | None = None) -> Streaming:
    product = DeviceProduct(store.geometry, store.format, torch.float32, torch.device("cpu"))
    ring = ring or Ring(PlainCopies(), n_places, product.n_bytes, staged=n_places % 2 == 0, checked=True)
    return Streaming(store, product, rates, ring)  # type: ignore[arg-type]


def routing(rng: np.random.Generator, tokens: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids of skewed popularity and some of them none, weights."""
    n_experts = GEOMETRY.n_experts
    fame = rng.dirichlet(np.full(n_experts, 0.5)) + 1e-6
    ids = np.array([rng.choice(n_experts, k, False, fame / fame.sum()) for _ in range(tokens)])
    ids[rng.random(ids.shape) < 0.05] = -1
    x = rng.standard_normal((tokens, GEOMETRY.hidden)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(rng.uniform(0.1, 1, (tokens, k))).float()


def rows_of(ids: torch.Tensor) -> np.ndarray:
    return np.bincount(ids[ids >= 0].numpy(), minlength=GEOMETRY.n_experts)


def together(
    experts: Experts, streaming: Streaming, layer: int, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, np.ndarray]:
    """The layer's sum with what goes over the link, and which experts those were."""
    x, ids, weights = case
    streamed = streaming.begin(LAYERS.index(layer), rows_of(ids), np.zeros(GEOMETRY.n_experts, np.bool_))
    left = torch.where(torch.from_numpy(np.append(streamed, False))[ids], -1, ids)
    pending = experts.submit(layer, x, left, weights)
    out = torch.zeros_like(x)
    streaming.finish(x, ids.numpy(), weights, out)
    streaming.check()
    return pending.wait() + out, streamed


@pytest.mark.parametrize("fmt", ["int4", "int8", "bf16", "fp8"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_sums_are_those_of_the_cpu_alone(fmt: ExpertFormat, nodes: int) -> None:
    """a16 is exact to 2^-15 of each group's largest value; sums run over 96 and 64 terms."""
    rng = np.random.default_rng(nodes)
    store = memory_store(fmt, GEOMETRY, LAYERS, n_nodes=nodes)
    with closing(Experts(store, PoolConfig(threads=2, precision="a16"), unpinned(2, nodes))) as experts:  # type: ignore[arg-type]
        for places in (2, 3, 5):
            streaming = streaming_of(store, places)
            for _ in range(8):
                tokens, k = int(rng.integers(1, 60)), int(rng.integers(1, 5))
                for index, layer in enumerate(LAYERS):
                    case = routing(rng, tokens, k)
                    expected = experts.submit(layer, *case).wait()
                    found, _ = together(experts, streaming, layer, case)
                    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max() + 1))
                    if index + 1 < len(LAYERS) and rng.random() < 0.7:
                        guess = rng.integers(0, 20, GEOMETRY.n_experts)
                        streaming.expect(index + 1, guess, rng.random(GEOMETRY.n_experts) < 0.2)
            stats = streaming.stats()
            assert stats.experts > 20 and stats.dropped > 0 and stats.ahead > 0, "the play had little of everything"
            assert stats.bytes == (stats.experts + stats.dropped + waiting(streaming)) * store.geometry.expert_bytes(
                fmt
            )


def waiting(streaming: Streaming) -> int:
    """Uploaded for a layer that has not come."""
    return len(streaming._loans)


def test_what_was_foreseen_is_not_uploaded_again() -> None:
    store, rng = memory_store("int4", GEOMETRY, LAYERS), np.random.default_rng(3)
    streaming = streaming_of(store, 4)
    case = routing(rng, 50, 4)
    rows, nobody = rows_of(case[1]), np.zeros(GEOMETRY.n_experts, np.bool_)
    streaming.begin(0, rows, nobody)
    streaming.finish(case[0], case[1].numpy(), case[2], torch.zeros_like(case[0]))
    before = streaming.stats()
    streaming.expect(1, rows, nobody)
    streamed = int(streaming.begin(1, rows, nobody).sum())
    after = streaming.stats()
    foreseen = min(4, int(before.experts))
    assert (after.ahead, after.dropped) == (foreseen, 0) and streamed >= foreseen > 0


def test_settled_experts_are_left_alone_and_unrouted_ones_too() -> None:
    store, rng = memory_store("int4", GEOMETRY, LAYERS), np.random.default_rng(4)
    streaming = streaming_of(store, 3)
    for _ in range(20):
        rows = rows_of(routing(rng, 80, 4)[1]) * (rng.random(GEOMETRY.n_experts) < 0.7)
        settled = rng.random(GEOMETRY.n_experts) < 0.3
        streamed = streaming.begin(1, rows, settled)
        assert not (streamed & (settled | (rows == 0))).any()


def test_a_layer_that_was_given_up_leaves_nothing_behind() -> None:
    """begin without finish, as after an error: the next layer has the whole ring."""
    store, rng = memory_store("int4", GEOMETRY, LAYERS), np.random.default_rng(5)
    with closing(Experts(store, PoolConfig(threads=1, precision="a16"), unpinned(1))) as experts:  # type: ignore[arg-type]
        streaming = streaming_of(store, 2)
        streaming.begin(0, np.full(GEOMETRY.n_experts, 40), np.zeros(GEOMETRY.n_experts, np.bool_))
        case = routing(rng, 40, 3)
        found, streamed = together(experts, streaming, LAYERS[1], case)
        expected = experts.submit(LAYERS[1], *case).wait()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert streamed.any() and streaming.stats().dropped == 2


def test_a_reader_that_gives_its_place_up_too_early_is_caught() -> None:
    """With three experts and two places the third would be written over one that is being read."""

    class Careless(Ring):
        def read(self, loan: Loan) -> torch.Tensor:
            data = super().read(loan)
            self.load("somebody else", [torch.full((self._memory.shape[1],), 7, dtype=torch.uint8)])
            return data

        def load(self, key: object, parts: list[torch.Tensor]) -> Loan:  # type: ignore[override]
            if key == "somebody else":
                self._memory[:] = parts[0]
                return Loan(key, 0, None, None)
            return super().load(key, parts)

    store, rng = memory_store("int4", GEOMETRY, LAYERS), np.random.default_rng(6)
    x, ids, weights = routing(rng, 60, 4)
    for checked in (True, False):
        n_bytes = GEOMETRY.expert_bytes("int4")
        streaming = streaming_of(store, 2, ring=Careless(PlainCopies(), 2, n_bytes, staged=False, checked=checked))
        assert streaming.begin(0, rows_of(ids), np.zeros(GEOMETRY.n_experts, np.bool_)).any()
        streaming.finish(x, ids.numpy(), weights, torch.zeros_like(x))
        if checked:
            with pytest.raises(RingError, match="did not hold"):
                streaming.check()
        else:
            streaming.check()  # nobody notices


def test_a_ring_of_less_than_two_experts_is_refused() -> None:
    assert ring_places(100, 33) == 3
    with pytest.raises(ValueError, match="streaming needs 2: give it 120 bytes"):
        ring_places(119, 60)
