"""A mixture-of-experts layer: choose experts in float32, hand the tokens over, do the shared expert meanwhile.

Knows neither the experts' weights nor their format: they sit behind three methods. Called by `hybrid.model`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear

from hybrid.config import ModelConfig
from hybrid.layers import Mlp, by_pieces

NO_EXPERT = -1  # an id: this token does without


class Pending(Protocol):
    """Experts at work."""

    def wait(self) -> torch.Tensor:
        """The weighted sum of the chosen experts, (T, D) in the input's type and place."""


class RoutedExperts(Protocol):
    """What a layer asks of the routed experts; `offload.experts.Experts` is the real one."""

    @property
    def wants_hints(self) -> bool:
        """True where knowing the next layer's likely experts early helps."""

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pending:
        """Start x (T, D) through experts `ids` (T, K), NO_EXPERT for none, with `weights` (T, K) float32."""

    def hint(self, layer: int, scores: torch.Tensor) -> None:
        """Tell how well the experts of `layer` will probably fit the tokens: (T, E), -inf for those ruled out."""


@dataclass(frozen=True, slots=True)
class Router:
    """Which experts a token goes to. In float32: bf16 scores would change the choice."""

    config: ModelConfig
    weight: torch.Tensor  # (E, D) float32
    bias: torch.Tensor | None  # (E,) float32, moves the choice and not the weights

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (T, K) int64 and weights (T, K) float32 for x (T, D)."""
        scores = by_pieces(self.scores, x)
        ids = self.choice(scores).topk(self.config.num_experts_per_tok, -1, sorted=False).indices  # (T, K)
        weights = scores.gather(-1, ids)  # (T, K)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.config.routed_scaling_factor

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """(T, E) float32: how well each expert fits, before the bias."""
        logits = linear(x.float(), self.weight)  # (T, E)
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    def choice(self, scores: torch.Tensor) -> torch.Tensor:
        """(T, E): what a token's experts are the best by; -inf in groups that are closed to it."""
        choice = scores if self.bias is None else scores + self.bias
        if self.config.topk_method != "greedy" and self.config.n_group > 1:
            choice = self._within_groups(choice)
        return choice

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """-inf outside the best `topk_group` groups; noaux_tc ranks a group by its best two experts, V2 by its best."""
        groups = torch.unflatten(choice, -1, (self.config.n_group, -1))  # (T, G, E/G)
        n_best = 2 if self.config.topk_method == "noaux_tc" else 1
        rank = groups.topk(n_best, -1).values.sum(-1)  # (T, G)
        kept = rank.topk(self.config.topk_group, -1, sorted=False).indices
        closed = torch.ones_like(rank, dtype=torch.bool).scatter_(-1, kept, False)  # (T, G)
        return groups.masked_fill(closed[..., None], float("-inf")).flatten(-2)  # (T, E)


@dataclass(frozen=True, slots=True)
class Moe:
    """One layer's router and shared expert beside the routed experts. `following`: the next such layer, for hints.

    `watch` sees the layer, its input x (T, D) and the chosen ids (T, K) of every step, for records of the routing.
    """

    layer: int
    router: Router
    shared: Mlp
    experts: RoutedExperts
    following: tuple[int, Router] | None
    watch: "Watch | None" = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) to (T, D)."""
        routed = self.route(x)
        pending = routed.submit()
        shared = by_pieces(self.shared, x)
        return pending.wait() + shared

    def route(self, x: torch.Tensor) -> "Routed":
        """Choose the experts of x (T, D); nothing runs yet."""
        return Routed(self, x, *self.router(x))


@dataclass(frozen=True, slots=True)
class Routed:
    """A layer's tokens that know their experts."""

    moe: Moe
    x: torch.Tensor  # (T, D)
    ids: torch.Tensor  # (T, K)
    weights: torch.Tensor  # (T, K) float32

    def submit(self) -> Pending:
        """Hand the tokens over, and tell the next layer's likely experts where asked."""
        moe, x = self.moe, self.x
        pending = moe.experts.submit(moe.layer, x, self.ids, self.weights)
        if moe.watch is not None:
            moe.watch(moe, x, self.ids)
        if moe.following is not None and moe.experts.wants_hints:
            layer, router = moe.following
            scores = by_pieces(router.scores, x)  # this layer's input, the next layer's router
            moe.experts.hint(layer, router.choice(scores))
        return pending


Watch = Callable[[Moe, torch.Tensor, torch.Tensor], None]
