"""Narrow weights and KV on a device: products and cache entries against the CPU's, and products timed beside bf16's.

Called by `tests.gpu`.
"""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from hybrid.config import ModelConfig, NarrowFormat
from hybrid.kv import allocate
from hybrid.narrow import Narrow, linear, quantised
from tests import families

SHAPE = (7168, 8192)  # (out, in) of Kimi-K2.5's o_proj
SHAPE_ON_CPU = (512, 1024)
ROWS = (1, 8, 64, 512)
ROUNDS, LAUNCHES = 15, 20
FORMATS: tuple[NarrowFormat, ...] = ("fp8", "int8")


def narrow_checks(device: torch.device) -> list[dict[str, Any]]:
    """One result for each format; `passed` is parity, the times say nothing about it."""
    return [_check(fmt, device) for fmt in FORMATS]


def _check(fmt: NarrowFormat, device: torch.device) -> dict[str, Any]:
    shape = SHAPE if device.type == "cuda" else SHAPE_ON_CPU
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(shape, generator=generator)
    here, there = Narrow(*quantised(weights, fmt)), Narrow(*quantised(weights.to(device), fmt))
    same = float((here.codes.view(torch.uint8) == there.codes.cpu().view(torch.uint8)).float().mean())
    there = Narrow(here.codes.to(device), here.scales.to(device))
    blocks = Narrow(there.codes, torch.full((-(-shape[0] // 128), -(-shape[1] // 128)), 0.5, device=device))
    x = torch.randn((8, shape[1]), generator=generator)
    exact = x.double() @ here.wide(torch.float32).double().T
    error = _relative(there.linear(x.to(device)), exact)
    error_bf16 = _relative(
        there.linear(x.to(device).bfloat16()), x.bfloat16().double() @ here.wide(torch.float32).double().T
    )
    if fmt == "fp8":
        error = max(error, _relative(blocks.linear(x.to(device)), 0.5 * (x.double() @ here.codes.double().T)))
    cached = _cache_difference(fmt, device)
    # Codes may differ where a quotient rounds the other way; TF32 would be off by 1e-3.
    passed = same > 0.9999 and error < 1e-5 and error_bf16 < 5e-3 and cached < 1e-6
    times = _times(weights.to(device).bfloat16(), there, device)
    shown = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in times.items())
    print(
        f"{'passed' if passed else 'FAILED'}: {fmt} weights and KV: products off by {error:.1e} in float32, "
        f"{error_bf16:.1e} in bf16, entries by {cached:.1e}; seconds by those of bf16, by rows: {shown}",
        flush=True,
    )
    return {
        "format": fmt, "passed": passed, "same_codes": same, "error_float32": error, "error_bfloat16": error_bf16,
        "cache_difference": cached, "seconds_by_bfloat16": times,
    }  # fmt: skip


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.cpu().double() - exact).norm() / exact.norm())


def _cache_difference(fmt: NarrowFormat, device: torch.device) -> float:
    """Of what is read after the same was written, relative to its size: entries that the codes hold exactly."""
    config = replace(ModelConfig.from_json(families.kimi_k25()), num_hidden_layers=2)
    rows = torch.randint(-8, 9, (16, config.latent_size), generator=torch.Generator().manual_seed(2)).float()
    rows[:, 0] = rows[:, config.kv_lora_rank] = 448.0 if fmt == "fp8" else 127.0
    cache = allocate(config, 4, 8, torch.float32, device, fmt)
    cache.write(1, torch.arange(8, 24, device=device), rows.to(device))
    return _relative(cache.read(1, torch.tensor([[1, 2]], device=device))[0], rows.double())


def _times(wide: torch.Tensor, narrow: Narrow, device: torch.device) -> dict[int, float]:
    """Seconds of a product by those of the wide matrix in bf16, taken in turns; copies so that no cache holds them."""
    copies = 4 if device.type == "cuda" else 1
    kinds = [
        [wide.clone() for _ in range(copies)],
        [Narrow(narrow.codes.clone(), narrow.scales) for _ in range(copies)],
    ]
    found = {}
    for rows in ROWS:
        x = torch.randn((rows, wide.shape[1]), device=device, dtype=torch.bfloat16)
        ratios = []
        for _ in range(ROUNDS if device.type == "cuda" else 3):
            wide_seconds, narrow_seconds = (_seconds(x, matrices, device) for matrices in kinds)
            ratios.append(narrow_seconds / wide_seconds)
        found[rows] = statistics.median(ratios)
    return found


def _seconds(x: torch.Tensor, matrices: Any, device: torch.device) -> float:
    n_launches = LAUNCHES if device.type == "cuda" else 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.inference_mode():
        for i in range(n_launches):
            linear(x, matrices[i % len(matrices)])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / n_launches
