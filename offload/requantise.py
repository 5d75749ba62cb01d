"""Turns published experts into another format at load, on all cores, and measures what that costs in weight error.

The result lies in one anonymous mapping on huge pages: a kernel that streams gigabytes of experts gains measurably
from them. Knows formats and bytes; names and checks are the store's, which is the only caller.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from offload.checkpoint import Checkpoint, CheckpointError, TensorInfo
from offload.config import FP8_BLOCK, GROUP, ExpertFormat
from offload.formats import Array, Bf16, Float, dequantise, float32_to_bf16, quantise_int4, quantise_int8

Source = Literal["int4", "fp8", "bf16", "f16", "f32"]

HUGE_PAGE = 1 << 21
ALIGNMENT = 64  # a cache line, and a 512-bit load
CHUNK = 1 << 20  # weights converted at a time by one thread: some 20 MB of temporaries


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """One expert matrix in the checkpoint, already checked."""

    checkpoint: Checkpoint
    data: TensorInfo
    scales: TensorInfo | None
    shape: tuple[int, int]  # (out, in)
    data_address: int
    scales_address: int

    @property
    def n_bytes(self) -> int:
        return self.data.n_bytes + (self.scales.n_bytes if self.scales else 0)


@dataclass(frozen=True, slots=True)
class Requantised:
    """The new bytes: `addresses` (n, 2) in the order of the matrices, and squared sums by layer."""

    memory: memoryview
    addresses: npt.NDArray[np.int64]
    squares: npt.NDArray[np.float64]  # (n_layers, 2): sum of (w - w')^2, sum of w^2

    def notices(self, layers: Sequence[int], source: Source, target: ExpertFormat) -> list[str]:
        """The measured relative RMS weight error, ||w - w'|| / ||w||, over all experts and in the worst layer."""
        error, norm = self.squares[:, 0], np.maximum(self.squares[:, 1], np.finfo(np.float64).tiny)
        by_layer = np.sqrt(error / norm)
        worst = int(by_layer.argmax())
        return [
            f"experts converted from {source} to {target}: relative RMS weight error "
            f"{np.sqrt(error.sum() / norm.sum()):.3%}, at most {by_layer[worst]:.3%} (layer {layers[worst]})"
        ]


def requantise(
    matrices: Sequence[MatrixSource],
    source: Source,
    target: ExpertFormat,
    n_layers: int,
    progress: Callable[[str, int, int], None],
) -> Requantised:
    """Convert all matrices; equally many belong to each layer, in order. Progress counts checkpoint bytes."""
    offsets, size = _layout(matrices, target)
    memory = _huge_memory(size)
    base = int(np.frombuffer(memory, np.uint8).ctypes.data)
    squares = np.zeros((n_layers, 2))
    stage = f"converting experts to {target}"
    done, total = 0, sum(matrix.n_bytes for matrix in matrices)
    progress(stage, done, total)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="requantise")
    try:
        jobs = [pool.submit(_convert, matrix, source, target, memory, *offsets[i]) for i, matrix in enumerate(matrices)]
        for index, (matrix, job) in enumerate(zip(matrices, jobs, strict=True)):
            squares[index * n_layers // len(matrices)] += job.result()
            done += matrix.n_bytes
            progress(stage, done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    scaled = target != "bf16"
    table = [[base + data, base + scales if scaled else 0] for data, scales in offsets]
    return Requantised(memory, np.array(table, np.int64), squares)


def _layout(matrices: Sequence[MatrixSource], target: ExpertFormat) -> tuple[list[tuple[int, int]], int]:
    """Offsets of every matrix's data and scales, one after the other, and the bytes of all."""
    offsets, at = [], 0
    for matrix in matrices:
        n_out, n_in = matrix.shape
        data = at
        scales = data + _aligned(n_out * _row_bytes(n_in, target))
        at = scales + (0 if target == "bf16" else _aligned(2 * n_out * (n_in // GROUP)))
        offsets.append((data, scales))
    return offsets, at


def _row_bytes(n_in: int, target: ExpertFormat) -> int:
    return {"int4": n_in // 2, "int8": n_in, "bf16": 2 * n_in}[target]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _huge_memory(size: int) -> memoryview:
    """Anonymous memory that starts on a huge page and asks for huge pages. The view keeps the mapping alive."""
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared: no huge pages
    mapped.madvise(mmap.MADV_HUGEPAGE)
    start = -int(np.frombuffer(mapped, np.uint8).ctypes.data) % HUGE_PAGE
    return memoryview(mapped)[start : start + size]


def _convert(
    matrix: MatrixSource, source: Source, target: ExpertFormat, memory: memoryview, data_at: int, scales_at: int
) -> tuple[float, float]:
    """Write one matrix in the target format; returns the sums of (w - w')^2 and w^2."""
    n_out, n_in = matrix.shape
    row = _row_bytes(n_in, target)
    data = np.frombuffer(memory, np.uint8, n_out * row, data_at).reshape(n_out, row)
    groups = n_in // GROUP
    n_scales = 0 if target == "bf16" else n_out * groups
    scales = np.frombuffer(memory, np.uint16, n_scales, scales_at).reshape(-1, groups) if n_scales else None
    error = norm = 0.0
    for begin, weights in _decoded(matrix, source):
        end = begin + len(weights)
        if not np.isfinite(weights).all():
            raise CheckpointError(
                f"{matrix.data.path}: tensor {matrix.data.name} holds NaN or infinity in rows {begin} to {end - 1}; "
                "the file is damaged, download it again"
            )
        values, steps = _quantise(weights, target)
        data[begin:end] = values.view(np.uint8)
        if scales is not None and steps is not None:
            scales[begin:end] = steps
        difference = dequantise(target, values, steps)
        difference -= weights
        error += float(np.square(difference, out=difference).sum(dtype=np.float64))
        norm += float(np.square(weights, out=weights).sum(dtype=np.float64))
    return error, norm


def _decoded(matrix: MatrixSource, source: Source) -> Iterator[tuple[int, Float]]:
    """The matrix as float32, some rows at a time: (first row, (rows, in)). Rows are whole fp8 blocks."""
    rows = max(1, CHUNK // matrix.shape[1] // FP8_BLOCK) * FP8_BLOCK
    data = matrix.checkpoint.array(matrix.data.name)
    scales = matrix.checkpoint.array(matrix.scales.name) if matrix.scales else None
    per_scale = FP8_BLOCK if source == "fp8" else 1
    for begin in range(0, len(data), rows):
        chunk = data[begin : begin + rows]
        if source in ("f16", "f32"):
            yield begin, chunk.astype(np.float32)
            continue
        factors = None if scales is None else scales[begin // per_scale : (begin + rows) // per_scale]
        yield begin, dequantise(cast(ExpertFormat, source), chunk, factors)


def _quantise(weights: Float, target: ExpertFormat) -> tuple[Array, Bf16 | None]:
    if target == "int4":
        return quantise_int4(weights)
    if target == "int8":
        return quantise_int8(weights)
    return float32_to_bf16(weights), None
