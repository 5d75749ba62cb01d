"""Experts' products from packed bytes in torch, against dense float64 weights."""

import ctypes

import numpy as np
import pytest
import torch

from offload import device_product
from offload.config import ExpertFormat, ExpertGeometry, PoolConfig
from offload.device_product import DeviceProduct, host_pieces
from offload.experts import Experts
from tests.reference import experts as reference
from tests.reference.expert_memory import MemoryStore, memory_store, unpinned

FORMATS: tuple[ExpertFormat, ...] = ("int4", "int8", "bf16", "fp8")
EVEN = [ExpertGeometry(6, 96, 160), ExpertGeometry(5, 416, 32), ExpertGeometry(5, 256, 384)]
ODD = ExpertGeometry(5, 99, 141)  # bf16 and fp8 only: partial blocks and tiles on every side
CPU = torch.device("cpu")


def geometries(fmt: ExpertFormat) -> list[ExpertGeometry]:
    return [*EVEN, *([ODD] if fmt in ("bf16", "fp8") else [])]


def on_device(store: MemoryStore, layer: int = 0) -> torch.Tensor:
    """(E, n_bytes): the layer's experts, gathered from the store's pieces."""
    geometry, fmt = store.geometry, store.format
    data = torch.full((geometry.n_experts, geometry.expert_bytes(fmt)), 0xAA, dtype=torch.uint8)
    for expert in range(geometry.n_experts):
        for node, matrix, offset, size in host_pieces(geometry, fmt, store.n_nodes):
            source = int(store.addresses[layer, expert, node, matrix])
            ctypes.memmove(data[expert].data_ptr() + offset, source, size)
    return data


def turned(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts in slots in another order, and where they are."""
    order = torch.arange(len(data)).flip(0)
    return data[order], order


def answer(dense: reference.Layer, x: np.ndarray, expert: int) -> np.ndarray:
    """(T, D) float64, activations as they are."""
    gate, up = x @ dense.gate[expert].T, x @ dense.up[expert].T
    return gate / (1 + np.exp(-gate)) * up @ dense.down[expert].T


@pytest.mark.parametrize("n_nodes", [1, 2, 3])
@pytest.mark.parametrize("fmt", FORMATS)
def test_decoded_weights_are_the_published_ones_bit_for_bit(fmt: ExpertFormat, n_nodes: int) -> None:
    for geometry in geometries(fmt):
        store = memory_store(fmt, geometry, n_nodes=n_nodes)
        product = DeviceProduct(geometry, fmt, torch.float32, CPU)
        data = on_device(store)
        gate_up, down = (product.weights(matrix, data).double().numpy() for matrix in ("gate_up", "down"))
        dense = store.dense[0]
        hidden, inner = geometry.hidden, geometry.inner
        for expert in range(geometry.n_experts):
            exact = dense.gate[expert], dense.up[expert], dense.down[expert]
            found = gate_up[expert, 0, :inner, :hidden], gate_up[expert, 1, :inner, :hidden]
            for held, wanted in zip((*found, down[expert, 0, :hidden, :inner]), exact, strict=True):
                # An exact product, rounded once; int4's and int8's are short enough to need no rounding.
                assert np.array_equal(held, wanted.astype(np.float32)), geometry


@pytest.mark.parametrize("fmt", FORMATS)
def test_products_agree_with_the_reference(fmt: ExpertFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 sums of at most 416 terms of order one. Two to four experts at a time."""
    monkeypatch.setattr(device_product, "WORKING_BYTES", 800_000)
    rng = np.random.default_rng(3)
    for geometry in geometries(fmt):
        store = memory_store(fmt, geometry)
        product, data = DeviceProduct(geometry, fmt, torch.float32, CPU), on_device(store)
        for tokens in (1, 7):
            x = rng.standard_normal((tokens, geometry.hidden)).astype(np.float32)
            shares = rng.uniform(0.1, 1, (geometry.n_experts, tokens)).astype(np.float32)
            shares[rng.random(shares.shape) < 0.4] = 0
            start = rng.standard_normal(x.shape).astype(np.float32)
            expected = start + sum(
                shares[e][:, None] * answer(store.dense[0], x.astype(np.float64), e) for e in range(len(shares))
            )
            few, many = torch.from_numpy(start.copy()), torch.from_numpy(start.copy())
            product.add_few(few, torch.from_numpy(x), torch.from_numpy(shares), *turned(data))
            for expert, share in enumerate(shares):
                rows = np.flatnonzero(share)
                chosen = torch.from_numpy(rows), torch.from_numpy(share[rows])
                product.add(many, torch.from_numpy(x), *chosen, data[expert])
            for found in (few, many):
                assert np.abs(found.numpy() - expected).max() <= 5e-5 * np.abs(expected).max(), geometry


def test_bfloat16_is_as_good_as_bfloat16_is() -> None:
    geometry = EVEN[2]
    for fmt in FORMATS:
        store, rng = memory_store(fmt, geometry), np.random.default_rng(4)
        product, data = DeviceProduct(geometry, fmt, torch.bfloat16, CPU), on_device(store)
        x = torch.from_numpy(rng.standard_normal((9, geometry.hidden))).bfloat16()
        out = torch.zeros(x.shape)
        product.add(out, x, torch.arange(9), torch.ones(9), data[2])
        expected = answer(store.dense[0], x.double().numpy(), 2)
        error = np.linalg.norm(out.numpy() - expected) / np.linalg.norm(expected)
        assert 1e-5 < error < 1e-2, fmt  # four roundings to 8 bits: weights, gate and up, h, y


def test_the_host_kernels_say_the_same() -> None:
    for fmt in FORMATS:
        geometry = EVEN[0]
        store, rng = memory_store(fmt, geometry, n_nodes=2), np.random.default_rng(5)
        experts = Experts(store, PoolConfig(1, "a16"), unpinned(2, 2))  # type: ignore[arg-type]
        x = torch.from_numpy(rng.standard_normal((6, geometry.hidden)).astype(np.float32))
        ids = torch.arange(6).remainder(geometry.n_experts)[:, None]
        host = experts.submit(3, x, ids, torch.full((6, 1), 0.5)).wait()
        experts.close()
        out = torch.zeros(x.shape)
        shares = torch.zeros((geometry.n_experts, 6)).scatter_(0, ids.T, 0.5)
        DeviceProduct(geometry, fmt, torch.float32, CPU).add_few(out, x, shares, *turned(on_device(store)))
        assert (out - host).abs().max() <= 1e-3 * host.abs().max(), fmt  # a16's own rounding of h


def test_a_token_that_did_not_choose_an_expert_is_safe_from_it() -> None:
    geometry = EVEN[0]
    store = memory_store("bf16", geometry)
    product, data = DeviceProduct(geometry, "bf16", torch.float32, CPU), on_device(store)
    x = torch.randn((2, geometry.hidden), generator=torch.Generator().manual_seed(0))
    x[1] = float("inf")
    shares = torch.zeros((geometry.n_experts, 2))
    shares[:, 0] = 1
    out = torch.zeros(x.shape)
    product.add_few(out, x, shares, *turned(data))
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()
