"""The two functions of kernels/amx.py as plain loops, for processors without AMX.

The panels are the same, so what the layer does with them (rows of bf16, parts of 32 tokens, both kinds of experts in
one batch) runs anywhere.
"""

# mypy: disallow-untyped-defs=False

import numpy as np
from numba import cfunc, njit, types

from offload.config import BLOCKS, LINE
from offload.kernels.activation import bf16_inputs, bf16_swiglu
from offload.kernels.amx import STEP_BYTES, SUMS_STRIDE, AmxFormat
from offload.kernels.intrinsics import I16, NOPYTHON, _store, load_u8, store_f32
from offload.kernels.portable import bf16
from offload.kernels.table import ENCODE, MULTIPLY, UNPACK, ManyTokens

INT4 = BLOCKS["int4"]
BLOCK_BYTES, LINES = INT4.bytes, INT4.lines
store_u16 = _store(types.uint16, I16)


@njit(**NOPYTHON)
def to_bf16(value):
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x8000)) >> np.uint32(16))


@cfunc(UNPACK, **NOPYTHON)
def unpack(weights, n_blocks, panel):
    for block in range(4 * n_blocks):
        for k in range(64):
            for row in range(16):
                source = weights + block * BLOCK_BYTES
                byte = load_u8(source + k // 8 * LINE + 4 * row + k % 8 // 2)
                scale = bf16(source + LINES * LINE + k // 32 * 32 + 2 * row)
                value = (np.float32((byte >> (4 * (k % 2))) & 15) - np.float32(8)) * scale
                target = panel + (2 * block + k // 32) * STEP_BYTES + k % 32 // 2 * LINE + 4 * row + 2 * (k % 2)
                store_u16(target, to_bf16(value))


@cfunc(MULTIPLY, **NOPYTHON)
def multiply(panel, steps, tokens, stride, n, out):
    for token in range(n):
        for row in range(64):
            total = np.float32(0)
            for k in range(32 * steps):
                at = (row // 16 * steps + k // 32) * STEP_BYTES + k % 32 // 2 * LINE + 4 * (row % 16) + 2 * (k % 2)
                total += bf16(panel + at) * bf16(tokens + token * stride + 2 * k)
            store_f32(out + token * SUMS_STRIDE + 4 * row, total)


@cfunc(ENCODE, **NOPYTHON)
def inputs(values, target):
    bf16_inputs(values, target)


@cfunc(ENCODE, **NOPYTHON)
def swiglu(sums, target):
    bf16_swiglu(sums, target)


def plain_many(fmt: AmxFormat) -> ManyTokens:
    """What table.many_tokens gives where there is AMX."""
    code = inputs, swiglu, unpack, multiply
    return ManyTokens(fmt, inputs.address, swiglu.address, unpack.address, multiply.address, code)
