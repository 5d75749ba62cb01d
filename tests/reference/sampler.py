"""The obvious sampler: one row at a time, NumPy float64, plain loops and sorts."""

import numpy as np

from hybrid.batch import Row, Sampling


def adjusted(logits: np.ndarray, row: Row) -> np.ndarray:
    """Logits (V,) after logit_bias and penalties."""
    s = row.sampling
    assert s is not None
    out = logits.astype(np.float64).copy()
    for token, bias in s.logit_bias:
        out[token] += bias
    for token in set(row.prompt) | set(row.output):
        out[token] = out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
    for token in set(row.output):
        out[token] -= s.frequency_penalty * row.output.count(token) + s.presence_penalty
    return out


def candidates(logits: np.ndarray, row: Row) -> tuple[list[int], np.ndarray]:
    """Ids that may be drawn, in the order of the draw, and their probabilities."""
    s = row.sampling
    assert s is not None
    out = adjusted(logits, row)
    ranked = sorted(range(len(out)), key=lambda token: (-out[token], token))
    if s.temperature == 0:
        return ranked[:1], np.ones(1)
    kept = _filtered(ranked, softmax(out / s.temperature), s)
    if s.top_k is None and s.top_p is None and s.min_p is None:
        kept.sort()
    weights = softmax(out / s.temperature)[kept]
    return kept, weights / weights.sum()


def _filtered(ranked: list[int], probabilities: np.ndarray, s: Sampling) -> list[int]:
    kept = list(ranked)
    if s.top_k is not None:
        kept = kept[: s.top_k]
    if s.top_p is not None:
        mass = probabilities[kept] / probabilities[kept].sum()
        before = np.cumsum(mass) - mass  # an id stays while those above it do not suffice
        kept = [token for token, so_far in zip(kept, before, strict=True) if so_far < s.top_p] or kept[:1]
    if s.min_p is not None:
        kept = [token for token in kept if probabilities[token] >= s.min_p * probabilities[ranked[0]] * (1 - 1e-12)]
    return kept


def sample(logits: np.ndarray, row: Row, u: float) -> int:
    """The id at `u` in [0, 1) of the cumulative distribution."""
    ids, probabilities = candidates(logits, row)
    return ids[min(int(np.searchsorted(np.cumsum(probabilities), u, side="right")), len(ids) - 1)]


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Natural logs of the probabilities of logits (V,)."""
    x = x.astype(np.float64)
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()))


def best(logits: np.ndarray, k: int) -> list[int]:
    """The `k` most probable ids, the lower id first among equals."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:k]
