"""The whole model against transformers, on random checkpoints of every family, float32 on the CPU.

The tolerances are the issue's: 2e-3 nats on any prompt token with `a16` experts, 2e-2 with `a8`. `pytest -s` shows
the figures.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from hybrid.batch import Batch, Row, Sampling, TokenLogprob
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.random_checkpoint import write_checkpoint
from offload.config import PoolConfig, Precision
from offload.formats import quantise_int4, quantise_int8
from offload.store import Target
from tests import families
from tests.reference import hf

PAGE = 16
N_PAGES = 160
FAMILIES: dict[str, Callable[[], families.Raw]] = {
    "kimi_k25": families.kimi_k25,
    "kimi_k2": families.kimi_k2,
    "kimi_k2_thinking": families.kimi_k2_thinking,
    "deepseek_v3": families.deepseek_v3,
    "deepseek_v3_odd": families.deepseek_v3_odd,
    "moonlight": families.moonlight,
    "deepseek_v2_lite": families.deepseek_v2_lite,
    "deepseek_v2": families.deepseek_v2,
}
TOLERANCE = {"a16": 2e-3, "a8": 2e-2}
MATTERS = 1e-2  # what a mistake must move, or parity would prove nothing


@dataclass(frozen=True, slots=True)
class Case:
    """A family's checkpoint, read by the oracle, and the right logprobs of one prompt."""

    directory: Path
    raw: dict[str, Any]
    weights: hf.Tensors
    ids: list[int]
    right: torch.Tensor  # (T, V)

    def copies(self) -> tuple[dict[str, Any], hf.Tensors]:
        """Config and weights to be corrupted."""
        return copy.deepcopy(self.raw), {name: weight.clone() for name, weight in self.weights.items()}

    def moved(self, found: torch.Tensor) -> float:
        """Largest change of the logprob of a prompt token, given another (T, V) table."""
        following = torch.tensor(self.ids[1:]).unsqueeze(1)
        return float((found[:-1].gather(1, following) - self.right[:-1].gather(1, following)).abs().max())


Cases = Callable[[str], Case]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """One random checkpoint for each family, written when first asked for."""
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            raw = FAMILIES[family]()
            directory = tmp_path_factory.mktemp("parity") / family
            write_checkpoint(raw, directory, seed=7)
            ids, weights = random_ids(raw, 100, seed=11), hf.dequantise(hf.read_raw(directory))
            made[family] = Case(directory, raw, weights, ids, hf.logprobs(hf.build(raw, weights), ids))
        return made[family]

    return get


def figure(name: str, value: float) -> None:
    """Shows a measured number with -s, and beside a failure."""
    print(f" {name}={value:.2e}", end="")


def random_ids(raw: dict[str, Any], count: int, seed: int) -> list[int]:
    vocab = hf.text_config(raw)["vocab_size"]
    ids: list[int] = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@contextmanager
def engine_of(case: Case, precision: Precision = "a16", **settings: Any) -> Iterator[Engine]:
    pool = PoolConfig(threads=2, precision=precision)
    chosen: dict[str, Any] = {"expert_format": "native"} | settings
    engine = Engine(
        EngineConfig(case.directory, "cpu", "float32", pool=pool, n_pages=N_PAGES, page_size=PAGE, **chosen)
    )
    try:
        yield engine
    finally:
        engine.close()


def pages(n_tokens: int) -> tuple[int, ...]:
    """Enough pages, in an order that is not the memory's."""
    return tuple((7 * i + 3) % N_PAGES for i in range(-(-n_tokens // PAGE)))


def score(engine: Engine, ids: Sequence[int], chunk: int | None = None) -> tuple[TokenLogprob, ...]:
    """Logprobs of ids[1:], each with the twenty best alternatives, in one prefill step or in chunks."""
    scored: tuple[TokenLogprob, ...] = ()
    for start in range(0, len(ids), chunk or len(ids)):
        new = tuple(ids[start : start + (chunk or len(ids))])
        targets = tuple(ids[start + 1 : start + 1 + len(new)])
        row = Row(1, new, start, pages(start + len(new)), targets=targets, n_alternatives=20)
        scored += engine.step(Batch((row,))).rows[0].scored
    return scored


def generate(engine: Engine, ids: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens: one prefill step, then one token a step over the cached pages."""
    known, position = list(ids), 0
    for n_sampled in range(count):
        row = Row(
            1, tuple(known[position:]), position, pages(len(known)), Sampling(temperature=0.0), n_sampled=n_sampled
        )
        token = engine.step(Batch((row,))).rows[0].token
        assert token is not None
        position = len(known)
        known.append(token)
    return known[len(ids) :]


def distance(scored: Sequence[TokenLogprob], expected: torch.Tensor, ids: Sequence[int]) -> float:
    """Largest |logprob - expected logprob| over the prompt's tokens and the alternatives beside them."""
    assert [entry.token for entry in scored] == list(ids[1:])
    pairs = [(t, entry.token, entry.logprob) for t, entry in enumerate(scored)]
    pairs += [(t, token, value) for t, entry in enumerate(scored) for token, value in entry.top]
    assert len(pairs) == 21 * (len(ids) - 1)
    return max(abs(value - float(expected[t, token])) for t, token, value in pairs)


@pytest.mark.parametrize("precision", ["a16", "a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logprobs(cases: Cases, family: str, precision: Precision) -> None:
    case = cases(family)
    with engine_of(case, precision) as engine:
        worst = distance(score(engine, case.ids), case.right, case.ids)
    figure("max_abs_logprob_difference", worst)
    assert worst < TOLERANCE[precision]


def clear_prompt(case: Case, count: int) -> tuple[list[int], list[int]]:
    """A prompt and the oracle's `count` greedy tokens after it, each ahead of the second best by more than twice the
    tolerance: elsewhere two answers would be right."""
    model = hf.build(case.raw, case.weights)
    for seed in range(20):
        ids = random_ids(case.raw, 40, seed)
        tokens, leads = hf.greedy(model, ids, count)
        if min(leads) > 2 * TOLERANCE["a16"]:
            figure("prompt", seed)
            figure("smallest_lead", min(leads))
            return ids, tokens
    raise AssertionError("no prompt has clear greedy tokens; the checkpoint's logits are too flat")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(cases: Cases, family: str) -> None:
    case = cases(family)
    ids, expected = clear_prompt(case, 16)
    with engine_of(case) as engine:
        assert generate(engine, ids, 16) == expected


@pytest.mark.parametrize("family", ["kimi_k25", "deepseek_v3_odd", "deepseek_v2_lite"])
def test_naive_and_absorbed_attention_agree(cases: Cases, family: str) -> None:
    # Both run in float32 and differ in the order of two matrix products, so they are held to far less than parity.
    case = cases(family)
    ids, expected = clear_prompt(case, 8)
    found: list[tuple[TokenLogprob, ...]] = []
    for path in ("naive", "absorbed"):
        with engine_of(case, mla=path) as engine:
            found.append(score(engine, case.ids))
            assert generate(engine, ids, 8) == expected
    worst = max(abs(a.logprob - b.logprob) for a, b in zip(*found, strict=True))
    figure("max_abs_difference_of_paths", worst)
    assert worst < 2e-4
    assert distance(found[1], case.right, case.ids) < TOLERANCE["a16"]


@pytest.mark.parametrize("mla", ["naive", "absorbed"])
def test_long_prompt_in_chunks(cases: Cases, mla: str) -> None:
    """Longer than one block of keys (2048) and of queries (128), written in chunks that end inside pages."""
    case = cases("kimi_k25")
    ids = random_ids(case.raw, 2300, seed=13)
    expected = hf.logprobs(hf.build(case.raw, case.weights), ids)
    with engine_of(case, mla=mla) as engine:
        worst = distance(score(engine, ids, chunk=755), expected, ids)
    figure("max_abs_logprob_difference", worst)
    assert worst < TOLERANCE["a16"]


def relative_rms(found: hf.Tensors, exact: hf.Tensors) -> float:
    """||w' - w|| / ||w|| over all routed experts."""
    names = [name for name in exact if hf.ROUTED.match(name)]
    error = sum(float((found[n] - exact[n]).double().square().sum()) for n in names)
    return float((error / sum(float(exact[n].double().square().sum()) for n in names)) ** 0.5)


def quantised(weights: hf.Tensors, target: str) -> hf.Tensors:
    """The weights with every routed expert taken through the published rounding and back by the oracle's own means."""
    changed = dict(weights)
    for name, weight in weights.items():
        if not hf.ROUTED.match(name):
            continue
        data, scales = (quantise_int4 if target == "int4" else quantise_int8)(weight.numpy())
        scale = torch.from_numpy(scales.copy()).view(torch.bfloat16)
        if target == "int4":
            changed[name] = hf.dequantise_int4(torch.from_numpy(data.copy()), scale)
        else:
            changed[name] = torch.from_numpy(data.copy()).float() * scale.float().repeat_interleave(32, dim=1)
    return changed


def noisy(weights: hf.Tensors, relative: float, seed: int) -> hf.Tensors:
    """The weights with Gaussian noise of the given relative size on every routed expert matrix."""
    generator = torch.Generator().manual_seed(seed)
    changed = dict(weights)
    for name, weight in weights.items():
        if hf.ROUTED.match(name):
            size = relative * float(weight.square().mean().sqrt())
            changed[name] = weight + size * torch.randn(weight.shape, generator=generator)
    return changed


@pytest.mark.parametrize(
    ("family", "target"),
    [
        *((family, target) for family in ("kimi_k2", "deepseek_v3", "moonlight") for target in ("int8", "int4")),
        ("deepseek_v2_lite", "int4"),
        ("kimi_k25", "int8"),
    ],
)
def test_experts_quantised_at_load(cases: Cases, family: str, target: Target) -> None:
    """Exact against an oracle with the same rounded experts, and no further from the native one than noise of the
    measured weight error moves it. The factor 3 covers the spread between five draws of noise and a rounding that
    is not Gaussian."""
    case = cases(family)
    rounded = quantised(case.weights, target)
    with engine_of(case, expert_format=target) as engine:
        scored = score(engine, case.ids)
    worst = distance(scored, hf.logprobs(hf.build(case.raw, rounded), case.ids), case.ids)
    error = relative_rms(rounded, case.weights)
    draws = [hf.logprobs(hf.build(case.raw, noisy(case.weights, error, seed)), case.ids) for seed in range(5)]
    noise = max(case.moved(found) for found in draws)
    moved = max(abs(entry.logprob - float(case.right[t, entry.token])) for t, entry in enumerate(scored))
    for name, value in {"against_rounded": worst, "weight_error": error, "moved": moved, "noise": noise}.items():
        figure(name, value)
    assert worst < TOLERANCE["a16"]
    assert moved < 3 * noise


@pytest.mark.parametrize("family", ["moonlight", "deepseek_v2_lite", "deepseek_v2"])
def test_oracle_equals_transformers_own_loader(cases: Cases, family: str) -> None:
    # The bf16 families only: transformers undoes INT4 and fp8 on the CPU to bf16, or not at all.
    case = cases(family)
    kind = DeepseekV3ForCausalLM if family == "moonlight" else DeepseekV2ForCausalLM
    model = kind.from_pretrained(case.directory, dtype=torch.float32)
    assert float((hf.logprobs(model, case.ids) - case.right).abs().max()) < 1e-4


def half_rope(weights: hf.Tensors, text: dict[str, Any]) -> None:
    """Rows reordered so that the oracle's interleaved rotation acts like one on halves of the published rows."""
    rope, nope = text["qk_rope_head_dim"], text["qk_nope_head_dim"]
    halves = torch.arange(rope).view(2, rope // 2).T.flatten()  # 0, R/2, 1, R/2+1, ...
    for name, weight in weights.items():
        if name.endswith(("self_attn.q_b_proj.weight", "self_attn.q_proj.weight")):
            heads = weight.view(-1, nope + rope, weight.shape[1])
            heads[:, nope:] = heads[:, nope:][:, halves]
        if name.endswith("kv_a_proj_with_mqa.weight"):
            weight[-rope:] = weight[-rope:][halves]


def swap_gate_up(weights: hf.Tensors, text: dict[str, Any]) -> None:
    for name in [n for n in weights if hf.ROUTED.match(n) and ".gate_proj." in n]:
        other = name.replace(".gate_proj.", ".up_proj.")
        weights[name], weights[other] = weights[other], weights[name]


def zero(ending: str) -> Callable[[hf.Tensors, dict[str, Any]], None]:
    def apply(weights: hf.Tensors, text: dict[str, Any]) -> None:
        found = [n for n in weights if n.endswith(ending)]
        assert found
        for name in found:
            weights[name] = torch.zeros_like(weights[name])

    return apply


def wrong_scaling_factor(weights: hf.Tensors, text: dict[str, Any]) -> None:
    text["routed_scaling_factor"] *= 1.1


def no_yarn(weights: hf.Tensors, text: dict[str, Any]) -> None:
    text["rope_scaling"] = None


CORRUPTIONS: dict[str, Callable[[hf.Tensors, dict[str, Any]], None]] = {
    "half_rope": half_rope,
    "gate_up_swapped": swap_gate_up,
    "no_selection_bias": zero("e_score_correction_bias"),
    "no_shared_expert": zero("shared_experts.down_proj.weight"),
    "scaling_factor": wrong_scaling_factor,
    "no_yarn": no_yarn,
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sensitive_to(cases: Cases, family: str, corruption: str) -> None:
    case = cases(family)
    raw, weights = case.copies()
    text = hf.text_config(raw)
    if corruption == "no_selection_bias" and text["topk_method"] != "noaux_tc":
        pytest.skip("this family selects without a bias")
    if corruption == "no_yarn" and text.get("rope_scaling") is None:
        pytest.skip("this family has no rope scaling")
    CORRUPTIONS[corruption](weights, text)
    moved = case.moved(hf.logprobs(hf.build(raw, weights), case.ids))
    figure("moved", moved)
    assert moved > MATTERS


@pytest.mark.parametrize("family", ["kimi_k25", "kimi_k2_thinking"])
def test_sensitive_to_nibble_order(cases: Cases, family: str) -> None:
    case = cases(family)
    tensors = hf.read_raw(case.directory)
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        data = tensors[name].view(torch.uint8)
        tensors[name] = ((data << 4) | (data >> 4)).view(torch.int32)
    moved = case.moved(hf.logprobs(hf.build(case.raw, hf.dequantise(tensors)), case.ids))
    figure("moved", moved)
    assert moved > MATTERS


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitive_to_latent_norm(cases: Cases, family: str) -> None:
    case = cases(family)
    model = hf.build(case.raw, case.weights)
    for module in list(model.modules()):
        if hasattr(module, "kv_a_layernorm"):
            module.kv_a_layernorm = torch.nn.Identity()
    moved = case.moved(hf.logprobs(model, case.ids))
    figure("moved", moved)
    assert moved > MATTERS
