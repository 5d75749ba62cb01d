"""A raw checkpoint directory in transformers' own model, float32 on the CPU: the oracle of the whole model.

Reads the published layout with the safetensors library and undoes INT4 and fp8 in the plainest way, on purpose
without any of the project's readers. The steps are separate (`read_raw`, `dequantise`, `build`) so that a test can
corrupt the data between them and prove that the comparison would notice.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
)

Tensors = dict[str, torch.Tensor]
NIBBLE_SHIFTS = (0, 4, 8, 12, 16, 20, 24, 28)  # element k of a row sits in bits 4*(k%8) of word k//8
ROUTED = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is."""
    raw: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return raw


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a raw config."""
    text: dict[str, Any] = raw.get("text_config", raw)
    return text


def read_raw(directory: Path) -> Tensors:
    """Every stored tensor by its published name, copied out of the files."""
    raw: Tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        raw.update(load_file(shard))
    return raw


def dequantise_int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(out, in/8) int32 and (out, in/32) bf16 to (out, in) float32."""
    shifts = torch.tensor(NIBBLE_SHIFTS)
    nibbles = (packed.long().unsqueeze(-1) >> shifts) & 0xF  # (out, in/8, 8)
    return (nibbles - 8).flatten(1).float() * scale.float().repeat_interleave(32, dim=1)


def dequantise_fp8(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """(out, in) e4m3 and one float32 per 128x128 block to (out, in) float32."""
    n_out, n_in = weight.shape
    blocks = scale_inv.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return weight.float() * blocks[:n_out, :n_in]


def dequantise(raw: Tensors) -> Tensors:
    """Plain float32 weights; quantised groups become one `<module>.weight`."""
    weights: Tensors = {}
    for name, tensor in raw.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix("_packed")
            weights[module] = dequantise_int4(tensor, raw[module + "_scale"])
            assert raw[module + "_shape"].tolist() == list(weights[module].shape), name
        elif tensor.dtype == torch.float8_e4m3fn:
            weights[name] = dequantise_fp8(tensor, raw[name + "_scale_inv"])
        elif not name.endswith((".weight_scale", ".weight_shape", ".weight_scale_inv", "inv_freq")):
            weights[name] = tensor.float()
    return weights


def _fuse_experts(weights: Tensors) -> Tensors:
    """Per-expert matrices to transformers' (E, 2F, D) `gate_up_proj`, gate first, and (E, D, F) `down_proj`."""
    fused: Tensors = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in weights.items():
        if match := ROUTED.match(name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            fused[name] = tensor
    for module, matrices in experts.items():
        count = range(len(matrices) // 3)
        fused[f"{module}.gate_up_proj"] = torch.stack(
            [torch.cat((matrices[e, "gate"], matrices[e, "up"])) for e in count]
        )
        fused[f"{module}.down_proj"] = torch.stack([matrices[e, "down"] for e in count])
    return fused


def _settings(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in text_config(raw).items() if k not in ("quantization_config", "model_type", "torch_dtype")}


def _empty_model(raw: dict[str, Any]) -> torch.nn.Module:
    kind: Any = DeepseekV3ForCausalLM
    config: Any = DeepseekV3Config(**_settings(raw))
    if raw["model_type"] == "deepseek_v2":
        kind, config = DeepseekV2ForCausalLM, DeepseekV2Config(**_settings(raw))
    elif raw["model_type"] == "kimi_k25":
        tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        whole: dict[str, Any] = {"text_config": config, "vision_config": tiny, "projection_hidden_size": 32}
        kind, config = Kimi_K25ForConditionalGeneration, Kimi_K25Config(tie_word_embeddings=False, **whole)
    model: torch.nn.Module = kind._from_config(config, attn_implementation="eager", experts_implementation="eager")
    return model


def build(raw: dict[str, Any], weights: Tensors) -> torch.nn.Module:
    """transformers' model with these weights. Every parameter of the language model must be given."""
    n_layers = text_config(raw)["num_hidden_layers"]
    state: Tensors = {}
    for name, tensor in _fuse_experts(weights).items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if name.startswith(("vision_tower.", "mm_projector.")) or (layer and int(layer[1]) >= n_layers):
            continue  # text only; layers past the last are for speculative decoding
        name = name.replace("language_model.model.", "model.language_model.").removeprefix("language_model.")
        state[name] = tensor
    with torch.random.fork_rng():
        model = _empty_model(raw)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [n for n in missing if not n.startswith(("model.vision_tower.", "model.mm_projector."))]
    assert not missing and not unexpected, f"missing {missing[:5]}, unexpected {unexpected[:5]}"
    return model.float().eval()


def load(directory: Path) -> torch.nn.Module:
    """The oracle of a checkpoint directory."""
    return build(read_config(directory), dequantise(read_raw(directory)))


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """(T, V) natural-log probabilities of the next token after each of `ids`."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.double().log_softmax(dim=-1)


def greedy(model: torch.nn.Module, ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """`count` greedy tokens, and the lead in nats of each over the second best."""
    known, leads = list(ids), []
    for _ in range(count):
        best = logprobs(model, known)[-1].topk(2)
        known.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return known[len(ids) :], leads
