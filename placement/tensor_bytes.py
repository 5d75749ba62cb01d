"""Bytes of a model's tensors, by group and in every type that the engine holds them in.

Plain sums over names and shapes. Called by the ledger, the planner and the doctor.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

from hybrid.config import ModelConfig, NarrowFormat
from hybrid.widths import held_bytes
from offload.config import ExpertFormat
from placement.plan import WeightDtype

GROUPS = (
    ("embed_tokens", "embedding"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp.gate.", "router (float32)"),
    ("shared_experts", "shared experts"),
    ("mlp.", "dense MLP"),
    ("lm_head", "output head"),
)
ITEM_BYTES: dict[WeightDtype, int] = {"float32": 4, "bfloat16": 2, "fp8": 2, "int8": 2}  # of what is not narrow


def group_of(name: str) -> str:
    """The group of a tensor outside the routed experts, by its published name."""
    return next(group for part, group in GROUPS if part in name)


@functools.lru_cache(maxsize=16)  # a planner asks a hundred times
def weight_bytes(model: ModelConfig, itemsize: int, narrow: NarrowFormat | None = None) -> Mapping[str, int]:
    """Bytes of everything but the routed experts, by tensor group, as `hybrid.widths` holds them."""
    groups: dict[str, int] = {}
    for name, shape in model.tensor_shapes().items():
        n_bytes = held_bytes(name, shape, itemsize, narrow, model.expert_format == "fp8")
        groups[group_of(name)] = groups.get(group_of(name), 0) + n_bytes
    return MappingProxyType(groups)


def expert_bytes(model: ModelConfig, fmt: ExpertFormat) -> int:
    """Bytes of all routed experts in `fmt`."""
    return len(model.moe_layers) * model.n_routed_experts * model.expert_geometry.expert_bytes(fmt)
