"""The eyes that train: MoonViT-3D and its projector for still images, in plain PyTorch under published names.

The arithmetic is the published one, which a test holds against transformers; only the numbers of `vision_config` are
small. An image is a single frame, which the published tower neither pools over time nor gives a time embedding.
Letters: N images, P patches of each, M tokens, S tower width, D text width. Called by `hybrid.nano.train`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, layer_norm, linear, scaled_dot_product_attention

from hybrid.config_json import Fields
from hybrid.random_vision import projector, tower

_EPS = 1e-5
_THETA = 10_000.0


class Tower(nn.Module):
    """Tower and projector of a `vision_config`. ConfigError where a key is missing or wrong."""

    def __init__(self, config: Mapping[str, object], device: torch.device) -> None:
        super().__init__()
        fields = Fields(config, "config.json", "vision_config.")
        shapes = tower(fields) | projector(fields)
        self.patch = fields.integer("patch_size")
        self.merge, across = fields.integers("merge_kernel_size")
        if self.merge != across:
            raise fields.error("merge_kernel_size", "two equal integers")
        self.n_layers = fields.integer("vt_num_hidden_layers")
        self.n_heads = fields.integer("vt_num_attention_heads")
        self.projector_eps = fields.number("projector_ln_eps")
        self.quantised = False  # whether the forward pass sees the weights as they will be shipped
        self.weights = nn.ParameterDict()
        for name, (shape, std) in shapes.items():
            if name.endswith(".bias"):
                value = torch.zeros(shape, device=device)
            else:
                value = torch.randn(shape, device=device) * std if std else torch.ones(shape, device=device)
            self.weights[key_of(name)] = nn.Parameter(value)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights by published name."""
        for key, value in self.weights.items():
            yield key.replace("/", "."), value

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take every weight by published name; other names are left alone. KeyError where one is missing."""
        for name, weight in self.named():
            weight.copy_(tensors[name])

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.weights[key_of(name)]
        if not self.quantised:
            return weight
        return weight + (weight.detach().bfloat16().float() - weight).detach()  # straight through

    def forward(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Text-sized tokens (M, D) of normalised float images (3, H, W), one image after the other.

        H and W are multiples of two patches (28), as after Kimi's padding; ValueError otherwise.
        """
        same_size: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            same_size[tuple(image.shape)].append(i)
        tokens: dict[int, torch.Tensor] = {}
        for members in same_size.values():
            tokens |= zip(members, self._tokens(torch.stack([images[i] for i in members])), strict=True)
        return torch.cat([tokens[i] for i in range(len(images))])

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, M, D)."""
        side = self.patch * self.merge
        if pixels.shape[-2] % side or pixels.shape[-1] % side:
            raise ValueError(f"image of {pixels.shape[-1]}x{pixels.shape[-2]} pixels: pad both to multiples of {side}")
        h, w = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        x = self._embedded(pixels, h, w)
        table = _rope(h, w, x.shape[-1] // self.n_heads, x.device)
        for layer in range(self.n_layers):
            block = f"vision_tower.encoder.blocks.{layer}."
            x = x + self._attend(block, self._norm(x, f"{block}norm0"), table)
            inner = gelu(self._linear(self._norm(x, f"{block}norm1"), f"{block}mlp.fc0"), approximate="tanh")
            x = x + self._linear(inner, f"{block}mlp.fc1")
        x = self._norm(x, "vision_tower.encoder.final_layernorm")
        x = self._norm(x, "mm_projector.pre_norm", self.projector_eps)
        x = x.reshape(len(x), h // self.merge, self.merge, w // self.merge, -1)  # (N, rows, dy, columns, dx * S)
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)  # (N, M, dy * dx * S)
        return self._linear(gelu(self._linear(x, "mm_projector.proj.0")), "mm_projector.proj.2")

    def _embedded(self, pixels: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """(N, 3, H, W) to patches (N, P, S), row by row, with the learned position grid stretched to h x w."""
        patches = pixels.reshape(-1, 3, h, self.patch, w, self.patch).permute(0, 2, 4, 1, 3, 5)
        kernel = self._weight("vision_tower.patch_embed.proj.weight").flatten(1)  # a convolution without overlap
        x = linear(patches.flatten(3).flatten(1, 2), kernel, self._weight("vision_tower.patch_embed.proj.bias"))
        grid = self._weight("vision_tower.patch_embed.pos_emb.weight").permute(2, 0, 1)
        if grid.shape[1:] != (h, w):
            grid = interpolate(grid[None], (h, w), mode="bicubic", align_corners=False)[0]
        return x + grid.flatten(1).T

    def _attend(self, block: str, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        n, patches, width = x.shape
        qkv = self._linear(x, f"{block}wqkv").view(n, patches, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, P, head)
        out = scaled_dot_product_attention(_rotated(q, table), _rotated(k, table), v)
        return self._linear(out.transpose(1, 2).flatten(2), f"{block}wo")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str, eps: float = _EPS) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], self._weight(f"{name}.weight"), self._weight(f"{name}.bias"), eps)


def _rope(h: int, w: int, head: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (P, head / 2): pair 2i of a head turns with the column, pair 2i + 1 with the row."""
    frequencies = _THETA ** (-torch.arange(0, head, 4, device=device) / head)
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    places = torch.stack((x.flatten(), y.flatten()), -1)  # (P, 2)
    angles = (frequencies[:, None] * places[:, None]).flatten(1)
    return angles.cos(), angles.sin()


def _rotated(heads: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(N, heads, P, head) with neighbouring dimensions turned as pairs."""
    cos, sin = table
    a, b = heads[..., ::2], heads[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def key_of(name: str) -> str:
    """A published name as a ParameterDict takes it."""
    return name.replace(".", "/")
