"""Many tokens of one expert at once, through AMX: 16 tokens times 16 rows times 32 inputs in one instruction.

The other tiers multiply integers of a group and scale them; a tile multiplication cannot stop at each group. So the
weights of a unit are first written out as bf16 with their scale in them (`unpack`), where all tokens of the expert
find them (`multiply`), and activations are bf16 too. Both roundings together err by some 0.2 %, a fifth of a8; but a
token's sum differs in its last bits from what it would be with fewer tokens beside it. bf16 experts need no unpacking:
a packed block is a tile of AMX as it lies.

    panel     [tile of 16 rows][step of 32 inputs][pair of inputs: 16 x 2 bf16]
    tokens    rows of bf16 inputs, equally spaced

Called by address from layer.py, compiled by table.py; only the tier `amx` uses it.
"""

# mypy: disallow-untyped-defs=False

from typing import Literal

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.config import BLOCKS, GROUP, LINE, TILE_ROWS, UNIT_TILES
from offload.kernels.intrinsics import I8, I16, I64
from offload.kernels.vector import Emitter, Value

AmxFormat = Literal["int4", "bf16"]
MANY_TOKENS = 16  # an expert with fewer is left to the vector kernels: unpacking costs as much as 16 tokens of these
TOKENS = 32  # of one multiplication: two tiles
STEP_BYTES = TILE_ROWS * LINE  # one tile of weights, 32 inputs
SUMS_STRIDE = 4 * UNIT_TILES * TILE_ROWS
ROW_PADDING = LINE  # between rows of tokens: spaced by a power of two they would share a few sets of the cache
C, A, B = (0, 1, 2, 3), (4, 5), (6, 7)  # tile registers: sums by token tile and weight tile, tokens, weights


def panel_bytes(n_in: int, fmt: AmxFormat) -> int:
    """Bytes of a unit's weights written out; 0 where they are used as they lie."""
    return (
        0 if fmt == "bf16" else UNIT_TILES * -(-n_in // BLOCKS[fmt].inputs) * BLOCKS[fmt].inputs // GROUP * STEP_BYTES
    )


def row_bytes(n_in: int, fmt: AmxFormat) -> int:
    """From one token's bf16 inputs to the next one's."""
    return 2 * -(-n_in // BLOCKS[fmt].inputs) * BLOCKS[fmt].inputs + ROW_PADDING


class UnpackCode:
    """Writes the function that turns a unit of int4 into a panel."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.b = e, e.builder

    def emit(self, weights: Value, n_blocks: Value, panel: Value) -> None:
        """Tiles lie one after another on both sides, so all blocks of the unit are one row of blocks."""
        b, block = self.b, BLOCKS["int4"]
        steps = block.inputs // GROUP
        with cgutils.for_range(b, b.mul(n_blocks, _int(UNIT_TILES)), intp=I64) as loop:
            source = b.add(weights, b.mul(loop.index, _int(block.bytes)))
            target = b.add(panel, b.mul(loop.index, _int(steps * STEP_BYTES)))
            for step in range(steps):
                scales = self.e.bf16_scales(source, block.lines * LINE + step * LINE // 2)
                shift = self.e.mul(scales, self.e.constant(-8.0, self.e.floats))
                for line in range(block.lines // steps):
                    packed = self.e.load_line(source, (step * block.lines // steps + line) * LINE)
                    for pair in range(4):
                        both = self._pair(packed, pair, scales, shift)
                        self.e.store(both, target, step * STEP_BYTES + (4 * line + pair) * LINE)

    def _pair(self, packed: Value, pair: int, scales: Value, shift: Value) -> Value:
        """Inputs 2 p and 2 p + 1 of a dword, as two bf16 in a dword."""
        e = self.e
        low, high = (
            e.cast(e.fma(e.to_float(e.mask(e.right(packed, 8 * pair + 4 * i), 0xF)), scales, shift), e.ints)
            for i in (0, 1)
        )
        half = e.constant(0x8000, e.ints)
        low, high = self.b.add(low, half), self.b.add(high, half)
        return self.b.or_(e.right(low, 16), e.mask(high, 0xFFFF0000))


class MultiplyCode:
    """Writes the function that multiplies a panel by up to 32 tokens."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def emit(self, panel: Value, steps: Value, tokens: Value, stride: Value, n: Value, out: Value) -> None:
        b = self.b
        full = _int(TILE_ROWS)
        with b.if_else(b.icmp_signed(">", n, full)) as (two, one):
            with two:
                self._emit_tiles(panel, steps, tokens, stride, [full, b.sub(n, full)], out)
            with one:
                self._emit_tiles(panel, steps, tokens, stride, [n], out)
        self._call("llvm.x86.tilerelease")

    def _emit_tiles(
        self, panel: Value, steps: Value, tokens: Value, stride: Value, counts: list[Value], out: Value
    ) -> None:
        """Two tiles of weights at a time, with all tiles of tokens, from end to end."""
        b = self.b
        self._configure(counts)
        with cgutils.for_range(b, _int(UNIT_TILES // 2), intp=I64) as turn:
            weights = [
                b.add(panel, b.mul(b.mul(b.add(b.mul(turn.index, _int(2)), _int(j)), steps), _int(STEP_BYTES)))
                for j in (0, 1)
            ]
            sums = [(i, j) for i in range(len(counts)) for j in (0, 1)]
            for i, j in sums:
                self._call("llvm.x86.tilezero", _tile(C[2 * i + j]))
            with cgutils.for_range(b, steps, intp=I64) as loop:
                for i in range(len(counts)):
                    row = b.add(tokens, b.mul(stride, _int(TILE_ROWS * i)))
                    self._load(A[i], b.add(row, b.mul(loop.index, _int(LINE))), stride)
                for j in (0, 1):
                    self._load(B[j], b.add(weights[j], b.mul(loop.index, _int(STEP_BYTES))), _int(LINE))
                for i, j in sums:
                    self._call("llvm.x86.tdpbf16ps", _tile(C[2 * i + j]), _tile(A[i]), _tile(B[j]))
            target = b.add(out, b.mul(turn.index, _int(2 * LINE)))
            for i, j in sums:
                place = b.add(target, _int(i * TILE_ROWS * SUMS_STRIDE + j * LINE))
                self._call("llvm.x86.tilestored64", _tile(C[2 * i + j]), self._pointer(place), _int(SUMS_STRIDE))

    def _configure(self, counts: list[Value]) -> None:
        """Palette 1: at byte 16 the bytes of a row of each tile, at byte 48 its rows."""
        b = self.b
        space = cgutils.alloca_once(b, ir.ArrayType(I8, LINE))
        cgutils.memset(b, space, _int(LINE), 0)
        base = b.ptrtoint(space, I64)
        b.store(ir.Constant(I8, 1), self._pointer(base))
        rows = {tile: _int(TILE_ROWS) for tile in B}
        for i, count in enumerate(counts):
            rows |= dict.fromkeys((C[2 * i], C[2 * i + 1], A[i]), count)
        for tile, count in rows.items():
            width = b.inttoptr(b.add(base, _int(16 + 2 * tile)), ir.PointerType(I16))
            b.store(ir.Constant(I16, LINE), width)
            b.store(b.trunc(count, I8), self._pointer(b.add(base, _int(48 + tile))))
        self._call("llvm.x86.ldtilecfg", self._pointer(base))

    def _load(self, tile: int, address: Value, stride: Value) -> None:
        self._call("llvm.x86.tileloadd64", _tile(tile), self._pointer(address), stride)

    def _pointer(self, address: Value) -> Value:
        return self.b.inttoptr(address, ir.PointerType(I8))

    def _call(self, name: str, *args: Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)


def _int(value: int) -> Value:
    return ir.Constant(I64, value)


def _tile(number: int) -> Value:
    return ir.Constant(I8, number)


@intrinsic
def emit_unpack(typingctx, weights, n_blocks, panel):
    """The body of table.UNPACK."""

    def codegen(context, builder, signature, args):
        UnpackCode(Emitter(builder, "avx512")).emit(*args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def emit_multiply(typingctx, panel, steps, tokens, stride, n, out):
    """The body of table.MULTIPLY."""

    def codegen(context, builder, signature, args):
        MultiplyCode(builder).emit(*args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen
