"""Multi-head latent attention over paged latents, in two equal ways.

naive     expand every latent to the heads' keys and values, then attend: fewer multiplications for long prefills.
absorbed  move the expansion to the query and the output, and attend over the latents themselves: for decoding.

The naive path is the oracle of the absorbed one. Both walk the context in blocks of keys with a running softmax, so
memory does not grow with the context, and block borders do not depend on the batch. Letters: `hybrid/README.md`.
Knows no weights' names and no page ownership. Called by `hybrid.model`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from hybrid.config import KEY_BLOCK, QUERY_BLOCK, ModelConfig
from hybrid.inputs import Group, StepInputs
from hybrid.kv import LatentCache
from hybrid.layers import rms_norm
from hybrid.narrow import Matrix, linear, widened
from hybrid.rope import Rope

# The published modelling code builds these two norms without passing rms_norm_eps, so they run with its default, also
# where the config says 1e-5 (K2.5, Moonlight). transformers 5.23 does the same; parity is measured against it.
LATENT_NORM_EPS = 1e-6

MlaPath = Literal["auto", "naive", "absorbed"]


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries in their two parts."""

    nope: torch.Tensor  # (..., H, N)
    rope: torch.Tensor  # (..., H, R), rotated


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer. `q_a` and `q_a_norm` are None where the config has no q_lora_rank; `q_b` is then q_proj."""

    config: ModelConfig
    layer: int
    path: MlaPath
    q_a: Matrix | None  # (Q, D)
    q_a_norm: torch.Tensor | None  # (Q,)
    q_b: Matrix  # (H * (N + R), Q or D)
    kv_a: Matrix  # (C + R, D)
    kv_a_norm: torch.Tensor  # (C,)
    kv_b: Matrix  # (H * (N + V), C)
    out: Matrix  # (D, H * V)

    def __call__(
        self,
        x: torch.Tensor,
        inputs: StepInputs,
        cache: LatentCache,
        rope: Rope,
        table: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """(T, D) to (T, D); writes the new latents first, so that rows see themselves."""
        q = self._queries(x, rope, table)
        cache.write(self.layer, inputs.slots, self._latents(x, rope, table))
        mixed = q.nope.new_empty(*q.nope.shape[:2], self.config.v_head_dim)  # (T, H, V)
        for group in inputs.groups:
            mine = Queries(q.nope[group.tokens], q.rope[group.tokens])  # (B, n, H, N), (B, n, H, R)
            mixed[group.tokens] = self._attend(mine, group, cache).to(mixed.dtype)
        return linear(mixed.flatten(1), self.out)  # (T, D)

    def _queries(self, x: torch.Tensor, rope: Rope, table: tuple[torch.Tensor, torch.Tensor]) -> Queries:
        if self.q_a is not None and self.q_a_norm is not None:
            x = rms_norm(linear(x, self.q_a), self.q_a_norm, LATENT_NORM_EPS)  # (T, Q)
        q = torch.unflatten(linear(x, self.q_b), -1, (self.config.num_attention_heads, -1))  # (T, H, N + R)
        nope, pe = torch.split(q, [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        cos, sin = table
        return Queries(nope, rope.rotate(pe, cos[:, None], sin[:, None]))

    def _latents(self, x: torch.Tensor, rope: Rope, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """What the cache holds of the new ids: (T, C + R)."""
        c, k_pe = torch.split(linear(x, self.kv_a), [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        return torch.cat((rms_norm(c, self.kv_a_norm, LATENT_NORM_EPS), rope.rotate(k_pe, *table)), -1)

    def _attend(self, q: Queries, group: Group, cache: LatentCache) -> torch.Tensor:
        """(B, n, H, V) float32 for one group."""
        n_new = q.nope.shape[1]
        absorbs = self.path == "absorbed" or (
            self.path == "auto" and absorbed_is_cheaper(self.config, n_new, group.n_context)
        )
        return self._absorbed(q, group, cache) if absorbs else self._naive(q, group, cache)

    def _naive(self, q: Queries, group: Group, cache: LatentCache) -> torch.Tensor:
        blocks = _query_blocks(torch.cat((q.nope, q.rope), -1), group)  # (B, n, H, N + R)
        n_nope, expand = self.config.qk_nope_head_dim, self._expand(q.nope.dtype)
        for start, latent in _key_blocks(self.layer, group, cache):
            c, k_pe = torch.split(latent, [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
            kv = torch.einsum("bkc,hmc->bkhm", c, expand)  # (B, k, H, N + V)
            heads_pe = k_pe[:, :, None].expand(*kv.shape[:3], -1)  # (B, k, H, R)
            keys, values = torch.cat((kv[..., :n_nope], heads_pe), -1), kv[..., n_nope:]
            for block in blocks:
                if block.sees(start):
                    scores = torch.einsum("bqhd,bkhd->bqhk", block.q, keys)
                    block.add(scores.float() * self.config.softmax_scale, start, "bqhk,bkhv->bqhv", values)
        return torch.cat([block.result() for block in blocks], 1)  # (B, n, H, V)

    def _absorbed(self, q: Queries, group: Group, cache: LatentCache) -> torch.Tensor:
        w_uk, w_uv = torch.split(
            self._expand(q.nope.dtype), [self.config.qk_nope_head_dim, self.config.v_head_dim], 1
        )  # (H, N, C), (H, V, C)
        in_latent = torch.einsum("bqhn,hnc->bqhc", q.nope, w_uk)
        blocks = _query_blocks(torch.cat((in_latent, q.rope), -1), group)  # (B, n, H, C + R)
        for start, latent in _key_blocks(self.layer, group, cache):
            c = latent[..., : self.config.kv_lora_rank]  # (B, k, C)
            for block in blocks:
                if block.sees(start):
                    scores = torch.einsum("bqhl,bkl->bqhk", block.q, latent)
                    block.add(scores.float() * self.config.softmax_scale, start, "bqhk,bkc->bqhc", c)
        mixed = torch.cat([block.result() for block in blocks], 1).to(q.nope.dtype)  # (B, n, H, C)
        return torch.einsum("bqhc,hvc->bqhv", mixed, w_uv)

    def _expand(self, dtype: torch.dtype) -> torch.Tensor:
        """From a latent to the heads' keys and values: (H, N + V, C)."""
        return torch.unflatten(widened(self.kv_b, dtype), 0, (self.config.num_attention_heads, -1))


class QueryBlock:
    """Some queries of a group and their running softmax: top score, sum of exponentials, weighted sum of values."""

    def __init__(self, q: torch.Tensor, positions: torch.Tensor, first: int, last: int) -> None:
        self.q = q  # (B, q, H, …)
        self._positions = positions  # (B, q)
        self._first, self._last = first, last  # smallest and largest of `positions`, known without asking the device
        self._top = q.new_full((*q.shape[:3], 1), -math.inf, dtype=torch.float32)  # (B, q, H, 1)
        self._total = torch.zeros_like(self._top)
        self._mixed: torch.Tensor | None = None  # (B, q, H, …) float32

    def sees(self, start: int) -> bool:
        """False where all keys from `start` on lie in the future."""
        return start <= self._last

    def add(self, scores: torch.Tensor, start: int, letters: str, values: torch.Tensor) -> None:
        """Take in the float32 scores (B, q, H, k), overwritten, of the keys from `start` on, and their values.

        Blocks must come in order: key 0 is seen by every query, so `top` is finite from the first block on.
        """
        n_keys = scores.shape[-1]
        if start + n_keys - 1 > self._first:
            keys = torch.arange(start, start + n_keys, device=scores.device)
            scores.masked_fill_((keys > self._positions[..., None])[:, :, None], -math.inf)
        top = torch.maximum(self._top, scores.amax(-1, keepdim=True))
        weights = scores.sub_(top).exp_()
        fade = (self._top - top).exp_()  # what is left of the sums so far
        mixed = torch.einsum(letters, weights.to(values.dtype), values).float()
        self._top, self._total = top, self._total * fade + weights.sum(-1, keepdim=True)
        self._mixed = mixed if self._mixed is None else self._mixed * fade + mixed

    def result(self) -> torch.Tensor:
        """The attention's output, float32."""
        assert self._mixed is not None, "a query that saw no key"
        return self._mixed / self._total


def absorbed_is_cheaper(config: ModelConfig, n_new: int, n_context: int) -> bool:
    """Compare multiplications for each head: expanding the context against working in the latent's wider space."""
    nope, rope, v, c = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
    naive = n_context * c * (nope + v) + n_new * n_context * (nope + rope + v)
    absorbed = n_new * c * (nope + v) + n_new * n_context * (2 * c + rope)
    return absorbed < naive


def _query_blocks(q: torch.Tensor, group: Group) -> list[QueryBlock]:
    n_new = q.shape[1]
    before = group.n_context - n_new  # of the longest row; B = 1 or n = 1 makes the bounds below exact
    return [
        QueryBlock(
            q[:, a : a + QUERY_BLOCK],
            group.positions[:, a : a + QUERY_BLOCK],
            group.first_position + a,
            before + min(a + QUERY_BLOCK, n_new) - 1,
        )
        for a in range(0, n_new, QUERY_BLOCK)
    ]


def _key_blocks(layer: int, group: Group, cache: LatentCache) -> Iterator[tuple[int, torch.Tensor]]:
    """(first position, (B, k, C + R)) over the group's context, in whole pages."""
    step = max(1, KEY_BLOCK // cache.page_size)
    for page in range(0, group.pages.shape[1], step):
        start = page * cache.page_size
        yield start, cache.read(layer, group.pages[:, page : page + step])
