"""A made-up router whose choices are varied, depend on the selection bias and on groups, and are never close calls.

With plain random weights the last chosen and the first rejected expert are often a hair apart, and any rounding
(int8 activations, bfloat16) swaps them; no tolerance on the logits would then tell a bug from noise. So a few hidden
dimensions carry a token class, one dimension for each class: the embedding writes them, no layer changes them
noticeably, and the router reads them. For each class and layer the experts are placed on levels with wide gaps:

    sigmoid with bias      strong   0.95 .. 0.99 chosen with any bias
                           helped   0.45 .. 0.55 chosen because of a positive bias
                           blocked  0.57 .. 0.65 rejected because of a negative bias: chosen if the bias is forgotten
                           the rest below 0.05
    several groups         lone     as good as a chosen expert, in a rejected group: chosen if groups are forgotten

A small random part on all dimensions keeps the mixing weights dependent on the context.
`hybrid.random_weights` calls this; it knows scores and experts, not files.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.config import ModelConfig
from hybrid.random_bits import RandomBits

CODE = 3.0  # value of a token's class dimension beside embeddings of standard deviation 1
CONTEXT_STD = 0.15  # of the part of the router logits that depends on everything else

Levels = dict[str, tuple[float, float]]
SIGMOID: Levels = {
    "strong": (3.0, 4.5),
    "lone": (3.0, 4.5),
    "helped": (-0.2, 0.2),
    "blocked": (0.3, 0.6),
    "rest": (-5.0, -3.0),
}
SOFTMAX: Levels = {"strong": (1.5, 3.5), "rest": (-3.0, -1.0)}
SOFTMAX_GROUPS: Levels = {"strong": (4.5, 5.5), "lone": (3.2, 3.4), "helped": (2.0, 2.4), "rest": (-3.0, -1.0)}


@dataclass(frozen=True, slots=True)
class Router:
    """One layer's router: the logits wanted for each class, and the selection bias where the method has one."""

    logits: npt.NDArray[np.float64]  # (E, classes)
    bias: npt.NDArray[np.float32] | None  # (E,)


def class_count(model: ModelConfig) -> int:
    """Enough classes that each expert is chosen by about two, and at most one dimension in eight spent on them."""
    wanted = max(32, -(-2 * model.n_routed_experts // model.num_experts_per_tok))
    return max(1, min(model.hidden_size // 8, wanted))


def class_dimensions(model: ModelConfig) -> npt.NDArray[np.intp]:
    """The hidden dimension of each class, spread evenly."""
    classes = class_count(model)
    return np.arange(classes) * (model.hidden_size // classes)


def make_router(model: ModelConfig, bits: RandomBits) -> Router:
    """Deal the experts to the classes and place them on their levels."""
    levels, experts = _levels(model), model.n_routed_experts
    signs = _bias_signs(model, bits)
    chosen_from = _Deals(model, bits)
    logits = np.empty((experts, class_count(model)))
    for column in logits.T:
        roles = _roles(model, chosen_from.next_hand(), signs, levels, bits)
        low, high = np.array([levels[role] for role in roles]).T
        column[:] = low + (high - low) * bits.uniform(experts, 0, 1)
    return Router(logits, _bias(model, signs, bits) if model.topk_method == "noaux_tc" else None)


def mixing_rms(model: ModelConfig, router: Router) -> float:
    """Root of the mean over classes of the sum of squared expert weights, the routed scaling factor included."""
    total = 0.0
    for column in router.logits.T:
        scores = [math.exp(z) for z in column] if model.scoring_func == "softmax" else _sigmoid(column)
        whole = sum(scores) if model.scoring_func == "softmax" else 1.0
        scores = [score / whole for score in scores]
        # The chosen ones are the strong and the helped; the highest scores are close enough to them for a scale.
        weights = sorted(scores, reverse=True)[: model.num_experts_per_tok]
        share = sum(weights) if model.norm_topk_prob else 1.0
        total += sum((weight / share) ** 2 for weight in weights)
    rms = model.routed_scaling_factor * math.sqrt(total / router.logits.shape[1])
    return float(f"{rms:.4g}")  # rounded, because exp differs in the last bit between machines


def _sigmoid(logits: npt.NDArray[np.float64]) -> list[float]:
    return [1 / (1 + math.exp(-z)) for z in logits]


def _is_grouped(model: ModelConfig) -> bool:
    return model.n_group > 1 and model.topk_method != "greedy"


def _levels(model: ModelConfig) -> Levels:
    if model.scoring_func == "sigmoid":
        return SIGMOID
    return SOFTMAX_GROUPS if _is_grouped(model) else SOFTMAX


def _bias_signs(model: ModelConfig, bits: RandomBits) -> npt.NDArray[np.int64]:
    """A third of each group's experts is favoured, a third is held back, a third is left alone."""
    size = model.n_routed_experts // model.n_group
    return np.concatenate([np.array(bits.shuffled(size)) % 3 - 1 for _ in range(model.n_group)])


def _bias(model: ModelConfig, signs: npt.NDArray[np.int64], bits: RandomBits) -> npt.NDArray[np.float32]:
    size = bits.uniform(len(signs), 0.25, 0.35)
    near_zero = bits.uniform(len(signs), -0.05, 0.05)
    values = np.where(signs == 0, near_zero, signs * size)
    # Softmax scores are about 1 / E, so a bias made for sigmoids would decide alone.
    return (values if model.scoring_func == "sigmoid" else values / model.n_routed_experts).astype(np.float32)


class _Deals:
    """Deals groups and, within them, experts like cards, so that all are used before one is used again."""

    def __init__(self, model: ModelConfig, bits: RandomBits) -> None:
        self._bits = bits
        groups = model.n_group if _is_grouped(model) else 1
        self._size = model.n_routed_experts // groups
        top = model.num_experts_per_tok
        # Two chosen experts put a group's best two above any other's; a group with one could lose.
        filled = max(-(-top // self._size), min(model.topk_group if groups > 1 else 1, max(1, top // 2)))
        self._counts = [top // filled + (i < top % filled) for i in range(filled)]
        self._groups = _Deck(groups, bits)
        self._experts = [_Deck(self._size, bits) for _ in range(groups)]

    def next_hand(self) -> list[list[int]]:
        """The experts that the next class chooses, a list for each group that it uses."""
        groups = self._groups.deal(len(self._counts))
        return [
            [group * self._size + expert for expert in self._experts[group].deal(count)]
            for group, count in zip(groups, self._counts, strict=True)
        ]


class _Deck:
    """Shuffled cards 0 .. n-1, reshuffled when they run out."""

    def __init__(self, size: int, bits: RandomBits) -> None:
        self._size, self._bits = size, bits
        self._cards: list[int] = []

    def deal(self, count: int) -> list[int]:
        """`count` different cards."""
        hand, self._cards = self._cards[:count], self._cards[count:]
        if len(hand) < count:
            fresh = self._bits.shuffled(self._size)
            hand += [card for card in fresh if card not in hand][: count - len(hand)]
            self._cards = [card for card in fresh if card not in hand]
        return hand


def _roles(
    model: ModelConfig, hand: list[list[int]], signs: npt.NDArray[np.int64], levels: Levels, bits: RandomBits
) -> list[str]:
    """One level for each expert of one class."""
    roles = ["rest"] * model.n_routed_experts
    for expert in (expert for group in hand for expert in group):
        roles[expert] = "strong"
    order = bits.shuffled(model.n_routed_experts)
    if model.scoring_func == "softmax":
        if "helped" in levels:
            for expert in (expert for group in hand for expert in group[1:]):
                roles[expert] = "helped"
    elif model.topk_method == "noaux_tc":
        helped = [e for group in hand for e in group if signs[e] > 0][: model.num_experts_per_tok // 2]
        blocked = [e for e in order if roles[e] == "rest" and signs[e] < 0][: len(helped)]
        for expert in helped:
            roles[expert] = "helped"
        for expert in blocked:
            roles[expert] = "blocked"
    ranked_apart = model.topk_method == "noaux_tc" or model.scoring_func == "softmax"
    if _is_grouped(model) and ranked_apart and len(hand) == model.topk_group:
        _place_lone(model, hand, signs, roles, order)
    return roles


def _place_lone(
    model: ModelConfig, hand: list[list[int]], signs: npt.NDArray[np.int64], roles: list[str], order: list[int]
) -> None:
    """One good expert in each group that is not used: held back by its bias where groups are ranked by their best two,
    so that it cannot lift its group."""
    size = model.n_routed_experts // model.n_group
    used = {group[0] // size for group in hand}
    for expert in order:
        held_back = model.topk_method != "noaux_tc" or signs[expert] < 0
        if expert // size not in used and held_back and roles[expert] in ("rest", "blocked"):
            roles[expert] = "lone"
            used.add(expert // size)
