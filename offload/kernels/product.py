"""The inner product of every vector tier: up to 32 weight rows times up to four tokens.

One source for all formats, precisions and tiers: `ProductCode` writes the LLVM of one variant. It takes a few rows
together, with the sums of these rows and all tokens in registers, and decodes weights once for all tokens. Each
(row, token) sum goes through the same operations in the same order however many rows and tokens are taken together,
so a token's result does not depend on its neighbours.

Weights come 64 bytes of a row at a time (fp8: 128), from the published bytes. A row's end goes through a zeroed copy,
because nothing may be read past the end of a tensor. A 32-bit lane holds

    int4   8 nibbles; a8 takes them as two byte vectors (low, high nibbles), a16 as four word vectors
    int8   4 bytes, taken as two word vectors (even, odd bytes)
    bf16   2 weights, two float vectors
    fp8    4 weights, four float vectors of 2**-120 times the value (exact; the NaN codes are not treated as such)

Called by address from layer.py, compiled by table.py.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.config import FP8_BLOCK, GROUP, ExpertFormat, Isa, Precision
from offload.kernels.activation import layout
from offload.kernels.intrinsics import F32, I8, I64
from offload.kernels.vector import Emitter, Value

MAX_TOKENS = 4
TILE = 32  # rows of one task, and the stride of a token's sums in `out`, in floats


def block_rows(isa: Isa, fmt: ExpertFormat) -> tuple[int, int, int, int]:
    """Weight rows taken together, for 1, 2, 3 and 4 tokens.

    Measured on Zen 3, int4 a8, GB/s for each core in a whole layer of one token: 13.4 with 1 row (memory is read
    strictly in order), 12.8 with 2, 11.5 with 4, 10.5 with 8. Four tokens: 26 GMAC/s with 1 row, 23 with 2, 22 with 4
    (the inputs crowd the decoded rows out of 16 registers). bf16 waits for its own additions and needs more sums at
    once: 16.7 GB/s with 4 rows, 14.5 with 2, 8.6 with 1. avx512vnni is not measured: 4 streams were best with another
    layout of the weights, and with 2 rows of 4 tokens nothing is spilled.
    """
    if isa == "avx2" and fmt != "bf16":
        return (1, 1, 1, 1)
    return (4, 4, 2, 2)


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
    """Addresses of one chunk, and where the sums are kept."""

    weights: list[Value]  # by row
    scales: list[Value]  # by row
    records: list[Value]  # by token
    sums: list[list[Value]]  # by row and token

    def add(self, e: Emitter, row: int, token: int, a: Value, b: Value) -> None:
        """sums[row][token] += a * b"""
        target = self.sums[row][token]
        e.builder.store(e.fma(a, b, e.builder.load(target)), target)


def emit_integers(e: Emitter, fmt: ExpertFormat, precision: Precision, o: Operands) -> None:
    """int4 and int8: each lane's integer product, times both scales."""
    block, chunk = layout(e.isa, fmt, precision), CHUNKS[fmt]
    groups = block.inputs // GROUP  # of one vector of weights
    for step in range(chunk.weight_bytes // e.vector):
        for row, (weights, scales) in enumerate(zip(o.weights, o.scales, strict=True)):
            parts = unpack(e, fmt, precision, e.load(weights, e.ints, step * e.vector))
            scale = e.group_scales(e.at(scales, step * groups * 2), groups)
            for token, record in enumerate(o.records):
                base = step * block.bytes
                inputs = [e.load(record, e.ints, base + p * e.vector) for p in range(block.parts)]
                start = e.load(record, e.ints, base + block.parts * e.vector)
                input_scale = e.load(record, e.floats, base + (block.parts + 1) * e.vector)
                pairs = list(zip(parts, inputs, strict=True))
                product = e.dot_bytes(start, pairs) if block.element == 1 else e.dot_words(start, pairs)
                o.add(e, row, token, e.to_float(product), e.mul(scale, input_scale))


def unpack(e: Emitter, fmt: ExpertFormat, precision: Precision, packed: Value) -> list[Value]:
    """A vector of weights as the parts that the activations' layout pairs them with."""
    words = e.cast(packed, e.words)
    if fmt == "int8":
        return [e.right_signed(e.left(words, 8), 8), e.right_signed(words, 8)]
    if precision == "a16":
        return [e.mask(e.right(words, 4 * p), 0x000F) for p in range(4)]
    return [e.mask(packed, 0x0F0F0F0F), e.mask(e.right(packed, 4), 0x0F0F0F0F)]


def emit_bf16(e: Emitter, o: Operands) -> None:
    """Each half of a lane is the upper half of a float32."""
    for step in range(CHUNKS["bf16"].weight_bytes // e.vector):
        for row, weights in enumerate(o.weights):
            packed = e.load(weights, e.ints, step * e.vector)
            parts = [e.cast(e.left(packed, 16), e.floats), e.cast(e.mask(packed, 0xFFFF0000), e.floats)]
            for token, record in enumerate(o.records):
                for p, part in enumerate(parts):
                    o.add(e, row, token, part, e.load(record, e.floats, (2 * step + p) * e.vector))


def emit_fp8(e: Emitter, o: Operands) -> None:
    """128 products with weights as they are, then the block's scale."""
    for row, (weights, scale) in enumerate(zip(o.weights, o.scales, strict=True)):
        partial = [e.constant(0.0, e.floats)] * len(o.records)
        for step in range(FP8_BLOCK // e.vector):
            packed = e.load(weights, e.ints, step * e.vector)
            for p in range(4):
                # The sign to bit 31, exponent and mantissa to bits 26..20.
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

    weights: Value
    row_bytes: Value
    scales: Value
    scale_bytes: Value
    rows: Value
    n_in: Value
    tokens: Value  # not read: the variant says it
    records: Value
    out: Value
    after: Value


class ProductCode:
    """Writes one variant's function at the emitter's position."""

    def __init__(self, e: Emitter, fmt: ExpertFormat, precision: Precision, tokens: int, arguments: Arguments) -> None:
        self.e, self.b, self.a = e, e.builder, arguments
        self.fmt: ExpertFormat = fmt
        self.precision: Precision = precision
        self.chunk = CHUNKS[fmt]
        block = layout(e.isa, fmt, precision)
        self.record_bytes = self.chunk.inputs // block.inputs * block.bytes  # of one chunk
        self.n_rows = block_rows(e.isa, fmt)[tokens - 1]
        self.whole = self.b.udiv(self.a.n_in, _int(self.chunk.inputs))
        self.rest = self.b.urem(self.a.n_in, _int(self.chunk.inputs))
        self.records = [e.load(self.a.records, I64, 8 * token) for token in range(tokens)]

    def emit(self) -> None:
        """All rows, block by block."""
        b, step = self.b, _int(self.n_rows)
        n_blocks = b.udiv(b.add(self.a.rows, _int(self.n_rows - 1)), step)
        with cgutils.for_range(b, n_blocks, intp=I64) as loop:
            self._emit_block(b.mul(loop.index, step))

    def _emit_block(self, first: Value) -> None:
        """Whole chunks of the rows, then what is left of them, then the sums."""
        e, b, a = self.e, self.b, self.a
        sums = [[e.variable(e.constant(0.0, e.floats)) for _ in self.records] for _ in range(self.n_rows)]
        weights, scales = self._rows(first, a.weights, a.row_bytes), self._rows(first, a.scales, a.scale_bytes)
        weight_ends = self._copy_ends(weights, self.chunk.weight_bytes)
        scale_ends = self._copy_ends(scales, self.chunk.scale_bytes)
        ahead = self._rows_ahead(first)
        # Turn 0 walks the tensors, turn 1 the copies of their ends: one loop body for both keeps the code small.
        with cgutils.for_range(b, _int(2), intp=I64) as turn:
            last = b.icmp_signed("==", turn.index, _int(1))
            turn_weights = [b.select(last, *pair) for pair in zip(weight_ends, weights, strict=True)]
            turn_scales = [b.select(last, *pair) for pair in zip(scale_ends, scales, strict=True)]
            done = b.select(last, b.mul(self.whole, _int(self.record_bytes)), _int(0))
            records = [b.add(record, done) for record in self.records]
            n_ends = b.zext(b.icmp_signed(">", self.rest, _int(0)), I64)
            with cgutils.for_range(b, b.select(last, n_ends, self.whole), intp=I64) as loop:
                self._prefetch(self._advance(ahead, loop.index, self.chunk.weight_bytes))
                operands = Operands(
                    self._advance(turn_weights, loop.index, self.chunk.weight_bytes),
                    self._advance(turn_scales, loop.index, self.chunk.scale_bytes),
                    self._advance(records, loop.index, self.record_bytes),
                    sums,
                )
                self._emit_chunk(operands)
        out = b.add(a.out, b.mul(first, _int(4)))
        for row, row_sums in enumerate(sums):
            for token, kept in enumerate(row_sums):
                e.store(e.total(b.load(kept)), e.at(out, 4 * (token * TILE + row)))

    def _emit_chunk(self, operands: Operands) -> None:
        if self.fmt == "bf16":
            emit_bf16(self.e, operands)
        elif self.fmt == "fp8":
            emit_fp8(self.e, operands)
        else:
            emit_integers(self.e, self.fmt, self.precision, operands)

    def _prefetch(self, rows: Sequence[Value]) -> None:
        """The next rows, line by line as these are read.

        Zen 3, one token, a whole int4 layer, GB/s for each core: none 11.2, the next block 12.5, two to four blocks
        on no better, a fixed distance of 1 to 16 KiB 11.5 to 11.8.
        """
        for row in rows:
            for line in range(0, self.chunk.weight_bytes, 64):
                self.e.prefetch(row, line)

    def _copy_ends(self, rows: Sequence[Value], step: int) -> list[Value]:
        """Addresses of zeroed stack copies of what the rows hold past their whole steps; void when that is nothing."""
        b = self.b
        if step == 0:
            return list(rows)
        space = cgutils.alloca_once(b, I8, size=len(rows) * step)
        copies = [b.gep(space, [_int(i * step)]) for i in range(len(rows))]
        # The one scale of a last fp8 block is there in full; all else is as long as its share of the inputs.
        shared = self.fmt == "fp8" and step == self.chunk.scale_bytes
        n_bytes = _int(step) if shared else b.udiv(b.mul(self.rest, _int(step)), _int(self.chunk.inputs))
        with b.if_then(b.icmp_signed(">", self.rest, _int(0)), likely=False):
            cgutils.memset(b, space, _int(len(rows) * step), 0)
            for copy, row in zip(copies, self._advance(rows, self.whole, step), strict=True):
                cgutils.raw_memcpy(b, copy, b.inttoptr(row, ir.PointerType(I8)), n_bytes, 1)
        return [b.ptrtoint(copy, I64) for copy in copies]

    def _rows(self, first: Value, address: Value, stride: Value) -> list[Value]:
        """Addresses of the block's rows; a short last block computes its last row several times."""
        b = self.b
        top = b.sub(self.a.rows, _int(1))
        numbers = [b.add(first, _int(r)) for r in range(self.n_rows)]
        valid = [b.select(b.icmp_signed("<", number, top), number, top) for number in numbers]
        return [b.add(address, b.mul(number, stride)) for number in valid]

    def _rows_ahead(self, first: Value) -> list[Value]:
        """Addresses of the rows that come next, in this call or after it. They are only prefetched."""
        b, a = self.b, self.a
        following = b.add(first, _int(self.n_rows))
        inside = b.add(a.weights, b.mul(following, a.row_bytes))
        start = b.select(b.icmp_signed("<", following, a.rows), inside, a.after)
        return [b.add(start, b.mul(_int(r), a.row_bytes)) for r in range(self.n_rows)]

    def _advance(self, addresses: Sequence[Value], index: Value, n_bytes: int) -> list[Value]:
        offset = self.b.mul(index, _int(n_bytes))
        return [self.b.add(address, offset) for address in addresses]


def _int(value: int) -> Value:
    return ir.Constant(I64, value)


@intrinsic(prefer_literal=True)
def emit_product(
    typingctx, isa, fmt, precision, tokens,
    weights, row_bytes, scales, scale_bytes, rows, n_in, n, records, out, after,
):  # fmt: skip
    """The body of one variant; the first four arguments are literals."""
    if not all(isinstance(kind, types.Literal) for kind in (isa, fmt, precision, tokens)):
        return None
    names = isa.literal_value, fmt.literal_value, precision.literal_value, tokens.literal_value

    def codegen(context, builder, signature, args):
        ProductCode(Emitter(builder, names[0]), names[1], names[2], names[3], Arguments(*args[4:])).emit()
        return context.get_dummy_value()

    return types.void(isa, fmt, precision, tokens, *[types.int64] * 10), codegen
