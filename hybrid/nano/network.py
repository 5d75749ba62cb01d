"""The network that trains: Kimi-K2.5's text model in plain PyTorch with gradients, its weights under published names.

The engine's own layers keep a paged cache and no gradients; this is the same arithmetic for whole documents, and a
test holds the two together. Letters as in `hybrid/README.md`. Called by `hybrid.nano.train`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from hybrid.config import ModelConfig
from hybrid.mla import LATENT_NORM_EPS
from hybrid.nano.vision import Tower, key_of
from hybrid.rope import build_rope
from offload.config import GROUP

EMBEDDING_STD = 0.5
HEAD_STD = 0.01


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of `shapes[i][1]` tokens each, `shapes[i][0]` of them, padded to rectangles and laid end to end."""

    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,)
    real: torch.Tensor  # (T,) bool, False for padding
    shapes: Sequence[tuple[int, int]]  # (documents, tokens) of each rectangle
    asked: torch.Tensor  # (A,) tokens whose successor is predicted
    targets: torch.Tensor  # (A,)
    weights: torch.Tensor  # (A,)
    images: Sequence[torch.Tensor] = ()  # (3, H, W) each, normalised
    seen_at: torch.Tensor | None = None  # (M,) where the images' tokens stand, in order


class Network(nn.Module):
    """Text model with its eyes. `routed` counts the tokens each expert got since `balance` was last called."""

    def __init__(self, config: ModelConfig, tower: Tower, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.tower = tower
        self.rope = build_rope(config, device)
        self._quantised = False
        self.weights = nn.ParameterDict()
        self.biases: dict[int, torch.Tensor] = {}
        self.routed: dict[int, torch.Tensor] = {}
        for name, shape in config.tensor_shapes().items():
            if not name.endswith("e_score_correction_bias"):
                self._add(name, shape, device)
        e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        for layer in config.moe_layers:
            for projection, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                self._add(f"model.layers.{layer}.mlp.experts.{projection}", (e, *shape), device)
            self.biases[layer] = torch.zeros(e, device=device)
            self.routed[layer] = torch.zeros(e, device=device)

    def _add(self, name: str, shape: tuple[int, ...], device: torch.device) -> None:
        if len(shape) == 1:
            value = torch.ones(shape, device=device)
        else:
            value = torch.randn(shape, device=device) * shape[-1] ** -0.5
        if name.endswith(("down_proj.weight", "experts.down", "o_proj.weight")):  # what goes back into the residual
            value *= (2 * self.config.num_hidden_layers) ** -0.5
        if name == "model.embed_tokens.weight":
            value = torch.randn(shape, device=device) * EMBEDDING_STD
        if name == "lm_head.weight":
            value = torch.randn(shape, device=device) * HEAD_STD
        self.weights[key_of(name)] = nn.Parameter(value)

    def quantise(self, on: bool) -> None:
        """Whether the forward pass sees the weights as they will be shipped."""
        self._quantised = self.tower.quantised = on

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The text model's weights by published name; a layer's experts are stacked: `…experts.gate`, `up`, `down`."""
        for key, value in self.weights.items():
            yield key.replace("/", "."), value

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.weights[key_of(name)]
        if not self._quantised:
            return weight
        seen = int4_rounded(weight) if ".experts." in name else weight.detach().bfloat16().float()
        return weight + (seen - weight).detach()  # straight through: the gradient is the full weight's

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits of the asked tokens' successors, (A, vocabulary) float32."""
        x = embedding(batch.ids, self._weight("model.embed_tokens.weight"))  # (T, D)
        if batch.seen_at is not None:
            x = x.index_copy(0, batch.seen_at, self.tower(batch.images))
        table = tuple(part[:, None] for part in self.rope.table(batch.positions))
        for layer in range(self.config.num_hidden_layers):
            base = f"model.layers.{layer}."
            x = x + self._attend(base, self._norm(x, f"{base}input_layernorm"), batch.shapes, table)
            h = self._norm(x, f"{base}post_attention_layernorm")
            if layer in self.biases:
                x = x + self._experts(layer, h, batch.real) + self._mlp(f"{base}mlp.shared_experts.", h)
            else:
                x = x + self._mlp(f"{base}mlp.", h)
        return linear(self._norm(x[batch.asked], "model.norm"), self._weight("lm_head.weight"))

    def _norm(self, x: torch.Tensor, name: str, eps: float | None = None) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self._weight(f"{name}.weight"), eps or self.config.rms_norm_eps)

    def _attend(
        self, base: str, x: torch.Tensor, shapes: Sequence[tuple[int, int]], table: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        c, base = self.config, f"{base}self_attn."
        heads = c.num_attention_heads
        q = self._norm(linear(x, self._weight(f"{base}q_a_proj.weight")), f"{base}q_a_layernorm", LATENT_NORM_EPS)
        q = torch.unflatten(linear(q, self._weight(f"{base}q_b_proj.weight")), -1, (heads, -1))
        q_nope, q_rope = torch.split(q, [c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        both = linear(x, self._weight(f"{base}kv_a_proj_with_mqa.weight"))
        latent, k_rope = torch.split(both, [c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self._norm(latent, f"{base}kv_a_layernorm", LATENT_NORM_EPS)
        kv = torch.unflatten(linear(latent, self._weight(f"{base}kv_b_proj.weight")), -1, (heads, -1))
        k_nope, v = torch.split(kv, [c.qk_nope_head_dim, c.v_head_dim], -1)
        cos, sin = table
        q = torch.cat((q_nope, self.rope.rotate(q_rope, cos, sin)), -1)
        k_rope = self.rope.rotate(k_rope[:, None], cos, sin).expand(-1, heads, -1)
        k = torch.cat((k_nope, k_rope), -1)
        mixed, start = [], 0
        for n, length in shapes:
            part = slice(start, start + n * length)
            start = part.stop
            rows = [torch.unflatten(t[part], 0, (n, length)).transpose(1, 2) for t in (q, k, v)]
            out = scaled_dot_product_attention(rows[0], rows[1], rows[2], is_causal=True, scale=c.softmax_scale)
            mixed.append(out.transpose(1, 2).reshape(n * length, -1))
        return linear(torch.cat(mixed), self._weight(f"{base}o_proj.weight"))

    def _mlp(self, base: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self._weight(f"{base}{name}_proj.weight") for name in ("gate", "up", "down"))
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    def _experts(self, layer: int, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        c, base = self.config, f"model.layers.{layer}.mlp."
        scores = linear(x, self._weight(f"{base}gate.weight")).sigmoid()  # (T, E)
        chosen = (scores.detach() + self.biases[layer]).topk(c.num_experts_per_tok, sorted=False).indices  # (T, K)
        shares = scores.gather(1, chosen)
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        if self.training:
            self.routed[layer] += torch.bincount(chosen[real].flatten(), minlength=c.n_routed_experts)
        plan = _Plan(chosen, c.n_routed_experts)
        rows = _Dispatch.apply(x, plan)  # type: ignore[no-untyped-call]  # (E, capacity, D)
        gate, up, down = (self._weight(f"{base}experts.{name}") for name in ("gate", "up", "down"))
        first, second = (rows @ torch.cat((gate, up), 1).mT).chunk(2, -1)
        inner = silu(first) * second
        out: torch.Tensor = _Collect.apply(inner @ down.mT, plan)  # type: ignore[no-untyped-call]  # (T, K, D)
        return (shares[:, None] @ out).squeeze(1)

    def balance(self, rate: float) -> float:
        """Move every layer's selection bias against its load, DeepSeek-V3's aux-loss-free way (arXiv 2412.19437).

        Returns the mean over layers of the busiest expert's load, in units of the mean load.
        """
        busiest = 0.0
        for layer, counts in self.routed.items():
            busiest += float(counts.max() / counts.mean()) / len(self.routed)
            self.biases[layer] += rate * torch.sign(counts.mean() - counts)
            counts.zero_()
        return busiest


def int4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """The values that INT4 with bf16 scales for every 32 inputs can hold, nearest to `weight` (…, in)."""
    codes, scales = int4(weight.detach())
    return (codes * scales[..., None]).flatten(-2)


def int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes −7 to 7, float (…, in / 32, 32), and bf16 scales as float (…, in / 32): the largest value is code 7."""
    groups = torch.unflatten(weight, -1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).clamp_min(1e-8).bfloat16().float()
    return (groups / scales[..., None]).round().clamp(-7, 7), scales


class _Plan:
    """Where each token's rows go when tokens are grouped by expert, each expert padded to the busiest one's rows."""

    def __init__(self, chosen: torch.Tensor, n_experts: int) -> None:
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=n_experts)
        self.shape = (n_experts, int(counts.max()))
        order = flat.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        within = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
        taken = flat[order] * self.shape[1] + within
        self.slots = torch.empty_like(flat).index_copy_(0, order, taken)  # (T * K,) row of each choice
        self.tokens = torch.full((n_experts * self.shape[1],), len(chosen), device=flat.device)
        self.tokens[taken] = order // chosen.shape[1]  # token of each row; T where the row is padding
        self.n_chosen = chosen.shape[1]


class _Dispatch(torch.autograd.Function):
    """(T, D) to (E, capacity, D). Both directions gather, which is much faster than scattering gradients."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, plan: _Plan) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.plan = plan
        return torch.unflatten(_padded(x)[plan.tokens], 0, plan.shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        rows = grad.flatten(0, 1)[ctx.plan.slots]
        return torch.unflatten(rows, 0, (-1, ctx.plan.n_chosen)).sum(1), None


class _Collect(torch.autograd.Function):
    """(E, capacity, D) to (T, K, D), the way back of `_Dispatch`."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, plan: _Plan) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.plan = plan
        return torch.unflatten(rows.flatten(0, 1)[plan.slots], 0, (-1, plan.n_chosen))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        plan = ctx.plan
        choice = torch.full_like(plan.tokens, len(plan.slots))
        choice[plan.slots] = torch.arange(len(plan.slots), device=plan.slots.device)
        return torch.unflatten(_padded(grad.flatten(0, 1))[choice], 0, plan.shape), None


def _padded(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x.new_zeros(1, x.shape[1])))
