"""An expert's product on the device, from the very bytes that the kernels on the host read.

The bytes are those of one packed expert as drawn in offload/config.py, all its gate_up units and then all its down
units, whatever memory nodes the host splits it over: `host_pieces` says where they lie there, and in which order they
make an expert. They are decoded to the type that the device computes in, in plain torch operations of fixed number,
and nothing here waits for the device. Knows no slots, no layers and no routing. Called by offload/split.py.

Letters as in config.py, and T tokens, N experts, U units, B blocks of a tile, R output rows, I inputs with padding.
"""

import torch
from torch.nn.functional import linear, silu

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
)

MEMBERS: dict[Matrix, int] = {"gate_up": 2, "down": 1}  # matrices that share a unit
WORKING_BYTES = 256 << 20  # that `add_few` decodes at a time: one expert of K2.5, 27 of V2-Lite


class DeviceProduct:
    """Adds experts' weighted products to a sum on the device."""

    def __init__(self, geometry: ExpertGeometry, fmt: ExpertFormat, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype`: of the decoded weights and the products; sums over experts are float32."""
        self._geometry, self._fmt, self._dtype, self._device = geometry, fmt, dtype, device
        self._sizes = {matrix: geometry.n_units(matrix) * geometry.unit_bytes(matrix, fmt) for matrix in MATRICES}
        self.n_bytes = geometry.expert_bytes(fmt)  # of one expert
        # While gate and up are decoded each weight lies there as values, as halves and as the result.
        self.working_bytes = 2 * geometry.inner * geometry.hidden * (3 + dtype.itemsize)
        self._together = max(1, WORKING_BYTES // self.working_bytes)

    def add(
        self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, shares: torch.Tensor, data: torch.Tensor
    ) -> None:
        """out[rows] += shares * expert(x[rows]) for one expert and many tokens.

        `out` (T, D) float32, `x` (T, D), `rows` (R,) int64, none twice, `shares` (R,) float32, `data` (n_bytes,)
        uint8, all on the device.
        """
        y = self._product(x[rows][None], data[None])[0]  # (R, D)
        out.index_add_(0, rows, y.float() * shares[:, None])

    def add_few(
        self, out: torch.Tensor, x: torch.Tensor, shares: torch.Tensor, memory: torch.Tensor, places: torch.Tensor
    ) -> None:
        """out += sum_n shares[n] * expert_n(x) for several experts and few tokens: every expert takes every token.

        `shares` (N, T) float32, 0 where a token did not choose the expert: that token's product is left out, even if
        it overflows. Expert n lies in `memory` (slots, n_bytes) uint8 at `places` (N,) int64. What an expert costs
        then is reading its weights.
        """
        for first in range(0, len(places), self._together):
            some = shares[first : first + self._together, :, None]  # (N, T, 1)
            data = memory[places[first : first + self._together]]  # (N, n_bytes)
            y = self._product(x.expand(len(some), *x.shape), data)  # (N, T, D)
            for weighted in (y.float() * some).masked_fill_(some == 0, 0):  # one after another, ascending
                out += weighted

    def weights(self, matrix: Matrix, data: torch.Tensor) -> torch.Tensor:
        """(N, members, R, I) decoded, for data (N, n_bytes): gate and up, or down alone."""
        first = 0 if matrix == "gate_up" else self._sizes["gate_up"]
        n, members, block = len(data), MEMBERS[matrix], BLOCKS[self._fmt]
        lines = data[:, first : first + self._sizes[matrix]].view(
            n, -1, members, UNIT_TILES // members, self._geometry.n_blocks(matrix, self._fmt), block.bytes // LINE, LINE
        )  # (N, U, M, tiles, B, lines, 64)
        # Dword j of 16 rows becomes 16 rows of dwords: the rows as published, filled up to whole tiles and blocks.
        dwords = lines[..., : block.lines, :].view(torch.int32)  # (N, U, M, tiles, B, J, 16)
        rows = dwords.permute(0, 2, 1, 3, 6, 4, 5).reshape(n, members, -1, dwords.shape[4], block.lines)  # (N,M,R,B,J)
        return self._decode(rows.view(torch.uint8), lines[..., block.lines :, :])

    def _product(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """(N, T, D): each expert's answer to its x (N, T, D)."""
        hidden, inner = self._geometry.hidden, self._geometry.inner
        gate_up = self.weights("gate_up", data)[..., :hidden]  # (N, 2, R, D)
        both = _times(x.to(self._dtype), gate_up.flatten(1, 2))  # (N, T, 2 R)
        gate, up = both.view(*both.shape[:2], *gate_up.shape[1:3])[..., :inner].unbind(-2)  # (N, T, F) each
        down = self.weights("down", data)[:, 0, :hidden, :inner]  # (N, D, F)
        return _times(silu(gate) * up, down)

    def _decode(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(N, M, R, I) from rows (N, M, R, B, bytes) and the scale lines (N, U, M, tiles, B, 0 or 1, 64)."""
        if self._fmt == "bf16":
            return rows.view(torch.bfloat16).flatten(-2).to(self._dtype)
        if self._fmt == "fp8":
            values = rows.view(torch.float8_e4m3fn).to(self._dtype)  # (N, M, R, B, 128)
            each = scales.view(torch.float32)  # (N, U, M, tiles, B, 1, 16)
            factors = each.permute(0, 2, 1, 3, 6, 4, 5).reshape(*values.shape[:4], 1)
            width = FP8_BLOCK
        else:
            values = _nibbles(rows) if self._fmt == "int4" else rows.view(torch.int8)  # (N, M, R, B, 64)
            pairs = scales.view(torch.bfloat16).reshape(*scales.shape[:5], 2, TILE_ROWS)  # (N, U, M, tiles, B, 2, 16)
            factors = pairs.permute(0, 2, 1, 3, 6, 4, 5).reshape(*values.shape[:3], -1, 1).to(self._dtype)
            values, width = values.reshape(*factors.shape[:4], GROUP), GROUP
        weights = torch.empty(values.shape, dtype=self._dtype, device=values.device)
        torch.mul(values, factors, out=weights)  # in the wider of the two types, then rounded once
        assert weights.shape[-1] == width
        return weights.flatten(-2)


def _nibbles(rows: torch.Tensor) -> torch.Tensor:
    """(..., 2 n) int8 values -8 to 7 of (..., n) bytes, the low half first."""
    flipped = rows ^ 0x88  # value + 8 becomes the value's own four bits, which shifts as signed bytes extend
    high = flipped.view(torch.int8) >> 4
    low = (flipped << 4).view(torch.int8) >> 4
    return torch.stack((low, high), -1).flatten(-2)


def _times(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, T, R): x (N, T, I) by weights (N, R, I)."""
    if len(x) == 1:
        return linear(x[0], weights[0])[None]
    return torch.bmm(x, weights.transpose(1, 2))


def host_pieces(geometry: ExpertGeometry, fmt: ExpertFormat, n_nodes: int) -> tuple[tuple[int, int, int, int], ...]:
    """Where an expert's bytes lie on the host: (node, matrix, offset in the expert, bytes) of each piece.

    A piece begins at `store.addresses[layer, expert, node, matrix]`. Pieces without bytes are left out.
    """
    pieces, offset = [], 0
    for number, matrix in enumerate(MATRICES):
        for node in range(n_nodes):
            size = len(geometry.units_of(matrix, node, n_nodes)) * geometry.unit_bytes(matrix, fmt)
            if size:
                pieces.append((node, number, offset, size))
            offset += size
    return tuple(pieces)
