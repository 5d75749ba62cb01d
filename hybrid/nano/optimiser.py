"""Muon for the matrices of attention and dense layers, AdamW for everything else.

Muon (Jordan 2024; the update's scale as in Moonlight, arXiv 2502.16982) needs fewer steps; on experts, whose matrices
are many and small, its orthogonalisation costs more time than it saves on a CPU. Called by `hybrid.nano.train`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_MOMENTUM = 0.95
_DECAY = 0.05
_STEPS = 5
_ADAM = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "queries.weight")  # tables, and the router
_EYES = 1 / 3  # of AdamW's rate
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's quintic iteration


class Optimiser:
    """Both optimisers over one network. `eyes` are weights that learn at a third of AdamW's rate."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], eyes: Iterable[nn.Parameter] = ()) -> None:
        by_muon = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
        for name, weight in named:
            by_muon[_suits_muon(name, weight)].append(weight)
        self._muon = by_muon[True]
        self._momentum = [torch.zeros_like(weight) for weight in self._muon]
        groups = [{"params": by_muon[False]}, {"params": list(eyes)}]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def step(self, muon_rate: float, adam_rate: float) -> None:
        """One update from the gradients, clipped to norm 1, the eyes' on their own; the gradients are cleared."""
        for group, factor in zip(self._adam.param_groups, (1.0, _EYES), strict=False):
            group["lr"] = adam_rate * factor
            nn.utils.clip_grad_norm_(group["params"] if factor == _EYES else [*self._muon, *group["params"]], 1.0)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, momentum in zip(self._muon, self._momentum, strict=True):
                if weight.grad is None:
                    continue
                momentum.lerp_(weight.grad, 1 - _MOMENTUM)
                update = orthogonalised(weight.grad.lerp(momentum, _MOMENTUM))
                weight.mul_(1 - muon_rate * _DECAY)
                weight.add_(update, alpha=-muon_rate * 0.2 * max(weight.shape) ** 0.5)
                weight.grad = None

    def state(self) -> dict[str, Any]:
        """What `load` takes."""
        return {"adam": self._adam.state_dict(), "momentum": self._momentum}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._adam.load_state_dict(state["adam"])
        for mine, saved in zip(self._momentum, state["momentum"], strict=True):
            mine.copy_(saved)


def orthogonalised(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient's orthogonal factor, roughly: singular values end between 0.7 and 1.2."""
    x: torch.Tensor = gradient.mT if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / (x.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if gradient.shape[0] > gradient.shape[1] else x


def _suits_muon(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and not name.endswith(_ADAM)
