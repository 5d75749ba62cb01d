"""Writes what all contestants read: expert templates, tokens, routes, and the answers they are checked against.

Every contestant loads the same files, so that all multiply the same weights for the same tokens by the same experts.
Knows no contestant. Called by `tests.bench.kernels`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offload import formats
from tests.bench.peers.child import MATRICES, Work

SEED = 7
TEMPLATES = 2  # distinct experts; a layer's experts repeat them, each in memory of its own
CHECK_ROWS = 8
OUTLIERS, OUTLIER_SIZE = 0.01, 20  # share of the channels, and how much larger they are


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer of a model."""

    hidden: int
    inner: int
    n_experts: int
    top_k: int


SHAPES = {
    "k25": Shape(7168, 2048, 384, 8),
    "deepseek-v3": Shape(7168, 2048, 256, 8),
    "moonlight": Shape(2048, 1408, 64, 6),
    "nano": Shape(512, 128, 64, 4),
}


def calls(rows: int) -> int:
    """Timed forwards of one turn, at most."""
    return max(2, min(20, 512 // rows))


def write(work: Work, rows: tuple[int, ...], turns: int) -> None:
    rng = np.random.default_rng(SEED)
    _write_templates(work, rng)
    for n in rows:
        shape = (turns, calls(n) + 1, n)  # the first one is for warming up
        _save(work, f"x-{n}", bf16_rounded(rng.standard_normal((n, work.hidden), np.float32)))
        _save(work, f"ids-{n}", routes(rng, shape, work.n_experts, work.top_k))
        _save(work, f"weights-{n}", _shares(rng, (*shape, work.top_k)))
    _write_check(work, rng)


def routes(rng: np.random.Generator, shape: tuple[int, ...], n_experts: int, top_k: int) -> np.ndarray:
    """(*shape, K) experts, drawn evenly, no expert twice for one token."""
    keys = rng.random((*shape, n_experts), np.float32)
    return np.argpartition(keys, top_k - 1, axis=-1)[..., :top_k].astype(np.int64)


def bf16_rounded(x: np.ndarray) -> np.ndarray:
    """Values that bf16 holds too, so that no contestant's input type costs it accuracy."""
    return formats.bf16_to_float32(formats.float32_to_bf16(x))


def _shares(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    shares = rng.random(shape, np.float32)
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def _write_templates(work: Work, rng: np.random.Generator) -> None:
    for matrix in MATRICES:
        n_out, n_in = (work.hidden, work.inner) if matrix == "down" else (work.inner, work.hidden)
        # gate and up answer in the order of one for tokens in the order of one
        made = [rng.standard_normal((n_out, n_in), np.float32) / np.float32(n_in**0.5) for _ in range(TEMPLATES)]
        data, scales = zip(*[formats.quantise_int4(weights) for weights in made], strict=True)
        dense = [formats.dequantise("int4", d, s) for d, s in zip(data, scales, strict=True)]
        _save(work, f"{matrix}-data", np.stack(data))
        _save(work, f"{matrix}-scales", np.stack(scales))
        _save(work, f"{matrix}-bf16", np.stack([formats.float32_to_bf16(weights) for weights in dense]))


def _write_check(work: Work, rng: np.random.Generator) -> None:
    """Tokens with even and with outlying channels, and the float64 layer's answers to them."""
    ids = routes(rng, (CHECK_ROWS,), work.n_experts, work.top_k)
    shares = _shares(rng, ids.shape)
    tokens = rng.standard_normal((CHECK_ROWS, work.hidden), np.float32)
    loud = np.where(rng.random(work.hidden) < OUTLIERS, OUTLIER_SIZE, 1).astype(np.float32)
    _save(work, "check-ids", ids)
    _save(work, "check-weights", shares)
    for name, values in (("gaussian", tokens), ("outliers", tokens * loud)):
        x = bf16_rounded(values)
        _save(work, f"check-x-{name}", x)
        _save(work, f"check-y-{name}", reference(work, x, ids, shares))


def reference(work: Work, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The layer in float64 on the dequantised weights."""
    y = np.zeros(x.shape)
    for template in range(TEMPLATES):
        gate, up, down = (
            formats.dequantise("int4", *(np.array(part[template]) for part in work.template(matrix))).astype(np.float64)
            for matrix in MATRICES
        )
        g, u = x.astype(np.float64) @ gate.T, x.astype(np.float64) @ up.T
        share = np.where(ids % TEMPLATES == template, shares.astype(np.float64), 0).sum(axis=1)
        y += share[:, None] * ((g / (1 + np.exp(-g)) * u) @ down.T)
    return y


def _save(work: Work, name: str, array: np.ndarray) -> None:
    np.save(Path(work.directory) / f"{name}.npy", array)
