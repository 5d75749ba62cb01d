"""Made-up routers: the choice is never close, and depends on what an implementation might forget."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybrid.config import ModelConfig
from hybrid.random_bits import RandomBits
from hybrid.random_router import Router, class_count, class_dimensions, make_router, mixing_rms
from tests import families

Change = dict[str, Any]


def published(family: Callable[[], Any], **sizes: int) -> ModelConfig:
    """A family at published sizes as far as the router sees them."""
    raw = family()
    text = raw.get("text_config", raw)
    text.update(sizes)
    return ModelConfig.from_json(raw)


MODELS: dict[str, ModelConfig] = {
    **{
        name: ModelConfig.from_json(getattr(families, name)())
        for name in ("kimi_k25", "kimi_k2_thinking", "deepseek_v3", "moonlight", "deepseek_v2_lite", "deepseek_v2")
    },
    "K2.5": published(families.kimi_k25, hidden_size=7168, n_routed_experts=384, num_experts_per_tok=8),
    "V3": published(
        families.deepseek_v3, hidden_size=7168, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4
    ),
    "V2": published(
        families.deepseek_v2, hidden_size=5120, n_routed_experts=160, num_experts_per_tok=6, n_group=8, topk_group=3
    ),
    "V2-Lite": published(families.deepseek_v2_lite, hidden_size=2048, n_routed_experts=64, num_experts_per_tok=6),
    "narrow": published(families.kimi_k25, hidden_size=32, n_routed_experts=4, num_experts_per_tok=2),
    "all": published(families.moonlight, n_routed_experts=4, num_experts_per_tok=4),
}


def scores(model: ModelConfig, logits: np.ndarray) -> np.ndarray:
    """(classes, E)"""
    if model.scoring_func == "sigmoid":
        return 1 / (1 + np.exp(-logits.T))
    raised = np.exp(logits.T)
    return raised / raised.sum(axis=1, keepdims=True)


def select(model: ModelConfig, router: Router, use_bias: bool = True, use_groups: bool = True) -> tuple[Any, Any]:
    """(classes, K) chosen experts, sorted, and each class's lead of the last chosen over the first rejected, within
    the kept groups and among the groups; DeepSeek's published rules, in float64."""
    # A softmax keeps the order of its logits, and leads among logits are the ones that noise must overcome.
    choice = scores(model, router.logits) if model.scoring_func == "sigmoid" else router.logits.T.copy()
    if use_bias and router.bias is not None:
        choice = choice + router.bias
    lead = np.full(len(choice), np.inf)
    if use_groups and model.topk_method != "greedy" and model.n_group > 1:
        by_group = np.sort(choice.reshape(len(choice), model.n_group, -1))
        rank = by_group[:, :, -2:].sum(2) if model.topk_method == "noaux_tc" else by_group[:, :, -1]
        order = np.argsort(-rank)
        ranked = np.take_along_axis(rank, order, 1)
        lead = ranked[:, model.topk_group - 1] - ranked[:, model.topk_group]
        kept = np.zeros_like(rank, bool)
        np.put_along_axis(kept, order[:, : model.topk_group], True, 1)
        choice = np.where(np.repeat(kept, choice.shape[1] // model.n_group, 1), choice, -np.inf)
    order = np.argsort(-choice)
    top = model.num_experts_per_tok
    if top < model.n_routed_experts:
        ranked = np.take_along_axis(choice, order, 1)
        lead = np.minimum(lead, ranked[:, top - 1] - ranked[:, top])
    return np.sort(order[:, :top]), lead


def router_of(name: str, layer: int = 1) -> Router:
    return make_router(MODELS[name], RandomBits(7, f"layer {layer}"))


@pytest.mark.parametrize("name", MODELS)
def test_no_choice_is_close(name: str) -> None:
    # The context moves sigmoid scores by about 0.15 / 4 and softmax logits by 0.15; a8 noise is far smaller.
    model = MODELS[name]
    _, lead = select(model, router_of(name))
    assert lead.min() > (0.15 if model.scoring_func == "sigmoid" else 0.75)


@pytest.mark.parametrize("name", MODELS)
def test_choices_are_varied(name: str) -> None:
    model = MODELS[name]
    sets = [{tuple(row) for row in select(model, router_of(name, layer))[0].tolist()} for layer in (1, 2)]
    classes = class_count(model)
    if model.num_experts_per_tok < model.n_routed_experts:
        assert len(sets[0]) > classes / 3 and sets[0] != sets[1]
    assert len({expert for row in sets[0] for expert in row}) == model.n_routed_experts


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if m.topk_method == "noaux_tc" and n != "all"])
def test_a_forgotten_bias_changes_choices(name: str) -> None:
    model, router = MODELS[name], router_of(name)
    right, _ = select(model, router)
    wrong, _ = select(model, router, use_bias=False)
    assert (right != wrong).any(axis=1).mean() > 0.4


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if m.n_group > 1])
def test_forgotten_groups_change_choices(name: str) -> None:
    model, router = MODELS[name], router_of(name)
    right, _ = select(model, router)
    wrong, _ = select(model, router, use_groups=False)
    assert (right != wrong).any(axis=1).mean() > 0.3


@pytest.mark.parametrize("name", ["kimi_k25", "deepseek_v2_lite", "deepseek_v2"])
def test_mixing_rms_is_that_of_the_selected_weights(name: str) -> None:
    model, router = MODELS[name], router_of(name)
    chosen, _ = select(model, router)
    weights = np.take_along_axis(scores(model, router.logits), chosen, 1)
    if model.norm_topk_prob:
        weights /= weights.sum(axis=1, keepdims=True)
    expected = model.routed_scaling_factor * np.sqrt(np.square(weights).sum(axis=1).mean())
    assert mixing_rms(model, router) == pytest.approx(expected, rel=0.1)


def test_class_dimensions_are_few_and_apart() -> None:
    for model in MODELS.values():
        found = class_dimensions(model)
        assert len(set(found.tolist())) == class_count(model) <= model.hidden_size // 8
        assert found.max() < model.hidden_size
