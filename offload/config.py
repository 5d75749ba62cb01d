"""What the expert store and the worker pool need to know, as plain values.

Letters: E experts of a layer, D hidden size, F inner size of one expert. The caller (hybrid) fills these in
from the model's config.json; nothing here knows tensor names or models.

The packed layout. Kernels read experts as tiles: 16 output rows side by side, so that a vector holds one dword of
each row and no sum crosses its lanes. A tile is a run of blocks, a block is lines of 64 bytes:

    line j          dword j of each of the 16 rows, as published (8 int4, 4 int8 or fp8, 2 bf16 inputs)
    last line       int4, int8: bf16 scales of the 16 rows for inputs 0..31, then for 32..63; fp8: 16 float32

Four tiles, one after another, make a unit, the piece of work that a worker takes. A unit of `gate_up` is two tiles of
gate and the two of up that meet them (32 inner rows); a unit of `down` is 64 output rows. An expert is its gate_up
units and then its down units, first those of the first memory node. Missing rows and inputs are filled up with zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ExpertFormat = Literal["int4", "int8", "bf16", "fp8"]
Precision = Literal["a8", "a16"]
Isa = Literal["amx", "avx512vnni", "avx512", "avxvnni", "avx2", "portable"]
Projection = Literal["gate", "up", "down"]
Matrix = Literal["gate_up", "down"]
Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all

PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
MATRICES: tuple[Matrix, ...] = ("gate_up", "down")
GROUP = 32  # in-features that share one scale, int4 and int8
FP8_BLOCK = 128  # rows and columns that share one scale, fp8
LINE = 64  # bytes of a cache line, and of one vector of 16 rows
TILE_ROWS = 16
UNIT_TILES = 4
UNIT_ROWS: dict[Matrix, int] = {"gate_up": 32, "down": 64}  # inner rows and output rows of one unit
# Bytes that one weight's product with few tokens moves in a device's memory, where they are decoded to 16 bits first
# (offload/device_product.py): rows put in order, taken apart, scaled, and read by the product.
DECODED_TRAFFIC: dict[ExpertFormat, float] = {"int4": 10.0, "int8": 7.0, "bf16": 6.0, "fp8": 11.0}
MAX_NODES = 8  # memory nodes that workers can tell apart: two sockets of four


@dataclass(frozen=True, slots=True)
class Block:
    """A tile's rows over some inputs."""

    inputs: int
    lines: int  # of weights
    scale_lines: int

    @property
    def bytes(self) -> int:
        return (self.lines + self.scale_lines) * LINE


BLOCKS: dict[ExpertFormat, Block] = {
    "int4": Block(64, 8, 1),
    "int8": Block(64, 16, 1),
    "bf16": Block(32, 16, 0),
    "fp8": Block(128, 32, 1),
}


@dataclass(frozen=True, slots=True)
class ExpertGeometry:
    """Sizes of one layer's routed experts."""

    n_experts: int  # E
    hidden: int  # D
    inner: int  # F

    def shape(self, projection: Projection) -> tuple[int, int]:
        """(out, in) features of one matrix: gate and up are (F, D), down is (D, F)."""
        return (self.hidden, self.inner) if projection == "down" else (self.inner, self.hidden)

    def n_units(self, matrix: Matrix) -> int:
        rows = self.inner if matrix == "gate_up" else self.hidden
        return -(-rows // UNIT_ROWS[matrix])

    def n_blocks(self, matrix: Matrix, fmt: ExpertFormat) -> int:
        """Blocks of one tile."""
        inputs = self.hidden if matrix == "gate_up" else self.inner
        return -(-inputs // BLOCKS[fmt].inputs)

    def unit_bytes(self, matrix: Matrix, fmt: ExpertFormat) -> int:
        return UNIT_TILES * self.n_blocks(matrix, fmt) * BLOCKS[fmt].bytes

    def units_of(self, matrix: Matrix, node: int, n_nodes: int) -> range:
        """The units that one of the memory nodes holds."""
        units = self.n_units(matrix)
        return range(units * node // n_nodes, units * (node + 1) // n_nodes)

    def node_bytes(self, node: int, n_nodes: int, fmt: ExpertFormat) -> int:
        """Bytes of one node's share of an expert."""
        return sum(len(self.units_of(m, node, n_nodes)) * self.unit_bytes(m, fmt) for m in MATRICES)

    def decoding_bytes(self, item: int) -> int:
        """Most memory that decoding one expert takes on a device that computes in `item` bytes: gate and up as
        published, as values and as the result."""
        return 2 * self.inner * self.hidden * (3 + item)

    def decoded_traffic(self, fmt: ExpertFormat) -> float:
        """Bytes that one expert's product with few tokens moves in a device's memory."""
        return 3 * self.inner * self.hidden * DECODED_TRAFFIC[fmt]

    def expert_bytes(self, fmt: ExpertFormat) -> int:
        """Bytes of one packed expert: weights, scales and padding (none where D and F are multiples of 64)."""
        return self.node_bytes(0, 1, fmt)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """How the expert products are run.

    `threads` None takes one worker for each physical core this process may use; `isa` None takes the best tier
    that the processor and the operating system allow.
    """

    threads: int | None = None
    precision: Precision = "a8"
    isa: Isa | None = None
