"""Activations as the products read them: the record of one row, and how it is filled.

A product multiplies a vector of weights, one dword of each of 16 rows, by one dword of activations spread over the
vector. A record therefore is a run of activation dwords in the order in which the products take weights apart:

    int4, int8   for each group of 32 inputs: the quantised inputs, an int32 and a float32
    bf16, fp8    float32, in plain order

The int32 is -offset * (sum of the group's inputs), where the integer product of the group starts: the products see
weights with that offset (int4 as stored: value + 8; int8 with `vpdpbusd`: value + 128). The float32 is the
activations' scale. A row is padded with zeros to whole blocks of weights.

Rounding: scale = absmax / limit and q = round_half_even(x * (limit / absmax)), in float32. A group with absmax below
1e-30 counts as zero. A group that holds NaN or an infinity gets q = 0 and the scale NaN, so that every output of that
token becomes NaN and no other token notices.

Knows nothing about weights' bytes or experts. Used by product.py and portable.py (the format) and table.py (the code).
"""

# mypy: disallow-untyped-defs=False

from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.config import BLOCKS, GROUP, ExpertFormat, Isa, Precision
from offload.kernels.intrinsics import F32, I8, I16, I32, I64
from offload.kernels.vector import VNNI, Value

LIMITS: dict[Precision, int] = {"a8": 127, "a16": 32767}
TINY = 1e-30
FLOATS, INTS = ir.VectorType(F32, GROUP), ir.VectorType(I32, GROUP)
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # their sum; the first has so few bits that products are exact
# exp(r) for |r| up to ln(2) / 2, from the constant up; relative error below 1e-7 (Cephes expf).
EXP = (1.0, 1.0, 5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a record holds."""

    element: int  # bytes of one activation: int8, int16 or float32
    limit: int  # largest quantised magnitude; 0: float32 as it is
    offset: int  # what the product's weights are too large by
    order: tuple[int, ...]  # the input of the group at each place

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 inputs."""
        return GROUP * self.element + (8 if self.limit else 0)

    def row_bytes(self, n_in: int, fmt: ExpertFormat) -> int:
        """Bytes of the record of a row of whole blocks."""
        inputs = BLOCKS[fmt].inputs
        return -(-n_in // inputs) * inputs // GROUP * self.group_bytes


def layout(isa: Isa, fmt: ExpertFormat, precision: Precision) -> Layout:
    """The record that the product of this tier, format and precision reads."""
    plain = tuple(range(GROUP))
    if fmt not in ("int4", "int8"):
        return Layout(4, 0, 0, plain)
    limit = LIMITS[precision]
    if isa == "portable":
        return Layout(1 if precision == "a8" else 2, limit, 8 if fmt == "int4" else 0, plain)
    if fmt == "int4" and precision == "a8":  # a dword's low nibbles, then its high nibbles
        return Layout(1, limit, 8, tuple(8 * j + 2 * i + high for j in range(4) for high in (0, 1) for i in range(4)))
    if fmt == "int4":  # nibbles p and p + 4 of a dword are what a shift by 4 p leaves in its two words
        return Layout(2, limit, 8, tuple(8 * j + p + 4 * word for j in range(4) for p in range(4) for word in (0, 1)))
    if precision == "a8" and isa in VNNI:  # bytes as they are
        return Layout(1, limit, 128, plain)
    return Layout(2, limit, 0, tuple(4 * j + p + 2 * word for j in range(8) for p in (0, 1) for word in (0, 1)))


def _constant(value: float, kind: ir.VectorType = FLOATS) -> Value:
    return ir.Constant(kind, [value] * kind.count)


def _call(b: ir.IRBuilder, name: str, returns: ir.Type, *args: Value) -> Value:
    kind = ir.FunctionType(returns, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _at(b: ir.IRBuilder, address: Value, offset: int, kind: ir.Type) -> Value:
    return b.inttoptr(b.add(address, ir.Constant(I64, offset)), ir.PointerType(kind))


def _load(b: ir.IRBuilder, address: Value, offset: int = 0) -> Value:
    value = b.load(_at(b, address, offset, FLOATS))
    value.align = 4
    return value


def emit_group(b: ir.IRBuilder, made: Layout, values: Value, record: Value) -> None:
    """Write 32 float32 values into their place in a record."""
    if made.limit == 0:
        b.store(values, _at(b, record, 0, FLOATS)).align = 4
        return
    magnitudes = _call(b, "llvm.fabs.v32f32", FLOATS, values)
    finite = b.fcmp_ordered("<", magnitudes, _constant(float("inf")))
    all_finite = _call(b, "llvm.vector.reduce.and.v32i1", ir.IntType(1), finite)
    top = _call(b, "llvm.vector.reduce.fmax.v32f32", F32, b.select(finite, magnitudes, _constant(0.0)))
    zero, limit = ir.Constant(F32, 0.0), ir.Constant(F32, float(made.limit))
    counts = b.fcmp_ordered(">=", top, ir.Constant(F32, TINY))
    scale = b.select(all_finite, b.select(counts, b.fdiv(top, limit), zero), ir.Constant(F32, float("nan")))
    factor = b.select(b.and_(all_finite, counts), b.fdiv(limit, top), zero)
    spread = b.shuffle_vector(
        b.insert_element(ir.Constant(FLOATS, ir.Undefined), factor, ir.Constant(I32, 0)),
        ir.Constant(FLOATS, ir.Undefined),
        ir.Constant(INTS, [0] * GROUP),
    )
    rounded = _call(b, "llvm.rint.v32f32", FLOATS, b.fmul(b.select(finite, values, _constant(0.0)), spread))
    quantised = b.fptosi(rounded, INTS)
    total = _call(b, "llvm.vector.reduce.add.v32i32", I32, quantised)
    narrow = b.trunc(quantised, ir.VectorType(I8 if made.element == 1 else I16, GROUP))
    dealt = b.shuffle_vector(narrow, narrow, ir.Constant(INTS, list(made.order)))
    b.store(dealt, _at(b, record, 0, dealt.type)).align = 4
    end = GROUP * made.element
    b.store(b.mul(total, ir.Constant(I32, -made.offset)), _at(b, record, end, I32)).align = 4
    b.store(scale, _at(b, record, end + 4, F32)).align = 4


def emit_swiglu(b: ir.IRBuilder, gates: Value, ups: Value) -> Value:
    """silu(gate) * up of 32 values; silu(x) = x / (1 + exp(-x)), exp by a polynomial."""
    # minnum and maxnum drop a NaN, which the division brings back.
    x = _call(b, "llvm.minnum.v32f32", FLOATS, b.fsub(_constant(0.0), gates), _constant(88.0))
    x = _call(b, "llvm.maxnum.v32f32", FLOATS, x, _constant(-87.0))
    whole = _call(b, "llvm.rint.v32f32", FLOATS, b.fmul(x, _constant(LOG2_E)))
    rest = _call(b, "llvm.fma.v32f32", FLOATS, whole, _constant(-LN2_HIGH), x)
    rest = _call(b, "llvm.fma.v32f32", FLOATS, whole, _constant(-LN2_LOW), rest)
    series = _constant(EXP[-1])
    for coefficient in EXP[-2::-1]:
        series = _call(b, "llvm.fma.v32f32", FLOATS, series, rest, _constant(coefficient))
    exponent = b.shl(b.add(b.fptosi(whole, INTS), _constant(127, INTS)), _constant(23, INTS))
    exponential = b.fmul(series, b.bitcast(exponent, FLOATS))
    return b.fmul(b.fdiv(gates, b.fadd(exponential, _constant(1.0))), ups)


def emit_bf16(b: ir.IRBuilder, values: Value, target: Value) -> None:
    """32 float32 as bf16, rounded to the nearest; a NaN stays one."""
    bits = b.bitcast(values, INTS)
    odd = b.and_(b.lshr(bits, _constant(16, INTS)), _constant(1, INTS))
    rounded = b.lshr(b.add(b.add(bits, odd), _constant(0x7FFF, INTS)), _constant(16, INTS))
    rounded = b.select(b.fcmp_unordered("uno", values, values), _constant(0x7FC0, INTS), rounded)
    narrow = b.trunc(rounded, ir.VectorType(I16, GROUP))
    b.store(narrow, _at(b, target, 0, narrow.type)).align = 4


def _bf16_encoder(values_of):
    """An intrinsic (address of float32 values, address of 32 bf16)."""

    @intrinsic
    def encode(typingctx, values, target):
        def codegen(context, builder, signature, args):
            emit_bf16(builder, values_of(builder, args[0]), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return encode


def _encoder(values_of):
    """An intrinsic (isa, fmt, precision as literals; address of float32 values, address of the group's record)."""

    @intrinsic(prefer_literal=True)
    def encode(typingctx, isa, fmt, precision, values, record):
        if not all(isinstance(kind, types.Literal) for kind in (isa, fmt, precision)):
            return None
        made = layout(isa.literal_value, fmt.literal_value, precision.literal_value)

        def codegen(context, builder, signature, args):
            emit_group(builder, made, values_of(builder, args[3]), args[4])
            return context.get_dummy_value()

        return types.void(isa, fmt, precision, types.int64, types.int64), codegen

    return encode


def _swiglu(b: ir.IRBuilder, sums: Value) -> Value:
    return emit_swiglu(b, _load(b, sums), _load(b, sums, 4 * GROUP))


encode_inputs, encode_swiglu = _encoder(_load), _encoder(_swiglu)  # of 32 inputs; of 32 gates and 32 ups
bf16_inputs, bf16_swiglu = _bf16_encoder(_load), _bf16_encoder(_swiglu)
