"""The latent cache: for each token and layer one normed latent and one rotated key, in pages.

A token's entry is C + R values, whatever the number of heads:

    [ c_0 … c_(C-1) | k_pe_0 … k_pe_(R-1) ]

in the model's type, or in one byte for each value (e4m3 or int8) with two float32 factors beside it, one for either
part (measured: docs/LOG.md).
Which page belongs to whom is `hybrid.pages`' business; here a page is an index. Called by `hybrid.mla`.
"""

from dataclasses import dataclass

import torch

from hybrid.config import KvDtype, ModelConfig
from hybrid.narrow import CODES, quantised


@dataclass(frozen=True, slots=True)
class LatentCache:
    """All pages of all layers. What `read` gives is in `dtype`."""

    entries: torch.Tensor  # (L, P, page_size, C + R) values or codes
    scales: torch.Tensor | None  # (L, P, page_size, 2) float32, of the latent's and the key's codes
    n_latent: int  # C
    kv_dtype: KvDtype
    dtype: torch.dtype

    @property
    def page_size(self) -> int:
        """Tokens of one page."""
        return self.entries.shape[2]

    def storage(self) -> tuple[torch.Tensor, ...]:
        """All memory of the cache, as tensors of (L, P, page_size, …) each: a page is its place in every one of them.

        Bytes to be copied, with codes as uint8: not every operation knows e4m3.
        """
        return (self._bytes(),) if self.scales is None else (self._bytes(), self.scales)

    def write(self, layer: int, slots: torch.Tensor, latent: torch.Tensor) -> None:
        """Store (T, C + R) at `slots` (T,), where slot = page * page_size + offset.

        Broken values become 0: places that a row must not see are still multiplied, by 0, so one request's NaN would
        otherwise spread to the next owner of its page. The request itself sees its NaN through the residual stream.
        """
        finite = torch.nan_to_num(latent, nan=0.0, posinf=0.0, neginf=0.0)
        if self.scales is None or self.kv_dtype == "model":
            self.entries[layer].flatten(0, 1).index_copy_(0, slots, finite)
            return
        parts = torch.split(finite, [self.n_latent, finite.shape[1] - self.n_latent], 1)
        codes, scales = zip(*(quantised(part, self.kv_dtype) for part in parts), strict=True)
        self._bytes()[layer].flatten(0, 1).index_copy_(0, slots, torch.cat(codes, 1).view(torch.uint8))
        self.scales[layer].flatten(0, 1).index_copy_(0, slots, torch.cat(scales, 1))

    def read(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """The entries of `pages` (B, N) in order: (B, N * page_size, C + R)."""
        found = self._bytes()[layer][pages].flatten(1, 2)
        if self.scales is None:
            return found
        scales = self.scales[layer][pages].flatten(1, 2)  # (B, N * page_size, 2)
        values = found.view(self.entries.dtype).to(self.dtype)
        values[..., : self.n_latent].mul_(scales[..., :1])
        values[..., self.n_latent :].mul_(scales[..., 1:])
        return values

    def _bytes(self) -> torch.Tensor:
        return self.entries if self.scales is None else self.entries.view(torch.uint8)


def allocate(
    config: ModelConfig,
    n_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: KvDtype = "model",
) -> LatentCache:
    """An empty cache. Zeros, not empty memory: the masked places of a page never written must be finite."""
    shape = (config.num_hidden_layers, n_pages, page_size)
    held, scales = dtype, None
    if kv_dtype != "model":
        held, scales = CODES[kv_dtype], torch.zeros((*shape, 2), device=device)
    entries = torch.zeros((*shape, config.latent_size), dtype=held, device=device)
    return LatentCache(entries, scales, config.kv_lora_rank, kv_dtype, dtype)
