"""Nano's experts made as large as another model's, without changing what they compute.

Every expert gets more inner rows: random weights in gate and up, and zero scales in down, so that they are read and
multiplied like any others and add nothing. Routing, and so reuse from token to token and the look-ahead's recall, is
that of a trained model on real text; only the bytes are another's. Called by `disk.py`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import hybrid.nano
from hybrid.config import ModelConfig
from offload.checkpoint import Checkpoint
from offload.config import GROUP, ExpertGeometry
from offload.store import pack_store

NANO = Path(hybrid.nano.__file__).parent / "model"
WORD = 8  # int4 weights in an int32


def inner_of(model: ModelConfig, expert_mb: float) -> int:
    """Inner rows for experts of so many megabytes."""
    one = ExpertGeometry(1, model.hidden_size, 64).expert_bytes("int4")
    return 64 * max(2, round(expert_mb * 1e6 / one))


def write(out: Path, inner: int) -> None:
    """Shards with the widened experts only, and the packed file made from them."""
    model = ModelConfig.from_directory(NANO)
    tensors = {name: tensor for path in sorted(NANO.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    generator = torch.Generator().manual_seed(7)
    out.mkdir(parents=True, exist_ok=True)
    index = {}
    for layer in model.moe_layers:
        made: dict[str, torch.Tensor] = {}
        for expert in range(model.n_routed_experts):
            for projection in ("gate", "up", "down"):
                made |= _widened(
                    tensors, model.expert_name(layer, expert, projection), projection == "down", inner, generator
                )
        name = f"layer-{layer}.safetensors"
        save_file(made, out / name)
        index |= dict.fromkeys(made, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    geometry = ExpertGeometry(model.n_routed_experts, model.hidden_size, inner)
    pack_store(Checkpoint(out), model.expert_name, geometry, model.moe_layers, "native", lambda *report: None)


def _widened(
    tensors: dict[str, torch.Tensor], name: str, down: bool, inner: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """One matrix's tensors: rows of gate and up, columns of down, are added."""
    words, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    hidden = words.shape[0] if down else words.shape[1] * WORD
    shape = (hidden, inner // WORD) if down else (inner, hidden // WORD)
    wide = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    wide[: words.shape[0], : words.shape[1]] = words
    scale = torch.zeros if down else torch.ones
    wide_scales = scale((shape[0], shape[1] * WORD // GROUP), dtype=scales.dtype) * 0.01
    wide_scales[: scales.shape[0], : scales.shape[1]] = scales
    size = torch.tensor([hidden, inner] if down else [inner, hidden], dtype=tensors[f"{name}.weight_shape"].dtype)
    return {
        f"{name}.weight_packed": wide,
        f"{name}.weight_scale": wide_scales.to(scales.dtype),
        f"{name}.weight_shape": size,
    }
