"""The byte layouts of expert weights, and the conversions between them, in NumPy.

Every layout is drawn here once. A matrix has `out` rows and `in` columns and is stored row by row.

    int4  data   int32 (out, in/8): eight weights to a word, the lowest nibble first, each stored as value + 8.
                 On a little-endian host the bytes of a row therefore hold two neighbouring weights each:

                     byte 0        byte 1        byte 2
                   | w1   w0 |   | w3   w2 |   | w5   w4 | ...        (high nibble, low nibble)

          scales bf16 (out, in/32): one for 32 neighbouring columns, w = value * scale, value in -8..7
    int8  data   int8 (out, in), value in -127..127; scales as for int4
    fp8   data   uint8 (out, in), the bits of float8 e4m3fn (1 sign, 4 exponent, 3 mantissa, bias 7, no infinity)
          scales float32 (ceil(out/128), ceil(in/128)): one for a 128x128 block, blocks at the edge are partial
    bf16  data   uint16 (out, in), the upper half of a float32; no scales

int4 is compressed-tensors' `pack-quantized`, fp8 is DeepSeek-V3's `weight_scale_inv` layout. int8 is our own.
This file knows neither files nor models; the store, the checkpoint maker and the tests call it.
"""

import numpy as np
import numpy.typing as npt

from offload.config import FP8_BLOCK, GROUP, ExpertFormat

Float = npt.NDArray[np.float32]
Bf16 = npt.NDArray[np.uint16]  # the bits of bf16
Array = npt.NDArray[np.generic]

FP8_MAX = 448.0  # the largest finite e4m3fn value, code 0x7e


def bf16_to_float32(bits: Bf16) -> Float:
    """Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bf16(values: Float) -> Bf16:
    """Rounds to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def fp8_e4m3_to_float32(codes: npt.NDArray[np.uint8]) -> Float:
    """Exact; the codes 0x7f and 0xff are NaN."""
    every = np.arange(256)
    exponent, mantissa = (every >> 3) & 15, every & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[[0x7F, 0xFF]] = np.nan
    table = np.where(every >= 128, -magnitude, magnitude).astype(np.float32)
    return np.asarray(table[codes])


def float32_to_fp8_e4m3(values: Float) -> npt.NDArray[np.uint8]:
    """Rounds to nearest, ties to even; magnitudes above 448 become 448. NaN is not allowed."""
    magnitude = np.minimum(np.abs(values), np.float32(FP8_MAX))
    bits = np.ascontiguousarray(magnitude).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    small = np.rint(magnitude * np.float32(512)).astype(np.uint32)  # subnormals count in steps of 2^-9
    codes = np.where(magnitude < np.float32(2.0**-6), small, rounded - np.uint32((127 - 7) << 3))
    codes |= np.signbit(values).astype(np.uint32) << np.uint32(7)
    return codes.astype(np.uint8)


def pack_int4(values: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """Packs (out, in) integers in -8..7 into (out, in/8) words."""
    nibbles = (values + 8).astype(np.uint8)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(packed).view("<i4")


def unpack_int4(packed: Array) -> npt.NDArray[np.int8]:
    """Unpacks (out, in/8) words, or the same rows as (out, in/2) bytes, into (out, in) values in -8..7."""
    pairs = np.ascontiguousarray(packed).view(np.uint8)
    values = np.empty((pairs.shape[0], pairs.shape[1] * 2), np.int8)
    values[:, 0::2] = pairs & np.uint8(15)
    values[:, 1::2] = pairs >> np.uint8(4)
    values -= np.int8(8)
    return values


def quantise_int4(weights: Float) -> tuple[npt.NDArray[np.int32], Bf16]:
    """(out, in) float32 -> packed words and scales. A scale just holds its group's extremes: +7 and -8 steps."""
    groups = weights.reshape(weights.shape[0], -1, GROUP)
    step = np.maximum(groups.max(axis=2) / np.float32(7), groups.min(axis=2) / np.float32(-8))
    scales = float32_to_bf16(step)
    return pack_int4(_steps(groups, scales, -8, 7)), scales


def quantise_int8(weights: Float) -> tuple[npt.NDArray[np.int8], Bf16]:
    """(out, in) float32 -> int8 values in -127..127 and scales."""
    groups = weights.reshape(weights.shape[0], -1, GROUP)
    scales = float32_to_bf16(np.abs(groups).max(axis=2) / np.float32(127))
    return _steps(groups, scales, -127, 127), scales


def _steps(groups: Float, scales: Bf16, low: int, high: int) -> npt.NDArray[np.int8]:
    """The nearest multiple of its rounded scale for every weight of (out, in/32, 32), as (out, in)."""
    step = bf16_to_float32(scales)
    usable = step >= np.finfo(np.float32).tiny  # the inverse of a subnormal would overflow; such a group becomes zero
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=usable)
    steps = groups * inverse[:, :, None]
    np.rint(steps, out=steps)
    np.clip(steps, low, high, out=steps)
    return steps.reshape(len(groups), -1).astype(np.int8)


def quantise_fp8(weights: Float) -> tuple[npt.NDArray[np.uint8], Float]:
    """(out, in) float32 -> e4m3 codes and one float32 factor for each 128x128 block (absolute maximum / 448)."""
    n_out, n_in = weights.shape
    rows, columns = -(-n_out // FP8_BLOCK), -(-n_in // FP8_BLOCK)
    padded = np.zeros((rows * FP8_BLOCK, columns * FP8_BLOCK), np.float32)
    padded[:n_out, :n_in] = np.abs(weights)
    scales = padded.reshape(rows, FP8_BLOCK, columns, FP8_BLOCK).max(axis=(1, 3)) / np.float32(FP8_MAX)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    steps = weights.astype(np.float32)
    _with_blocks(np.divide, steps, scales)
    return float32_to_fp8_e4m3(steps), scales


def _with_blocks(operation: np.ufunc, values: Float, factors: Float) -> None:
    """Applies `operation` in place to (out, in) values and one factor for each 128x128 block."""
    wide = np.repeat(factors, FP8_BLOCK, axis=1)[:, : values.shape[1]]
    for block, row in enumerate(wide):
        rows = values[block * FP8_BLOCK : (block + 1) * FP8_BLOCK]
        operation(rows, row, out=rows)


def dequantise(fmt: ExpertFormat, data: Array, scales: Array | None) -> Float:
    """The (out, in) float32 weights that `data` and `scales` stand for. `scales` is None for bf16 only."""
    if fmt == "bf16":
        return bf16_to_float32(data.view(np.uint16))
    assert scales is not None, f"{fmt} weights need scales"
    if fmt == "fp8":
        codes = data.view(np.uint8)
        weights = fp8_e4m3_to_float32(codes)
        _with_blocks(np.multiply, weights, scales.view(np.float32))
        return weights
    values = unpack_int4(data) if fmt == "int4" else data.view(np.int8)
    groups = values.reshape(len(values), -1, GROUP).astype(np.float32)
    groups *= bf16_to_float32(scales.view(np.uint16))[:, :, None]
    return groups.reshape(values.shape)
