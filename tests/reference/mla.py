"""Multi-head latent attention, rotary embedding and YaRN, written the obvious way in float64.

One whole sequence at a time, one head at a time, rotations as complex numbers.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def frequencies(
    dim: int, theta: float, factor: float, original: int, beta_fast: float, beta_slow: float
) -> list[float]:
    """YaRN's angle for each pair and step of position (arXiv 2309.00071, as the published modelling code rounds it)."""

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(beta_fast)), 0), min(math.ceil(dimension(beta_slow)), dim - 1)
    result = []
    for pair in range(dim // 2):
        trained = theta ** (-2 * pair / dim)
        ramp = min(max((pair - low) / ((high - low) or 0.001), 0.0), 1.0)
        result.append(trained / factor * ramp + trained * (1 - ramp))
    return result


def rotate(x: Array, position: int, angles: list[float]) -> Array:
    """Turn neighbours (x0, x1), (x2, x3), … as complex numbers."""
    turned = np.empty_like(x)
    for pair, angle in enumerate(angles):
        z = complex(x[2 * pair], x[2 * pair + 1]) * complex(math.cos(position * angle), math.sin(position * angle))
        turned[2 * pair], turned[2 * pair + 1] = z.real, z.imag
    return turned


def norm(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm of each row."""
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight)


def attention(
    x: Array,
    w: Mapping[str, Array],
    n_heads: int,
    nope: int,
    rope: int,
    v: int,
    scale: float,
    angles: list[float],
    eps: float = 1e-6,
) -> Array:
    """(S, D) to (S, D), causal. `w` has q_proj or q_a_proj, q_a_layernorm, q_b_proj, and the rest by published name."""
    n = len(x)
    q = x @ w["q_proj"].T if "q_proj" in w else norm(x @ w["q_a_proj"].T, w["q_a_layernorm"], eps) @ w["q_b_proj"].T
    kv = x @ w["kv_a_proj_with_mqa"].T
    latent_size = kv.shape[1] - rope
    c = norm(kv[:, :latent_size], w["kv_a_layernorm"], eps)
    k_pe = np.stack([rotate(kv[s, latent_size:], s, angles) for s in range(n)])
    q = q.reshape(n, n_heads, nope + rope)
    expanded = (c @ w["kv_b_proj"].T).reshape(n, n_heads, nope + v)
    heads = []
    for h in range(n_heads):
        q_pe = np.stack([rotate(q[s, h, nope:], s, angles) for s in range(n)])
        scores = (q[:, h, :nope] @ expanded[:, h, :nope].T + q_pe @ k_pe.T) * scale
        scores[np.triu_indices(n, 1)] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ expanded[:, h, nope:])
    return np.concatenate(heads, 1) @ w["o_proj"].T
