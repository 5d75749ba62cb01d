"""Checkpoints of random experts in every published format, and what a store made of them must hold."""

import ctypes
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from offload.checkpoint import Checkpoint
from offload.config import MATRICES, PROJECTIONS, ExpertGeometry, Projection
from offload.formats import dequantise, float32_to_bf16, quantise_fp8, quantise_int4, quantise_int8
from offload.store import ExpertStore
from tests.reference import packing

GEOMETRY = ExpertGeometry(n_experts=3, hidden=192, inner=160)  # partial fp8 blocks both ways
LAYERS = (1, 4)
Tensors = dict[str, torch.Tensor]


def prefix(layer: int, expert: int, projection: Projection) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"


def silent(stage: str, done: int, total: int) -> None:
    pass


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def published(name: str, weights: torch.Tensor, source: str) -> Tensors:
    """One matrix as a checkpoint of that kind stores it."""
    if source == "int4":
        packed, scales = quantise_int4(weights.numpy())
        shape = torch.tensor(list(weights.shape), dtype=torch.int32)
        return {
            f"{name}.weight_packed": torch.from_numpy(packed),
            f"{name}.weight_scale": bf16(scales),
            f"{name}.weight_shape": shape,
        }
    if source == "fp8":
        codes, factors = quantise_fp8(weights.numpy())
        data = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return {f"{name}.weight": data, f"{name}.weight_scale_inv": torch.from_numpy(factors)}
    kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    return {f"{name}.weight": weights.to(kinds[source])}


def expert_tensors(source: str, layers: tuple[int, ...] = LAYERS, geometry: ExpertGeometry = GEOMETRY) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    tensors: Tensors = {}
    for layer in layers:
        for expert in range(geometry.n_experts):
            for projection in PROJECTIONS:
                shape = geometry.shape(projection)
                weights = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
                tensors |= published(prefix(layer, expert, projection), weights, source)
    return tensors


def save(tensors: Tensors, directory: Path) -> Checkpoint:
    """Two shards, so that addresses must follow the file as well as the offset."""
    names = sorted(tensors)
    for i, held in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name].clone() for name in held}, directory / f"{i}.safetensors")
    return Checkpoint(directory)


def exact(tensors: Tensors, name: str) -> np.ndarray:
    """The float32 weights of a published matrix, by torch where torch can."""
    if f"{name}.weight_packed" in tensors:
        scales = tensors[f"{name}.weight_scale"].view(torch.uint16).numpy()
        return dequantise("int4", tensors[f"{name}.weight_packed"].numpy(), scales)
    weights = tensors[f"{name}.weight"].float()
    if f"{name}.weight_scale_inv" in tensors:
        blocks = tensors[f"{name}.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        weights = weights * blocks[: weights.shape[0], : weights.shape[1]]
    return weights.numpy()


def kept(tensors: Tensors, name: str, fmt: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Row-major data and scales of a published matrix in `fmt`: the published bytes, or quantised anew."""
    if fmt == "int4" and f"{name}.weight_packed" in tensors:
        return tensors[f"{name}.weight_packed"].numpy(), tensors[f"{name}.weight_scale"].view(torch.uint16).numpy()
    if fmt == "fp8":
        return tensors[f"{name}.weight"].view(torch.uint8).numpy(), tensors[f"{name}.weight_scale_inv"].numpy()
    weights = exact(tensors, name)
    if fmt == "bf16":
        return float32_to_bf16(weights), None
    return quantise_int4(weights) if fmt == "int4" else quantise_int8(weights)


def expected_units(tensors: Tensors, layer: int, expert: int, found: ExpertStore) -> list[list[np.ndarray]]:
    """The gate_up units and the down units that the store must hold, by the oracle."""
    matrices = {p: kept(tensors, prefix(layer, expert, p), found.format) for p in PROJECTIONS}
    return list(packing.expert(found.format, found.geometry, matrices))


def check_bytes(found: ExpertStore, tensors: Tensors) -> None:
    """Every unit of every expert, at the address of its node."""
    geometry = found.geometry
    for i, layer in enumerate(found.layers):
        for expert in range(geometry.n_experts):
            every = expected_units(tensors, layer, expert, found)
            for node in range(found.n_nodes):
                for k, matrix in enumerate(MATRICES):
                    units = geometry.units_of(matrix, node, found.n_nodes)
                    size = len(units) * geometry.unit_bytes(matrix, found.format)
                    held = ctypes.string_at(int(found.addresses[i, expert, node, k]), size)
                    assert held == b"".join(unit.tobytes() for unit in every[k][units.start : units.stop])
