"""Byte layouts against the published drawing, and rounding against float64 and torch's own types."""

import numpy as np
import pytest
import torch

from offload.formats import (
    bf16_to_float32,
    dequantise,
    float32_to_bf16,
    float32_to_fp8_e4m3,
    fp8_e4m3_to_float32,
    pack_int4,
    quantise_fp8,
    quantise_int4,
    quantise_int8,
    unpack_int4,
)

EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16)
EVERY_FP8 = np.arange(1 << 8, dtype=np.uint8)


def weights(n_out: int, n_in: int, seed: int = 3) -> np.ndarray:
    """Uneven rows and columns, so that a scale taken from the wrong place is far off."""
    rng = np.random.default_rng(seed)
    rows, columns = 2.0 ** rng.integers(-4, 5, (n_out, 1)), 2.0 ** rng.integers(-4, 5, (1, n_in))
    return (rng.standard_normal((n_out, n_in)) * rows * columns).astype(np.float32)


def test_published_words() -> None:
    # The two words of the format's description: the lowest nibble is the first weight, value + 8.
    words = np.array([[0xFEDCBA98, 0x76543210]], np.uint32).view(np.int32)
    assert unpack_int4(words).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]]
    assert pack_int4(np.array([[0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]])).tolist() == words.tolist()


def test_pack_follows_the_bit_formula() -> None:
    values = np.random.default_rng(1).integers(-8, 8, (5, 64))
    packed = pack_int4(values)
    assert packed.dtype == np.int32 and packed.shape == (5, 8)
    for r in range(5):
        for k in range(64):
            assert ((int(packed[r, k // 8]) >> 4 * (k % 8)) & 0xF) - 8 == values[r, k]
    assert (unpack_int4(packed) == values).all()
    assert (unpack_int4(packed.view(np.uint8)) == values).all()  # the store hands out bytes


def test_bf16_reads_every_code_as_torch_does() -> None:
    expected = torch.from_numpy(EVERY_BF16.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    assert np.array_equal(bf16_to_float32(EVERY_BF16), expected, equal_nan=True)


def test_bf16_rounds_to_nearest_even() -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal(4096).astype(np.float32) * np.float32(10) ** rng.integers(-38, 38, 4096)
    values = values.astype(np.float32)
    between = bf16_to_float32(EVERY_BF16[0x3F00:0x4100])
    ties = ((between[:-1].astype(np.float64) + between[1:]) / 2).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-40], np.float32)
    for sample in (values, ties, special):
        expected = torch.from_numpy(sample).bfloat16().view(torch.int16).numpy().view(np.uint16)
        found = float32_to_bf16(sample)
        assert np.array_equal(np.isnan(bf16_to_float32(found)), np.isnan(sample))
        assert np.array_equal(found[~np.isnan(sample)], expected[~np.isnan(sample)])


def test_fp8_reads_every_code_as_torch_does() -> None:
    expected = torch.from_numpy(EVERY_FP8).view(torch.float8_e4m3fn).float().numpy()
    found = fp8_e4m3_to_float32(EVERY_FP8)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


def test_fp8_rounds_as_torch_does() -> None:
    exact = np.sort(fp8_e4m3_to_float32(EVERY_FP8[~np.isin(EVERY_FP8, (0x7F, 0xFF))]))
    ties = (exact[:-1] + exact[1:]) / np.float32(2)
    sample = np.concatenate([exact, ties, np.linspace(-448, 448, 20001), np.linspace(-0.03, 0.03, 20001)])
    sample = sample.astype(np.float32)
    expected = torch.from_numpy(sample).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(float32_to_fp8_e4m3(sample), expected)
    assert fp8_e4m3_to_float32(float32_to_fp8_e4m3(np.array([1e9, -1e9], np.float32))).tolist() == [448.0, -448.0]


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (64, 256)])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_group_quantisation(fmt: str, shape: tuple[int, int]) -> None:
    original = weights(*shape)
    data, scales = quantise_int4(original) if fmt == "int4" else quantise_int8(original)
    assert scales.shape == (shape[0], shape[1] // 32) and scales.dtype == np.uint16
    assert data.nbytes == shape[0] * shape[1] // (2 if fmt == "int4" else 1)
    step = np.repeat(bf16_to_float32(scales).astype(np.float64), 32, axis=1)
    restored = dequantise(fmt, data, scales)
    # Nearest step; the scale's own rounding to 8 bits lets the group's extreme lie up to 128/256 step outside.
    assert (np.abs(restored - original) <= step * 0.5001 + np.abs(original) * 2**-8).all()
    groups = original.reshape(shape[0], -1, 32).astype(np.float64)
    top = groups.max(2) / 7 if fmt == "int4" else np.abs(groups).max(2) / 127
    needed = np.maximum(top, groups.min(2) / -8) if fmt == "int4" else top
    assert np.allclose(bf16_to_float32(scales), needed, rtol=2**-8)
    values = unpack_int4(data) if fmt == "int4" else data
    reach = values.reshape(shape[0], -1, 32)
    assert ((reach.max(2) == (7 if fmt == "int4" else 127)) | (reach.min(2) == (-8 if fmt == "int4" else -127))).all()
    assert (np.repeat(bf16_to_float32(scales), 32, axis=1) * values == restored).all()


def test_int4_uses_minus_eight() -> None:
    original = np.full((1, 32), 1.0, np.float32)
    original[0, 5] = -8.0
    data, scales = quantise_int4(original)
    assert bf16_to_float32(scales).tolist() == [[1.0]]
    assert np.array_equal(dequantise("int4", data, scales), original)


def test_zero_and_vanishing_groups_become_zero() -> None:
    original = np.zeros((2, 64), np.float32)
    original[1, 32:] = 1e-42
    for fmt, quantise in (("int4", quantise_int4), ("int8", quantise_int8)):
        assert not dequantise(fmt, *quantise(original)).any()


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (72, 160)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    original = weights(*shape)
    data, scales = quantise_fp8(original)
    assert data.shape == shape and scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    restored = dequantise("fp8", data, scales)
    for r in range(0, shape[0], 128):
        for c in range(0, shape[1], 128):
            block = original[r : r + 128, c : c + 128]
            scale = scales[r // 128, c // 128]
            assert scale == np.float32(np.abs(block).max()) / np.float32(448)
            codes = torch.from_numpy(data[r : r + 128, c : c + 128].copy()).view(torch.float8_e4m3fn).float().numpy()
            assert np.array_equal(restored[r : r + 128, c : c + 128], codes * scale)
            # Three mantissa bits: half a step is 2^-4 of the value; below 2^-6 steps are 2^-9 of the scale.
            assert (np.abs(codes * scale - block) <= np.abs(block) * 2**-4 + scale * 2**-10).all()


def test_bf16_is_exact() -> None:
    original = bf16_to_float32(float32_to_bf16(weights(3, 40)))
    assert np.array_equal(dequantise("bf16", float32_to_bf16(original), None), original)
