"""The routed experts, obviously: float64 NumPy, one token and one expert at a time.

The only rounding it shares with the kernels is the one that is part of their contract: how activations are quantised
(offload/kernels/activation.py), in float32.
"""

from dataclasses import dataclass

import numpy as np

GROUP, BLOCK = 32, 128
LIMITS = {"a8": 127, "a16": 32767}


def weights_int4(data: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(out, in/2) bytes, low nibble first, value + 8; scales bf16 bits (out, in/32)."""
    return integers_int4(data) * np.repeat(bf16(scales), GROUP, axis=1)


def integers_int4(data: np.ndarray) -> np.ndarray:
    pairs = np.stack([data & 15, data >> 4], axis=-1).astype(np.int64) - 8
    return pairs.reshape(data.shape[0], -1)


def weights_int8(data: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return data.view(np.int8).astype(np.float64) * np.repeat(bf16(scales), GROUP, axis=1)


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def fp8(bits: np.ndarray) -> np.ndarray:
    """e4m3: sign, four exponent bits with bias 7, three mantissa bits; exponent 0 is subnormal."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float64)
    power = np.maximum(exponent, 1).astype(np.float64) - 7
    magnitude = (mantissa / 8 + (exponent > 0)) * 2.0**power
    return np.where(bits & 128, -magnitude, magnitude)


def weights_fp8(data: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """scales float32 (ceil(out/128), ceil(in/128))."""
    spread = np.repeat(np.repeat(scales.astype(np.float64), BLOCK, axis=0), BLOCK, axis=1)
    return fp8(data) * spread[: data.shape[0], : data.shape[1]]


def dense(fmt: str, data: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """The weights as float64 (out, in)."""
    if fmt == "bf16":
        return bf16(data)
    return {"int4": weights_int4, "int8": weights_int8, "fp8": weights_fp8}[fmt](data, scales)


def quantise(x: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers (in,) and float32 scales (in/32,) of one float32 row."""
    groups = x.astype(np.float32).reshape(-1, GROUP)
    top = np.abs(groups).max(axis=1)
    zero = top < np.float32(1e-30)
    safe = np.where(zero, np.float32(1), top)
    q = np.rint(groups * (np.float32(limit) / safe)[:, None])
    scale = np.where(zero, np.float32(0), safe / np.float32(limit))
    return np.where(zero[:, None], 0, q).astype(np.int64).reshape(-1), scale.astype(np.float32)


def seen(x: np.ndarray, fmt: str, precision: str) -> np.ndarray:
    """A row as the products see it, float64."""
    if fmt in ("bf16", "fp8"):
        return x.astype(np.float64)
    q, scale = quantise(x, LIMITS[precision])
    return q * np.repeat(scale.astype(np.float64), GROUP)


@dataclass(frozen=True)
class Layer:
    """Dense float64 weights by expert: gate, up (F, D) and down (D, F)."""

    fmt: str
    gate: list[np.ndarray]
    up: list[np.ndarray]
    down: list[np.ndarray]


def experts(layer: Layer, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, precision: str) -> np.ndarray:
    """y (T, D) = sum_k weights[t, k] * down(silu(gate x) * up x), expert ids[t, k]."""
    y = np.zeros(x.shape)
    for t in range(len(x)):
        row = seen(x[t], layer.fmt, precision)
        for expert, weight in zip(ids[t], weights[t], strict=True):
            gate, up = layer.gate[expert] @ row, layer.up[expert] @ row
            hidden = gate / (1 + np.exp(-gate)) * up
            y[t] += weight * (layer.down[expert] @ seen(hidden.astype(np.float32), layer.fmt, precision))
    return y
