"""hybrid.mla: both paths over pages against whole-sequence float64 attention, however the sequence is cut.

Weights are drawn so that scores have a standard deviation above one: with flatter scores a wrong key, scale or mask
hides in the average.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import hybrid.mla
from hybrid.batch import Batch, Row
from hybrid.config import ModelConfig
from hybrid.inputs import GROUP_ROWS, check_rows, grouped, upload
from hybrid.kv import LatentCache, allocate
from hybrid.mla import Attention, QueryBlock, absorbed_is_cheaper
from hybrid.model import _attention
from hybrid.rope import Rope, build_rope
from tests import families
from tests.reference import mla as reference

PAGE = 4
N_PAGES = 64
CPU = torch.device("cpu")
Array = npt.NDArray[np.float64]


def config_of(q_lora_rank: int | None) -> ModelConfig:
    """All sizes different, so that no axis can stand in for another."""
    raw = families.deepseek_v3() | {"hidden_size": 48, "q_lora_rank": q_lora_rank, "num_attention_heads": 3}
    raw |= {"qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 6, "kv_lora_rank": 20}
    return ModelConfig.from_json(raw)


@dataclass
class Layer:
    """One attention layer with its cache, and the same weights in float64."""

    config: ModelConfig
    weights: dict[str, Array]
    attention: Attention
    rope: Rope
    cache: LatentCache

    def run(self, x: Array, rows: Sequence[Row], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(T, D) of the new ids in row order."""
        check_rows(rows, N_PAGES, PAGE, 512)
        inputs = upload(Batch(tuple(rows)), PAGE, CPU)
        table = self.rope.table(inputs.positions)
        return self.attention(torch.tensor(x).to(dtype), inputs, self.cache, self.rope, table)

    def expected(self, x: Array) -> Array:
        scaling = self.config.rope_scaling
        assert scaling is not None
        angles = reference.frequencies(
            self.config.qk_rope_head_dim, self.config.rope_theta, scaling.factor,
            scaling.original_max_position_embeddings, scaling.beta_fast, scaling.beta_slow,
        )  # fmt: skip
        sizes = (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim, self.config.v_head_dim)
        return reference.attention(
            x, self.weights, self.config.num_attention_heads, *sizes, self.config.softmax_scale, angles
        )


def make_layer(path: Any = "auto", q_lora_rank: int | None = 24, dtype: torch.dtype = torch.float32) -> Layer:
    config = config_of(q_lora_rank)
    rng = np.random.default_rng(5)
    weights: dict[str, Array] = {}
    for name, shape in config.tensor_shapes().items():
        if name.startswith("model.layers.0.self_attn."):
            spread = 0.3 if len(shape) == 1 else 2.0 / math.sqrt(shape[-1])
            weights[name.split(".")[-2]] = rng.normal(float(len(shape) == 1), spread, shape)
    tensors = {f"model.layers.0.self_attn.{k}.weight": torch.tensor(v).to(dtype) for k, v in weights.items()}
    attention = _attention(config, 0, tensors, path)
    return Layer(config, weights, attention, build_rope(config, CPU), allocate(config, N_PAGES, PAGE, dtype, CPU))


def pages_for(n: int, seed: int) -> tuple[int, ...]:
    """Pages in no order."""
    return tuple(int(p) for p in np.random.default_rng(seed).permutation(N_PAGES)[: -(-n // PAGE)])


def row(start: int, stop: int, pages: tuple[int, ...], request: int = 0) -> Row:
    return Row(request, tuple(range(start, stop)), start, pages)


def sequence(n: int, seed: int = 6) -> Array:
    return np.random.default_rng(seed).normal(size=(n, 48))


def test_the_reference_is_not_flat() -> None:
    """Guards the guards: permuting the past must change the output a lot."""
    layer, x = make_layer(), sequence(20)
    shuffled = np.concatenate([x[:10][::-1], x[10:]])
    assert np.abs(layer.expected(x)[-1] - layer.expected(shuffled)[-1]).max() > 0.3


@pytest.mark.parametrize("q_lora_rank", [24, None])
@pytest.mark.parametrize("path", ["naive", "absorbed", "auto"])
@pytest.mark.parametrize("cuts", [[23], [1] * 23, [5, 1, 1, 9, 7], [22, 1], [4, 4, 15]])
def test_any_cutting_of_a_sequence_is_the_whole(
    path: str, q_lora_rank: int | None, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid.mla, "KEY_BLOCK", 8)  # several blocks of keys and of queries, none of them even
    monkeypatch.setattr(hybrid.mla, "QUERY_BLOCK", 3)
    layer, x, pages = make_layer(path, q_lora_rank), sequence(23), pages_for(23, 7)
    found, start = [], 0
    for cut in cuts:
        found.append(layer.run(x[start : start + cut], [row(start, start + cut, pages)]))
        start += cut
    expected = layer.expected(x)
    # float32 against float64: 2^-24 * sqrt(48 products) * a few layers of products, relative to outputs of size ~3
    np.testing.assert_allclose(torch.cat(found).numpy(), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("path", ["naive", "absorbed", "auto"])
def test_rows_of_one_step_do_not_mix(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid.mla, "KEY_BLOCK", 8)
    layer = make_layer(path)
    lengths = [1, 2, 9, 30, 13, 5, 17, 6]
    new = [1, 1, 1, 1, 13, 4, 1, 1]
    order = iter(np.random.default_rng(8).permutation(N_PAGES))
    pages = [tuple(int(next(order)) for _ in range(-(-n // PAGE))) for n in lengths]
    xs = [sequence(n, seed=10 + i) for i, n in enumerate(lengths)]
    for x, n, fresh, mine in zip(xs, lengths, new, pages, strict=True):
        if n > fresh:
            layer.run(x[: n - fresh], [row(0, n - fresh, mine)])
    rows = [row(n - f, n, p, i) for i, (n, f, p) in enumerate(zip(lengths, new, pages, strict=True))]
    found = layer.run(np.concatenate([x[-f:] for x, f in zip(xs, new, strict=True)]), rows)
    expected = np.concatenate([layer.expected(x)[-f:] for x, f in zip(xs, new, strict=True)])
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * np.abs(expected).max())


def test_a_shared_page_serves_two_rows() -> None:
    layer, prefix = make_layer(), sequence(8)
    ours, theirs = np.concatenate([prefix, sequence(3, 20)]), np.concatenate([prefix, sequence(5, 21)])
    layer.run(ours, [row(0, 11, (9, 2, 30))])
    found = layer.run(theirs[8:], [row(8, 13, (9, 2, 11, 12))])
    np.testing.assert_allclose(found.numpy(), layer.expected(theirs)[8:], atol=1e-4)


def test_broken_values_in_a_reused_page_do_not_spread() -> None:
    layer, x = make_layer("absorbed"), sequence(10)
    broken = layer.run(np.full((12, 48), np.nan), [row(0, 12, (1, 2, 3))])
    assert torch.isnan(broken).all()
    layer.run(x[:9], [row(0, 9, (1, 2, 3))])
    layer.run(x[:1], [row(0, 1, (4,), 1)])
    found = layer.run(np.concatenate([x[9:], x[1:2]]), [row(9, 10, (1, 2, 3)), row(1, 2, (4,), 1)])
    np.testing.assert_allclose(found.numpy()[0], layer.expected(x)[9], atol=1e-4)
    np.testing.assert_allclose(found.numpy()[1], layer.expected(x[:2])[1], atol=1e-4)


@pytest.mark.parametrize("path", ["naive", "absorbed"])
def test_bfloat16_stays_near(path: str) -> None:
    layer, x = make_layer(path, dtype=torch.bfloat16), sequence(37)
    found = layer.run(x, [row(0, 37, pages_for(37, 7))], torch.bfloat16)
    assert found.dtype == torch.bfloat16
    expected = layer.expected(x)
    # 2^-9 per rounding over about ten roundings in a row, amplified by scores of a few units
    assert np.sqrt(np.mean((found.float().numpy() - expected) ** 2)) < 0.05 * np.sqrt(np.mean(expected**2))


def test_scores_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    original = QueryBlock.add

    def watch(self: QueryBlock, scores: torch.Tensor, *others: Any) -> None:
        sizes.append((scores.shape[1], scores.shape[3]))
        original(self, scores, *others)

    monkeypatch.setattr(QueryBlock, "add", watch)
    monkeypatch.setattr(hybrid.mla, "KEY_BLOCK", 32)
    monkeypatch.setattr(hybrid.mla, "QUERY_BLOCK", 16)
    layer = make_layer("naive")
    layer.run(sequence(200), [row(0, 200, pages_for(200, 7))])
    assert max(q for q, _ in sizes) == 16 and max(k for _, k in sizes) == 32
    causal = sum(1 for q in range(0, 200, 16) for k in range(0, 200, 32) if k <= min(q + 16, 200) - 1)
    assert len(sizes) == causal  # blocks that lie wholly in the future are not computed


def test_auto_decodes_absorbed_and_prefills_naive() -> None:
    raw = families.deepseek_v3() | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    published = ModelConfig.from_json(raw | {"kv_lora_rank": 512})
    assert all(absorbed_is_cheaper(published, 1, n) for n in (100, 1000, 262_144))
    assert not any(absorbed_is_cheaper(published, n, n) for n in (512, 4096))
    assert absorbed_is_cheaper(published, 32, 100_000) and not absorbed_is_cheaper(published, 512, 100_000)


def test_groups_hold_similar_decode_rows_and_lone_prefills() -> None:
    lengths = [3, 100, 4, 7, 110, 2000]
    rows = [row(n - 1, n, tuple(range(500)), i) for i, n in enumerate(lengths)]
    rows.insert(2, row(0, 50, tuple(range(500)), 9))
    groups = grouped(rows, PAGE)
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert [2] in groups
    for group in groups:
        pages = [-(-(rows[i].position + len(rows[i].ids)) // PAGE) for i in group]
        assert len(group) == 1 or max(pages) <= 2 * min(pages)
    assert sorted(map(sorted, groups)) == [[0, 3, 4], [1, 5], [2], [6]]
    many = [row(9, 10, (0, 1, 2), i) for i in range(2 * GROUP_ROWS + 1)]
    assert [len(group) for group in grouped(many, PAGE)] == [GROUP_ROWS, GROUP_ROWS, 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(row(0, 5, (1, 2)), pages=(1,)), "5 ids, 1 pages"),
        (replace(row(0, 5, (1, 2)), pages=(1, N_PAGES)), "page out of range"),
        (replace(row(0, 5, (1, 2)), ids=(1, 2, 600)), "outside the vocabulary"),
        (replace(row(0, 5, (1, 2)), pages=(1, 1)), "written twice"),
        (replace(row(0, 5, (1, 2)), ids=()), "no new ids"),
        (replace(row(0, 2, (1, 2)), targets=(1, 2, 3)), "too many targets"),
    ],
)
def test_bad_rows_are_caught(bad: Row, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_rows([bad], N_PAGES, PAGE, 512)


def test_two_rows_may_not_write_one_slot() -> None:
    with pytest.raises(AssertionError, match="written twice"):
        check_rows([row(0, 2, (3,), 0), row(1, 2, (3,), 1)], N_PAGES, PAGE, 512)
    with pytest.raises(AssertionError, match="two rows"):
        check_rows([row(0, 2, (3,), 0), row(0, 2, (4,), 0)], N_PAGES, PAGE, 512)
