"""Packs row-major matrices into the units that the kernels read (drawn in offload/config.py).

The bytes of a weight stay as they are; only their order changes: 8 x 8 dwords at a time are turned in registers, with
generic LLVM shuffles, so that one source serves every processor. What the block at a row's end and the tile at the
last row lack is filled up in a small copy first. Knows no files, no nodes, no quantisation. offload/reading.py and
the tests call it; the compiled part holds no interpreter lock, so threads run it side by side.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.config import (
    BLOCKS,
    FP8_BLOCK,
    GROUP,
    LINE,
    MATRICES,
    TILE_ROWS,
    UNIT_TILES,
    ExpertFormat,
    ExpertGeometry,
    Matrix,
    Projection,
)
from offload.kernels.intrinsics import I8, I16, I32, I64, NOPYTHON

MEMBERS: dict[Matrix, tuple[Projection, ...]] = {"gate_up": ("gate", "up"), "down": ("down",)}
NO_SCALES, PAIRS, BROADCAST = range(3)  # a block's scale line: none, two bf16 of each row, one float32 of all rows
SCALE_KIND: dict[ExpertFormat, int] = {"int4": PAIRS, "int8": PAIRS, "bf16": NO_SCALES, "fp8": BROADCAST}
ZERO: dict[ExpertFormat, int] = {"int4": 0x88, "int8": 0, "bf16": 0, "fp8": 0}  # a byte of weights that are zero
STAGED = TILE_ROWS * BLOCKS["fp8"].lines * 4  # bytes of the largest block's rows

_DWORDS = ir.VectorType(I32, 8)
_LOW32, _HIGH32 = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
_LOW64, _HIGH64 = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
_LOW128, _HIGH128 = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


def store_past_caches(builder, value, address):
    """A store that need not read the line it fills: 1.6 times the rate of plain stores (Zen 3, 2026-11-22)."""
    done = builder.store(value, builder.inttoptr(address, ir.PointerType(value.type)))
    done.align = LINE // 2
    done.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


@intrinsic
def turn_dwords(typingctx, source, row_bytes, target):
    """Line j of `target` gets dword j of 16 rows, for j of 0..7: two turns of 8 x 8 dwords."""

    def codegen(context, builder, signature, args):
        source, row_bytes, target = args

        def shuffle(a, b, order):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))

        halves = []
        for half in range(2):
            rows = []
            for row in range(8 * half, 8 * half + 8):
                place = builder.add(source, builder.mul(row_bytes, ir.Constant(I64, row)))
                rows.append(builder.load(builder.inttoptr(place, ir.PointerType(_DWORDS))))
                rows[-1].align = 1
            pairs = [shuffle(a, b, o) for a, b in zip(rows[::2], rows[1::2], strict=True) for o in (_LOW32, _HIGH32)]
            fours = [shuffle(pairs[i], pairs[i + 2], order) for i in (0, 1, 4, 5) for order in (_LOW64, _HIGH64)]
            halves.append([shuffle(fours[i], fours[i + 4], order) for order in (_LOW128, _HIGH128) for i in range(4)])
        for i in range(8):
            for half in range(2):
                place = builder.add(target, ir.Constant(I64, LINE * i + LINE // 2 * half))
                store_past_caches(builder, halves[half][i], place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def part_pairs(typingctx, source, row_bytes, target):
    """A line at `target`: the first halves of a dword of each of 16 rows, then the second halves."""

    def codegen(context, builder, signature, args):
        source, row_bytes, target = args
        gathered = ir.Constant(ir.VectorType(I32, TILE_ROWS), ir.Undefined)
        for row in range(TILE_ROWS):
            place = builder.add(source, builder.mul(row_bytes, ir.Constant(I64, row)))
            dword = builder.load(builder.inttoptr(place, ir.PointerType(I32)))
            dword.align = 1
            gathered = builder.insert_element(gathered, dword, ir.Constant(I32, row))
        words = builder.bitcast(gathered, ir.VectorType(I16, 2 * TILE_ROWS))
        order = ir.Constant(ir.VectorType(I32, 2 * TILE_ROWS), [*range(0, 32, 2), *range(1, 32, 2)])
        line = builder.shuffle_vector(words, words, order)
        store_past_caches(builder, line, target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def copy_bytes(typingctx, source, target, n):
    def codegen(context, builder, signature, args):
        source, target, n = args
        kind = ir.PointerType(I8)
        cgutils.raw_memcpy(builder, builder.inttoptr(target, kind), builder.inttoptr(source, kind), n, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def fill_bytes(typingctx, target, value, n):
    def codegen(context, builder, signature, args):
        target, value, n = args
        place = builder.inttoptr(target, ir.PointerType(I8))
        cgutils.memset(builder, place, n, builder.trunc(value, I8))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def finish_stores(typingctx):
    """Stores past the caches are in no order until a fence."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit(**NOPYTHON)
def stage(source, row_bytes, rows, n_bytes, width, fill, target):
    """Copy `n_bytes` (at most `width`) of each of `rows` rows to 16 rows of `width` bytes; `fill` what is missing."""
    fill_bytes(target, fill, TILE_ROWS * width)
    for row in range(rows):
        copy_bytes(source + row * row_bytes, target + row * width, min(n_bytes, width))


@njit(**NOPYTHON)
def pack_block(kind, data, row_bytes, lines, scales, scale_bytes, rows, out):
    """One block whose 16 rows can all be read. `rows` of them count."""
    for line in range(0, lines, 8):
        turn_dwords(data + 4 * line, row_bytes, out + LINE * line)
    last = out + LINE * lines
    if kind == PAIRS:
        part_pairs(scales, scale_bytes, last)
    elif kind == BROADCAST:
        fill_bytes(last, 0, LINE)
        for row in range(rows):
            copy_bytes(scales, last + 4 * row, 4)


@njit(**NOPYTHON)
def pack_tile(kind, fill, lines, data, row_bytes, scales, scale_bytes, rows, out, scratch):
    """`rows` rows (at most 16) of all inputs."""
    width = 4 * lines  # bytes of a row in a block
    whole = row_bytes // width if rows == TILE_ROWS else 0
    step = (lines + (kind != NO_SCALES)) * LINE
    for block in range(-(-row_bytes // width)):
        place, factors = data + block * width, scales + 4 * block
        if block < whole:
            pack_block(kind, place, row_bytes, lines, factors, scale_bytes, rows, out)
        else:
            stage(place, row_bytes, rows, row_bytes - block * width, width, fill, scratch)
            if kind == PAIRS:
                stage(factors, scale_bytes, rows, scale_bytes - 4 * block, 4, 0, scratch + STAGED)
                pack_block(kind, scratch, width, lines, scratch + STAGED, 4, rows, out)
            else:
                pack_block(kind, scratch, width, lines, factors, scale_bytes, rows, out)
        out += step


@njit(cache=True, **NOPYTHON)
def pack_rows(
    kind, fill, lines, row_bytes, scale_bytes, scale_rows, n_rows, n_members, d0, s0, d1, s1, begin, end, out, scratch
):
    """Units [begin, end) of the one or two matrices that share a unit: addresses of their data and scales."""
    tiles = UNIT_TILES // n_members  # of one matrix in a unit
    tile_bytes = -(-row_bytes // (4 * lines)) * (lines + (kind != NO_SCALES)) * LINE
    for unit in range(begin, end):
        for tile in range(UNIT_TILES):
            data, scales = (d0, s0) if tile < tiles else (d1, s1)
            row = (unit * tiles + tile % tiles) * TILE_ROWS
            rows = max(0, min(TILE_ROWS, n_rows - row))
            data += row * row_bytes
            scales += row // scale_rows * scale_bytes
            pack_tile(kind, fill, lines, data, row_bytes, scales, scale_bytes, rows, out, scratch)
            out += tile_bytes
    finish_stores()


def row_sizes(fmt: ExpertFormat, n_in: int) -> tuple[int, int, int]:
    """Bytes of a published row, bytes of a row of scales, and the weight rows that share one."""
    if fmt == "bf16":
        return 2 * n_in, 0, 1
    if fmt == "fp8":
        return n_in, 4 * -(-n_in // FP8_BLOCK), FP8_BLOCK
    return n_in // 2 if fmt == "int4" else n_in, 2 * (n_in // GROUP), 1


def pack_units(
    fmt: ExpertFormat,
    geometry: ExpertGeometry,
    matrix: Matrix,
    sources: Sequence[tuple[int, int]],
    units: range,
    out: int,
) -> None:
    """Pack `units` to the address `out`, a multiple of 64.

    `sources`: addresses of data and scales of gate and up, or of down, as if all rows from 0 on were there.
    """
    n_rows, n_in = geometry.shape(MEMBERS[matrix][0])
    scratch = aligned(STAGED + LINE)
    places = [address for source in (sources[0], sources[-1]) for address in source]
    pack_rows(
        SCALE_KIND[fmt], ZERO[fmt], BLOCKS[fmt].lines, *row_sizes(fmt, n_in), n_rows, len(sources), *places,
        units.start, units.stop, out, scratch.ctypes.data,
    )  # fmt: skip


def pack_expert(
    fmt: ExpertFormat,
    geometry: ExpertGeometry,
    matrices: Mapping[Projection, tuple[npt.NDArray[np.generic], npt.NDArray[np.generic] | None]],
) -> npt.NDArray[np.uint8]:
    """One expert from row-major data and scales as `offload.formats` has them, for one memory node."""
    packed = aligned(geometry.expert_bytes(fmt))
    at = packed.ctypes.data
    for matrix in MATRICES:
        arrays = [[np.ascontiguousarray(a) for a in matrices[p] if a is not None] for p in MEMBERS[matrix]]
        sources = [(held[0].ctypes.data, held[1].ctypes.data if len(held) > 1 else 0) for held in arrays]
        units = range(geometry.n_units(matrix))
        pack_units(fmt, geometry, matrix, sources, units, at)
        at += len(units) * geometry.unit_bytes(matrix, fmt)
    return packed


def aligned(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory that starts at a cache line."""
    memory = np.empty(n_bytes + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + n_bytes]
