"""The expert store: addresses that lead to the right bytes, and refusals that name what is wrong."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offload import requantise, store
from offload.checkpoint import Checkpoint, CheckpointError
from offload.config import PROJECTIONS, ExpertGeometry, Projection
from offload.formats import bf16_to_float32, dequantise, quantise_fp8, quantise_int4, quantise_int8
from offload.store import ExpertStore, Target, open_store

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


def stored(found: ExpertStore, layer: int, expert: int, projection: Projection) -> tuple[np.ndarray, np.ndarray | None]:
    """Data and scales of one matrix, read at the table's addresses."""
    data_at, scales_at = found.addresses[found.layers.index(layer), expert, PROJECTIONS.index(projection)].tolist()
    n_out, n_in = found.geometry.shape(projection)
    widths = {"int4": n_in // 2, "int8": n_in, "fp8": n_in, "bf16": 2 * n_in}
    data = np.frombuffer(ctypes.string_at(data_at, n_out * widths[found.format]), np.uint8).reshape(n_out, -1)
    if found.format == "bf16":
        assert scales_at == 0
        return data, None
    kind, shape = (np.float32, (-(-n_out // 128), -(-n_in // 128))) if found.format == "fp8" else (np.uint16, None)
    shape = shape or (n_out, n_in // 32)
    n_bytes = int(np.prod(shape)) * np.dtype(kind).itemsize
    return data, np.frombuffer(ctypes.string_at(scales_at, n_bytes), kind).reshape(shape)


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


def every() -> list[tuple[int, int, Projection]]:
    return [(layer, expert, p) for layer in LAYERS for expert in range(GEOMETRY.n_experts) for p in PROJECTIONS]


@pytest.mark.parametrize(("source", "target"), [("int4", "native"), ("int4", "int4"), ("fp8", "native")])
def test_scaled_formats_are_used_in_place(tmp_path: Path, source: str, target: Target) -> None:
    tensors = expert_tensors(source)
    checkpoint = save(tensors, tmp_path)
    found = open_store(checkpoint, prefix, GEOMETRY, LAYERS, target, silent)
    data_name, scales_name = (
        (".weight_packed", ".weight_scale") if source == "int4" else (".weight", ".weight_scale_inv")
    )
    assert found.resident and found.notices == ()
    assert found.format == source and found.layers == LAYERS
    assert found.addresses.dtype == np.int64 and found.addresses.shape == (2, 3, 3, 2)
    checkpoint.close()  # the store keeps the mappings
    total = 0
    for layer, expert, projection in every():
        name = prefix(layer, expert, projection)
        data, scales = stored(found, layer, expert, projection)
        assert scales is not None
        assert data.tobytes() == tensors[name + data_name].view(torch.uint8).numpy().tobytes()
        assert scales.tobytes() == tensors[name + scales_name].view(torch.uint8).numpy().tobytes()
        total += data.nbytes + scales.nbytes
    assert found.n_bytes == total
    found.close()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_bf16_is_used_in_place(tmp_path: Path) -> None:
    tensors = expert_tensors("bf16")
    checkpoint = save(tensors, tmp_path)
    found = open_store(checkpoint, prefix, GEOMETRY, LAYERS, "native", silent)
    assert found.resident and found.format == "bf16"
    assert found.n_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for layer, expert, projection in every():
        name = f"{prefix(layer, expert, projection)}.weight"
        assert found.addresses[LAYERS.index(layer), expert, PROJECTIONS.index(projection), 0] == checkpoint.address(
            name
        )
        data, _ = stored(found, layer, expert, projection)
        assert data.tobytes() == tensors[name].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("source", "target"),
    [("int4", "int8")] + [(source, target) for source in ("fp8", "bf16", "f16", "f32") for target in ("int8", "int4")],
)
def test_quantised_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: Target) -> None:
    monkeypatch.setattr(requantise, "CHUNK", 128 * 160)  # several pieces to a matrix
    tensors = expert_tensors(source)
    calls: list[tuple[str, int, int]] = []
    found = open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, target, lambda *call: calls.append(call))
    assert found.resident and found.format == target
    assert found.n_bytes == 2 * 3 * GEOMETRY.expert_bytes(target)
    assert found.addresses[0, 0, 0, 0] % (2 << 20) == 0 and not (found.addresses % 64).any()
    squares = {layer: np.zeros(2) for layer in LAYERS}
    for layer, expert, projection in every():
        weights = exact(tensors, prefix(layer, expert, projection))
        data, scales = stored(found, layer, expert, projection)
        expected, steps = quantise_int4(weights) if target == "int4" else quantise_int8(weights)
        assert data.tobytes() == expected.tobytes()
        assert scales is not None and np.array_equal(scales, steps)
        difference = dequantise(target, expected, steps).astype(np.float64) - weights
        squares[layer] += [np.square(difference).sum(), np.square(weights.astype(np.float64)).sum()]
    by_layer = {layer: np.sqrt(error / norm) for layer, (error, norm) in squares.items()}
    worst = max(LAYERS, key=lambda layer: by_layer[layer])
    error, norm = sum(squares.values())
    assert len(found.notices) == 1
    assert f"from {source} to {target}" in found.notices[0]
    figures = re.search(r"error (.*)%, at most (.*)% \(layer (\d)\)", found.notices[0])
    assert figures and int(figures[3]) == worst
    assert float(figures[1]) == pytest.approx(100 * np.sqrt(error / norm), rel=1e-3, abs=6e-4)
    assert float(figures[2]) == pytest.approx(100 * by_layer[worst], rel=1e-3, abs=6e-4)
    size = sum(t.nbytes for name, t in tensors.items() if not name.endswith("_shape"))
    assert calls[0][1:] == (0, size) and calls[-1][1:] == (size, size)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {stage for stage, _, _ in calls} == {f"converting experts to {target}"}
    found.close()


@pytest.mark.parametrize("source", ["f16", "f32"])
def test_wide_floats_become_bf16(tmp_path: Path, source: str) -> None:
    tensors = expert_tensors(source)
    found = open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, "native", silent)
    assert found.format == "bf16" and found.resident
    assert f"from {source} to bf16" in found.notices[0]
    for layer, expert, projection in every():
        weights = exact(tensors, prefix(layer, expert, projection))
        data, _ = stored(found, layer, expert, projection)
        expected = torch.from_numpy(weights).bfloat16().float().numpy()
        assert np.array_equal(bf16_to_float32(data.view(np.uint16)), expected)


def test_reading_ahead_counts_every_byte(tmp_path: Path) -> None:
    tensors = expert_tensors("bf16")
    calls: list[tuple[str, int, int]] = []
    open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, "native", lambda *call: calls.append(call))
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[0] == ("reading experts", 0, size) and calls[-1] == ("reading experts", size, size)


def test_no_reading_ahead_beyond_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    calls: list[int] = []
    found = open_store(
        save(expert_tensors("bf16"), tmp_path), prefix, GEOMETRY, LAYERS, "native", lambda *call: calls.append(call[1])
    )
    assert calls == []
    assert len(found.notices) == 1 and "not read ahead" in found.notices[0]
    assert not found.resident


@pytest.mark.parametrize(
    "shape", [torch.tensor([160, 192]), torch.tensor([160, 24]), torch.tensor([160, 192], dtype=torch.int32), None]
)
def test_weight_shape_spellings(tmp_path: Path, shape: torch.Tensor | None) -> None:
    tensors = expert_tensors("int4")
    del tensors[f"{prefix(4, 2, 'up')}.weight_shape"]
    if shape is not None:
        tensors[f"{prefix(4, 2, 'up')}.weight_shape"] = shape
    open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, "native", silent)


GATE, DOWN = prefix(1, 0, "gate"), prefix(4, 2, "down")
REFUSALS: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "missing scales": ("int4", lambda t: t.pop(f"{DOWN}.weight_scale"), rf"{DOWN}\.weight_scale is missing"),
    "missing matrix": ("bf16", lambda t: t.pop(f"{DOWN}.weight"), rf"{DOWN}\.weight is missing"),
    "missing first": ("bf16", lambda t: t.pop(f"{GATE}.weight"), rf"{GATE}\.weight is missing"),
    "missing fp8 scales": ("fp8", lambda t: t.pop(f"{DOWN}.weight_scale_inv"), r"weight_scale_inv is missing"),
    "group size": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(192, 1).bfloat16()}),
        rf"{DOWN}\.weight_scale: expected BF16 \[192, 5\].*found BF16 \[192, 1\]",
    ),
    "scale type": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(192, 5)}),
        r"expected BF16 \[192, 5\].*found F32 \[192, 5\]",
    ),
    "transposed": (
        "bf16",
        lambda t: t.update({f"{DOWN}.weight": torch.ones(160, 192).bfloat16()}),
        rf"{DOWN}\.weight: expected BF16 \[192, 160\] for 192 outputs and 160 inputs, found BF16 \[160, 192\]",
    ),
    "one other type": (
        "bf16",
        lambda t: t.update({f"{DOWN}.weight": torch.ones(192, 160)}),
        r"expected BF16.*found F32 \[192, 160\]",
    ),
    "unknown type": ("bf16", lambda t: t.update({f"{GATE}.weight": torch.ones(160, 192).double()}), "dtype F64"),
    "mixed layers": (
        "int4",
        lambda t: t.update(expert_tensors("fp8", (4,))) or [t.pop(n) for n in list(t) if "s.4." in n and "pack" in n],
        "layer 1 has int4 experts and layer 4 has fp8",
    ),
    "weight_shape": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_shape": torch.tensor([160, 192])}),
        rf"{DOWN}\.weight_shape: expected I32 or I64 holding \[192, 160\], found \[160, 192\]",
    ),
    "reordered": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_g_idx": torch.zeros(160, dtype=torch.int32)}),
        rf"{DOWN}\.weight_g_idx: reordered or asymmetric",
    ),
    "asymmetric": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(24, 5, dtype=torch.int32)}),
        rf"{DOWN}\.weight_zero_point: reordered or asymmetric",
    ),
    "weight_shape type": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_shape": torch.tensor([192.0, 160.0])}),
        r"weight_shape: expected I32 or I64.*found F32 \[2\]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_tensor_and_sizes(tmp_path: Path, case: str) -> None:
    source, damage, message = REFUSALS[case]
    tensors = expert_tensors(source)
    damage(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, "native", silent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["int8", "int4"])
def test_not_a_number_is_refused(tmp_path: Path, target: Target) -> None:
    tensors = expert_tensors("bf16")
    tensors[f"{DOWN}.weight"][150, 3] = torch.nan
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.weight holds NaN or infinity in rows 0 to 191"):
        open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, target, silent)


@pytest.mark.parametrize(
    ("geometry", "dimension"),
    [(ExpertGeometry(1, 48, 64), "hidden_size 48"), (ExpertGeometry(1, 64, 40), "moe_intermediate_size 40")],
)
def test_groups_must_divide(tmp_path: Path, geometry: ExpertGeometry, dimension: str) -> None:
    checkpoint = save(expert_tensors("bf16", (0,), geometry), tmp_path)
    with pytest.raises(CheckpointError, match=f"{dimension} is not a multiple of 32.*--expert-format native"):
        open_store(checkpoint, prefix, geometry, (0,), "int8", silent)
    assert open_store(checkpoint, prefix, geometry, (0,), "native", silent).format == "bf16"


def test_a_failing_progress_stops_the_conversion(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(save(expert_tensors("bf16"), tmp_path), prefix, GEOMETRY, LAYERS, "int4", stop)
