"""Rows of an expert matrix in another format than the published one: fp8, bf16, f16 or f32 to int8 or int4, int4 to
int8, f16 or f32 to bf16.

The weight error against the published weights is measured on the way. Knows arrays and no files; offload/reading.py,
the only caller, brings the rows and packs what is made of them.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from offload.config import FP8_BLOCK, ExpertFormat
from offload.formats import Array, Float, dequantise, float32_to_bf16, quantise_int4, quantise_int8
from offload.sources import Source

Squares = npt.NDArray[np.float64]  # (..., 2): sum of (w - w')^2, sum of w^2


class NotFiniteError(ValueError):
    """Rows that hold NaN or infinity."""


def convert(
    data: Array, scales: Array | None, skip: int, source: Source, target: ExpertFormat
) -> tuple[Array, Array | None, Squares]:
    """Published rows in the target format, without the first `skip` ones: data, scales, squares.

    The first row is the first of its fp8 block. Raises NotFiniteError.
    """
    weights = _decode(data, scales, source)[skip:]
    if not np.isfinite(weights).all():
        raise NotFiniteError
    values: Array
    steps: Array | None = None
    if target == "int4":
        values, steps = quantise_int4(weights)
    elif target == "int8":
        values, steps = quantise_int8(weights)
    else:
        values = float32_to_bf16(weights)
    difference = dequantise(target, values, steps)
    difference -= weights
    return values, steps, np.array([np.square(part).sum(dtype=np.float64) for part in (difference, weights)])


def _decode(data: Array, scales: Array | None, source: Source) -> Float:
    if source in ("f16", "f32"):
        return data.astype(np.float32)
    return dequantise(cast(ExpertFormat, source), data, scales)


def scale_rows(source: Source) -> int:
    """Weight rows that share a row of scales."""
    return FP8_BLOCK if source == "fp8" else 1


def error_notice(squares: Squares, layers: Sequence[int], source: Source, target: ExpertFormat) -> str:
    """The measured relative RMS weight error, ||w - w'|| / ||w||, over all experts and in the worst layer."""
    error, norm = squares[:, 0], np.maximum(squares[:, 1], np.finfo(np.float64).tiny)
    by_layer = np.sqrt(error / norm)
    worst = int(by_layer.argmax())
    return (
        f"experts converted from {source} to {target}: relative RMS weight error "
        f"{np.sqrt(error.sum() / norm.sum()):.3%}, at most {by_layer[worst]:.3%} (layer {layers[worst]})"
    )
