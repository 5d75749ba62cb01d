"""The transformer on the device: embedding, blocks of attention and MLP, norm and head.

Reads like the paper: `x += attention(norm x); x += mlp(norm x)`. Knows no requests and no sampling.
Called by `hybrid.engine`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding

from hybrid.config import ModelConfig
from hybrid.inputs import StepInputs
from hybrid.kv import LatentCache
from hybrid.lanes import Block, Lane, run
from hybrid.layers import Mlp, rms_norm
from hybrid.mla import Attention, MlaPath
from hybrid.moe import Moe, RoutedExperts, Router, Watch
from hybrid.narrow import Matrix, linear
from hybrid.rope import Rope, build_rope

Tensors = Mapping[str, Matrix]


@dataclass(frozen=True, slots=True)
class Transformer:
    """A whole language model but its routed experts."""

    eps: float
    rope: Rope
    embed: torch.Tensor  # (vocabulary, D), on the device or in RAM
    blocks: tuple[Block, ...]
    norm: torch.Tensor  # (D,)
    head: Matrix  # (vocabulary, D)

    def lane(self, pieces: Sequence[StepInputs], cache: LatentCache) -> Lane:
        """A step's new ids in pieces, or those of one half, at the start of their way; `hidden` takes them on."""
        return Lane(self.embedded(torch.cat([piece.ids for piece in pieces])), pieces, cache, self.rope, self.eps)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """(T,) to (T, D)."""
        return embedding(ids.to(self.embed.device), self.embed).to(ids.device)

    def hidden(self, lanes: Sequence[Lane]) -> torch.Tensor:
        """The residual stream after the last block, (T, D); the new ids' latents are in the cache afterwards.

        Two lanes take turns at the device and the routed experts.
        """
        run(self.blocks, lanes)
        return lanes[0].result if len(lanes) == 1 else torch.cat([lane.result for lane in lanes])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) to (N, vocabulary) float32."""
        return linear(rms_norm(hidden, self.norm, self.eps), self.head).float()


def build_model(
    config: ModelConfig, tensors: Tensors, experts: RoutedExperts, path: MlaPath, watch: Watch | None = None
) -> Transformer:
    """Join the loaded tensors (names of `ModelConfig.tensor_shapes`) to a model."""
    routers = {layer: _router(config, layer, tensors) for layer in config.moe_layers}
    embed, norm = _wide(tensors, "model.embed_tokens.weight"), _wide(tensors, "model.norm.weight")
    return Transformer(
        eps=config.rms_norm_eps,
        rope=build_rope(config, norm.device),
        embed=embed,
        blocks=tuple(
            _block(config, layer, tensors, routers, experts, path, watch) for layer in range(config.num_hidden_layers)
        ),
        norm=norm,
        head=embed if config.tie_word_embeddings else tensors["lm_head.weight"],
    )


def _block(
    config: ModelConfig,
    layer: int,
    tensors: Tensors,
    routers: Mapping[int, Router],
    experts: RoutedExperts,
    path: MlaPath,
    watch: Watch | None,
) -> Block:
    base = f"model.layers.{layer}."
    return Block(
        attention_norm=_wide(tensors, f"{base}input_layernorm.weight"),
        attention=_attention(config, layer, tensors, path),
        mlp_norm=_wide(tensors, f"{base}post_attention_layernorm.weight"),
        mlp=_moe(layer, tensors, routers, experts, watch) if layer in routers else _mlp(tensors, f"{base}mlp."),
    )


def _attention(config: ModelConfig, layer: int, tensors: Tensors, path: MlaPath) -> Attention:
    base = f"model.layers.{layer}.self_attn."
    return Attention(
        config=config,
        layer=layer,
        path=path,
        q_a=tensors.get(f"{base}q_a_proj.weight"),
        q_a_norm=None if config.q_lora_rank is None else _wide(tensors, f"{base}q_a_layernorm.weight"),
        q_b=tensors[f"{base}{'q_proj' if config.q_lora_rank is None else 'q_b_proj'}.weight"],
        kv_a=tensors[f"{base}kv_a_proj_with_mqa.weight"],
        kv_a_norm=_wide(tensors, f"{base}kv_a_layernorm.weight"),
        kv_b=tensors[f"{base}kv_b_proj.weight"],
        out=tensors[f"{base}o_proj.weight"],
    )


def _router(config: ModelConfig, layer: int, tensors: Tensors) -> Router:
    gate = f"model.layers.{layer}.mlp.gate."
    bias = f"{gate}e_score_correction_bias"
    return Router(config, _wide(tensors, f"{gate}weight"), _wide(tensors, bias) if bias in tensors else None)


def _moe(
    layer: int, tensors: Tensors, routers: Mapping[int, Router], experts: RoutedExperts, watch: Watch | None
) -> Moe:
    later = [number for number in routers if number > layer]
    following = (min(later), routers[min(later)]) if later else None
    shared = _mlp(tensors, f"model.layers.{layer}.mlp.shared_experts.")
    return Moe(layer, routers[layer], shared, experts, following, watch)


def _mlp(tensors: Tensors, base: str) -> Mlp:
    return Mlp(*(tensors[f"{base}{part}_proj.weight"] for part in ("gate", "up", "down")))


def _wide(tensors: Tensors, name: str) -> torch.Tensor:
    """One that is never narrow."""
    found = tensors[name]
    assert isinstance(found, torch.Tensor), f"{name} is looked up or added, not multiplied by"
    return found
