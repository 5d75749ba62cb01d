"""What a checkpoint's config.json says, checked once, as plain values; and what the engine is asked to do with it.

Knows the model family (Kimi-K2.5, Kimi-K2, DeepSeek-V3, DeepSeek-V2 and relatives), its numbers and its tensor names.
Knows no tensors and no devices: torch is never imported, so that the server and the planner can read a config.
`hybrid.config_json` does the reading and the complaining.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hybrid.config_json import ConfigError as ConfigError
from hybrid.config_json import Fields, read_object
from offload.config import ExpertFormat, ExpertGeometry, PoolConfig, Projection

if TYPE_CHECKING:  # for readers of plans, who import no numpy
    from offload.stream_split import StreamRates

ModelType = Literal["kimi_k25", "kimi_k2", "deepseek_v3", "deepseek_v2"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]
ScoringFunc = Literal["sigmoid", "softmax"]
NarrowFormat = Literal["fp8", "int8"]  # one byte for each value
KvDtype = Literal["model", NarrowFormat]  # "model": as everything is computed

MODEL_TYPES: tuple[ModelType, ...] = ("kimi_k25", "kimi_k2", "deepseek_v3", "deepseek_v2")

# What exists at once in a step. The engine computes in these sizes and the ledger of bytes counts with them.
KEY_BLOCK = 2048  # keys expanded: 134 MB of float32 keys and values at 64 heads of 128 + 128
QUERY_BLOCK = 128  # queries scored: 67 MB of float32 scores at 64 heads
PIECE_TOKENS = 2048  # new ids in a layer, but for its routed experts: 226 MB of bf16 in a dense MLP of 3 x 18,432
LOGIT_ROWS = 256  # positions with logits: 168 MB of float32 at 163,840 words
# Narrow weights widened: 34 MB of bf16, which the L2 of a large GPU holds (40 to 100 MB), so that a decoding step reads
# one byte for each weight from its memory. Smaller tiles are more launches.
WIDE_TILE = 1 << 24

KIMI_STOP_NAMES = ("[EOS]", "<|im_end|>")
KIMI_STOP_IDS = frozenset((163585, 163586))  # the same two in the published vocabulary
YARN_KEYS = frozenset(
    ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
)
ROPE_KEYS = YARN_KEYS | {"type", "rope_type", "rope_theta"}


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's growth of attention with the context: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN. `mscale` and `mscale_all_dim` are 0 where the file has none."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def attention_factor(self) -> float:
        """Multiplier of cos and sin; 1 in every published checkpoint of the family (mscale = mscale_all_dim)."""
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model of the family. Names as in config.json; `q_lora_rank` None means a single q_proj."""

    model_type: ModelType
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    topk_method: TopkMethod
    scoring_func: ScoringFunc
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_interleave: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    expert_format: ExpertFormat  # as published
    tensor_prefix: str  # "language_model." or ""
    vision: bool

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Read DIR/config.json, and the stop ids of generation_config.json and tokenizer_config.json beside it.

        Raises ConfigError, one line that names the file, the key and what was expected.
        """
        stops: set[int] = set()
        generation, tokenizer = directory / "generation_config.json", directory / "tokenizer_config.json"
        if generation.is_file():
            stops |= set(Fields(read_object(generation), str(generation)).integers("eos_token_id"))
        if tokenizer.is_file():
            stops |= _named_stops(read_object(tokenizer))
        file = directory / "config.json"
        return cls.from_json(read_object(file), str(file), frozenset(stops))

    @classmethod
    def from_json(
        cls, values: Mapping[str, object], where: str = "config.json", stops: frozenset[int] = frozenset()
    ) -> "ModelConfig":
        """The model of a parsed config.json. `stops` adds stop ids known from elsewhere."""
        top = Fields(values, where)
        model_type = top.choice("model_type", MODEL_TYPES)
        text = top.section("text_config") if model_type == "kimi_k25" else top
        _refuse_unknown_shapes(text)
        n_experts = text.integer("n_routed_experts")
        theta, scaling = _rope(text)
        first_dense = text.integer("first_k_dense_replace", minimum=0)
        vocab = text.integer("vocab_size")
        config = cls(
            model_type=model_type,
            hidden_size=text.integer("hidden_size"),
            num_hidden_layers=text.integer("num_hidden_layers"),
            first_k_dense_replace=first_dense,
            moe_layer_freq=text.integer("moe_layer_freq", default=1),
            intermediate_size=text.integer("intermediate_size"),
            moe_intermediate_size=text.integer("moe_intermediate_size"),
            num_attention_heads=text.integer("num_attention_heads"),
            q_lora_rank=text.integer_or_null("q_lora_rank"),
            kv_lora_rank=text.integer("kv_lora_rank"),
            qk_nope_head_dim=text.integer("qk_nope_head_dim"),
            qk_rope_head_dim=text.integer("qk_rope_head_dim", multiple_of=2),
            v_head_dim=text.integer("v_head_dim"),
            n_routed_experts=n_experts,
            num_experts_per_tok=text.integer("num_experts_per_tok"),
            n_shared_experts=text.integer("n_shared_experts"),
            n_group=text.integer("n_group", default=1),
            topk_group=text.integer("topk_group", default=1),
            topk_method=text.choice(
                "topk_method", ("noaux_tc", "greedy", "group_limited_greedy"), _topk_default(model_type)
            ),
            scoring_func=text.choice("scoring_func", ("sigmoid", "softmax"), _scoring_default(model_type)),
            norm_topk_prob=text.flag("norm_topk_prob", model_type != "deepseek_v2"),
            routed_scaling_factor=text.number("routed_scaling_factor"),
            rms_norm_eps=text.number("rms_norm_eps"),
            vocab_size=vocab,
            max_position_embeddings=text.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_interleave=text.flag("rope_interleave", True),
            tie_word_embeddings=text.flag("tie_word_embeddings", top.flag("tie_word_embeddings", False)),
            eos_token_ids=_stop_ids(top, text, stops, vocab),
            expert_format=_expert_format(top, text),
            tensor_prefix="language_model." if model_type == "kimi_k25" else "",
            vision=model_type == "kimi_k25" and top.has("vision_config"),
        )
        _check_routing(config, text)
        return config

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with routed experts."""
        return tuple(
            layer
            for layer in range(self.first_k_dense_replace, self.num_hidden_layers)
            if layer % self.moe_layer_freq == 0
        )

    @property
    def expert_geometry(self) -> ExpertGeometry:
        """Sizes of one layer's routed experts."""
        return ExpertGeometry(self.n_routed_experts, self.hidden_size, self.moe_intermediate_size)

    @property
    def latent_size(self) -> int:
        """Values cached for a token in a layer: the latent and the shared rotated key (C + R)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention scores: head size ** -0.5, times YaRN's mscale squared, at every length."""
        scale = 1 / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim)
        if self.rope_scaling is None or not self.rope_scaling.mscale_all_dim:
            return scale
        return scale * yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of cache for one token over all layers."""
        return self.num_hidden_layers * self.latent_size * itemsize

    def expert_name(self, layer: int, expert: int, projection: Projection) -> str:
        """Name of one routed matrix in the checkpoint, without `.weight…`."""
        return f"{self.tensor_prefix}model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the language model but the routed experts, by name without `tensor_prefix`."""
        d, vocab = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (vocab, d)
        moe = set(self.moe_layers)
        for layer in range(self.num_hidden_layers):
            base = f"model.layers.{layer}."
            shapes |= {f"{base}input_layernorm.weight": (d,), f"{base}post_attention_layernorm.weight": (d,)}
            shapes |= {f"{base}self_attn.{name}.weight": shape for name, shape in self._attention_shapes().items()}
            if layer not in moe:
                shapes |= _mlp_shapes(f"{base}mlp.", d, self.intermediate_size)
                continue
            shapes[f"{base}mlp.gate.weight"] = (self.n_routed_experts, d)
            if self.topk_method == "noaux_tc":
                shapes[f"{base}mlp.gate.e_score_correction_bias"] = (self.n_routed_experts,)
            shapes |= _mlp_shapes(f"{base}mlp.shared_experts.", d, self.n_shared_experts * self.moe_intermediate_size)
        return shapes

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        d, heads, latent = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        q_out = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        shapes: dict[str, tuple[int, ...]] = {"q_proj": (q_out, d)}
        if self.q_lora_rank is not None:
            rank = self.q_lora_rank
            shapes = {"q_a_proj": (rank, d), "q_a_layernorm": (rank,), "q_b_proj": (q_out, rank)}
        return shapes | {
            "kv_a_proj_with_mqa": (self.latent_size, d),
            "kv_a_layernorm": (latent,),
            "kv_b_proj": (heads * (self.qk_nope_head_dim + self.v_head_dim), latent),
            "o_proj": (d, heads * self.v_head_dim),
        }


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one engine loads and how it computes. `n_pages` pages of `page_size` tokens hold the latent cache.

    `mla` "auto" takes the cheaper of the two attention paths for each row; the others force one, for tests.
    `experts` is who runs the routed experts: our kernels, kt-kernel, or the faster of the two after a trial.
    `expert_ram` bytes are for experts that a packed file holds; None takes what is free when they are opened, less the
    cache and HOST_RESERVE. `n_ram_pages` pages more lie in RAM, for prefixes that no running request holds.
    `narrow` holds the matrices outside the routed experts in a byte for each value (`hybrid.widths`), `kv_dtype`
    likewise the cache; everything is computed in `dtype`. `embedding_in_ram` looks ids up beside the CPU, and only
    their rows go to the device.
    `ring_bytes` of the device, two experts or more, let steps with prompts stream experts there, as many as the
    `stream_rates` of this machine say; 0 for none.
    `ping_pong` runs steps as two halves that take turns at the device and the experts: "auto" where trying shows that
    it pays, "on" wherever there are two rows. `handoff` lets the device release the expert workers by a flag instead of
    being waited for. `warm` lets idle workers read likely experts into the processor's cache.
    `graphs` replays the device's part of decode steps from CUDA graphs, on cuda.
    `vram_slots` are experts of each MoE layer that lie on the device as well; () for none anywhere.
    """

    model: Path
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    expert_format: Literal["native", "int8", "int4"]
    pool: PoolConfig
    n_pages: int
    page_size: int = 16
    mla: Literal["auto", "naive", "absorbed"] = "auto"
    experts: Literal["numba", "kt", "auto"] = "numba"
    expert_ram: int | None = None
    n_ram_pages: int = 0
    narrow: NarrowFormat | None = None
    kv_dtype: KvDtype = "model"
    embedding_in_ram: bool = False
    ring_bytes: int = 0
    stream_rates: "StreamRates | None" = None
    ping_pong: Literal["off", "auto", "on"] = "off"
    handoff: bool = False
    warm: bool = False
    graphs: bool = False
    vram_slots: tuple[int, ...] = ()


def is_router(name: str) -> bool:
    """True for the router's weight and bias: bf16 logits would change which experts win, so they stay float32."""
    return ".mlp.gate." in name


def _mlp_shapes(base: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{base}gate_proj.weight": (inner, hidden),
        f"{base}up_proj.weight": (inner, hidden),
        f"{base}down_proj.weight": (hidden, inner),
    }


def _topk_default(model_type: ModelType) -> TopkMethod:
    # transformers 5 leaves the key out when it saves a DeepSeek-V3 config, because that class knows one method only.
    return "greedy" if model_type == "deepseek_v2" else "noaux_tc"


def _scoring_default(model_type: ModelType) -> ScoringFunc:
    return "softmax" if model_type == "deepseek_v2" else "sigmoid"


def _refuse_unknown_shapes(text: Fields) -> None:
    """Features no checkpoint of the family uses; running without them would give wrong numbers."""
    text.choice("hidden_act", ("silu",), "silu")
    for key in ("attention_bias", "mlp_bias"):
        if text.flag(key, False):
            raise text.error(key, "false (biases are not supported)")


def _rope(text: Fields) -> tuple[float, RopeScaling | None]:
    """theta and YaRN, from `rope_parameters` (transformers 5) or `rope_theta` beside `rope_scaling` (as published)."""
    modern = text.has("rope_parameters")
    scaling = (
        text.section("rope_parameters" if modern else "rope_scaling") if modern or text.has("rope_scaling") else None
    )
    if scaling is None:
        return text.number("rope_theta"), None
    theta = scaling.number("rope_theta") if scaling.has("rope_theta") else text.number("rope_theta")
    kind = scaling.choice("rope_type" if scaling.has("rope_type") else "type", ("yarn", "default"), "default")
    if kind == "default":
        return theta, None
    scaling.refuse_others(ROPE_KEYS)
    return theta, RopeScaling(
        factor=scaling.number("factor"),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        mscale=scaling.number("mscale", default=0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", default=0.0),
    )


def _expert_format(top: Fields, text: Fields) -> ExpertFormat:
    """Format of the routed experts, from a quantization_config at either level."""
    holder = text if text.has("quantization_config") else top
    if not holder.has("quantization_config"):
        return "bf16"
    quantisation = holder.section("quantization_config")
    if quantisation.choice("quant_method", ("compressed-tensors", "fp8")) == "fp8":
        if quantisation.integers("weight_block_size") != (128, 128):
            raise quantisation.error("weight_block_size", "[128, 128]")
        return "fp8"
    quantisation.choice("format", ("pack-quantized",))
    groups = quantisation.section("config_groups")
    for name in groups.values:
        weights = groups.section(name).section("weights")
        expected: dict[str, object] = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}
        for key, value in expected.items():
            if weights.values.get(key) != value:
                raise weights.error(key, repr(value))
    return "int4"


def _stop_ids(top: Fields, text: Fields, extra: frozenset[int], vocab_size: int) -> tuple[int, ...]:
    """All ids that end a turn, ascending."""
    stops = set(top.integers("eos_token_id")) | set(text.integers("eos_token_id")) | extra
    if stops & KIMI_STOP_IDS:  # one revision of K2.5 names [EOS], another <|im_end|>; the model ends with either
        stops |= KIMI_STOP_IDS
    return tuple(sorted(stop for stop in stops if stop < vocab_size))  # an id beyond the vocabulary is never drawn


def _named_stops(tokenizer: Mapping[str, object]) -> set[int]:
    """Ids of Kimi's two end tokens wherever a smaller Kimi vocabulary has put them."""
    added = tokenizer.get("added_tokens_decoder")
    if not isinstance(added, Mapping):
        return set()
    return {
        int(key)
        for key, token in added.items()
        if isinstance(token, Mapping) and token.get("content") in KIMI_STOP_NAMES and str(key).isdecimal()
    }


def _check_routing(config: ModelConfig, text: Fields) -> None:
    """Numbers that are fine alone and impossible together."""
    if not config.moe_layers:
        raise text.error("first_k_dense_replace", f"less than num_hidden_layers = {config.num_hidden_layers}")
    if config.n_routed_experts % config.n_group:
        raise text.error("n_group", f"a divisor of n_routed_experts = {config.n_routed_experts}")
    if config.topk_group > config.n_group:
        raise text.error("topk_group", f"at most n_group = {config.n_group}")
    per_group = config.n_routed_experts // config.n_group
    if config.n_group > 1 and config.topk_method == "noaux_tc" and per_group < 2:
        raise text.error("n_group", "such that each group holds two experts (a group is ranked by its best two)")
    reachable = config.n_routed_experts if config.topk_method == "greedy" else config.topk_group * per_group
    if config.num_experts_per_tok > reachable:
        raise text.error("num_experts_per_tok", f"at most {reachable}, the experts that the chosen groups hold")
