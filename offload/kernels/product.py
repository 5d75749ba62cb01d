"""The inner product of every vector tier: a block of weight rows times up to four tokens.

One source for all formats, precisions and tiers: `ProductCode` writes the LLVM of one variant, with the block's sums
in registers. Weights are decoded once for all tokens of the block. Each (row, token) sum goes through the same
operations in the same order whatever the block's shape, so a token's result does not depend on its neighbours.

    weights 64 bytes at a time (fp8: 128), as published; a row's last part goes through a zeroed copy, because nothing
    may be read past the end of a tensor
      int4   32-bit lane = 8 nibbles. a8: low and high nibbles are two byte vectors; a16: four word vectors
      int8   32-bit lane = 4 bytes, even and odd ones are two word vectors
      bf16   32-bit lane = 2 weights, the halves are two float vectors
      fp8    32-bit lane = 4 weights; each is exact as a float32 of 2**-120 times its value

Called by address from layer.py, compiled by table.py.
"""

from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.config import FP8_BLOCK, GROUP, ExpertFormat, Isa, Precision
from offload.kernels.activation import layout
from offload.kernels.intrinsics import I8, I64
from offload.kernels.vector import F32, Emitter

MAX_TOKENS = 4
TILE = 32  # rows of one task, and the stride of a token's sums in `out`, in floats

# Weight rows to one call, by tokens: as many sums as the registers hold (16 of 32 bytes, 32 of 64 bytes).
BLOCK_ROWS: dict[Isa, tuple[int, int, int, int]] = {
    "avx512vnni": (4, 4, 4, 4),
    "avx2": (4, 4, 2, 2),
    "portable": (4, 4, 4, 4),
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one turn of the inner loop takes from a row."""

    inputs: int
    weight_bytes: int
    scale_bytes: int


CHUNKS: dict[ExpertFormat, Chunk] = {
    "int4": Chunk(128, 64, 128 // GROUP * 2),
    "int8": Chunk(64, 64, 64 // GROUP * 2),
    "bf16": Chunk(32, 64, 0),
    "fp8": Chunk(FP8_BLOCK, 128, 4),
}


@dataclass(frozen=True, slots=True)
class Operands:
    """Addresses of one chunk: rows' weights, rows' scales, tokens' records, and the sums as variables [row][token]."""

    weights: list
    scales: list
    records: list
    sums: list

    def add(self, e: Emitter, row: int, token: int, a, b):
        """sums[row][token] += a * b"""
        target = self.sums[row][token]
        e.builder.store(e.fma(a, b, e.builder.load(target)), target)


def integers(e: Emitter, fmt: ExpertFormat, precision: Precision, o: Operands):
    """int4 and int8: integer product of each lane, times both scales."""
    block = layout(e.isa, fmt, precision)
    unpack = {("int4", "a8"): nibble_bytes, ("int4", "a16"): nibble_words}.get((fmt, precision), byte_words)
    dot = e.dot_bytes if unpack is nibble_bytes else e.dot_words
    chunk = CHUNKS[fmt]
    for step in range(chunk.weight_bytes // e.vector):
        groups = block.inputs // GROUP
        for row, (weights, scales) in enumerate(zip(o.weights, o.scales, strict=True)):
            parts = unpack(e, e.load(weights, e.ints, step * e.vector))
            scale = e.group_scales(e.at(scales, step * groups * 2), groups)
            for token, record in enumerate(o.records):
                base = step * block.bytes
                inputs = [e.load(record, e.ints, base + p * e.vector) for p in range(block.parts)]
                start = e.load(record, e.ints, base + block.parts * e.vector)
                input_scale = e.load(record, e.floats, base + (block.parts + 1) * e.vector)
                product = dot(start, list(zip(parts, inputs, strict=True)))
                o.add(e, row, token, e.to_float(product), e.mul(scale, input_scale))


def nibble_bytes(e: Emitter, packed):
    return [e.mask(packed, 0x0F0F0F0F), e.mask(e.right(packed, 4), 0x0F0F0F0F)]


def nibble_words(e: Emitter, packed):
    words = e.cast(packed, e.words)
    return [e.mask(e.right(words, 4 * p), 0x000F) for p in range(4)]


def byte_words(e: Emitter, packed):
    words = e.cast(packed, e.words)
    return [e.right_signed(e.left(words, 8), 8), e.right_signed(words, 8)]


def bfloats(e: Emitter, o: Operands):
    """bf16: each half of a lane is the upper half of a float32."""
    for step in range(64 // e.vector):
        for row, weights in enumerate(o.weights):
            packed = e.load(weights, e.ints, step * e.vector)
            parts = [e.cast(e.left(packed, 16), e.floats), e.cast(e.mask(packed, 0xFFFF0000), e.floats)]
            for token, record in enumerate(o.records):
                for p, part in enumerate(parts):
                    o.add(e, row, token, part, e.load(record, e.floats, (2 * step + p) * e.vector))


def float8s(e: Emitter, o: Operands):
    """fp8 e4m3: 128 products with unscaled weights, then the block's scale."""
    for row, (weights, scale) in enumerate(zip(o.weights, o.scales, strict=True)):
        partial = [e.constant(0.0, e.floats)] * len(o.records)
        for step in range(FP8_BLOCK // e.vector):
            packed = e.load(weights, e.ints, step * e.vector)
            for p in range(4):
                # Sign to bit 31, exponent and mantissa to bits 26..20.
                bits = e.mask(e.right_signed(e.left(packed, 24 - 8 * p), 4), 0x87F00000)
                weight = e.mul(e.cast(bits, e.floats), e.constant(2.0**120, e.floats))
                for token, record in enumerate(o.records):
                    values = e.load(record, e.floats, (4 * step + p) * e.vector)
                    partial[token] = e.fma(weight, values, partial[token])
        spread = e.splat(e.load(scale, F32), e.floats)
        for token, value in enumerate(partial):
            o.add(e, row, token, value, spread)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of the compiled function, all int64: table.py says what they mean."""

    weights: ir.Value
    row_bytes: ir.Value
    scales: ir.Value
    scale_bytes: ir.Value
    rows: ir.Value
    n_in: ir.Value
    tokens: ir.Value  # not read: the variant says it
    records: ir.Value
    out: ir.Value
    ahead: ir.Value


class ProductCode:
    """Writes one variant's function at the emitter's position."""

    def __init__(self, e: Emitter, fmt: ExpertFormat, precision: Precision, tokens: int, a: Arguments):
        self.e, self.b, self.fmt, self.precision, self.a = e, e.builder, fmt, precision, a
        self.chunk = CHUNKS[fmt]
        block = layout(e.isa, fmt, precision)
        self.record_bytes = self.chunk.inputs // block.inputs * block.bytes  # of one chunk
        self.rows = self._row_numbers(BLOCK_ROWS[e.isa][tokens - 1])
        self.records = [e.load(a.records, I64, 8 * token) for token in range(tokens)]
        self.sums = [[e.variable(e.constant(0.0, e.floats)) for _ in range(tokens)] for _ in self.rows]

    def emit(self) -> None:
        """Whole chunks of the rows, then what is left of them, then the sums."""
        e, b, a = self.e, self.b, self.a
        weights, scales = self._rows_of(a.weights, a.row_bytes), self._rows_of(a.scales, a.scale_bytes)
        ahead = self._rows_of(a.ahead, a.row_bytes)
        whole, rest = b.udiv(a.n_in, self._int(self.chunk.inputs)), b.urem(a.n_in, self._int(self.chunk.inputs))
        copies = self._copy_rest(whole, rest, weights, scales)
        # Turn 0 walks the tensors, turn 1 the copies of their ends: one loop body for both keeps the code small.
        with cgutils.for_range(b, self._int(2), intp=I64) as turn:
            last = b.icmp_signed("==", turn.index, self._int(1))
            row_weights = [b.select(last, *pair) for pair in zip(copies[0], weights, strict=True)]
            row_scales = [b.select(last, *pair) for pair in zip(copies[1], scales, strict=True)]
            skipped = b.select(last, b.mul(whole, self._int(self.record_bytes)), self._int(0))
            records = [b.add(record, skipped) for record in self.records]
            some = b.zext(b.icmp_signed(">", rest, self._int(0)), I64)
            with cgutils.for_range(b, b.select(last, some, whole), intp=I64) as loop:
                self._prefetch(self._advance(ahead, loop.index, self.chunk.weight_bytes))
                self._chunk(loop.index, row_weights, row_scales, records)
        for row in range(len(self.rows)):
            for token in range(len(self.records)):
                e.store(e.total(b.load(self.sums[row][token])), e.at(a.out, 4 * (token * TILE + row)))

    def _chunk(self, index: ir.Value, weights: list, scales: list, records: list) -> None:
        operands = Operands(
            self._advance(weights, index, self.chunk.weight_bytes),
            self._advance(scales, index, self.chunk.scale_bytes),
            self._advance(records, index, self.record_bytes),
            self.sums,
        )
        if self.fmt == "bf16":
            bfloats(self.e, operands)
        elif self.fmt == "fp8":
            float8s(self.e, operands)
        else:
            integers(self.e, self.fmt, self.precision, operands)

    def _prefetch(self, rows: list) -> None:
        for row in rows:
            for line in range(0, self.chunk.weight_bytes, 64):
                self.e.prefetch(row, line)

    def _copy_rest(self, whole: ir.Value, rest: ir.Value, weights: list, scales: list) -> tuple[list, list]:
        """Addresses of zeroed stack copies of what the rows hold past their whole chunks."""
        b, chunk, n = self.b, self.chunk, len(weights)
        sizes = chunk.weight_bytes, 8
        rest_bytes = (
            b.udiv(b.mul(rest, self._int(chunk.weight_bytes)), self._int(chunk.inputs)),
            self._int(chunk.scale_bytes) if self.fmt == "fp8" else b.mul(b.udiv(rest, self._int(GROUP)), self._int(2)),
        )
        spaces = [cgutils.alloca_once(b, I8, size=n * size) for size in sizes]
        with b.if_then(b.icmp_signed(">", rest, self._int(0))):
            for space, size, n_bytes, step, rows in zip(
                spaces, sizes, rest_bytes, (chunk.weight_bytes, chunk.scale_bytes), (weights, scales), strict=True
            ):
                if step == 0:
                    continue
                cgutils.memset(b, space, self._int(n * size), 0)
                for i, row in enumerate(self._advance(rows, whole, step)):
                    target = b.gep(space, [self._int(i * size)])
                    source = b.inttoptr(row, ir.PointerType(I8))
                    cgutils.raw_memcpy(b, target, source, n_bytes, 1)
        return tuple(
            [b.ptrtoint(b.gep(space, [self._int(i * size)]), I64) for i in range(n)]
            for space, size in zip(spaces, sizes, strict=True)
        )

    def _row_numbers(self, n: int) -> list:
        """0, 1, ... up to the last valid row, which a short block computes several times."""
        top = self.b.sub(self.a.rows, self._int(1))
        return [self.b.select(self.b.icmp_signed("<", self._int(r), top), self._int(r), top) for r in range(n)]

    def _rows_of(self, address: ir.Value, stride: ir.Value) -> list:
        return [self.b.add(address, self.b.mul(row, stride)) for row in self.rows]

    def _advance(self, addresses: list, index: ir.Value, n_bytes: int) -> list:
        offset = self.b.mul(index, self._int(n_bytes))
        return [self.b.add(address, offset) for address in addresses]

    def _int(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)


@intrinsic(prefer_literal=True)
def emit_product(
    typingctx, isa, fmt, precision, tokens,
    weights, row_bytes, scales, scale_bytes, rows, n_in, n, records, out, ahead,
):  # fmt: skip
    """The body of one variant; the first four arguments are literals."""
    if not isinstance(isa, types.Literal):
        return None
    variant = [kind.literal_value for kind in (isa, fmt, precision, tokens)]

    def codegen(context, builder, signature, args):
        ProductCode(Emitter(builder, variant[0]), *variant[1:], Arguments(*args[4:])).emit()
        return context.get_dummy_value()

    return types.void(isa, fmt, precision, tokens, *[types.int64] * 10), codegen
