"""The small layers: RMS norm and the gated MLP, as plain functions of tensors.

Called by `hybrid.mla`, `hybrid.moe` and `hybrid.model`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from hybrid.config import PIECE_TOKENS


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension: in float32, rounded to x's type before the weight, as trained."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(silu(gate x) * up x): the dense layers and the shared experts."""

    gate: torch.Tensor  # (F, D)
    up: torch.Tensor  # (F, D)
    down: torch.Tensor  # (D, F)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) to (T, D)."""
        inner = silu(linear(x, self.gate)) * linear(x, self.up)  # (T, F)
        return linear(inner, self.down)  # (T, D)


def by_pieces(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """layer(x), PIECE_TOKENS rows of x at a time."""
    parts = torch.split(x, PIECE_TOKENS)
    return layer(x) if len(parts) == 1 else torch.cat([layer(part) for part in parts])
