"""Products and records of every tier that this machine has, against float64 and, where they are integers, exactly."""

import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from offload import kernels as kernels_package
from offload.config import FP8_BLOCK, GROUP, ExpertFormat, Isa, Precision
from offload.formats import pack_int4
from offload.isa import REQUIRED, available
from offload.kernels import product
from offload.kernels.activation import ENCODE, Layout, layout
from offload.kernels.product import MAX_TOKENS, TILE
from offload.kernels.table import Kernels, kernels
from tests.reference import experts as reference
from tests.reference.expert_memory import guarded, quantised
from tests.reference.vnni import SpelledOut, spelled_out_kernels

FORMATS: tuple[ExpertFormat, ...] = ("int4", "int8", "bf16", "fp8")
PRECISIONS: tuple[Precision, ...] = ("a8", "a16")
TIERS = [
    pytest.param(isa, marks=() if isa in ("avx512vnni", *available()) else pytest.mark.skip(reason=f"no {isa} here"))
    for isa in REQUIRED
]
WIDTHS = [(fmt, n_in) for fmt in FORMATS for n_in in (32, 96, 160, 416)]
WIDTHS += [(fmt, n_in) for fmt in ("bf16", "fp8") for n_in in (1, 100, 331)]
ONE_BF16 = 0x3F80
PRODUCT_TYPE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)
ENCODE_TYPE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(ENCODE.args))


@functools.cache
def load(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Kernels:
    """The tier's kernels; avx512vnni runs with its two own instructions spelt out where the processor lacks them."""
    if isa in available():
        return kernels(isa, fmt, precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "Emitter", SpelledOut)
        return spelled_out_kernels(isa, fmt, precision)


def record_of(code: Kernels, x: np.ndarray) -> np.ndarray:
    """The record of one float32 row, written in pieces as the workers do."""
    shape = code.layout
    record = np.zeros(shape.row_bytes(len(x)), np.uint8)
    row = guarded(x.astype(np.float32))
    for first in range(0, len(x), 64):
        n = min(64, len(x) - first)
        ENCODE_TYPE(code.encode)(
            row.ctypes.data + 4 * first, first, n, record.ctypes.data,
            shape.parts, shape.element, shape.vector, shape.offset, shape.limit,
        )  # fmt: skip
    return record


def read_record(shape: Layout, record: np.ndarray, n_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inputs in plain order, and offsets and scales by lane: the drawing in activation.py, read back."""
    blocks = record.reshape(-1, shape.bytes)
    kind = {1: np.int8, 2: np.int16, 4: np.float32}[shape.element]
    parts = blocks[:, : shape.parts * shape.vector].copy().view(kind).reshape(len(blocks), shape.parts, -1)
    inputs = parts.transpose(0, 2, 1).reshape(-1)
    if not shape.limit:
        return inputs, np.empty(0), np.empty(0)
    offsets = blocks[:, shape.parts * shape.vector : -shape.vector].copy().view(np.int32)
    return inputs, offsets.reshape(-1), blocks[:, -shape.vector :].copy().view(np.float32).reshape(-1)


def multiply(
    code: Kernels, fmt: ExpertFormat, data: np.ndarray, scales: np.ndarray | None, x: np.ndarray
) -> np.ndarray:
    """Rows times tokens, float32 (tokens, rows), from guarded copies of the tensors."""
    (tokens, n_in), rows = x.shape, data.shape[0]
    kept = guarded(data), guarded(scales) if scales is not None else np.zeros(1)
    records = [record_of(code, row) for row in x]
    table = np.array([record.ctypes.data for record in records], np.int64)
    out = np.full((MAX_TOKENS, TILE), np.nan, np.float32)
    stride = 0 if scales is None or fmt == "fp8" else scales.nbytes // rows
    PRODUCT_TYPE(code.products[tokens - 1])(
        kept[0].ctypes.data, data.nbytes // rows, kept[1].ctypes.data, stride, rows, n_in, tokens,
        table.ctypes.data, out.ctypes.data, kept[0].ctypes.data,
    )  # fmt: skip
    return out[:tokens, :rows]


def integers(fmt: ExpertFormat, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored weights with these integer values and scales of one."""
    data = pack_int4(q).view(np.uint8) if fmt == "int4" else q.astype(np.int8)
    return data, np.full((q.shape[0], q.shape[1] // GROUP), ONE_BF16, np.uint16)


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("fmt", "n_in"), WIDTHS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_agree_with_float64(isa: Isa, fmt: ExpertFormat, precision: Precision, n_in: int) -> None:
    code = load(isa, fmt, precision)
    rng = np.random.default_rng(n_in)
    for rows in (1, 3, 32):
        data, scales = quantised(fmt, rng.standard_normal((rows, n_in)).astype(np.float32))
        weights = reference.dense(fmt, data, scales)
        for tokens in range(1, MAX_TOKENS + 1):
            x = (rng.standard_normal((tokens, n_in)) * rng.uniform(0.1, 10, (tokens, 1))).astype(np.float32)
            seen = np.array([reference.seen(row, fmt, precision) for row in x])
            got = multiply(code, fmt, data, scales, x)
            # Each product and addition rounds by at most 2^-24 of what it holds; a term passes fewer than
            # n_in + 16 of them (its scales' product, its lane's sum, the tree over 16 lanes).
            bound = (n_in + 16) * 2.0**-24 * (np.abs(seen) @ np.abs(weights).T)
            assert np.all(np.abs(got - seen @ weights.T) <= bound), (rows, tokens)


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("fmt", ["int4", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_integer_products_are_exact(isa: Isa, fmt: ExpertFormat, precision: Precision) -> None:
    """With scales of one the float32 sum is the integer itself, as long as every partial sum is below 2^24."""
    code, limit = load(isa, fmt, precision), reference.LIMITS[precision]
    rng = np.random.default_rng(5)
    low, high = (-8, 7) if fmt == "int4" else (-127, 127)
    n_in = 416
    for rows, tokens in ((5, 1), (6, 2), (32, 3), (9, 4)):
        weights = rng.integers(low, high + 1, (rows, n_in))
        x = rng.integers(-limit, limit + 1, (tokens, n_in))
        x[:, 0::GROUP] = limit * rng.choice((-1, 1), (tokens, n_in // GROUP))  # absmax = limit: a scale of one
        while np.any(np.abs(x) @ np.abs(weights).T >= 1 << 24):
            weights = np.where(rng.random(weights.shape) < 0.3, 0, weights)
        got = multiply(code, fmt, *integers(fmt, weights), x.astype(np.float32))
        assert np.array_equal(got.astype(np.int64), x @ weights.T)
        assert np.count_nonzero(got) > 0


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("fmt", ["int4", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_do_not_overflow(isa: Isa, fmt: ExpertFormat, precision: Precision, sign: int) -> None:
    """All inputs and weights at their limits, -8 and -128 too, in as many places as stay exact in float32."""
    code, limit = load(isa, fmt, precision), reference.LIMITS[precision]
    weight = -8 if fmt == "int4" else -128
    n = min(GROUP, ((1 << 24) - 1) // (limit * -weight))
    weights, x = np.zeros((2, 2 * GROUP), np.int64), np.full((1, 2 * GROUP), sign * limit)
    weights[0, GROUP : GROUP + n] = weight
    weights[1, :n] = weight
    got = multiply(code, fmt, *integers(fmt, weights), x.astype(np.float32))
    assert got.tolist() == [[sign * limit * weight * n] * 2]


@pytest.mark.parametrize("isa", TIERS)
def test_every_fp8_code_and_both_edges_of_a_block(isa: Isa) -> None:
    """Row r picks out input r, so the outputs are the decoded weights; two blocks with different scales."""
    code = load(isa, "fp8", "a16")
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    for code_row, at in ((codes[:127], 1), (codes[127:], 2)):
        data = np.zeros((1, FP8_BLOCK + len(code_row)), np.uint8)
        data[0, : len(code_row)] = code_row
        data[0, FP8_BLOCK:] = code_row
        scales = np.array([[2.0, 0.25 * at]], np.float32)
        for k in range(len(code_row)):
            for first, scale in ((0, 2.0), (FP8_BLOCK, 0.25 * at)):
                x = np.zeros((1, data.shape[1]), np.float32)
                x[0, first + k] = 1
                assert multiply(code, "fp8", data, scales, x)[0, 0] == reference.fp8(code_row[k : k + 1])[0] * scale


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sum_does_not_depend_on_rows_and_tokens_beside_it(isa: Isa, fmt: ExpertFormat, precision: Precision) -> None:
    code, rng = load(isa, fmt, precision), np.random.default_rng(8)
    data, scales = quantised(fmt, rng.standard_normal((7, 224)).astype(np.float32))
    x = rng.standard_normal((4, 224)).astype(np.float32)
    together = multiply(code, fmt, data, scales, x)
    for token in range(4):
        for row in range(7):
            own = scales if fmt == "fp8" or scales is None else scales[row : row + 1]
            alone = multiply(code, fmt, data[row : row + 1], own, x[token : token + 1])
            assert alone[0, 0] == together[token, row]
    assert np.array_equal(multiply(code, fmt, data, scales, x[:3]), together[:3])


@pytest.mark.parametrize("isa", REQUIRED)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_records_hold_what_the_reference_quantises(isa: Isa, fmt: ExpertFormat, precision: Precision) -> None:
    """Layouts of all tiers: the code that fills a record is plain and runs anywhere."""
    code = load("portable", fmt, precision)
    shape = layout(isa, fmt, precision)
    code = Kernels(**{name: getattr(code, name) for name in code.__slots__} | {"layout": shape})
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(160) * np.repeat([1, 1e-31, 1e20, 0, 3], GROUP)).astype(np.float32)
    x[0], x[1:4] = 2.54, (0.01, 0.03, -0.05)  # scale 0.02 with a8: halves are rounded to even
    inputs, offsets, scales = read_record(shape, record_of(code, x), len(x))
    assert not inputs[160:].any()
    if not shape.limit:
        assert np.array_equal(inputs[:160], x)
        return
    q, group_scales = reference.quantise(x, shape.limit)
    assert np.array_equal(inputs[:160], q)
    lanes = GROUP // (shape.parts * 4 // shape.element)  # of one group
    assert np.array_equal(scales[: 5 * lanes], np.repeat(group_scales, lanes))
    assert np.array_equal(offsets[: 5 * lanes], -shape.offset * q.reshape(5 * lanes, -1).sum(axis=1))
    assert not scales[5 * lanes :].any()
    assert not offsets[5 * lanes :].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_group_that_is_not_finite_has_no_finite_scale(bad: float, precision: Precision) -> None:
    code = load("portable", "int4", precision)
    x = np.ones(96, np.float32)
    x[40] = bad
    inputs, _, scales = read_record(code.layout, record_of(code, x), 96)
    by_group = scales.reshape(-1, GROUP * code.layout.element // 4)
    assert np.isnan(by_group[1]).all()
    assert np.isfinite(by_group[0]).all()
    assert np.isfinite(by_group[2]).all()
    assert not inputs[32:64].any()


CROSS_COMPILE = """
import sys
from numba import njit
from offload.kernels.intrinsics import NOPYTHON
from offload.kernels.table import PRODUCT, vector_product
function = vector_product(sys.argv[1], sys.argv[2], sys.argv[3], 4).__wrapped__
print("\\n".join(njit(PRODUCT, **NOPYTHON)(function).inspect_asm().values()))
"""
TARGETS = {  # LLVM's processor, its features, the registers that we want to see
    "avx512vnni": ("icelake-server", "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx2,+fma,+bmi2", "zmm"),
    "avx2": ("haswell", "+avx2,+fma,+bmi2", "ymm"),
}


@pytest.mark.parametrize(
    ("isa", "fmt", "precision", "instruction"),
    [
        ("avx512vnni", "int4", "a8", "vpdpbusd"),
        ("avx512vnni", "int4", "a16", "vpdpwssd"),
        ("avx512vnni", "int8", "a8", "vpdpwssd"),
        ("avx2", "int4", "a8", "vpmaddubsw"),
        ("avx2", "int4", "a16", "vpmaddwd"),
    ],
)
def test_tiers_are_compiled_to_their_instructions(
    tmp_path: Path, isa: Isa, fmt: ExpertFormat, precision: Precision, instruction: str
) -> None:
    """Compiled for another processor and not run, so any x86-64 machine can tell."""
    if "avx2" not in available():
        pytest.skip("needs LLVM's x86-64 back end")
    cpu, features, register = TARGETS[isa]
    environment = dict(os.environ, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-c", CROSS_COMPILE, isa, fmt, precision]
    root = Path(__file__).parents[2]
    asm = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(rf"{instruction}\s.*%{register}", asm)) >= 4  # once for each token at least
    assert re.search(rf"vfmadd\w+ps\s.*%{register}", asm)
    assert ("%zmm" in asm) == (register == "zmm")


def test_the_cache_directory_follows_every_kernel_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels"
    source.mkdir()
    monkeypatch.setattr(kernels_package, "__file__", str(source / "__init__.py"))
    seen = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2")):
        (source / name).write_text(text)
        seen.add(kernels_package.cache_directory(tmp_path))
        assert kernels_package.cache_directory(tmp_path) in seen
    assert len(seen) == 3
    assert {path.parent for path in seen} == {tmp_path / "hybrid" / "kernels"}


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    shared = tmp_path / f"hybrid-{os.getuid()}"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for wanted in (tmp_path / "file", Path("~")):  # a directory cannot be made in the one; the other is no home at all
        monkeypatch.setattr(kernels_package.config, "CACHE_DIR", str(wanted))
        assert kernels_package.choose_directory() == kernels_package.cache_directory(shared)
    assert shared.stat().st_mode & 0o777 == 0o700
    shared.chmod(0o777)  # anybody could have put code there
    found = kernels_package.choose_directory()
    assert shared not in found.parents and tmp_path in found.parents
    monkeypatch.setattr(kernels_package.config, "CACHE_DIR", str(tmp_path / "good"))
    assert kernels_package.choose_directory() == kernels_package.cache_directory(tmp_path / "good")


def test_a_second_start_finds_everything_in_the_cache() -> None:
    load("portable", "int4", "a8")
    assert all(function.cache_hits == 1 for function in kernels("portable", "int4", "a8").code)
