"""The inner product of every vector tier: one unit of packed weights (64 rows) times up to eight tokens.

One source for all formats, precisions and tiers: `ProductCode` writes the LLVM of one variant. A lane is a weight
row, so sums never cross lanes and weights are taken apart once for all tokens. Each (row, token) sum goes through the
same operations in the same order however many tiles and tokens are taken together, so a token's result does not
depend on its neighbours.

A dword of a row is taken apart as

    int4   a8: two byte vectors (low, high nibbles); a16: four word vectors
    int8   bytes with `vpdpbusd`, else two word vectors (even, odd bytes)
    bf16   two float vectors
    fp8    four float vectors of 2**-120 times the value (exact; the NaN codes are not treated as such)

Called by address from layer.py, compiled by table.py.
"""

# mypy: disallow-untyped-defs=False

from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.config import BLOCKS, GROUP, LINE, TILE_ROWS, UNIT_TILES, ExpertFormat, Isa, Precision
from offload.kernels.activation import layout
from offload.kernels.intrinsics import I64
from offload.kernels.vector import Emitter, Value

TOKENS = (1, 2, 3, 4, 8)  # there is a variant for each
MAX_TOKENS = TOKENS[-1]
UNIT_SUMS = UNIT_TILES * TILE_ROWS  # sums of one token
AHEAD = 1152  # bytes to prefetch ahead


def tiles_together(isa: Isa, fmt: ExpertFormat, tokens: int) -> int:
    """Tiles whose sums stay in registers from end to end, each its own stream of memory; 0: sums go through memory."""
    if isa in ("avx2", "avxvnni"):  # a tile is two vectors, and there are only 16 registers
        return 1 if tokens <= (2 if fmt in ("int4", "int8") else 4) else 0
    return 4 if tokens <= 2 else 2 if tokens <= 4 else 0


@dataclass(frozen=True, slots=True)
class Column:
    """One vector of rows."""

    lines: Value  # address of its first vector of weights in the block
    scales: Value  # address of its first scales
    sums: list[Value]  # pointers, by token


class ProductCode:
    """Writes one variant's function at the emitter's position."""

    def __init__(self, e: Emitter, isa: Isa, fmt: ExpertFormat, precision: Precision, tokens: int) -> None:
        self.e, self.b = e, e.builder
        self.fmt: ExpertFormat = fmt
        self.precision: Precision = precision
        self.block = BLOCKS[fmt]
        self.record = layout(isa, fmt, precision)
        self.record_bytes = self.block.inputs // GROUP * self.record.group_bytes  # of one block
        self.tokens = tokens
        self.tiles = tiles_together(isa, fmt, tokens)
        self.parts = LINE // e.vector  # vectors of a line
        self.columns = self.parts if tokens <= 4 else 1  # taken together where sums go through memory

    def emit(self, weights: Value, n_blocks: Value, records: Value, out: Value) -> None:
        """All tiles of the unit."""
        rows = [self.e.load(records, I64, 8 * token) for token in range(self.tokens)]
        if self.tiles:
            self._emit_in_registers(weights, n_blocks, rows, out)
        else:
            self._emit_through_memory(weights, n_blocks, rows, out)

    def _emit_in_registers(self, weights: Value, n_blocks: Value, rows: list[Value], out: Value) -> None:
        """A few tiles from end to end: for few tokens, where weights come from memory."""
        e, b = self.e, self.b
        tile_bytes = b.mul(n_blocks, _int(self.block.bytes))
        with cgutils.for_range(b, _int(UNIT_TILES // self.tiles), intp=I64) as turn:
            first = b.mul(turn.index, _int(self.tiles))
            starts = [b.add(weights, b.mul(b.add(first, _int(i)), tile_bytes)) for i in range(self.tiles)]
            zero = e.constant(0.0, e.floats)
            n_columns = self.tiles * self.parts
            sums = [[cgutils.alloca_once_value(b, zero) for _ in rows] for _ in range(n_columns)]
            with cgutils.for_range(b, n_blocks, intp=I64) as loop:
                skipped = b.mul(loop.index, _int(self.block.bytes))
                blocks = [b.add(start, skipped) for start in starts]
                for block in blocks:
                    self._prefetch(block, self.block.bytes)
                columns = [
                    self._column(blocks[i // self.parts], _int(i % self.parts), column) for i, column in enumerate(sums)
                ]
                done = b.mul(loop.index, _int(self.record_bytes))
                self._emit_block(columns, [b.add(row, done) for row in rows])
            target = b.add(out, b.mul(first, _int(4 * TILE_ROWS)))
            for i, column in enumerate(sums):
                for token, kept in enumerate(column):
                    e.store(b.load(kept), target, 4 * UNIT_SUMS * token + e.vector * i)

    def _emit_through_memory(self, weights: Value, n_blocks: Value, rows: list[Value], out: Value) -> None:
        """Tile by tile, its sums in `out`, so that all registers serve its tokens."""
        e, b = self.e, self.b
        tile_bytes = b.mul(n_blocks, _int(self.block.bytes))
        for token in range(self.tokens):
            for offset in range(0, 4 * UNIT_SUMS, e.vector):
                e.store(e.constant(0.0, e.floats), out, 4 * UNIT_SUMS * token + offset)
        turns = self.parts // self.columns
        share = self.block.bytes // turns  # of a block, to prefetch in each turn
        with cgutils.for_range(b, _int(UNIT_TILES), intp=I64) as tile:
            start = b.add(weights, b.mul(tile.index, tile_bytes))
            sums = b.add(out, b.mul(tile.index, _int(4 * TILE_ROWS)))
            # Blocks and their columns in one loop: LLVM would unroll one over the columns, share what both load and
            # run out of registers.
            with cgutils.for_range(b, b.mul(n_blocks, _int(turns)), intp=I64) as loop:
                index, turn = b.udiv(loop.index, _int(turns)), b.urem(loop.index, _int(turns))
                block = b.add(start, b.mul(index, _int(self.block.bytes)))
                self._prefetch(b.add(block, b.mul(turn, _int(share))), share)
                part = b.mul(turn, _int(self.columns))
                places = [b.add(part, _int(i)) for i in range(self.columns)]
                columns = [self._column(block, place, self._pointers(sums, place)) for place in places]
                done = b.mul(index, _int(self.record_bytes))
                self._emit_block(columns, [b.add(row, done) for row in rows])

    def _pointers(self, sums: Value, part: Value) -> list[Value]:
        """Where a column's sums lie, by token."""
        e, b = self.e, self.b
        first = b.add(sums, b.mul(part, _int(e.vector)))
        kind = ir.PointerType(e.floats)
        return [b.inttoptr(e.at(first, 4 * UNIT_SUMS * token), kind) for token in range(self.tokens)]

    def _column(self, block: Value, part: Value, sums: list[Value]) -> Column:
        b, vector = self.b, self.e.vector
        per_scale = 2 if self.fmt in ("int4", "int8") else 4
        scales = b.add(block, b.mul(part, _int(vector * per_scale // 4)))
        return Column(b.add(block, b.mul(part, _int(vector))), self.e.at(scales, self.block.lines * LINE), sums)

    def _emit_block(self, columns: list[Column], records: list[Value]) -> None:
        if self.fmt == "bf16":
            self._emit_floats(columns, records, 2)
        elif self.fmt == "fp8":
            self._emit_floats(columns, records, 4)
        else:
            for group in range(self.block.inputs // GROUP):
                self._emit_integers(columns, records, group)

    def _prefetch(self, address: Value, n_bytes: int) -> None:
        for line in range(0, n_bytes, LINE):
            self.e.prefetch(address, AHEAD + line)

    def _load_sum(self, pointer: Value) -> Value:
        value = self.b.load(pointer)
        value.align = 4
        return value

    def _store_sum(self, value: Value, pointer: Value) -> None:
        self.b.store(value, pointer).align = 4

    def _emit_integers(self, columns: list[Column], records: list[Value], group: int) -> None:
        """int4 and int8: the integer product of 32 inputs, times both scales."""
        e = self.e
        lines = self.block.lines * GROUP // self.block.inputs
        at = group * self.record.group_bytes
        end = at + GROUP * self.record.element
        # Nibbles without VNNI are summed as words and meet the start when they are widened.
        narrow = self.record.element == 1 and not e.vnni
        starts = [e.spread(record, e.ints, end) for record in records]
        totals = [[None if narrow else start for start in starts] for _ in columns]
        for line in range(lines):
            place = (group * lines + line) * LINE
            taken = [self._take_apart(e.load_line(column.lines, place)) for column in columns]
            for token, record in enumerate(records):
                for p in range(len(taken[0])):
                    inputs = e.spread(record, e.ints, at + 4 * (line * len(taken[0]) + p))
                    for c, parts in enumerate(taken):
                        totals[c][token] = self._add(totals[c][token], parts[p], inputs)
        for c, column in enumerate(columns):
            scales = e.bf16_scales(column.scales, group * LINE // 2)
            for token, record in enumerate(records):
                total = e.widen(totals[c][token], starts[token]) if narrow else totals[c][token]
                both = e.mul(scales, e.spread(record, e.floats, end + 4))
                kept = column.sums[token]
                self._store_sum(e.fma(e.to_float(total), both, self._load_sum(kept)), kept)

    def _add(self, total: Value, weights: Value, inputs: Value) -> Value:
        if self.record.element == 2:
            return self.e.dot_words(total, weights, inputs)
        return self.e.dot_bytes(total, weights, inputs)

    def _take_apart(self, packed: Value) -> list[Value]:
        """A vector of weights as the parts that the activations' order pairs them with."""
        e = self.e
        words = e.cast(packed, e.words)
        if self.fmt == "int4" and self.precision == "a8":
            return [e.mask(packed, 0x0F0F0F0F), e.mask(e.right(packed, 4), 0x0F0F0F0F)]
        if self.fmt == "int4":
            return [e.mask(e.right(words, 4 * p), 0x000F) for p in range(4)]
        if self.record.element == 1:
            return [self.b.xor(packed, e.constant(0x80808080, e.ints))]
        return [e.right_signed(e.left(words, 8), 8), e.right_signed(words, 8)]

    def _emit_floats(self, columns: list[Column], records: list[Value], per_dword: int) -> None:
        """bf16 and fp8: float products; fp8's sum over the block is scaled afterwards."""
        e = self.e
        scaled = self.block.scale_lines > 0
        zero = e.constant(0.0, e.floats)
        sums = [[zero if scaled else self._load_sum(kept) for kept in column.sums] for column in columns]
        for line in range(self.block.lines):
            packed = [e.load_line(column.lines, line * LINE) for column in columns]
            for p in range(per_dword):
                parts = [self._float_part(value, p) for value in packed]
                for token, record in enumerate(records):
                    inputs = e.spread(record, e.floats, 4 * (line * per_dword + p))
                    for c, part in enumerate(parts):
                        sums[c][token] = e.fma(part, inputs, sums[c][token])
        for column, made in zip(columns, sums, strict=True):
            for kept, value in zip(column.sums, made, strict=True):
                if scaled:
                    value = e.fma(value, e.load(column.scales, e.floats), self._load_sum(kept))
                self._store_sum(value, kept)

    def _float_part(self, packed: Value, p: int) -> Value:
        e = self.e
        if self.fmt == "bf16":  # each half of a dword is the upper half of a float32
            return e.cast(e.left(packed, 16) if p == 0 else e.mask(packed, 0xFFFF0000), e.floats)
        # The sign to bit 31, exponent and mantissa to bits 26..20.
        bits = e.mask(e.right_signed(e.left(packed, 24 - 8 * p), 4), 0x87F00000)
        return e.mul(e.cast(bits, e.floats), e.constant(2.0**120, e.floats))


def _int(value: int) -> Value:
    return ir.Constant(I64, value)


@intrinsic(prefer_literal=True)
def emit_product(typingctx, isa, fmt, precision, tokens, weights, n_blocks, records, out):
    """The body of one variant; the first four arguments are literals."""
    if not all(isinstance(kind, types.Literal) for kind in (isa, fmt, precision, tokens)):
        return None
    names = isa.literal_value, fmt.literal_value, precision.literal_value, tokens.literal_value

    def codegen(context, builder, signature, args):
        ProductCode(Emitter(builder, names[0]), *names).emit(*args[4:])
        return context.get_dummy_value()

    return types.void(isa, fmt, precision, tokens, *[types.int64] * 4), codegen
