"""The inner product for any processor: the meaning of product.py, one number at a time.

Plain numba, read it first. The integer results are the same as the vector tiers', bit for bit; float sums differ in
their order only. Called by address from layer.py, compiled by table.py.
"""

# mypy: disallow-untyped-defs=False

import numpy as np
from numba import njit

from offload.config import FP8_BLOCK, GROUP
from offload.kernels.intrinsics import NOPYTHON, load_f32, load_i8, load_i16, load_u8, load_u16


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
def integer_row(fmt, weights, scales, n_in, record, element):
    """int4 and int8: sum over groups of 32 of the integer product times the weights' and the activations' scale."""
    total = np.float32(0)
    for group in range(n_in // GROUP):
        # A block of the record: the activations, one vector not used here, the scale in every lane.
        base = record + group * 3 * GROUP * element
        dot = np.int32(0)
        for i in range(GROUP):
            k = group * GROUP + i
            if fmt == "int4":
                weight = np.int32((load_u8(weights + k // 2) >> (4 * (k % 2))) & 0x0F) - np.int32(8)
            else:
                weight = np.int32(load_i8(weights + k))
            q = np.int32(load_i8(base + i)) if element == 1 else np.int32(load_i16(base + 2 * i))
            dot += weight * q
        total += np.float32(dot) * (bf16(scales + 2 * group) * load_f32(base + 2 * GROUP * element))
    return total


@njit(**NOPYTHON)
def bf16_row(weights, n_in, record):
    total = np.float32(0)
    for k in range(n_in):
        total += bf16(weights + 2 * k) * load_f32(record + 4 * k)
    return total


@njit(**NOPYTHON)
def fp8_row(weights, scales, n_in, record):
    total = np.float32(0)
    for block in range(-(-n_in // FP8_BLOCK)):
        partial = np.float32(0)
        for k in range(block * FP8_BLOCK, min((block + 1) * FP8_BLOCK, n_in)):
            partial += fp8(weights + k) * load_f32(record + 4 * k)
        total += partial * load_f32(scales + 4 * block)
    return total


@njit(**NOPYTHON)
def row_product(fmt, element, weights, scales, n_in, record):
    """One weight row times one token's record; `fmt` is a literal."""
    if fmt == "bf16":
        return bf16_row(weights, n_in, record)
    if fmt == "fp8":
        return fp8_row(weights, scales, n_in, record)
    return integer_row(fmt, weights, scales, n_in, record, element)
