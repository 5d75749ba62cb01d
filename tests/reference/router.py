"""The choice of experts for one token at a time, in float64 and plain loops."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def route(
    x: Array,
    weight: Array,
    bias: Array | None,
    top_k: int,
    scoring: str,
    method: str,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
) -> list[dict[int, float]]:
    """For each token a map from expert to weight."""
    return [
        _route_one(logits, bias, top_k, scoring, method, n_group, topk_group, normalise, scale)
        for logits in x @ weight.T
    ]


def _route_one(
    logits: Array,
    bias: Array | None,
    top_k: int,
    scoring: str,
    method: str,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
) -> dict[int, float]:
    scores = 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    choice = scores + bias if bias is not None else scores.copy()
    allowed = list(range(len(choice)))
    if method != "greedy" and n_group > 1:
        size = len(choice) // n_group
        members = [list(range(g * size, (g + 1) * size)) for g in range(n_group)]
        best = 2 if method == "noaux_tc" else 1
        rank = [sum(sorted((choice[e] for e in group), reverse=True)[:best]) for group in members]
        kept = sorted(range(n_group), key=lambda g: -rank[g])[:topk_group]
        allowed = [e for g in kept for e in members[g]]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
    total = sum(scores[e] for e in chosen) if normalise else 1.0
    return {e: float(scores[e] / total * scale) for e in chosen}
