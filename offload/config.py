"""What the expert store and the worker pool need to know, as plain values.

Letters: E experts of a layer, D hidden size, F inner size of one expert. The caller (hybrid) fills these in
from the model's config.json; nothing here knows tensor names or models.
"""

from dataclasses import dataclass
from typing import Literal

ExpertFormat = Literal["int4", "int8", "bf16", "fp8"]
Precision = Literal["a8", "a16"]
Isa = Literal["avx512vnni", "avx2", "portable"]
Projection = Literal["gate", "up", "down"]

PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
GROUP = 32  # in-features that share one scale, int4 and int8
FP8_BLOCK = 128  # rows and columns that share one scale, fp8


@dataclass(frozen=True, slots=True)
class ExpertGeometry:
    """Sizes of one layer's routed experts."""

    n_experts: int  # E
    hidden: int  # D
    inner: int  # F

    def shape(self, projection: Projection) -> tuple[int, int]:
        """(out, in) features of one matrix: gate and up are (F, D), down is (D, F)."""
        return (self.hidden, self.inner) if projection == "down" else (self.inner, self.hidden)

    def expert_bytes(self, fmt: ExpertFormat) -> int:
        """Bytes of one expert, weights and scales, in `fmt`."""
        return sum(matrix_bytes(*self.shape(p), fmt) for p in PROJECTIONS)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """How the expert products are run.

    `threads` None takes one worker for each physical core this process may use; `isa` None takes the best tier
    that the processor and the operating system allow.
    """

    threads: int | None = None
    precision: Precision = "a8"
    isa: Isa | None = None


def matrix_bytes(n_out: int, n_in: int, fmt: ExpertFormat) -> int:
    """Bytes of one (n_out, n_in) matrix with its scales: bf16 per 32 inputs, or float32 per 128x128 block for fp8."""
    if fmt == "bf16":
        return 2 * n_out * n_in
    if fmt == "fp8":
        return n_out * n_in + 4 * -(-n_out // FP8_BLOCK) * -(-n_in // FP8_BLOCK)
    weights = n_out * n_in // 2 if fmt == "int4" else n_out * n_in
    return weights + 2 * n_out * (n_in // GROUP)
