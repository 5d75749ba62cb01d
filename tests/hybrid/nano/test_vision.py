"""The trainable tower and projector against transformers' own, which reads the weights by their published names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Kimi_K25ForConditionalGeneration

from hybrid.config_json import ConfigError
from hybrid.nano.vision import Tower

CPU = torch.device("cpu")
LIMIT = 1e-4  # 2e-5 was measured; the exact gelu in place of the tower's tanh one makes 4e-4
CONFIG: dict[str, Any] = {
    "init_pos_emb_height": 6, "init_pos_emb_width": 6, "init_pos_emb_time": 4, "merge_kernel_size": [2, 2],
    "mm_hidden_size": 32, "patch_size": 14, "projector_ln_eps": 1e-5, "text_hidden_size": 48, "vt_hidden_size": 32,
    "vt_intermediate_size": 64, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 2,
}  # fmt: skip
TEXT = {
    "model_type": "deepseek_v3", "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1,
    "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
OWN_NAMES = {
    "vt_hidden_size": "hidden_size", "vt_intermediate_size": "intermediate_size",
    "vt_num_attention_heads": "num_attention_heads", "vt_num_hidden_layers": "num_hidden_layers",
    "init_pos_emb_height": "pos_emb_height", "init_pos_emb_width": "pos_emb_width",
    "init_pos_emb_time": "pos_emb_time", "patch_size": "patch_size", "merge_kernel_size": "merge_kernel_size",
}  # fmt: skip
IMAGES = [(84, 84), (112, 84), (84, 84), (28, 140)]  # height, width


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(1)
    tower = Tower(CONFIG, CPU)
    with torch.no_grad():
        for name, weight in tower.named():
            if weight.ndim == 1:  # gains and biases that are not one and zero
                weight.add_(0.2 * torch.randn_like(weight))
            if name.endswith("wqkv.weight"):
                weight.mul_(3)  # sharp attention, so that a wrong rotation shows
    return tower


def images() -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.rand(3, *size) * 2 - 1 for size in IMAGES]


def reference(tower: Tower, directory: Path) -> Any:
    """transformers' model, loaded from a checkpoint with the tower's tensors. Its text part is not looked at."""
    vision = {theirs: CONFIG[ours] for ours, theirs in OWN_NAMES.items()}
    config = {
        "architectures": ["Kimi_K25ForConditionalGeneration"], "model_type": "kimi_k25", "tie_word_embeddings": False,
        "projection_hidden_size": CONFIG["mm_hidden_size"], "text_config": TEXT, "vision_config": vision,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: weight.detach() for name, weight in tower.named()}, directory / "model.safetensors")
    model, report = Kimi_K25ForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all("language_model" in name or name == "lm_head.weight" for name in report["missing_keys"])
    return model.float().eval().model


@torch.no_grad()
def expected(model: Any, image: torch.Tensor) -> torch.Tensor:
    _, height, width = image.shape
    grid = torch.tensor([[1, height // 14, width // 14]])
    patches = image.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).flatten(0, 1)
    (tokens,) = model.get_image_features(patches, grid).pooler_output
    assert isinstance(tokens, torch.Tensor)
    return tokens


def test_tokens_are_those_of_transformers(tower: Tower, tmp_path: Path) -> None:
    model = reference(tower, tmp_path)
    wanted = torch.cat([expected(model, image) for image in images()])
    found = tower(images()).detach()
    assert found.shape == (9 + 12 + 9 + 5, 48)
    assert wanted.std() > 0.2
    assert (found - wanted).abs().max() < LIMIT


def test_an_image_is_seen_alike_in_any_company(tower: Tower) -> None:
    alone = torch.cat([tower([image]) for image in images()])
    assert torch.allclose(tower(images()), alone, atol=1e-5)


def test_a_patch_that_moves_changes_the_tokens(tower: Tower) -> None:
    image = torch.zeros(3, 84, 84)
    image[:, :14, :14] = 1
    right, down = torch.roll(image, 14, 2), torch.roll(image, 14, 1)
    assert (tower([right]) - tower([down])).abs().max() > 0.01


def test_shipped_weights_are_what_a_quantised_tower_sees(tower: Tower) -> None:
    tower.quantised = True
    seen = tower(images())
    seen.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for _, weight in tower.named())
    shipped = Tower(CONFIG, CPU)
    shipped.load({name: weight.bfloat16() for name, weight in tower.named()})
    assert torch.equal(shipped(images()), seen)
    tower.quantised = False
    assert not torch.equal(tower(images()), seen)


def test_what_is_missing_or_wrong_is_named(tower: Tower) -> None:
    with pytest.raises(KeyError, match="vision_tower"):
        tower.load({})
    with pytest.raises(ValueError, match="80x84 pixels: pad both to multiples of 28"):
        tower([torch.zeros(3, 84, 80)])
    with pytest.raises(ConfigError, match=r"vision_config\.mm_hidden_size is missing"):
        Tower({key: value for key, value in CONFIG.items() if key != "mm_hidden_size"}, CPU)
    with pytest.raises(ConfigError, match="two equal integers"):
        Tower(CONFIG | {"merge_kernel_size": [2, 1]}, CPU)
