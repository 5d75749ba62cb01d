"""placement.routing: the expected number of distinct experts against drawn ones and against published figures, and
records that are read, or refused in one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.config import ModelConfig
from hybrid.routes import Record, read_record, write_record
from placement.routing import RoutingError, Shares, chosen, read_routing, uniform, write_routing

TEXT = {
    "model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 4, "first_k_dense_replace": 1,
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-6, "vocab_size": 64, "max_position_embeddings": 512, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 1,
}  # fmt: skip
MODEL = ModelConfig.from_json(TEXT)  # MoE layers 1, 2 and 3 of 8 experts, 2 for a token
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 100, 200)


def draw(weights: npt.NDArray[np.float64], tokens: int, top_k: int, seed: int) -> npt.NDArray[np.int64]:
    """Experts of each token, (tokens, K): drawn one after another without putting back (Gumbel's trick)."""
    noise = np.random.default_rng(seed).gumbel(size=(tokens, len(weights)))
    return np.argsort(-(np.log(weights) + noise), axis=1)[:, :top_k]


def counts_of(chosen: npt.NDArray[np.int64], n_experts: int) -> npt.NDArray[np.int64]:
    return np.bincount(chosen.ravel(), minlength=n_experts)


def distinct(shares: Shares, tokens: int) -> Shares:
    return np.asarray(chosen(shares, tokens).sum(axis=-1))


@pytest.mark.parametrize("tokens", [1, 3, 16, 50])
@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.6])
def test_distinct_experts_against_drawn_ones(tokens: int, exponent: float) -> None:
    """40 experts, 4 for a token, 48,000 tokens; five standard errors of the mean over the batches."""
    weights = (np.arange(40) + 1.0) ** -exponent
    drawn = draw(weights, 48_000, 4, seed=tokens)
    shares = counts_of(drawn, 40) / len(drawn)
    batches = drawn[: len(drawn) // tokens * tokens].reshape(-1, tokens * 4)
    found = np.array([len(np.unique(batch)) for batch in batches])
    error = 5 * found.std() / len(found) ** 0.5 + 1e-9
    expected = distinct(shares[None], tokens)
    assert expected.shape == (1,)
    assert abs(expected[0] - found.mean()) < error
    if exponent and tokens > 1:  # and the uniform law would not do
        assert abs(40 * (1 - 0.9**tokens) - found.mean()) > error


@pytest.mark.parametrize(
    ("exponent", "published"),
    [
        (0.0, (8, 15.8, 31, 59.5, 110, 188, 244, 284, 337, 378)),
        (0.8, (8, 15.2, 28, 50, 87, 141, 182, 214, 265, 335)),
    ],
)
def test_distinct_experts_of_kimi_k25_as_tabulated(exponent: float, published: tuple[float, ...]) -> None:
    """384 experts, 8 for a token, drawn by Zipf's law: the table of offload.md, which is rounded; 20,000 tokens."""
    shares = counts_of(draw((np.arange(384) + 1.0) ** -exponent, 20_000, 8, seed=1), 384)[None] / 20_000
    found = [distinct(shares, tokens)[0] for tokens in BATCHES]
    assert found == pytest.approx(published, rel=0.01, abs=0.5)


@given(st.integers(1, 400), st.integers(1, 16), st.integers(0, 5000))
def test_the_uniform_law_in_closed_form(n_experts: int, top_k: int, tokens: int) -> None:
    model = replace(MODEL, n_routed_experts=n_experts, num_experts_per_tok=min(top_k, n_experts))
    routing = uniform(model)
    assert routing.uniform
    assert routing.shares.shape == (3, n_experts)
    assert np.allclose(routing.shares.sum(axis=1), model.num_experts_per_tok)
    miss = 1 - model.num_experts_per_tok / n_experts
    assert np.allclose(distinct(routing.shares, tokens), n_experts * (1 - miss**tokens))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 300))
def test_bounds_of_distinct_experts(shares: list[float], tokens: int) -> None:
    """One token's choices at least, every expert at most, and no more with a token than without it."""
    row = np.array([shares])
    found = distinct(row, tokens)[0]
    assert sum(shares) - 1e-9 <= found <= min(len(shares), tokens * sum(shares)) + 1e-9
    assert found <= distinct(row, tokens + 1)[0] + 1e-9


class TestRecord:
    def path(self, tmp_path: Path) -> Path:
        """A record of 1000 tokens, the three layers skewed differently."""
        counts = np.stack([counts_of(draw((np.arange(8) + 1.0) ** -skew, 1000, 2, 7), 8) for skew in (0.0, 0.5, 3.0)])
        path = tmp_path / "routing.json"
        write_routing(path, MODEL.moe_layers, counts, 1000)
        assert list(tmp_path.iterdir()) == [path]
        return path

    def changed(self, tmp_path: Path, **changes: object) -> Path:
        path = self.path(tmp_path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return path

    def refusal(self, path: Path, model: ModelConfig = MODEL) -> str:
        with pytest.raises(RoutingError) as caught:
            read_routing(path, model)
        said = str(caught.value)
        assert said.startswith(f"{path}: ")
        assert "\n" not in said
        return said.removeprefix(f"{path}: ")

    def test_shares_are_the_counts_over_the_tokens(self, tmp_path: Path) -> None:
        path = self.path(tmp_path)
        rows = json.loads(path.read_text())["chosen"]
        assert list(rows) == ["1", "2", "3"]
        routing = read_routing(path, MODEL)
        assert routing.tokens == 1000
        assert not routing.uniform
        assert np.allclose(routing.shares.sum(axis=1), 2)
        # Half a choice more for each of 8 experts moves a share by less than half a token in a thousand, twice.
        assert np.allclose(routing.shares, np.array(list(rows.values())) / 1000, atol=0.002)
        assert routing.shares.min() > 0

    def test_an_expert_that_was_never_chosen_is_possible(self, tmp_path: Path) -> None:
        path = tmp_path / "routing.json"
        write_routing(path, (1, 2, 3), np.tile([3, 3, 0, 0, 0, 0, 0, 0], (3, 1)), 3)
        shares = read_routing(path, MODEL).shares
        # 3.5 and 0.5 of 10, two choices for a token
        assert np.allclose(shares, [[0.7, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])

    def test_all_experts_for_every_token(self, tmp_path: Path) -> None:
        path = tmp_path / "routing.json"
        write_routing(path, (1, 2, 3), np.full((3, 8), 999_983), 999_983)
        assert np.allclose(read_routing(path, replace(MODEL, num_experts_per_tok=8)).shares, 1)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        assert self.refusal(tmp_path / "none") == "cannot be read: No such file or directory"
        path = tmp_path / "text"
        path.write_text("{")
        assert self.refusal(path).startswith("not JSON: ")
        path.write_bytes(b'{"\xff": 1}')
        assert self.refusal(path).startswith("not JSON: ")
        path.write_text("[" * 100_000)
        assert self.refusal(path) == "not JSON: nested too deeply"

    @pytest.mark.parametrize(
        "text", ["[]", "{}", "3", '{"document": "hybrid routing", "version": 2}', '{"version": 1}']
    )
    def test_another_document(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "other"
        path.write_text(text)
        assert self.refusal(path) == "not a routing record of this version; make one with --record-routing"

    @pytest.mark.parametrize(
        "changes",
        [
            {"tokens": 0},
            {"tokens": -3},
            {"tokens": 2.5},
            {"tokens": True},
            {"tokens": None},
            {"tokens": 2**63},
            {"chosen": None},
            {"chosen": []},
            {"chosen": {}},
            {"chosen": {"1": [1] * 8, "2": [1] * 8}},
            {"chosen": {"0": [1] * 8, "1": [1] * 8, "2": [1] * 8}},
        ],
    )
    def test_other_tokens_or_layers(self, tmp_path: Path, changes: dict[str, object]) -> None:
        said = self.refusal(self.changed(tmp_path, **changes))
        assert said == "expected tokens from 1 to 2**63 - 1 and layers 1 to 3: another model's?"

    @pytest.mark.parametrize(
        "row",
        [
            [1] * 7,
            [1] * 9,
            [1] * 7 + [-1],
            [1] * 7 + [2**63],
            [10**400] * 8,
            [1] * 7 + [1.5],
            [1] * 7 + [True],
            [1] * 7 + ["1"],
            [],
            None,
            8,
            {},
        ],
    )
    def test_counts_that_are_none(self, tmp_path: Path, row: object) -> None:
        path = self.changed(tmp_path, chosen={"1": [1] * 8, "2": row, "3": [1] * 8})
        assert self.refusal(path) == "chosen.2: expected 8 counts from 0 to 2**63 - 1: another model's?"

    def test_an_expert_chosen_more_than_once_for_a_token(self, tmp_path: Path) -> None:
        path = self.changed(tmp_path, chosen={"1": [250] * 8, "2": [250] * 8, "3": [2000] + [0] * 7})
        assert self.refusal(path) == "chosen.3: an expert more than once for a token; make one with --record-routing"

    def test_a_record_of_another_model(self, tmp_path: Path) -> None:
        path = self.path(tmp_path)
        assert "chosen.1: expected 16 counts" in self.refusal(path, replace(MODEL, n_routed_experts=16))
        assert "layers 1 to 4" in self.refusal(path, replace(MODEL, num_hidden_layers=5))

    def test_a_wrong_number_of_layers_is_our_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="zip"):
            write_routing(tmp_path / "routing.json", (1, 2), np.ones((3, 8), np.int64), 4)
        assert list(tmp_path.iterdir()) == []


class TestTokens:
    """A record of single tokens, the three layers skewed differently."""

    def path(self, tmp_path: Path, n_tokens: int = 400) -> Path:
        choices = [np.sort(draw((np.arange(8) + 1.0) ** -skew, n_tokens, 2, 7), axis=1) for skew in (0.0, 0.5, 3.0)]
        layers, bias, starts = np.array([1, 2, 3]), np.zeros((3, 8), np.float32), np.array([0, 100])
        families, scores = np.array(["a", "b"]), np.zeros((0, 3, 8), np.float16)
        turns, kinds = np.array([[20, 50]]), np.array(["chat"])
        tokens, experts = np.zeros(n_tokens, np.uint16), np.stack(choices, 1).astype(np.uint8)
        path = tmp_path / "routing.npz"
        write_record(path, Record("0", layers, bias, tokens, starts, families, turns, kinds, experts, scores))
        return path

    def test_it_counts_as_a_record_of_counts_does(self, tmp_path: Path) -> None:
        found = read_routing(self.path(tmp_path), MODEL)
        counts = [counts_of(draw((np.arange(8) + 1.0) ** -skew, 400, 2, 7), 8) for skew in (0.0, 0.5, 3.0)]
        write_routing(tmp_path / "routing.json", MODEL.moe_layers, np.stack(counts), 400)
        wanted = read_routing(tmp_path / "routing.json", MODEL)
        assert found.tokens == wanted.tokens == 400
        assert np.array_equal(found.shares, wanted.shares)
        assert found.shares.std(axis=1).argsort().tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("changes", "has"),
        [
            ({"num_hidden_layers": 5}, "2 of 8 experts in layers 1 to 4"),
            ({"first_k_dense_replace": 0}, "2 of 8 experts in layers 0 to 3"),
            ({"n_routed_experts": 16}, "2 of 16 experts in layers 1 to 3"),
            ({"num_experts_per_tok": 3}, "3 of 8 experts in layers 1 to 3"),
        ],
    )
    def test_a_record_of_another_model(self, tmp_path: Path, changes: dict[str, int], has: str) -> None:
        path = self.path(tmp_path)
        with pytest.raises(RoutingError) as caught:
            read_routing(path, ModelConfig.from_json(TEXT | changes))
        assert (
            str(caught.value)
            == f"{path}: recorded with 2 of 8 experts in layers 1 to 3; this model has {has}: another model's?"
        )

    def test_layers_that_are_not_in_a_row_are_named(self, tmp_path: Path) -> None:
        path = self.path(tmp_path)
        write_record(path, replace(read_record(path), layers=np.array([1, 2, 4])))
        with pytest.raises(RoutingError, match=r"experts in layers \[1, 2, 4\]; this model has .* in layers 1 to 3: "):
            read_routing(path, MODEL)

    def test_a_damaged_record(self, tmp_path: Path) -> None:
        path = self.path(tmp_path)
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(RoutingError, match=r"routing\.npz: not an \.npz file of plain arrays, or a damaged one: "):
            read_routing(path, MODEL)
