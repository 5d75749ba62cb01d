"""Vector code of one tier, written as LLVM instructions.

`Emitter` is the short vocabulary that product.py is written in: whole vectors of the tier's width, loads at any
address, and the dot products of small integers, which alone differ between tiers. Everything else is generic LLVM.
Knows nothing about formats, rows or tokens.
"""

from llvmlite import ir
from numba.core import cgutils

from offload.config import Isa
from offload.kernels.activation import VECTOR_BYTES
from offload.kernels.intrinsics import I8, I32, I64

I16, F32 = ir.IntType(16), ir.FloatType()


class Emitter:
    """Instructions at a builder's position, for vectors of `lanes` int32 or float32."""

    def __init__(self, builder, isa: Isa):
        self.builder = builder
        self.isa = isa
        self.vector = VECTOR_BYTES[isa]  # bytes
        self.lanes = self.vector // 4
        self.ints = ir.VectorType(I32, self.lanes)
        self.words = ir.VectorType(I16, 2 * self.lanes)
        self.bytes = ir.VectorType(I8, 4 * self.lanes)
        self.floats = ir.VectorType(F32, self.lanes)

    # addresses and memory

    def at(self, address, offset: int):
        return self.builder.add(address, ir.Constant(I64, offset)) if offset else address

    def load(self, address, kind, offset: int = 0):
        value = self.builder.load(self.builder.inttoptr(self.at(address, offset), ir.PointerType(kind)))
        value.align = 1
        return value

    def store(self, value, address):
        self.builder.store(value, self.builder.inttoptr(address, ir.PointerType(value.type))).align = 1

    def prefetch(self, address, offset: int = 0):
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(I8), I32, I32, I32])
        target = self.builder.inttoptr(self.at(address, offset), ir.PointerType(I8))
        hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]  # for reading, into every level, data
        self._call("llvm.prefetch.p0", kind, [target, *hints])

    def variable(self, value):
        """A vector that changes in loops; LLVM turns it into a register."""
        return cgutils.alloca_once_value(self.builder, value)

    # arithmetic

    def constant(self, value, kind):
        return ir.Constant(kind, [value] * kind.count)

    def splat(self, value, kind):
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, undefined, self._order([0] * kind.count))

    def mask(self, value, bits: int):
        return self.builder.and_(value, self.constant(bits, value.type))

    def left(self, value, count: int):
        return self.builder.shl(value, self.constant(count, value.type)) if count else value

    def right(self, value, count: int):
        return self.builder.lshr(value, self.constant(count, value.type)) if count else value

    def right_signed(self, value, count: int):
        return self.builder.ashr(value, self.constant(count, value.type)) if count else value

    def cast(self, value, kind):
        return self.builder.bitcast(value, kind)

    def to_float(self, value):
        return self.builder.sitofp(value, self.floats)

    def mul(self, a, b):
        return self.builder.fmul(a, b)

    def fma(self, a, b, c):
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        return self._call(f"llvm.fma.v{self.lanes}f32", kind, [a, b, c])

    def total(self, value):
        """Sum of a float vector: halves added to halves, the same tree every time."""
        while value.type.count > 1:
            half = value.type.count // 2
            low = self.builder.shuffle_vector(value, value, self._order(range(half)))
            high = self.builder.shuffle_vector(value, value, self._order(range(half, 2 * half)))
            value = self.builder.fadd(low, high)
        return self.builder.extract_element(value, ir.Constant(I32, 0))

    def group_scales(self, address, groups: int):
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

    # dot products of small integers, four bytes or two words to a lane: start + sum of u * s over the pairs

    def dot_bytes(self, start, pairs):
        """Unsigned bytes of at most 15 times signed bytes, exact."""
        if self.isa == "avx512vnni":
            kind = ir.FunctionType(self.ints, [self.ints] * 3)
            for unsigned, signed in pairs:
                start = self._call("llvm.x86.avx512.vpdpbusd.512", kind, [start, unsigned, signed])
            return start
        kind = ir.FunctionType(self.words, [self.bytes] * 2)
        # 2 * 15 * 128 * (two pairs) fits 16 bits, so the pairs are added before they are widened.
        parts = [self._call("llvm.x86.avx2.pmadd.ub.sw", kind, [self.cast(v, self.bytes) for v in p]) for p in pairs]
        both = parts[0] if len(parts) == 1 else self.builder.add(*parts)
        return self.builder.add(start, self._multiply_add(both, self.constant(1, self.words)))

    def dot_words(self, start, pairs):
        """Signed words times signed words, exact while the sum fits 32 bits."""
        if self.isa == "avx512vnni":
            kind = ir.FunctionType(self.ints, [self.ints] * 3)
            for a, b in pairs:
                operands = [start, self.cast(a, self.ints), self.cast(b, self.ints)]
                start = self._call("llvm.x86.avx512.vpdpwssd.512", kind, operands)
            return start
        for a, b in pairs:
            start = self.builder.add(start, self._multiply_add(self.cast(a, self.words), self.cast(b, self.words)))
        return start

    def _multiply_add(self, a, b):
        return self._call("llvm.x86.avx2.pmadd.wd", ir.FunctionType(self.ints, [self.words] * 2), [a, b])

    def _order(self, indexes):
        indexes = list(indexes)
        return ir.Constant(ir.VectorType(I32, len(indexes)), indexes)

    def _call(self, name, kind, args):
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)
