"""Rotary position embedding: YaRN's frequencies, and the rotation of adjacent pairs.

Knows positions and frequencies, no attention. Called by `hybrid.model` (the table of a step) and `hybrid.mla`.
"""

import math
from dataclasses import dataclass

import torch

from hybrid.config import ModelConfig, RopeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies of one model, float32 on the device."""

    frequencies: torch.Tensor  # (R/2,)
    factor: float  # of cos and sin
    interleaved: bool

    def table(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the angles at `positions` (T,): each (T, R/2) float32."""
        angles = positions.float()[:, None] * self.frequencies  # (T, R/2)
        return angles.cos() * self.factor, angles.sin() * self.factor

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate the pairs of the last dimension (R) of x; cos and sin must broadcast against (…, R/2).

        Published checkpoints pair neighbours, (x0, x1), (x2, x3), …; only a config that says `rope_interleave` false
        pairs x_i with x_(i + R/2). The layout of the input is kept: queries and keys share it, so scores do not care.
        """
        pairs = torch.unflatten(
            x.float(), -1, (-1, 2) if self.interleaved else (2, -1)
        )  # (..., R/2, 2) or (..., 2, R/2)
        axis = -1 if self.interleaved else -2
        a, b = pairs.unbind(axis)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2).to(x.dtype)  # (..., R)


def build_rope(config: ModelConfig, device: torch.device) -> Rope:
    """The rotation that a config describes."""
    frequencies = yarn_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return Rope(frequencies.to(device, torch.float32), factor, config.rope_interleave)


def yarn_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Inverse frequencies, (dim/2,) float64. YaRN (arXiv 2309.00071): fast pairs as trained, slow ones stretched.

    A pair that turns more than `beta_fast` times over the original context keeps its frequency, one that turns fewer
    than `beta_slow` times is divided by `factor`, and those between are blended linearly by index.
    """
    trained = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (R/2,)
    if scaling is None:
        return trained
    low = max(math.floor(_index_of(scaling.beta_fast, dim, theta, scaling)), 0)
    high = min(math.ceil(_index_of(scaling.beta_slow, dim, theta, scaling)), dim - 1)
    width = high - low if high != low else 0.001  # the published code's guard against 0 / 0
    stretched = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)  # (R/2,)
    return trained / scaling.factor * stretched + trained * (1 - stretched)


def _index_of(turns: float, dim: int, theta: float, scaling: RopeScaling) -> float:
    """Index, in dimensions, of the pair that turns `turns` times over the original context."""
    return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
