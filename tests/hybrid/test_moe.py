"""hybrid.moe: the router of every family against plain loops; the order of work in a layer."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from hybrid.config import ModelConfig
from hybrid.layers import Mlp, rms_norm
from hybrid.moe import Moe, Router
from tests import families
from tests.reference.router import route

HIDDEN, EXPERTS, TOKENS = 24, 32, 200


def router_of(raw: dict[str, Any], seed: int = 0) -> Router:
    raw = raw.get("text_config", raw) | {"model_type": raw["model_type"].replace("k25", "k2")}
    config = ModelConfig.from_json(raw | {"hidden_size": HIDDEN, "n_routed_experts": EXPERTS})
    rng = np.random.default_rng(seed)
    weight = torch.tensor(rng.normal(size=(EXPERTS, HIDDEN)) / 4, dtype=torch.float32)
    bias = torch.tensor(rng.normal(size=EXPERTS) * 0.2, dtype=torch.float32)
    return Router(config, weight, bias if config.topk_method == "noaux_tc" else None)


def expected(router: Router, x: torch.Tensor) -> list[dict[int, float]]:
    c = router.config
    return route(
        x.double().numpy(),
        router.weight.double().numpy(),
        None if router.bias is None else router.bias.double().numpy(),
        c.num_experts_per_tok,
        c.scoring_func,
        c.topk_method,
        c.n_group,
        c.topk_group,
        c.norm_topk_prob,
        c.routed_scaling_factor,
    )


def as_maps(ids: torch.Tensor, weights: torch.Tensor) -> list[dict[int, float]]:
    return [dict(zip(i, w, strict=True)) for i, w in zip(ids.tolist(), weights.tolist(), strict=True)]


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "family",
    [
        families.kimi_k25,
        families.deepseek_v3,
        families.moonlight,
        families.deepseek_v2_lite,
        families.deepseek_v2,
    ],
)
def test_router_matches_plain_loops(family: Any) -> None:
    router, x = router_of(family()), tokens()
    ids, weights = router(x)
    assert weights.dtype == torch.float32
    for found, wanted in zip(as_maps(ids, weights), expected(router, x), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    router, x = router_of(families.kimi_k2()), tokens()
    ids, weights = router(x)
    scores = (x @ router.weight.T).sigmoid().gather(1, ids)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True) * 2.827)
    unbiased, _ = Router(router.config, router.weight, torch.zeros(EXPERTS))(x)
    changed = sum(set(a) != set(b) for a, b in zip(ids.tolist(), unbiased.tolist(), strict=True))
    assert changed > TOKENS / 2


def test_groups_limit_the_choice() -> None:
    router, x = router_of(families.deepseek_v3()), tokens()
    per_group = EXPERTS // router.config.n_group
    assert all(len({e // per_group for e in row}) <= router.config.topk_group for row in router(x)[0].tolist())
    free = Router(ModelConfig.from_json(families.kimi_k2() | {"n_routed_experts": EXPERTS}), router.weight, router.bias)
    assert any(len({e // per_group for e in row}) > router.config.topk_group for row in free(x)[0].tolist())


def test_bfloat16_input_is_scored_in_float32() -> None:
    router, x = router_of(families.kimi_k2()), tokens().bfloat16()
    for found, wanted in zip(as_maps(*router(x)), expected(router, x.float()), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


@dataclass
class Recorder:
    """Routed experts that add up known numbers and write down the calls."""

    wants_hints: bool
    calls: list[tuple[str, int]] = field(default_factory=list)
    hinted: list[torch.Tensor] = field(default_factory=list)

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> "Recorder":
        self.calls.append(("submit", layer))
        self.answer = x * (ids * weights).sum(1, keepdim=True)
        return self

    def hint(self, layer: int, scores: torch.Tensor) -> None:
        self.calls.append(("hint", layer))
        self.hinted.append(scores)

    def wait(self) -> torch.Tensor:
        self.calls.append(("wait", 0))
        return self.answer


@pytest.mark.parametrize("wants_hints", [True, False])
def test_layer_adds_routed_and_shared(wants_hints: bool) -> None:
    experts, x = Recorder(wants_hints), tokens()
    generator = torch.Generator().manual_seed(3)
    shared = Mlp(*(torch.randn(shape, generator=generator) for shape in ((7, HIDDEN), (7, HIDDEN), (HIDDEN, 7))))
    router, following = router_of(families.kimi_k2()), router_of(families.kimi_k2(), seed=9)
    found = Moe(4, router, shared, experts, (6, following))(x)
    ids, weights = router(x)
    inner = torch.nn.functional.silu(x @ shared.gate.T) * (x @ shared.up.T)
    torch.testing.assert_close(found, x * (ids * weights).sum(1, keepdim=True) + inner @ shared.down.T)
    hints = [("hint", 6)] if wants_hints else []
    assert experts.calls == [("submit", 4), *hints, ("wait", 0)]
    if wants_hints:
        named = experts.hinted[0].topk(ids.shape[1], -1).indices  # the bias is in the scores: it moves the choice
        assert torch.equal(named.sort().values, following(x)[0].sort().values)
        assert experts.hinted[0].shape == (TOKENS, EXPERTS)


def test_last_layer_hints_at_nothing() -> None:
    experts = Recorder(wants_hints=True)
    shared = Mlp(torch.ones(3, HIDDEN), torch.ones(3, HIDDEN), torch.ones(HIDDEN, 3))
    Moe(4, router_of(families.kimi_k2()), shared, experts, None)(tokens())
    assert experts.calls == [("submit", 4), ("wait", 0)]


def test_a_watch_sees_the_layer_its_input_and_its_choice() -> None:
    shared = Mlp(torch.ones(3, HIDDEN), torch.ones(3, HIDDEN), torch.ones(HIDDEN, 3))
    router, x, seen = router_of(families.kimi_k2()), tokens(), []
    layer = Moe(4, router, shared, Recorder(False), None, lambda *what: seen.append(what))
    unwatched = Moe(4, router, shared, Recorder(False), None)(x)
    assert torch.equal(layer(x), unwatched)
    ((moe, into, ids),) = seen
    assert moe is layer and into is x
    assert torch.equal(ids, router(x)[0])


def test_norm_rounds_before_the_weight() -> None:
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(5)).bfloat16() * 3
    weight = torch.linspace(0.5, 1.5, 40).bfloat16()
    wide = x.double()
    unit = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).float().bfloat16()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), unit * weight, rtol=2**-7, atol=0)
    exact = rms_norm(x.double().float(), weight.float(), 0.5)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight.double()
    np.testing.assert_allclose(exact.numpy(), expected.numpy(), rtol=2e-6)
