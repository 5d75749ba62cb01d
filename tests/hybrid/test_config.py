"""hybrid.config: every family's config.json, both spellings, and complaints that name the key."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import ConfigError, ModelConfig
from tests import families

FAMILIES = [
    families.kimi_k25,
    families.kimi_k2,
    families.kimi_k2_thinking,
    families.deepseek_v3,
    families.deepseek_v3_odd,
    families.moonlight,
    families.deepseek_v2_lite,
    families.deepseek_v2,
]
PUBLISHED_YARN = {
    "type": "yarn",
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def write(directory: Path, raw: dict[str, Any], **others: Any) -> Path:
    for name, values in {"config": raw, **others}.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return directory


def published_heads(factor: float | None, mscale: float = 1.0) -> ModelConfig:
    raw = families.deepseek_v3() | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": None}
    if factor is not None:
        raw["rope_scaling"] = PUBLISHED_YARN | {"factor": factor, "mscale": mscale, "mscale_all_dim": mscale}
    return ModelConfig.from_json(raw)


def test_published_kimi_k25(kimi_dir: Path) -> None:
    config = ModelConfig.from_directory(kimi_dir)
    assert (config.model_type, config.tensor_prefix, config.vision) == ("kimi_k25", "language_model.", True)
    assert config.moe_layers == tuple(range(1, 61))
    assert config.eos_token_ids == (163585, 163586)
    assert config.expert_format == "int4"
    assert config.expert_geometry.expert_bytes("int4") == 24_772_608
    assert config.kv_bytes_per_token(2) == 70_272
    # 595.15 GB less 570.76 GB of experts, 0.834 of vision tower and 0.109 of projector, plus 0.33 for a float32 router
    assert config.softmax_scale == pytest.approx(0.1446796, abs=1e-7)


@pytest.mark.parametrize(
    ("factor", "mscale", "expected"),
    [(64, 1.0, 0.1446796), (32, 1.0, 0.1308608), (40, 1.0, 0.1352338), (40, 0.707, 0.1147214), (None, 1.0, 0.0721688)],
)
def test_softmax_scale_of_the_published_models(factor: float | None, mscale: float, expected: float) -> None:
    assert published_heads(factor, mscale).softmax_scale == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: Callable[[], dict[str, Any]]) -> None:
    raw = family()
    config = ModelConfig.from_json(raw)
    text = raw.get("text_config", raw)
    for name in (
        "hidden_size",
        "q_lora_rank",
        "n_group",
        "topk_method",
        "scoring_func",
        "norm_topk_prob",
        "rope_theta",
    ):
        assert getattr(config, name) == text[name], name
    shapes = config.tensor_shapes()
    attention = {name.split(".")[-2] for name in shapes if "layers.0.self_attn" in name}
    assert ("q_proj" in attention) == (text["q_lora_rank"] is None)
    assert any("e_score_correction_bias" in name for name in shapes) == (text["topk_method"] == "noaux_tc")
    last = config.num_hidden_layers - 1
    inner = text["n_shared_experts"] * text["moe_intermediate_size"]
    assert shapes[f"model.layers.{last}.mlp.shared_experts.down_proj.weight"] == (text["hidden_size"], inner)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (text["intermediate_size"], text["hidden_size"])


def test_expert_format_follows_the_quantisation_at_either_level() -> None:
    raw = families.kimi_k25()
    raw["quantization_config"] = raw["text_config"].pop("quantization_config")
    assert ModelConfig.from_json(raw).expert_format == "int4"
    assert ModelConfig.from_json(families.deepseek_v3()).expert_format == "fp8"
    assert ModelConfig.from_json(families.moonlight()).expert_format == "bf16"


def test_both_spellings_of_rope_agree() -> None:
    old = families.kimi_k2()
    new = families.kimi_k2()
    scaling = new.pop("rope_scaling")
    scaling["rope_type"] = scaling.pop("type")
    new["rope_parameters"] = scaling | {"rope_theta": new.pop("rope_theta")}
    assert ModelConfig.from_json(new) == ModelConfig.from_json(old)
    plain = families.moonlight()
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": plain.pop("rope_theta")}
    assert ModelConfig.from_json(plain) == ModelConfig.from_json(families.moonlight())


def test_attention_factor_follows_the_two_mscales() -> None:
    scaling = ModelConfig.from_json(families.deepseek_v3_odd()).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx((0.1 * 3.688879 + 1) / (0.05 * 3.688879 + 1), rel=1e-6)
    raw = families.deepseek_v3()
    del raw["rope_scaling"]["mscale"], raw["rope_scaling"]["mscale_all_dim"]
    bare = ModelConfig.from_json(raw)
    assert bare.rope_scaling is not None
    assert bare.rope_scaling.attention_factor == pytest.approx(1.3688879, rel=1e-6)
    assert bare.softmax_scale == pytest.approx((32 + 16) ** -0.5)


def test_stop_ids_are_gathered(tmp_path: Path) -> None:
    added = {"256": {"content": "[BOS]"}, "257": {"content": "[EOS]"}, "258": {"content": "<|im_end|>"}}
    write(tmp_path, families.kimi_k25(), tokenizer_config={"added_tokens_decoder": added})
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (257, 258)
    write(tmp_path, families.moonlight() | {"eos_token_id": 7}, generation_config={"eos_token_id": [7, 9, 600]})
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (7, 9, 257, 258)  # 600 is outside the vocabulary
    assert ModelConfig.from_json(families.moonlight() | {"eos_token_id": None}).eos_token_ids == ()


def test_either_kimi_stop_id_brings_both() -> None:
    raw = families.moonlight() | {"vocab_size": 163840, "eos_token_id": 163586}
    assert ModelConfig.from_json(raw).eos_token_ids == (163585, 163586)


def test_layers_that_alternate() -> None:
    raw = families.moonlight() | {"moe_layer_freq": 2, "num_hidden_layers": 6}
    assert ModelConfig.from_json(raw).moe_layers == (2, 4)


def test_defaults_where_transformers_leaves_keys_out() -> None:
    raw = families.deepseek_v3()
    for key in ("scoring_func", "topk_method", "moe_layer_freq", "norm_topk_prob"):
        del raw[key]
    assert ModelConfig.from_json(raw) == ModelConfig.from_json(families.deepseek_v3())
    lite = families.deepseek_v2_lite() | {"n_group": None, "topk_group": None}
    del lite["scoring_func"], lite["topk_method"], lite["norm_topk_prob"]
    assert ModelConfig.from_json(lite) == ModelConfig.from_json(families.deepseek_v2_lite())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type must be one of kimi_k25, kimi_k2, deepseek_v3, deepseek_v2"),
        ({"hidden_size": "128"}, "hidden_size must be an integer"),
        ({"hidden_size": 128.0}, "hidden_size must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor must be a positive number"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim must be an integer of at least 2 and a multiple of 2"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"scoring_func": "tanh"}, "scoring_func must be one of sigmoid, softmax"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"eos_token_id": ["x"]}, "eos_token_id must be an integer"),
        ({"n_group": 3}, "n_group must be a divisor of n_routed_experts = 16"),
        ({"n_group": 4, "topk_group": 5}, "topk_group must be at most n_group = 4"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 5}, "num_experts_per_tok must be at most 4"),
        ({"n_group": 16, "topk_group": 8}, "n_group must be such that each group holds two experts"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace must be less than num_hidden_layers = 4"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type must be one of yarn, default"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "key rope_scaling.original_max_position_embeddings is miss",
        ),
        ({"rope_scaling": PUBLISHED_YARN | {"factor": 2, "truncate": False}}, "rope_scaling.truncate is not supported"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method must be one of compressed-tensors, fp8"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "quantization_config.weight_block_size must be [128, 128]",
        ),
    ],
)
def test_impossible_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, families.moonlight() | change)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_directory(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_group_size_other_than_32_is_refused() -> None:
    raw = copy.deepcopy(families.kimi_k25())
    raw["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    with pytest.raises(
        ConfigError, match=r"text_config\.quantization_config\.config_groups\.group_0\.weights\.group_size"
    ):
        ModelConfig.from_json(raw)


@pytest.mark.parametrize(
    "key",
    sorted(set(families.moonlight()) & {"hidden_size", "kv_lora_rank", "q_lora_rank", "rope_theta", "vocab_size"}),
)
def test_missing_keys_are_named(key: str) -> None:
    raw = families.moonlight()
    del raw[key]
    with pytest.raises(ConfigError, match=f"config.json: key {key} is missing"):
        ModelConfig.from_json(raw)


def test_missing_text_config() -> None:
    with pytest.raises(ConfigError, match="key text_config is missing"):
        ModelConfig.from_json({"model_type": "kimi_k25"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "not valid"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_directory(tmp_path)
