"""Weight matrices in one byte for each value, and products with them: weights only, inputs keep the model's type.

A weight is its code (int8, or e4m3: fp8) times a factor of its block. Blocks are whole output rows where we quantise:
the codes then are exact in any type that a product runs in, and the factors multiply its result. They are 128 x 128
where a checkpoint is published in fp8, whose codes and factors are kept as they are.

No wide copy stays: a product widens WIDE_TILE weights at a time. Which tensors are narrow: `hybrid.widths`. Called by
`hybrid.weights`, which makes them, and wherever the model multiplies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hybrid.config import WIDE_TILE, NarrowFormat
from offload.config import FP8_BLOCK

CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
SMALLEST_SCALE = 1e-30  # of a block that is all zeros: its codes are 0 whatever they are divided by


@dataclass(frozen=True, slots=True)
class Narrow:
    """One matrix. `scales` are (out, 1), or one for each 128 x 128 block with the partial ones."""

    codes: torch.Tensor  # (out, in) int8 or float8_e4m3fn
    scales: torch.Tensor  # float32

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Of codes and factors."""
        return self.codes.nbytes + self.scales.nbytes

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) times the transposed matrix: (…, out) in x's type."""
        products = [self._product(x, rows) for rows in self._tiles()]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def wide(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix itself (out, in), rounded once to `dtype`."""
        return self._wide(slice(0, len(self.codes)), dtype)

    def _product(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        if not self._by_row:
            return torch.nn.functional.linear(x, self._wide(rows, x.dtype))
        return torch.nn.functional.linear(x, self.codes[rows].to(x.dtype)).mul_(self.scales[rows, 0])

    def _wide(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows from a block's first."""
        codes = self.codes[rows].to(dtype)  # exact: bf16 holds every code
        if self._by_row:
            return codes.mul_(self.scales[rows])
        factors = self.scales[rows.start // FP8_BLOCK : -(-rows.stop // FP8_BLOCK)]
        factors = factors.repeat_interleave(FP8_BLOCK, 0)[: len(codes)]  # (rows, blocks)
        n_whole = codes.shape[1] // FP8_BLOCK  # blocks that are not partial
        whole, rest = codes[:, : n_whole * FP8_BLOCK], codes[:, n_whole * FP8_BLOCK :]
        torch.unflatten(whole, 1, (n_whole, FP8_BLOCK)).mul_(factors[:, :n_whole, None])
        rest.mul_(factors[:, n_whole:])
        return codes

    def _tiles(self) -> Iterator[slice]:
        """The rows in tiles of whole blocks."""
        n_rows, n_in = self.codes.shape
        step = max(1, WIDE_TILE // n_in // FP8_BLOCK) * FP8_BLOCK
        return (slice(a, min(a + step, n_rows)) for a in range(0, n_rows, step))

    @property
    def _by_row(self) -> bool:
        return self.scales.shape == (len(self.codes), 1)


Matrix = torch.Tensor | Narrow


def linear(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """x (…, in) times the transposed weight (out, in): (…, out)."""
    return weight.linear(x) if isinstance(weight, Narrow) else torch.nn.functional.linear(x, weight)


def widened(weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) itself, for products that are no plain `linear`; wide ones are in `dtype` already."""
    return weight.wide(dtype) if isinstance(weight, Narrow) else weight


def quantised(values: torch.Tensor, fmt: NarrowFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, in) and factors (rows, 1) of rows in any floating type.

    Each row's largest value gets the largest code. int8 is then off by 0.9 % where a row is 7,168 normal numbers, e4m3
    by 2.6 %, whatever its blocks are (2026-11-23, docs/LOG.md).
    """
    values = values.float()
    scales = (values.abs().amax(1, keepdim=True) / LARGEST[fmt]).clamp_min_(SMALLEST_SCALE)
    codes = values / scales
    return (codes.round_() if fmt == "int8" else codes).to(CODES[fmt]), scales
