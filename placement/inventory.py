"""What a published checkpoint holds: how many tensors and bytes, from its config.json alone.

In closed form for the routed experts, which are all alike, so that the answer for 208,550 tensors takes a millisecond.
Knows names and shapes as published (`hybrid.config`, the vision tower's from `hybrid.random_vision`), no files and no
machine. Called by `hybrid plan`, which may have nothing but the config.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hybrid.config import ModelConfig, is_router
from hybrid.config_json import Fields
from hybrid.random_vision import Shapes, projector, tower
from offload.config import FP8_BLOCK, GROUP, PROJECTIONS
from placement.ledger import human
from placement.tensor_bytes import group_of

BF16, FP32, INT32 = 2, 4, 4
KEPT_WIDE = ("embed_tokens", "lm_head")  # matrices that an fp8 checkpoint publishes in bf16


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one kind."""

    what: str
    tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """A published checkpoint, in the order of a token's way through it."""

    groups: tuple[Group, ...]
    expert_bytes: int  # of one packed expert: weights and scales as the kernels read them
    kv_bytes_per_token: int  # in bf16, all layers

    @property
    def tensors(self) -> int:
        return sum(group.tensors for group in self.groups)

    @property
    def n_bytes(self) -> int:
        return sum(group.n_bytes for group in self.groups)

    def table(self) -> str:
        """As text: every group, the sum, one expert and one cached token."""
        lines = [f"  {g.what:<45}{g.tensors:>10,}{human(g.n_bytes):>15}" for g in self.groups]
        total = f"  {'= published checkpoint':<45}{self.tensors:>10,}{human(self.n_bytes):>15}"
        rest = f"  one expert {self.expert_bytes:,} B, KV {self.kv_bytes_per_token:,} B per token in bf16"
        return "\n".join(["what is published (tensors, bytes)", *lines, total, rest])


def take_inventory(values: Mapping[str, object], where: str = "config.json") -> Inventory:
    """The checkpoint of a parsed config.json. Raises ConfigError that names the key."""
    model = ModelConfig.from_json(values, where)
    found: dict[str, Group] = {}
    for name, shape in model.tensor_shapes().items():
        _add(found, group_of(name).removesuffix(" (float32)"), _published(model, name, shape))
    routed = len(model.moe_layers) * model.n_routed_experts
    sizes = [
        size for projection in PROJECTIONS for size in _expert_matrix(model, model.expert_geometry.shape(projection))
    ]
    found["routed experts"] = Group(
        f"routed experts, {routed:,} in {model.expert_format}", routed * len(sizes), routed * sum(sizes)
    )
    if model.vision:
        vision = Fields(values, where).section("vision_config")
        _add(found, "projector of images", _plain(projector(vision)))
        _add(found, "vision tower", _plain(tower(vision)))
    expert = model.expert_geometry.expert_bytes(model.expert_format)
    return Inventory(tuple(found.values()), expert, model.kv_bytes_per_token(BF16))


def _add(found: dict[str, Group], what: str, sizes: Iterable[int]) -> None:
    known = found.get(what, Group(what, 0, 0))
    new = list(sizes)
    found[what] = Group(what, known.tensors + len(new), known.n_bytes + sum(new))


def _published(model: ModelConfig, name: str, shape: tuple[int, ...]) -> list[int]:
    """Bytes of a tensor outside the routed experts, and of its scales where it has them."""
    if name.endswith("e_score_correction_bias"):
        return [FP32 * math.prod(shape)]
    narrow = model.expert_format == "fp8" and len(shape) == 2 and not is_router(name)
    if narrow and not any(part in name for part in KEPT_WIDE):
        return _fp8(shape)
    return [BF16 * math.prod(shape)]


def _expert_matrix(model: ModelConfig, shape: tuple[int, int]) -> list[int]:
    """Bytes of one routed matrix's tensors: int4's weight_packed, weight_scale and weight_shape; fp8's; bf16's one."""
    if model.expert_format == "fp8":
        return _fp8(shape)
    n_out, n_in = shape
    if model.expert_format == "int4":
        return [n_out * n_in // 2, BF16 * n_out * n_in // GROUP, 2 * INT32]
    return [BF16 * n_out * n_in]


def _fp8(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape), FP32 * math.prod(-(-size // FP8_BLOCK) for size in shape)]


def _plain(shapes: Shapes) -> list[int]:
    return [BF16 * math.prod(shape) for shape, _ in shapes.values()]
