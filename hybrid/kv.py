"""The latent cache: for each token and layer one normed latent and one rotated key, in pages.

A token's entry is C + R values, whatever the number of heads:

    [ c_0 … c_(C-1) | k_pe_0 … k_pe_(R-1) ]

Which page belongs to whom is `hybrid.pages`' business; here a page is an index. Called by `hybrid.mla`.
"""

from dataclasses import dataclass

import torch

from hybrid.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LatentCache:
    """All pages of all layers."""

    entries: torch.Tensor  # (L, P, page_size, C + R)

    @property
    def page_size(self) -> int:
        """Tokens of one page."""
        return self.entries.shape[2]

    def storage(self) -> tuple[torch.Tensor, ...]:
        """All memory of the cache, as tensors (L, P, page_size, …): a page is its place in every one of them."""
        return (self.entries,)

    def write(self, layer: int, slots: torch.Tensor, latent: torch.Tensor) -> None:
        """Store (T, C + R) at `slots` (T,), where slot = page * page_size + offset.

        Broken values become 0: places that a row must not see are still multiplied, by 0, so one request's NaN would
        otherwise spread to the next owner of its page. The request itself sees its NaN through the residual stream.
        """
        finite = torch.nan_to_num(latent, nan=0.0, posinf=0.0, neginf=0.0)
        self.entries[layer].flatten(0, 1).index_copy_(0, slots, finite)

    def read(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """The entries of `pages` (B, N) in order: (B, N * page_size, C + R)."""
        return self.entries[layer][pages].flatten(1, 2)


def allocate(
    config: ModelConfig, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> LatentCache:
    """An empty cache. Zeros, not empty memory: the masked places of a page never written must be finite."""
    shape = (config.num_hidden_layers, n_pages, page_size, config.latent_size)
    return LatentCache(torch.zeros(shape, dtype=dtype, device=device))
