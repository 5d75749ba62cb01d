"""placement.inventory: the published checkpoint, against the tensors that a made-up one is written with."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import ConfigError, ModelConfig
from hybrid.config_json import Fields
from hybrid.random_weights import RandomWeights
from placement.inventory import take_inventory
from tests import families

FAMILIES = (
    families.kimi_k25, families.kimi_k2, families.kimi_k2_thinking, families.deepseek_v3, families.deepseek_v3_odd,
    families.moonlight, families.deepseek_v2_lite, families.deepseek_v2,
)  # fmt: skip


def written(raw: dict[str, Any]) -> list[tuple[str, int]]:
    """(name, bytes) of every tensor that `hybrid make-checkpoint` would write."""
    model = ModelConfig.from_json(raw)
    vision = Fields(raw, "config.json").section("vision_config") if model.vision else None
    return [(t.name, t.n_bytes) for section in RandomWeights(model, 0).sections(vision) for t in section]


def test_k25_to_the_byte(kimi_dir: Path) -> None:
    raw = json.loads((kimi_dir / "config.json").read_text())
    inventory, tensors = take_inventory(raw), written(raw)
    assert inventory.tensors == len(tensors) == 208_550
    assert inventory.n_bytes == sum(size for _, size in tensors) == 595_148_192_736
    assert (inventory.expert_bytes, inventory.kv_bytes_per_token) == (24_772_608, 70_272)
    sizes = {group.what: (group.tensors, group.n_bytes) for group in inventory.groups}
    # 60 layers of 384 experts of 3 matrices: nibbles, a bf16 scale for 32 of them, and two int32 of shape.
    weights = 60 * 384 * 3 * 7168 * 2048
    assert sizes["routed experts, 23,040 in int4"] == (207_360, weights // 2 + weights // 16 + 60 * 384 * 3 * 8)
    hidden, inner, layers = 1152, 4304, 27  # of the vision tower
    block = 4 * hidden + 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden
    ends = hidden * (3 * 14 * 14 + 1) + 64 * 64 * hidden + 2 * hidden
    assert sizes["vision tower"] == (12 * layers + 5, 2 * (layers * block + ends))
    merged = 4 * hidden
    assert sizes["projector of images"] == (6, 2 * (2 * hidden + merged * merged + merged + 7168 * merged + 7168))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_would_be_written(family: Callable[[], dict[str, Any]]) -> None:
    raw = family()
    inventory, tensors = take_inventory(raw), written(raw)
    assert (inventory.tensors, inventory.n_bytes) == (len(tensors), sum(size for _, size in tensors))
    routed = [(name, size) for name, size in tensors if ".mlp.experts." in name]
    group = next(group for group in inventory.groups if group.what.startswith("routed experts"))
    assert (group.tensors, group.n_bytes) == (len(routed), sum(size for _, size in routed))
    norms = next(group for group in inventory.groups if group.what == "norms")
    found = [size for name, size in tensors if "norm" in name and not name.startswith(("vision", "mm_"))]
    assert (norms.tensors, norms.n_bytes) == (len(found), sum(found))


def test_table() -> None:
    lines = take_inventory(families.kimi_k25()).table().splitlines()
    shown = [int(line.split()[-3].replace(",", "")) for line in lines[1:-2]]
    assert sum(shown) == int(lines[-2].split()[-3].replace(",", "")) == len(written(families.kimi_k25()))
    assert math.prod(lines[-1].count(word) for word in ("one expert", "per token")) == 1


def test_a_config_without_a_key_names_it() -> None:
    raw = families.kimi_k25()
    del raw["vision_config"]["vt_intermediate_size"]
    with pytest.raises(ConfigError, match=r"box\.json: key vision_config\.vt_intermediate_size is missing"):
        take_inventory(raw, "box.json")
