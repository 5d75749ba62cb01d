"""Tiny raw `config.json` contents for every family the loader accepts.

The keys and their nesting are those of the published files; only the sizes are small, and the YaRN boundaries are
moved into a short prompt's reach so that a wrong frequency shows. Used by the parity and the system tests with
`hybrid.random_checkpoint`. Every call returns a fresh dict that the test may edit.
"""

from typing import Any

Raw = dict[str, Any]

FP8_BLOCKS: Raw = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
INT4_GROUPS: Raw = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
}


def _yarn(factor: float, beta_fast: float, mscale: float, mscale_all_dim: float) -> Raw:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 256,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


def _text(**changes: Any) -> Raw:
    """What all families share; `changes` are the family's own facts."""
    heads = changes.get("num_attention_heads", 4)
    yarn = changes.get("rope_scaling")
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "kv_lora_rank": 64,
        "max_position_embeddings": int(256 * yarn["factor"]) if yarn else 8192,
        "moe_intermediate_size": 64,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": heads,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 511,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 32,
        "vocab_size": 512,
    } | changes


def kimi_k25() -> Raw:
    """Kimi-K2.5: the text model nested under `text_config`, INT4 experts, a vision tower beside it."""
    text = _text(model_type="kimi_k2", rope_scaling=_yarn(64.0, 32.0, 1.0, 1.0), quantization_config=INT4_GROUPS)
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 511,
        "ignore_index": -100,
        "media_placeholder_token_id": 277,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "text_config": text,
        "vision_config": {
            "patch_size": 14,
            "init_pos_emb_height": 8,
            "init_pos_emb_width": 8,
            "init_pos_emb_time": 4,
            "pos_emb_type": "divided_fixed",
            "vt_hidden_size": 32,
            "vt_num_hidden_layers": 2,
            "vt_num_attention_heads": 2,
            "vt_intermediate_size": 64,
            "merge_kernel_size": [2, 2],
            "merge_type": "sd2_tpool",
            "video_attn_type": "spatial_temporal",
            "mm_projector_type": "patchmerger",
            "mm_hidden_size": 32,
            "projector_hidden_act": "gelu",
            "projector_ln_eps": 1e-5,
            "text_hidden_size": 128,
        },
    }


def kimi_k2() -> Raw:
    """Kimi-K2-Instruct: fp8 blocks, YaRN with beta_fast 1, its own eps."""
    return _text(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="kimi_k2",
        hidden_size=256,
        moe_intermediate_size=128,
        rms_norm_eps=1e-6,
        rope_scaling=_yarn(32.0, 1.0, 1.0, 1.0),
        quantization_config=FP8_BLOCKS,
    )


def kimi_k2_thinking() -> Raw:
    """K2-Thinking: INT4 experts without the prefix; sizes that are no multiple of 64 or 128."""
    return _text(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="kimi_k2",
        hidden_size=160,
        intermediate_size=224,
        moe_intermediate_size=96,
        num_attention_heads=5,
        q_lora_rank=48,
        kv_lora_rank=40,
        n_routed_experts=11,
        num_experts_per_tok=3,
        rope_scaling=_yarn(64.0, 1.0, 1.0, 1.0),
        quantization_config=INT4_GROUPS,
    )


def deepseek_v3() -> Raw:
    """DeepSeek-V3: fp8 blocks, grouped selection, more than one dense layer."""
    return _text(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=128,
        first_k_dense_replace=2,
        n_group=4,
        topk_group=2,
        rms_norm_eps=1e-6,
        rope_theta=10000,
        rope_scaling=_yarn(40, 32, 1.0, 1.0),
        routed_scaling_factor=2.5,
        quantization_config=FP8_BLOCKS,
    )


def deepseek_v3_odd() -> Raw:
    """As DeepSeek-V3, with partial fp8 blocks everywhere and mscale that does not cancel."""
    return deepseek_v3() | {
        "hidden_size": 160,
        "intermediate_size": 200,
        "moe_intermediate_size": 72,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 136,
        "kv_lora_rank": 40,
        "rope_scaling": _yarn(40, 32, 1.0, 0.5),
    }


def moonlight() -> Raw:
    """Moonlight: bf16, one query projection, no rope scaling, two shared experts."""
    raw = _text(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        n_shared_experts=2,
        q_lora_rank=None,
        routed_scaling_factor=2.446,
    )
    del raw["rope_scaling"]
    return raw


def deepseek_v2_lite() -> Raw:
    """DeepSeek-V2-Lite: bf16, softmax scoring, greedy choice without renormalising, mscale 0.707."""
    return _text(
        architectures=["DeepseekV2ForCausalLM"],
        model_type="deepseek_v2",
        n_shared_experts=2,
        norm_topk_prob=False,
        q_lora_rank=None,
        rms_norm_eps=1e-6,
        rope_theta=10000,
        rope_scaling=_yarn(40, 32, 0.707, 0.707),
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        topk_method="greedy",
    )


def deepseek_v2() -> Raw:
    """DeepSeek-V2 (236B): as V2-Lite with a query rank, groups scored by their best expert, and a large scale."""
    return deepseek_v2_lite() | {
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 64,
        "routed_scaling_factor": 16.0,
        "topk_method": "group_limited_greedy",
    }
