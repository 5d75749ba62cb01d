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
from offload.config import BLOCKS, FP8_BLOCK, GROUP, ExpertFormat, Isa, Precision
from offload.formats import float32_to_bf16, pack_int4
from offload.isa import REQUIRED, available, choose
from offload.kernels import amx, product
from offload.kernels.activation import Layout
from offload.kernels.product import TOKENS, UNIT_SUMS
from offload.kernels.table import Kernels, kernels, many_tokens
from tests.reference import experts as reference
from tests.reference import packing
from tests.reference.expert_memory import guarded, quantised
from tests.reference.vnni import SpelledOut, spelled_out_kernels

FORMATS: tuple[ExpertFormat, ...] = ("int4", "int8", "bf16", "fp8")
PRECISIONS: tuple[Precision, ...] = ("a8", "a16")
TIERS = [
    pytest.param(
        isa, marks=() if "avx2" in available() or isa == "portable" else pytest.mark.skip(reason=f"no {isa} here")
    )
    for isa in REQUIRED
    if isa != "amx"  # the same products as avx512vnni; its own functions are tested below
]
# Floats have no integer dot products, so of the tiers that differ in these alone one stands for all.
VARIANTS = [
    pytest.param(*tier.values, fmt, precision, marks=tier.marks)
    for tier in TIERS
    for fmt in FORMATS
    for precision in PRECISIONS
    if fmt in ("int4", "int8") or (precision == "a8" and tier.values[0] in ("avx512vnni", "avx2", "portable"))
]
WIDTHS = {fmt: (32, 96, 416) if fmt in ("int4", "int8") else (1, 100, 160, 331) for fmt in FORMATS}
ONE_BF16 = 0x3F80
PRODUCT_TYPE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
ENCODE_TYPE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2)


@functools.cache
def load(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Kernels:
    """The tier's kernels; with its own instructions spelt out where the processor lacks them."""
    if isa in available():
        return kernels(isa, fmt, precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "Emitter", SpelledOut)
        return spelled_out_kernels(isa, fmt, precision)


def record_of(code: Kernels, fmt: ExpertFormat, x: np.ndarray) -> np.ndarray:
    """The record of one float32 row, written group by group as the workers do; the padding stays zero."""
    record = np.zeros(code.layout.row_bytes(len(x), fmt), np.uint8)
    row = np.zeros(-(-len(x) // GROUP) * GROUP, np.float32)
    row[: len(x)] = x
    kept = guarded(row)
    for group in range(len(row) // GROUP):
        ENCODE_TYPE(code.encode_inputs)(
            kept.ctypes.data + 4 * GROUP * group, record.ctypes.data + code.layout.group_bytes * group
        )
    return record


def read_record(shape: Layout, record: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inputs in plain order, and offsets and scales by group: the drawing in activation.py, read back."""
    groups = record.reshape(-1, shape.group_bytes)
    kind = {1: np.int8, 2: np.int16, 4: np.float32}[shape.element]
    inputs = np.zeros((len(groups), GROUP), kind)
    inputs[:, list(shape.order)] = groups[:, : GROUP * shape.element].copy().view(kind)
    ends = groups[:, GROUP * shape.element :].copy()
    if not shape.limit:
        return inputs.reshape(-1), np.empty(0), np.empty(0)
    return inputs.reshape(-1), ends[:, :4].copy().view(np.int32)[:, 0], ends[:, 4:].copy().view(np.float32)[:, 0]


def multiply(
    code: Kernels, fmt: ExpertFormat, data: np.ndarray, scales: np.ndarray | None, x: np.ndarray
) -> np.ndarray:
    """Up to 64 rows times tokens, float32 (tokens, rows), from a guarded unit. Takes tokens as the layer does."""
    (tokens, n_in), rows = x.shape, data.shape[0]
    unit = guarded(np.concatenate([packing.tile(fmt, data, scales, first) for first in range(0, UNIT_SUMS, 16)]))
    records = [record_of(code, fmt, row) for row in x]
    blocks = -(-n_in // BLOCKS[fmt].inputs)
    sums: list[np.ndarray] = []
    while len(sums) < tokens:
        n = max(n for n in TOKENS if n <= tokens - len(sums))
        table = np.array([record.ctypes.data for record in records[len(sums) : len(sums) + n]], np.int64)
        out = guarded(np.full((n, UNIT_SUMS), np.nan, np.float32)).view(np.float32).reshape(n, UNIT_SUMS)
        PRODUCT_TYPE(code.products[n - 1])(unit.ctypes.data, blocks, table.ctypes.data, out.ctypes.data)
        sums += list(out)
    assert not np.any(np.array(sums)[:, rows:]), "rows that are padding must give zero"
    return np.array(sums)[:, :rows]


def integers(fmt: ExpertFormat, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored weights with these integer values and scales of one."""
    data = pack_int4(q).view(np.uint8) if fmt == "int4" else q.astype(np.int8)
    return data, np.full((q.shape[0], q.shape[1] // GROUP), ONE_BF16, np.uint16)


@pytest.mark.parametrize(("isa", "fmt", "precision"), VARIANTS)
def test_products_agree_with_float64(isa: Isa, fmt: ExpertFormat, precision: Precision) -> None:
    code, rng = load(isa, fmt, precision), np.random.default_rng(4)
    for n_in, rows in zip(WIDTHS[fmt], (64, 1, 17, 40), strict=False):
        data, scales = quantised(fmt, rng.standard_normal((rows, n_in)).astype(np.float32))
        weights = reference.dense(fmt, data, scales)
        for tokens in (1, 2, 3, 4, 5, 8):
            x = (rng.standard_normal((tokens, n_in)) * rng.uniform(0.1, 10, (tokens, 1))).astype(np.float32)
            seen = np.array([reference.seen(row, fmt, precision) for row in x])
            got = multiply(code, fmt, data, scales, x)
            # Each product and addition rounds by at most 2^-24 of what it holds; a term passes fewer than
            # n_in + 16 of them (its scales' product, its lane's sum).
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
    for rows, tokens in ((5, 1), (64, 2), (33, 3), (9, 4), (40, 8)):
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


@pytest.mark.parametrize("isa", [tier for tier in TIERS if tier.values[0] in ("avx512vnni", "avx2", "portable")])
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


@pytest.mark.parametrize(("isa", "fmt", "precision"), VARIANTS)
def test_a_sum_does_not_depend_on_rows_and_tokens_beside_it(isa: Isa, fmt: ExpertFormat, precision: Precision) -> None:
    code, rng = load(isa, fmt, precision), np.random.default_rng(8)
    data, scales = quantised(fmt, rng.standard_normal((7, 224)).astype(np.float32))
    x = rng.standard_normal((8, 224)).astype(np.float32)
    together = multiply(code, fmt, data, scales, x)
    for row in range(7):
        own = scales if fmt == "fp8" or scales is None else scales[row : row + 1]
        for token in range(8):
            alone = multiply(code, fmt, data[row : row + 1], own, x[token : token + 1])
            assert alone[0, 0] == together[token, row]
    for tokens in (2, 3, 4):
        assert np.array_equal(multiply(code, fmt, data, scales, x[:tokens]), together[:tokens])


@pytest.mark.parametrize(("isa", "fmt", "precision"), VARIANTS)
def test_records_hold_what_the_reference_quantises(isa: Isa, fmt: ExpertFormat, precision: Precision) -> None:
    code = load(isa, fmt, precision)
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(160) * np.repeat([1, 1e-31, 1e20, 0, 3], GROUP)).astype(np.float32)
    x[0], x[1:4] = 2.54, (0.01, 0.03, -0.05)  # scale 0.02 with a8: halves are rounded to even
    assert sorted(code.layout.order) == list(range(GROUP))
    inputs, offsets, scales = read_record(code.layout, record_of(code, fmt, x))
    assert not inputs[160:].any()
    if not code.layout.limit:
        assert np.array_equal(inputs[:160], x)
        return
    q, group_scales = reference.quantise(x, code.layout.limit)
    assert np.array_equal(inputs[:160], q)
    assert np.array_equal(scales, [*group_scales, 0])
    assert np.array_equal(offsets, [*(-code.layout.offset * q.reshape(5, GROUP).sum(axis=1)), 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_group_that_is_not_finite_has_no_finite_scale(bad: float, precision: Precision) -> None:
    code = load("portable", "int4", precision)
    x = np.ones(96, np.float32)
    x[40] = bad
    inputs, _, scales = read_record(code.layout, record_of(code, "int4", x))
    assert np.isnan(scales).tolist() == [False, True, False, False]
    assert not inputs[32:64].any()


def test_silu_times_up() -> None:
    """Over the whole range of gates, infinities and NaN too, against float64: a few units in the last place."""
    code = load("portable", "bf16", "a8")
    gates = np.concatenate([np.linspace(-110, 110, 1995), [0.0, -0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    ups = np.random.default_rng(0).standard_normal(len(gates)).astype(np.float32)
    got = np.zeros_like(gates)
    for first in range(0, len(gates) // GROUP * GROUP, GROUP):
        sums = np.concatenate([gates[first : first + GROUP], ups[first : first + GROUP]])
        ENCODE_TYPE(code.encode_swiglu)(sums.ctypes.data, got.ctypes.data + 4 * first)
    sums = np.concatenate([gates[-GROUP:], ups[-GROUP:]])
    ENCODE_TYPE(code.encode_swiglu)(sums.ctypes.data, got.ctypes.data + 4 * (len(gates) - GROUP))
    wide = gates.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = wide / (1 + np.exp(-wide)) * ups
    usual = np.isfinite(gates) & (gates > -85)  # further down the result is below 1e-34, where exp is cut off
    assert np.all(np.abs(got[usual] - expected[usual]) <= 5e-7 * np.abs(expected[usual]))
    low = np.isfinite(gates) & ~usual
    assert low.any() and np.abs(got[low]).max() < 1e-33
    assert np.isnan(got[-1])


CROSS_COMPILE = """
import sys
from offload.kernels import table
isa, fmt, precision, tokens = sys.argv[1:4] + [int(sys.argv[4])]
code = table.many_tokens("int4").code if isa == "amx" else [table.vector_product(isa, fmt, precision, tokens)]
print("\\n".join(function._library.get_asm_str() for function in code))
"""
AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx2,+fma,+bmi2"
TARGETS = {  # LLVM's processor, its features, the registers that we want to see
    "amx": ("sapphirerapids", f"{AVX512},+avx512vnni,+amx-tile,+amx-bf16", "tmm"),
    "avx512vnni": ("icelake-server", f"{AVX512},+avx512vnni", "zmm"),
    "avx512": ("skylake-avx512", AVX512, "zmm"),
    "avxvnni": ("alderlake", "+avx2,+fma,+bmi2,+avxvnni", "ymm"),
    "avx2": ("haswell", "+avx2,+fma,+bmi2", "ymm"),
}


@pytest.mark.parametrize(
    ("isa", "fmt", "precision", "instruction"),
    [
        ("amx", "int4", "a8", "tdpbf16ps"),
        ("avx512vnni", "int4", "a8", "vpdpbusd"),
        ("avx512vnni", "int4", "a16", "vpdpwssd"),
        ("avx512vnni", "int8", "a8", "vpdpbusd"),
        ("avx512", "int4", "a8", "vpmaddubsw"),
        ("avx512", "int8", "a8", "vpmaddwd"),
        ("avxvnni", "int4", "a8", "vpdpbusd"),
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
    command = [sys.executable, "-c", CROSS_COMPILE, isa, fmt, precision, "4"]
    root = Path(__file__).parents[2]
    asm = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(rf"{instruction}\s.*%{register}", asm)) >= 4  # once for each token or tile at least
    vectors = "zmm" if register == "tmm" else register
    assert re.search(rf"vfmadd\w+ps\s.*%{vectors}", asm)
    assert ("%zmm" in asm) == (vectors == "zmm")


@pytest.mark.skipif("amx" not in available(), reason="no amx here; checked in an emulator, see docs/LOG.md")
@pytest.mark.parametrize("n_in", [64, 160, 416])
@pytest.mark.parametrize("tokens", [1, 16, 17, 32])
@pytest.mark.parametrize("fmt", ["int4", "bf16"])
def test_amx_agrees_with_float64(fmt: amx.AmxFormat, tokens: int, n_in: int) -> None:
    choose("amx")
    code, rng = many_tokens(fmt), np.random.default_rng(tokens)
    data, scales = quantised(fmt, rng.standard_normal((64, n_in)).astype(np.float32))
    unit = np.concatenate([packing.tile(fmt, data, scales, first) for first in range(0, UNIT_SUMS, 16)])
    unit, blocks = guarded(unit), -(-n_in // BLOCKS[fmt].inputs)
    rows = np.zeros((tokens, amx.row_bytes(n_in, fmt) // 2), np.uint16)
    rows[:, :n_in] = float32_to_bf16(rng.standard_normal((tokens, n_in)).astype(np.float32))
    panel = guarded(np.zeros(amx.panel_bytes(n_in, fmt), np.uint8)) if fmt == "int4" else unit
    if fmt == "int4":
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.unpack)(unit.ctypes.data, blocks, panel.ctypes.data)
    out = np.full((tokens, UNIT_SUMS), np.nan, np.float32)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(code.multiply)(
        panel.ctypes.data, blocks * BLOCKS[fmt].inputs // GROUP, rows.ctypes.data, rows.strides[0], tokens,
        out.ctypes.data,
    )  # fmt: skip
    expected = reference.bf16(rows[:, :n_in]) @ reference.dense(fmt, data, scales).T
    assert np.linalg.norm(out - expected) <= (2e-3 if fmt == "int4" else 1e-6) * np.linalg.norm(expected)


def test_the_cache_directory_follows_every_kernel_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels"
    source.mkdir()
    monkeypatch.setattr(kernels_package, "__file__", str(source / "__init__.py"))
    seen = set()
    (tmp_path / "config.py").write_text("LINE = 64")
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("../config.py", "LINE = 32")):
        (source / name).write_text(text)
        seen.add(kernels_package.cache_directory(tmp_path))
        assert kernels_package.cache_directory(tmp_path) in seen
    assert len(seen) == 4
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
