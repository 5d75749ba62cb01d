"""Vector code of one tier, written as LLVM instructions.

`Emitter` is the short vocabulary that product.py is written in: whole vectors of the tier's width, loads at any
address, and the dot products of small integers, which alone differ between tiers. Everything else is generic LLVM.
Knows nothing about formats, rows or tokens.
"""

from typing import Any, TypeAlias

from llvmlite import ir
from numba.core import cgutils

from offload.config import Isa
from offload.kernels.intrinsics import F32, I8, I16, I32, I64

Value: TypeAlias = Any  # an ir.Value; llvmlite ships no types

VECTOR_BYTES: dict[Isa, int] = {"amx": 64, "avx512vnni": 64, "avx512": 64, "avxvnni": 32, "avx2": 32}
VNNI: frozenset[Isa] = frozenset({"amx", "avx512vnni", "avxvnni"})  # tiers with vpdpbusd and vpdpwssd


class Emitter:
    """Instructions at a builder's position, for vectors of `lanes` int32 or float32."""

    def __init__(self, builder: ir.IRBuilder, isa: Isa) -> None:
        self.builder = builder
        self.vnni = isa in VNNI
        self.vector = VECTOR_BYTES[isa]  # bytes
        self.lanes = self.vector // 4
        self.ints = ir.VectorType(I32, self.lanes)
        self.words = ir.VectorType(I16, 2 * self.lanes)
        self.bytes = ir.VectorType(I8, 4 * self.lanes)
        self.floats = ir.VectorType(F32, self.lanes)

    # addresses and memory

    def at(self, address: Value, offset: int) -> Value:
        return self.builder.add(address, ir.Constant(I64, offset)) if offset else address

    def load(self, address: Value, kind: ir.Type, offset: int = 0, align: int = 4) -> Value:
        value = self.builder.load(self.builder.inttoptr(self.at(address, offset), ir.PointerType(kind)))
        value.align = align
        return value

    def load_line(self, address: Value, offset: int) -> Value:
        """A vector of weights: packed lines are aligned."""
        return self.load(address, self.ints, offset, self.vector)

    def store(self, value: Value, address: Value, offset: int = 0) -> None:
        pointer = self.builder.inttoptr(self.at(address, offset), ir.PointerType(value.type))
        self.builder.store(value, pointer).align = 4

    def prefetch(self, address: Value, offset: int = 0) -> None:
        pointer = self.builder.inttoptr(self.at(address, offset), ir.PointerType(I8))
        hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]  # for reading, into every level, data
        self._call("llvm.prefetch.p0", ir.VoidType(), pointer, *hints)

    def spread(self, address: Value, kind: ir.VectorType, offset: int = 0) -> Value:
        """One dword of memory in every lane."""
        return self.splat(self.load(address, kind.element, offset), kind)

    # arithmetic

    def constant(self, value: float, kind: ir.VectorType) -> Value:
        return ir.Constant(kind, [value] * kind.count)

    def splat(self, value: Value, kind: ir.VectorType) -> Value:
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
        )

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
        return self._call(f"llvm.fma.v{self.lanes}f32", self.floats, a, b, c)

    def bf16_scales(self, address: Value, offset: int) -> Value:
        """As many bf16 as there are lanes, as float32."""
        packed = self.load(address, ir.VectorType(I16, self.lanes), offset, self.vector // 2)
        return self.cast(self.left(self.builder.zext(packed, self.ints), 16), self.floats)

    # dot products of small integers, four bytes or two words to a lane, added to a total

    def dot_bytes(self, total: Value | None, unsigned: Value, signed: Value) -> Value:
        """Unsigned bytes times signed bytes. Exact with VNNI, where the total is dwords; else it is words, starts as
        None and is exact for up to 8 products of at most 15 with at most 127: 8 * 2 bytes * 15 * 127 = 30480."""
        if self.vnni:
            return self._vnni("vpdpbusd", total, unsigned, signed)
        products = self._x86("pmadd.ub.sw", self.words, self.cast(unsigned, self.bytes), self.cast(signed, self.bytes))
        if total is None:
            return products
        # Never saturates, and unlike a plain addition stays where it is written: LLVM would turn the chain into a tree.
        return self._call(f"llvm.sadd.sat.v{2 * self.lanes}i16", self.words, total, products)

    def widen(self, words: Value, start: Value) -> Value:
        """start + the sum of a lane's two words."""
        return self.builder.add(start, self._multiply_add(words, self.constant(1, self.words)))

    def dot_words(self, total: Value, a: Value, b: Value) -> Value:
        """Signed words times signed words; exact while the sum fits 32 bits."""
        if self.vnni:
            return self._vnni("vpdpwssd", total, a, b)
        return self.builder.add(total, self._multiply_add(self.cast(a, self.words), self.cast(b, self.words)))

    def _vnni(self, instruction: str, total: Value | None, a: Value, b: Value) -> Value:
        name = f"llvm.x86.avx512.{instruction}.{8 * self.vector}"
        return self._call(name, self.ints, total, self.cast(a, self.ints), self.cast(b, self.ints))

    def _multiply_add(self, a: Value, b: Value) -> Value:
        return self._x86("pmadd.wd", self.ints, a, b)

    def _x86(self, name: str, returns: ir.Type, *args: Value) -> Value:
        """AVX2's instruction, or its 512-bit version, which LLVM spells in another way."""
        wide = {"pmadd.ub.sw": "llvm.x86.avx512.pmaddubs.w.512", "pmadd.wd": "llvm.x86.avx512.pmaddw.d.512"}
        return self._call(wide[name] if self.vector == 64 else f"llvm.x86.avx2.{name}", returns, *args)

    def _call(self, name: str, returns: ir.Type, *args: Value) -> Value:
        kind = ir.FunctionType(returns, [arg.type for arg in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)
