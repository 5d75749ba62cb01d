"""Names, shapes and spreads of Kimi-K2.5's vision tower and projector, for made-up checkpoints.

Spreads keep activations near 1 through the tower and give the projector's output the size of a text embedding.
Called by `hybrid.random_weights`.
"""

import math

from hybrid.config_json import Fields

Shapes = dict[str, tuple[tuple[int, ...], float]]  # name: shape, standard deviation (0: a norm's gains)

BIAS = 0.1
POSITION = 0.5
GELU = 0.65  # rms of gelu of a unit normal


def projector(vision: Fields) -> Shapes:
    """mm_projector: a norm, then two linear layers over merged patches."""
    size, text = vision.integer("mm_hidden_size"), vision.integer("text_hidden_size")
    merged = size * math.prod(_pair(vision, "merge_kernel_size"))
    return {
        **_norm("mm_projector.pre_norm", size),
        **_linear("mm_projector.proj.0", merged, merged, 1.0),
        **_linear("mm_projector.proj.2", text, merged, 1 / GELU),
    }


def tower(vision: Fields) -> Shapes:
    """vision_tower: patch embedding, positions, encoder blocks, final norm."""
    size, inner = vision.integer("vt_hidden_size"), vision.integer("vt_intermediate_size")
    patch, layers = vision.integer("patch_size"), vision.integer("vt_num_hidden_layers")
    positions = (vision.integer("init_pos_emb_height"), vision.integer("init_pos_emb_width"), size)
    patch_std = 1 / math.sqrt(3 * patch * patch)
    shapes: Shapes = {
        "vision_tower.patch_embed.proj.weight": ((size, 3, patch, patch), patch_std),
        "vision_tower.patch_embed.proj.bias": ((size,), BIAS),
        "vision_tower.patch_embed.pos_emb.weight": (positions, POSITION),
    }
    share = 1 / math.sqrt(layers)  # what each block adds
    for layer in range(layers):
        block = f"vision_tower.encoder.blocks.{layer}."
        shapes |= _norm(f"{block}norm0", size) | _norm(f"{block}norm1", size)
        shapes |= _linear(f"{block}wqkv", 3 * size, size, 1.0) | _linear(f"{block}wo", size, size, share)
        shapes |= _linear(f"{block}mlp.fc0", inner, size, 1.0) | _linear(f"{block}mlp.fc1", size, inner, share)
    return shapes | _norm("vision_tower.encoder.final_layernorm", size)


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": ((size,), 0.0), f"{name}.bias": ((size,), BIAS)}


def _linear(name: str, n_out: int, n_in: int, gain: float) -> Shapes:
    return {f"{name}.weight": ((n_out, n_in), gain / math.sqrt(n_in)), f"{name}.bias": ((n_out,), BIAS)}


def _pair(vision: Fields, key: str) -> tuple[int, ...]:
    pair = vision.integers(key)
    if len(pair) != 2 or 0 in pair:
        raise vision.error(key, "two positive integers")
    return pair
