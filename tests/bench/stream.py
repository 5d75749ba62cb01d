"""Experts through the ring: the link's rate against plain copies, and prefill with it against the CPU alone.

`python -m tests.bench.stream`. A layer of random experts of K2.5's shape on CUDA; on the CPU as device a small one,
where copies and products are the processor's own work: then only the order is tried, and the figures say nothing about
a link. `link`: all experts of the layer by turns through plain copies, one after another from the same pinned memory,
and through the ring with products of a few rows each; the ratio is of bytes per second, aim 0.85. `prefill`: the same
tokens with the split and with the CPU alone, by turns. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from offload.config import ExpertGeometry, PoolConfig
from offload.copies import copies_to
from offload.device_product import DeviceProduct
from offload.experts import Experts
from offload.repeated import LAYER, random_expert, repeated_store
from offload.store import ExpertStore
from offload.stream_split import StreamRates
from offload.streaming import Streaming, open_streaming
from offload.topology import find_topology
from tests.bench import machine

K25, SMALL = ExpertGeometry(96, 7168, 2048), ExpertGeometry(32, 1024, 512)
K, PLACES = 8, 4
AIM = 0.85  # of plain copies
ROWS = (1, 4, 16, 64)  # at which the CPU is timed for the split


def main() -> int:
    """Run the bench; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stream", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=0, help="of the prefill (default: 64 for each expert)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="expert workers (default: one for each core)")
    given = parser.parse_args()
    found = measure(torch.device(given.device), given.tokens, given.rounds, given.threads)
    print(table(found))
    print(json.dumps({"bench": "stream", "torch": torch.__version__, **machine.describe(), **found}))
    return 0


def measure(device: torch.device, tokens: int = 0, rounds: int = 5, threads: int | None = None) -> dict[str, Any]:
    """Both figures. `tests.gpu` calls it too."""
    geometry = K25 if device.type == "cuda" else SMALL
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    topology = find_topology(threads)
    store = repeated_store(
        geometry, "int4", [random_expert("int4", geometry, seed) for seed in range(4)], topology.nodes
    )
    product = DeviceProduct(geometry, "int4", dtype, device)
    notices: list[str] = []
    with closing(Experts(store, PoolConfig(threads), topology)) as experts:
        rates = _cpu_rates(experts, geometry)
        streaming = open_streaming(store, product, rates, PLACES * product.n_bytes, device, notices.append, False)
        assert streaming is not None, "all experts are in memory"
        with closing(streaming):
            link, upload = _link(store, streaming, product, device, dtype, rounds)
            few, each = _device_rates(product, geometry, device, dtype)
            streaming.use(replace(rates, upload=upload, device_read=few, device_row=each))
            n_tokens = tokens or 64 * geometry.n_experts // K
            prefill = _prefill(experts, streaming, geometry, device, dtype, n_tokens, rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "notices": notices, "link": link, "prefill": prefill}


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    link, prefill = found["link"], found["prefill"]
    streamed = f"{prefill['streamed']} of {prefill['routed']} experts streamed"
    return (
        f"link      {link['ring_gbs']:.1f} GB/s through the ring, {link['plain_gbs']:.1f} GB/s plain: "
        f"{link['ratio']:.2f} (aim {AIM})\n"
        f"prefill   {prefill['tokens']} tokens of a layer: {prefill['split_ms']:.1f} ms with {streamed}, "
        f"{prefill['cpu_ms']:.1f} ms by the CPU alone: {prefill['ratio']:.2f} times"
    )


def _cpu_rates(experts: Experts, geometry: ExpertGeometry) -> StreamRates:
    """Seconds of an expert on the CPU by rows. The upload is nothing yet, so that all experts go over the link."""
    seconds = []
    for rows in ROWS:
        tokens = _tokens(geometry, rows * geometry.n_experts // K, even=True)
        layer = partial(_on_cpu, experts, *tokens)
        seconds.append(_median(layer, 3) / geometry.n_experts)
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (ROWS[-1] - ROWS[-2]))
    return StreamRates(1e-9, 0.0, tuple(map(float, ROWS)), tuple(seconds), slope, 0.0, 0.0)


def _on_cpu(experts: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    experts.submit(LAYER, x, ids, weights).wait()


def _device_rates(
    product: DeviceProduct, geometry: ExpertGeometry, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of an expert on the device, and of each row where multiplying decides."""
    data = torch.zeros(product.n_bytes, dtype=torch.uint8, device=device)
    x = torch.randn((512, geometry.hidden), device=device, dtype=dtype)
    out, shares = torch.zeros((512, geometry.hidden), device=device), torch.ones(512, device=device)

    def seconds(n: int) -> float:
        rows = torch.arange(n, device=device)

        def run() -> None:
            product.add(out, x, rows, shares[:n], data)
            _settle(device)

        return _median(run, 5)

    few, many = seconds(8), seconds(512)
    return few, many / 512


def _link(
    store: ExpertStore,
    streaming: Streaming,
    product: DeviceProduct,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> tuple[dict[str, Any], float]:
    """All experts of the layer both ways, and the seconds of one upload."""
    geometry = store.geometry
    x, ids, weights = _tokens(geometry, 4 * geometry.n_experts // K, even=True)
    x, shares, chosen = x.to(device, dtype), weights.to(device), ids.numpy()
    rows = np.bincount(chosen.ravel(), minlength=geometry.n_experts)
    nobody = np.zeros(geometry.n_experts, np.bool_)
    out = torch.zeros((len(x), geometry.hidden), device=device)
    copies = copies_to(device)
    places = copies.memory(PLACES, product.n_bytes)

    def ring() -> None:
        assert streaming.begin(0, rows, nobody).all(), "all experts go over the link"
        streaming.finish(x, chosen, shares, out)
        _settle(device)

    def plain() -> None:
        for expert in range(geometry.n_experts):
            at = 0
            for part in streaming.bytes_of(0, expert):
                copies.copy(places[expert % PLACES, at : at + part.numel()], part)
                at += part.numel()
        copies.host_after(copies.copied())

    moved = geometry.n_experts * product.n_bytes
    through, bare = _by_turns(ring, plain, rounds)
    ratio = statistics.median(b / r for r, b in zip(through, bare, strict=True))
    found = {
        "experts": geometry.n_experts,
        "bytes": moved,
        "ring_gbs": moved / statistics.median(through) / 1e9,
        "plain_gbs": moved / statistics.median(bare) / 1e9,
        "ratio": ratio,
        "aim": AIM,
    }
    return found, statistics.median(bare) / geometry.n_experts


def _prefill(
    experts: Experts,
    streaming: Streaming,
    geometry: ExpertGeometry,
    device: torch.device,
    dtype: torch.dtype,
    n_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """One layer of a prompt with the split, and by the CPU alone: from the device and back to it."""
    x, ids, weights = _tokens(geometry, n_tokens, even=False)
    x, shares, chosen = x.to(device, dtype), weights.to(device), ids.numpy()
    rows = np.bincount(chosen.ravel(), minlength=geometry.n_experts)
    on_device, nobody = ids.to(device), np.zeros(geometry.n_experts, np.bool_)
    streamed = 0

    def split() -> None:
        nonlocal streamed
        mask = streaming.begin(0, rows, nobody)
        streamed = int(mask.sum())
        left = torch.from_numpy(np.where(np.append(mask, False)[chosen], -1, chosen)).to(device)
        pending = experts.submit(LAYER, x, left, shares)
        out = torch.zeros((n_tokens, geometry.hidden), device=device)
        streaming.finish(x, chosen, shares, out)
        (pending.wait().float() + out).to(dtype)
        _settle(device)

    def alone() -> None:
        _on_cpu(experts, x, on_device, shares)
        _settle(device)

    with_ring, by_cpu = _by_turns(split, alone, rounds)
    return {
        "tokens": n_tokens,
        "routed": int(np.count_nonzero(rows)),
        "streamed": streamed,
        "split_ms": statistics.median(with_ring) * 1e3,
        "cpu_ms": statistics.median(by_cpu) * 1e3,
        "ratio": statistics.median(c / r for r, c in zip(with_ring, by_cpu, strict=True)),
    }


def _tokens(geometry: ExpertGeometry, n: int, even: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (T, D) float32, ids (T, K) with all experts alike or by Zipf's law, weights."""
    rng, n_experts = np.random.default_rng(1), geometry.n_experts
    if even:
        ids = (np.arange(n * K) % n_experts).reshape(n, K)
    else:
        fame = 1 / np.arange(1, n_experts + 1) ** 0.8
        keys = rng.random((n, n_experts)) ** (1 / fame)  # K largest: drawn without putting back, by fame
        ids = np.argpartition(-keys, K, axis=1)[:, :K]
    x = torch.from_numpy(rng.standard_normal((n, geometry.hidden), np.float32))
    return x, torch.from_numpy(np.ascontiguousarray(ids)), torch.full((n, K), 1 / K)


def _by_turns(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, after a first turn that does not count."""
    turns = [(_seconds(one), _seconds(other)) for _ in range(rounds + 1)][1:]
    return [a for a, _ in turns], [b for _, b in turns]


def _median(call: Callable[[], object], n: int) -> float:
    return statistics.median([_seconds(call) for _ in range(n + 1)][1:])


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
