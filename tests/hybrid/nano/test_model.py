"""The shipped checkpoint: the published layout, the size promised, and transformers' opinion of it."""

import json
import random
import re

import pytest
import torch

from hybrid.batch import Batch, Row
from hybrid.config import EngineConfig, ModelConfig
from hybrid.engine import Engine
from hybrid.nano import mixture
from hybrid.nano.conversation import encode
from hybrid.nano.record import model_hash
from hybrid.nano.train import CONFIG
from hybrid.nano.vocabulary import SPECIAL, read_vocabulary
from hybrid.routes import read_record
from offload.checkpoint import Checkpoint
from offload.config import PoolConfig
from tests.reference import hf

MODEL = CONFIG.with_name("model")
PAGE = 16


@pytest.fixture(scope="module")
def weights() -> hf.Tensors:
    return hf.read_raw(MODEL)


def test_it_is_small_and_shaped_like_kimi_k25(weights: hf.Tensors) -> None:
    config = ModelConfig.from_directory(MODEL)
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 20e6
    assert config.expert_format == "int4"
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts) == (32, 4, 1)
    assert (config.first_k_dense_replace, config.scoring_func, config.topk_method) == (1, "sigmoid", "noaux_tc")
    packed = {name for name in weights if name.endswith("weight_packed")}
    assert len(packed) == 3 * 32 * len(config.moe_layers)
    assert all(".mlp.experts." in name for name in packed)
    for name, shape in config.tensor_shapes().items():
        assert tuple(weights[f"language_model.{name}"].shape) == shape
    Checkpoint(MODEL).close()


def test_it_has_all_of_kimis_special_tokens() -> None:
    known = json.loads((MODEL / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token["content"]: int(number) for number, token in known.items()} == SPECIAL
    assert set(ModelConfig.from_directory(MODEL).eos_token_ids) == {SPECIAL["<|im_end|>"], SPECIAL["[EOS]"]}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_transformers_gives_the_same_logits(weights: hf.Tensors, seed: int) -> None:
    """On the dequantised weights, over a held-out swarm: the issue's 2e-3, at `a16`."""
    raw = json.loads((MODEL / "config.json").read_text())
    conversation = mixture.named(2, 3)(random.Random(seed), True)
    ids = encode(conversation, read_vocabulary(MODEL)).ids
    expected = hf.logprobs(hf.build(raw, hf.dequantise(weights)), ids)
    n_pages = -(-len(ids) // PAGE)
    engine = Engine(EngineConfig(MODEL, "cpu", "float32", "native", PoolConfig(2, "a16"), n_pages=n_pages))
    try:
        row = Row(0, tuple(ids), 0, tuple(range(n_pages)), targets=tuple(ids[1:]), n_alternatives=20)
        (answer,) = engine.step(Batch((row,))).rows
    finally:
        engine.close()
    apart = 0.0
    for i, scored in enumerate(answer.scored):
        found = dict(scored.top) | {scored.token: scored.logprob}
        at = torch.tensor(list(found))
        apart = max(apart, float((expected[i, at] - torch.tensor(list(found.values()))).abs().max()))
    print(f" apart={apart:.1e}", end="")
    assert apart < 2e-3


def test_the_card_is_finished_and_its_files_are_there() -> None:
    card = CONFIG.with_name("README.md").read_text()
    assert re.findall(r"^[A-Z_]{4,}$|\b[A-Z]+_[A-Z]+\b", card, re.MULTILINE) == []  # places still to be filled
    named = re.findall(r"\]\((\S+?)\)|`(routing\.npz)`", card)
    assert named
    assert [name for pair in named for name in pair if name and not CONFIG.with_name(name).is_file()] == []


def test_the_sources_of_the_config_are_what_is_shipped() -> None:
    for name in ("config.json", "preprocessor_config.json"):
        assert (MODEL / name).read_bytes() == CONFIG.with_name(name).read_bytes()


def test_no_expert_is_dead_and_none_works_for_three() -> None:
    """Over the shipped record, which is of this very model on held-out conversations."""
    record = read_record(CONFIG.with_name("routing.npz"))
    assert record.model == model_hash(MODEL)
    for layer in record.counts():
        assert layer.min() > 0
        assert layer.max() <= 3 * layer.mean()
