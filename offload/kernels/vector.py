"""Vector code of one tier, written as LLVM instructions.

`Emitter` is the short vocabulary that product.py is written in: whole vectors of the tier's width, loads at any
address, and the dot products of small integers, which alone differ between tiers. Everything else is generic LLVM.
Knows nothing about formats, rows or tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from llvmlite import ir
from numba.core import cgutils

from offload.config import Isa
from offload.kernels.activation import VECTOR_BYTES
from offload.kernels.intrinsics import F32, I8, I16, I32, I64

Value: TypeAlias = Any  # an ir.Value; llvmlite ships no types
Pairs: TypeAlias = Sequence[tuple[Value, Value]]


class Emitter:
    """Instructions at a builder's position, for vectors of `lanes` int32 or float32."""

    def __init__(self, builder: ir.IRBuilder, isa: Isa) -> None:
        self.builder = builder
        self.isa: Isa = isa
        self.vector = VECTOR_BYTES[isa]  # bytes
        self.lanes = self.vector // 4
        self.ints = ir.VectorType(I32, self.lanes)
        self.words = ir.VectorType(I16, 2 * self.lanes)
        self.bytes = ir.VectorType(I8, 4 * self.lanes)
        self.floats = ir.VectorType(F32, self.lanes)

    # addresses and memory

    def at(self, address: Value, offset: int) -> Value:
        return self.builder.add(address, ir.Constant(I64, offset)) if offset else address

    def load(self, address: Value, kind: ir.Type, offset: int = 0) -> Value:
        value = self.builder.load(self.builder.inttoptr(self.at(address, offset), ir.PointerType(kind)))
        value.align = 1
        return value

    def store(self, value: Value, address: Value) -> None:
        self.builder.store(value, self.builder.inttoptr(address, ir.PointerType(value.type))).align = 1

    def prefetch(self, address: Value, offset: int = 0) -> None:
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(I8), I32, I32, I32])
        target = self.builder.inttoptr(self.at(address, offset), ir.PointerType(I8))
        hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]  # for reading, into every level, data
        self._call("llvm.prefetch.p0", kind, [target, *hints])

    def variable(self, value: Value) -> Value:
        """Where a vector that changes in loops is kept; LLVM makes it a register."""
        return cgutils.alloca_once_value(self.builder, value)

    # arithmetic

    def constant(self, value: float, kind: ir.VectorType) -> Value:
        return ir.Constant(kind, [value] * kind.count)

    def splat(self, value: Value, kind: ir.VectorType) -> Value:
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, undefined, self._order([0] * kind.count))

    def mask(self, value: Value, bits: int) -> Value:
        return self.builder.and_(value, self.constant(bits, value.type))

    def left(self, value: Value, count: int) -> Value:
        return self.builder.shl(value, self.constant(count, value.type)) if count else value

    def right(self, value: Value, count: int) -> Value:
        return self.builder.lshr(value, self.constant(count, value.type)) if count else value

    def right_signed(self, value: Value, count: int) -> Value:
        return self.builder.ashr(value, self.constant(count, value.type)) if count else value

    def cast(self, value: Value, kind: ir.Type) -> Value:
        """The same bits as another type."""
        return self.builder.bitcast(value, kind)

    def to_float(self, value: Value) -> Value:
        return self.builder.sitofp(value, self.floats)

    def mul(self, a: Value, b: Value) -> Value:
        return self.builder.fmul(a, b)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once. LLVM may not reorder any float operation written here."""
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        return self._call(f"llvm.fma.v{self.lanes}f32", kind, [a, b, c])

    def total(self, value: Value) -> Value:
        """Sum of a float vector: halves added to halves, the same tree every time."""
        while value.type.count > 1:
            half = value.type.count // 2
            low = self.builder.shuffle_vector(value, value, self._order(range(half)))
            high = self.builder.shuffle_vector(value, value, self._order(range(half, 2 * half)))
            value = self.builder.fadd(low, high)
        return self.builder.extract_element(value, ir.Constant(I32, 0))

    def group_scales(self, address: Value, groups: int) -> Value:
        """`groups` bf16 scales, each spread as float32 over its share of the lanes."""
        unit = 2 * groups  # bytes of the scales, repeated over the vector: every 128-bit quarter then holds a copy
        packed = self.load(address, ir.IntType(8 * unit))
        copies = self.cast(self.splat(packed, ir.VectorType(packed.type, self.vector // unit)), self.bytes)
        order, zero = [], self.vector
        for lane in range(self.lanes):
            low = 4 * lane // unit * unit + 2 * (lane * groups // self.lanes)
            order += [zero, zero, low, low + 1]
        spread = self.builder.shuffle_vector(copies, ir.Constant(self.bytes, None), self._order(order))
        return self.cast(spread, self.floats)

    # dot products of small integers, four bytes or two words to a lane: start + sum of the pairs' products

    def dot_bytes(self, start: Value, pairs: Pairs) -> Value:
        """Two pairs of unsigned bytes of at most 15 and signed bytes; exact."""
        if self.isa == "avx512vnni":
            kind = ir.FunctionType(self.ints, [self.ints] * 3)
            for unsigned, signed in pairs:
                start = self._call("llvm.x86.avx512.vpdpbusd.512", kind, [start, unsigned, signed])
            return start
        kind = ir.FunctionType(self.words, [self.bytes] * 2)
        low, high = (
            self._call("llvm.x86.avx2.pmadd.ub.sw", kind, [self.cast(value, self.bytes) for value in pair])
            for pair in pairs
        )
        # 2 pairs * 2 bytes * 15 * 128 fits a word, so they are added before they are widened.
        return self.builder.add(start, self._multiply_add(self.builder.add(low, high), self.constant(1, self.words)))

    def dot_words(self, start: Value, pairs: Pairs) -> Value:
        """Signed words times signed words; exact while the sum fits 32 bits."""
        if self.isa == "avx512vnni":
            kind = ir.FunctionType(self.ints, [self.ints] * 3)
            for a, b in pairs:
                operands = [start, self.cast(a, self.ints), self.cast(b, self.ints)]
                start = self._call("llvm.x86.avx512.vpdpwssd.512", kind, operands)
            return start
        for a, b in pairs:
            start = self.builder.add(start, self._multiply_add(self.cast(a, self.words), self.cast(b, self.words)))
        return start

    def _multiply_add(self, a: Value, b: Value) -> Value:
        return self._call("llvm.x86.avx2.pmadd.wd", ir.FunctionType(self.ints, [self.words] * 2), [a, b])

    def _order(self, indexes: Iterable[int]) -> Value:
        chosen = list(indexes)
        return ir.Constant(ir.VectorType(I32, len(chosen)), chosen)

    def _call(self, name: str, kind: ir.FunctionType, args: Sequence[Value]) -> Value:
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)
