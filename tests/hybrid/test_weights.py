"""hybrid.weights: values, types, fp8 blocks, and complaints that name the tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hybrid.config import ModelConfig, is_router
from hybrid.weights import load_weights, unknown_names
from offload.checkpoint import Checkpoint, CheckpointError
from tests import families

CPU = torch.device("cpu")


class Loaded:
    """One load, with what it reported."""

    def __init__(self, directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        self.progress: list[tuple[str, int, int]] = []
        self.notices: list[str] = []
        checkpoint = Checkpoint(directory)
        self.tensors = load_weights(
            checkpoint, config, CPU, dtype, lambda *report: self.progress.append(report), self.notices.append
        )
        checkpoint.close()


def config_of(family: Any = families.moonlight, **changes: Any) -> ModelConfig:
    return ModelConfig.from_json(family() | {"num_hidden_layers": 2} | changes)


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        config.tensor_prefix + name: torch.randn(shape, generator=generator).to(
            torch.float32 if name.endswith("bias") else dtype
        )
        for name, shape in config.tensor_shapes().items()
    }


def save(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_values_arrive_in_the_chosen_type(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    config = config_of()
    tensors = random_tensors(config, stored)
    loaded = Loaded(save(tmp_path, tensors), config, wanted)
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in loaded.tensors.items():
        dtype = torch.float32 if is_router(name) else wanted
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name].to(dtype)), name
    assert any(is_router(name) for name in tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert loaded.progress[0] == ("weights", 0, total) and loaded.progress[-1] == ("weights", total, total)
    assert loaded.notices == []


def test_the_prefix_is_stripped(tmp_path: Path) -> None:
    raw = families.kimi_k25()
    raw["text_config"]["num_hidden_layers"] = 2
    config = ModelConfig.from_json(raw)
    tensors = random_tensors(config)
    loaded = Loaded(save(tmp_path, tensors), config)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(loaded.tensors[name], tensors[f"language_model.{name}"].float())


def test_fp8_blocks_are_multiplied_out(tmp_path: Path) -> None:
    config = config_of(families.deepseek_v3_odd, first_k_dense_replace=1)
    rng = np.random.default_rng(2)
    tensors, expected = random_tensors(config), {}
    for name, (rows, columns) in {n: s for n, s in config.tensor_shapes().items() if "_proj" in n}.items():
        codes = torch.randn((rows, columns), generator=torch.Generator().manual_seed(rows)).to(torch.float8_e4m3fn)
        scales = rng.uniform(0.1, 9.0, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, torch.from_numpy(scales)
        row_block, column_block = np.arange(rows)[:, None] // 128, np.arange(columns)[None] // 128
        expected[name] = codes.double().numpy() * scales[row_block, column_block]
    assert any(min(array.shape) > 128 for array in expected.values())
    loaded = Loaded(save(tmp_path, tensors), config)
    assert loaded.notices == []
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded.tensors[name].numpy(), array.astype(np.float32), err_msg=name)


def test_a_tied_head_needs_no_tensor(tmp_path: Path) -> None:
    config = config_of(tie_word_embeddings=True)
    tensors = random_tensors(config)
    assert "lm_head.weight" not in Loaded(save(tmp_path, tensors), config).tensors


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    config = config_of()
    tensors = random_tensors(config)
    gone = [name for name in tensors if "layers.1.mlp.shared_experts" in name] + ["model.norm.weight"]
    save(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in gone})
    with pytest.raises(CheckpointError) as caught:
        Loaded(tmp_path, config)
    assert "4 tensors" in str(caught.value) and "model.norm.weight" in str(caught.value)
    assert "and 1 more" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("model.norm.weight", torch.ones(127), r"model\.norm\.weight has shape \[127\], config.json calls for \[128\]"),
        ("model.norm.weight", torch.ones(128, dtype=torch.int32), r"model\.norm\.weight is I32.*BF16, F16, F32 and F8"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, name: str, replacement: torch.Tensor, message: str) -> None:
    config = config_of()
    with pytest.raises(CheckpointError, match=message):
        Loaded(save(tmp_path, random_tensors(config) | {name: replacement}), config)


@pytest.mark.parametrize("scales", [None, torch.ones(1, 2), torch.ones(2, 1, dtype=torch.bfloat16)])
def test_fp8_without_fitting_scales_is_named(tmp_path: Path, scales: torch.Tensor | None) -> None:
    config = config_of()
    name = "model.layers.0.mlp.gate_proj.weight"  # (256, 128): two blocks by one
    tensors = random_tensors(config) | {name: torch.zeros(256, 128, dtype=torch.float8_e4m3fn)}
    if scales is not None:
        tensors[f"{name}_scale_inv"] = scales
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight_scale_inv"):
        Loaded(save(tmp_path, tensors), config)


def test_unknown_tensors_are_noticed_and_harmless_ones_not(tmp_path: Path) -> None:
    config = config_of()
    harmless = ["model.layers.2.self_attn.o_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    harmless += ["vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.bias"]
    harmless += ["model.layers.1.mlp.experts.3.up_proj.weight_packed"]
    strange = ["model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.experts.3.up_proj.weight", "extra"]
    strange += ["model.layers.1.mlp.shared_experts.up_proj.weight_packed"]
    names = [*random_tensors(config), *harmless]
    assert unknown_names(config, names) == []
    assert unknown_names(config, names + strange) == sorted(strange)
    extras = {name: torch.zeros(1) for name in [*harmless, *strange]}
    loaded = Loaded(save(tmp_path, random_tensors(config) | extras), config)
    assert len(loaded.notices) == 1
    assert "4 tensors are not used" in loaded.notices[0] and "extra" in loaded.notices[0]
