"""Activations as the products read them: the record of one row, and how it is filled.

A row of n inputs becomes a run of blocks. A block holds `inputs` consecutive inputs, dealt to `parts` vectors so that
vector p pairs up, element for element, with what one shift and mask take out of the weights:

    block = [part 0][part 1]...           input k lies in part k % parts at element k // parts
            [offset][scale]               quantised formats only: one int32 and one float32 for each 4-byte lane

The int32 lane is -offset * (sum of the inputs that this lane multiplies), where the integer product of the lane
starts: weights are stored with that offset (int4: value + 8). The float32 lane is the activations' scale of the
lane's group of 32. A row that does not fill its last block is padded with zeros, scales included.

Rounding: scale = absmax / limit and q = round_half_even(x * (limit / absmax)), in float32. A group with absmax below
1e-30 counts as zero. A group that holds NaN or an infinity gets q = 0 and the scale NaN, so that every output of that
token becomes NaN and no other token notices.

Knows nothing about weights' bytes or experts. Used by product.py, portable.py (the format) and layer.py (`encode`).
"""

# mypy: disallow-untyped-defs=False

from dataclasses import dataclass

import numpy as np
from numba import njit, types

from offload.config import GROUP, ExpertFormat, Isa, Precision
from offload.kernels.intrinsics import NOPYTHON, load_f32, store_f32, store_i8, store_i16, store_i32

VECTOR_BYTES: dict[Isa, int] = {"avx512vnni": 64, "avx2": 32}
LIMITS: dict[Precision, int] = {"a8": 127, "a16": 32767}
TINY = np.float32(1e-30)
ENCODE = types.void(*[types.int64] * 9)  # the C signature of `encode`


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of one block of a record."""

    parts: int
    element: int  # bytes of one activation: int8, int16 or float32
    vector: int  # bytes of one part
    offset: int  # what the stored weights are too large by
    limit: int  # largest quantised magnitude; 0: float32 as it is

    @property
    def inputs(self) -> int:
        """Inputs of one block."""
        return self.parts * self.vector // self.element

    @property
    def bytes(self) -> int:
        """Bytes of one block."""
        return (self.parts + (2 if self.limit else 0)) * self.vector

    def row_bytes(self, n_in: int) -> int:
        """Bytes of the record of a row; whole runs of 128 inputs, because a product may read that many at once."""
        return -(-n_in // 128) * 128 // self.inputs * self.bytes


def layout(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Layout:
    """The record that the product of this tier, format and precision reads."""
    limit = LIMITS[precision] if fmt in ("int4", "int8") else 0
    if isa == "portable":  # plain order: one group of 32 in each block
        element = {0: 4, 127: 1, 32767: 2}[limit]
        return Layout(1, element, GROUP * element, 0, limit)
    vector = VECTOR_BYTES[isa]
    if fmt == "int4":
        return Layout(2, 1, vector, 8, limit) if precision == "a8" else Layout(4, 2, vector, 8, limit)
    if fmt == "int8":
        return Layout(2, 2, vector, 0, limit)
    return Layout(2 if fmt == "bf16" else 4, 4, vector, 0, 0)


@njit(**NOPYTHON)
def encode_floats(values, first, n, record, parts, vector):
    """Deal float32 inputs [first, first + n) into the record."""
    inputs = parts * vector // 4
    for i in range(n):
        block, k = divmod(first + i, inputs)
        target = record + block * parts * vector + k % parts * vector + k // parts * 4
        store_f32(target, load_f32(values + 4 * i))


@njit(**NOPYTHON)
def largest(values):
    """Largest magnitude of a group; NaN when there is one."""
    top = np.float32(0)
    for i in range(GROUP):
        magnitude = abs(load_f32(values + 4 * i))
        if magnitude > top or magnitude != magnitude:
            top = magnitude
    return top


@njit(**NOPYTHON)
def encode_group(values, first, record, parts, element, vector, offset, limit):
    """Quantise the 32 float32 at `values`, the inputs from `first` (a multiple of 32), into the record."""
    top = largest(values)
    scale, factor = np.float32(0), np.float32(0)
    if not top < np.float32(np.inf):
        scale = np.float32(np.nan)
    elif top >= TINY:
        scale, factor = top / np.float32(limit), np.float32(limit) / top
    block, start = divmod(first, parts * vector // element)
    base = record + block * (parts + 2) * vector
    per_lane = 4 // element
    first_lane = start // (parts * per_lane)
    for lane in range(first_lane, first_lane + GROUP // (parts * per_lane)):
        total = np.int32(0)
        for i in range(lane * per_lane, (lane + 1) * per_lane):
            for part in range(parts):
                x = load_f32(values + 4 * (i * parts + part - start))
                q = np.int32(np.rint(x * factor)) if factor > 0 else np.int32(0)
                total += q
                if element == 1:
                    store_i8(base + part * vector + i, q)
                else:
                    store_i16(base + part * vector + 2 * i, q)
        store_i32(base + parts * vector + 4 * lane, np.int32(-offset) * total)
        store_f32(base + (parts + 1) * vector + 4 * lane, scale)


def encode(values, first, n, record, parts, element, vector, offset, limit):
    """Write the n float32 at `values`, inputs [first, first + n) of a row, into its record.

    `first` is a multiple of 32, n too unless the limit is 0; the other arguments are those of Layout.
    """
    if limit == 0:
        encode_floats(values, first, n, record, parts, vector)
        return
    for i in range(0, n, GROUP):
        encode_group(values + 4 * i, first + i, record, parts, element, vector, offset, limit)
