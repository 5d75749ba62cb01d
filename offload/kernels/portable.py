"""The inner product for any processor: the meaning of product.py, one number at a time.

Plain numba, read it first. The integer results are the same as the vector tiers', bit for bit; float sums differ in
their order only. Called by address from layer.py, compiled by table.py.
"""

# mypy: disallow-untyped-defs=False

import numpy as np
from numba import njit

from offload.config import BLOCKS, GROUP, LINE, TILE_ROWS
from offload.kernels.intrinsics import NOPYTHON, load_f32, load_i8, load_i16, load_i32, load_u8, load_u16

INT4_BYTES, INT8_BYTES = BLOCKS["int4"].bytes, BLOCKS["int8"].bytes
BF16_BYTES, FP8_BYTES = BLOCKS["bf16"].bytes, BLOCKS["fp8"].bytes
INT4_SCALES, INT8_SCALES = BLOCKS["int4"].lines * LINE, BLOCKS["int8"].lines * LINE
BF16_INPUTS, FP8_INPUTS = BLOCKS["bf16"].inputs, BLOCKS["fp8"].inputs
FP8_SCALES = BLOCKS["fp8"].lines * LINE


@njit(**NOPYTHON)
def bits_to_float(bits):
    return np.uint32(bits).view(np.float32)


@njit(**NOPYTHON)
def bf16(address):
    return bits_to_float(np.uint32(load_u16(address)) << np.uint32(16))


@njit(**NOPYTHON)
def fp8(address):
    """e4m3: the sign to bit 31, exponent and mantissa to bits 26..20, and the exponents' difference as a factor."""
    value = np.uint32(load_u8(address))
    moved = ((value & np.uint32(0x80)) << np.uint32(24)) | ((value & np.uint32(0x7F)) << np.uint32(20))
    return bits_to_float(moved) * np.float32(2.0**120)


@njit(**NOPYTHON)
def stored_weight(fmt, block, row, k):
    """The k-th input of a row in a block of int4 (value + 8) or int8."""
    if fmt == "int4":
        return np.int32((load_u8(block + k // 8 * LINE + 4 * row + k % 8 // 2) >> (4 * (k % 2))) & 0x0F)
    return np.int32(load_i8(block + k // 4 * LINE + 4 * row + k % 4))


@njit(**NOPYTHON)
def integer_row(fmt, tile, row, n_blocks, record, element):
    """Sum over groups of 32 of the integer product times the weights' and the activations' scale."""
    block_bytes, scales = (INT4_BYTES, INT4_SCALES) if fmt == "int4" else (INT8_BYTES, INT8_SCALES)
    total = np.float32(0)
    for group in range(2 * n_blocks):
        block = tile + group // 2 * block_bytes
        base = record + group * (GROUP * element + 8)
        dot = load_i32(base + GROUP * element)
        for i in range(GROUP):
            q = np.int32(load_i8(base + i)) if element == 1 else np.int32(load_i16(base + 2 * i))
            dot += stored_weight(fmt, block, row, group % 2 * GROUP + i) * q
        scale = bf16(block + scales + group % 2 * (LINE // 2) + 2 * row)
        total += np.float32(dot) * (scale * load_f32(base + GROUP * element + 4))
    return total


@njit(**NOPYTHON)
def bf16_row(tile, row, n_blocks, record):
    total = np.float32(0)
    for k in range(n_blocks * BF16_INPUTS):
        block = tile + k // BF16_INPUTS * BF16_BYTES
        total += bf16(block + k % BF16_INPUTS // 2 * LINE + 4 * row + 2 * (k % 2)) * load_f32(record + 4 * k)
    return total


@njit(**NOPYTHON)
def fp8_row(tile, row, n_blocks, record):
    total = np.float32(0)
    for index in range(n_blocks):
        block = tile + index * FP8_BYTES
        partial = np.float32(0)
        for k in range(FP8_INPUTS):
            weight = fp8(block + k // 4 * LINE + 4 * row + k % 4)
            partial += weight * load_f32(record + 4 * (index * FP8_INPUTS + k))
        total += partial * load_f32(block + FP8_SCALES + 4 * row)
    return total


@njit(**NOPYTHON)
def row_product(fmt, element, unit, n_blocks, row, record):
    """One row of a unit times one token's record; `fmt` and `element` are literals."""
    if fmt == "bf16":
        return bf16_row(unit + row // TILE_ROWS * n_blocks * BF16_BYTES, row % TILE_ROWS, n_blocks, record)
    if fmt == "fp8":
        return fp8_row(unit + row // TILE_ROWS * n_blocks * FP8_BYTES, row % TILE_ROWS, n_blocks, record)
    block_bytes = INT4_BYTES if fmt == "int4" else INT8_BYTES
    return integer_row(
        fmt, unit + row // TILE_ROWS * n_blocks * block_bytes, row % TILE_ROWS, n_blocks, record, element
    )
