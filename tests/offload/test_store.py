"""The expert store: addresses that lead to the right bytes, and refusals that name what is wrong."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from offload import numa, reading, store
from offload.checkpoint import CheckpointError
from offload.config import PROJECTIONS, ExpertGeometry
from offload.formats import dequantise, quantise_int4, quantise_int8
from offload.sources import Target
from offload.store import open_store
from tests.reference.expert_files import (
    GEOMETRY,
    LAYERS,
    Tensors,
    check_bytes,
    exact,
    expert_tensors,
    prefix,
    save,
    silent,
)

FORMATS = ("int4", "fp8", "bf16", "f16", "f32")


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 0, 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_published_weights_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, nodes: tuple[int, ...], chunk: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK", chunk)
    monkeypatch.setattr(reading, "CONVERTED", chunk)
    tensors = expert_tensors(source)
    checkpoint = save(tensors, tmp_path)
    found = open_store(checkpoint, prefix, GEOMETRY, LAYERS, "native", silent, nodes)
    checkpoint.close()  # nothing is left in the shards
    assert found.pager is None and found.layers == LAYERS
    assert found.addresses.dtype == np.int64 and found.addresses.shape == (2, 3, len(nodes), 2)
    assert found.n_nodes == len(nodes) and not (found.addresses % 64).any()
    assert found.n_bytes == 2 * 3 * GEOMETRY.expert_bytes(found.format)
    assert found.format == (source if source in ("int4", "fp8") else "bf16")
    assert len(found.notices) == (1 if source in ("f16", "f32") else 0)
    assert all(f"from {source} to bf16" in notice for notice in found.notices)
    check_bytes(found, tensors)
    found.close()


@pytest.mark.parametrize("nodes", [(0,), (0, 0, 0)])
@pytest.mark.parametrize(
    ("source", "target"),
    [("int4", "int8")] + [(source, target) for source in ("fp8", "bf16", "f16", "f32") for target in ("int8", "int4")],
)
def test_quantised_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: Target, nodes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(reading, "CONVERTED", 32 * 192)  # several pieces to a matrix
    tensors = expert_tensors(source)
    calls: list[tuple[str, int, int]] = []
    checkpoint = save(tensors, tmp_path)
    found = open_store(checkpoint, prefix, GEOMETRY, LAYERS, target, lambda *call: calls.append(call), nodes)
    assert found.pager is None and found.format == target
    check_bytes(found, tensors)
    squares = {layer: np.zeros(2) for layer in LAYERS}
    for layer in LAYERS:
        for name in (prefix(layer, expert, p) for expert in range(GEOMETRY.n_experts) for p in PROJECTIONS):
            weights = exact(tensors, name)
            again = dequantise(target, *(quantise_int4(weights) if target == "int4" else quantise_int8(weights)))
            difference = again.astype(np.float64) - weights
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


def test_progress_counts_every_published_byte(tmp_path: Path) -> None:
    tensors = expert_tensors("bf16")
    calls: list[tuple[str, int, int]] = []
    open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, "native", lambda *call: calls.append(call))
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[0] == ("reading experts", 0, size) and calls[-1] == ("reading experts", size, size)


def test_sizes_without_padding_are_those_of_the_published_tensors(tmp_path: Path) -> None:
    geometry = ExpertGeometry(2, 128, 64)
    tensors = expert_tensors("int4", (0,), geometry)
    found = open_store(save(tensors, tmp_path), prefix, geometry, (0,), "native", silent)
    assert found.n_bytes == sum(t.nbytes for name, t in tensors.items() if not name.endswith("_shape"))


@pytest.mark.parametrize(("target", "flag"), [("native", ""), ("int8", " --expert-format int8")])
def test_more_than_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target, flag: str) -> None:
    monkeypatch.setattr(store, "ram", lambda: (100_000, 100_000))
    with pytest.raises(CheckpointError) as caught:
        open_store(save(expert_tensors("bf16"), tmp_path), prefix, GEOMETRY, LAYERS, target, silent)
    assert str(caught.value).startswith("the experts take 0.0 GB in memory and 0.0 GB of RAM are free; ")
    assert f"`hybrid pack {tmp_path}{flag}`" in str(caught.value)


def test_crowded_memory_lets_go_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = expert_tensors("bf16")
    dropped: list[int] = []
    advise = reading.os.posix_fadvise
    monkeypatch.setattr(
        reading.os,
        "posix_fadvise",
        lambda *a: dropped.append(a[2]) if a[3] == reading.os.POSIX_FADV_DONTNEED else advise(*a),
    )
    checkpoint = save(tensors, tmp_path)
    needed = 6 * GEOMETRY.expert_bytes("bf16")
    for available, n_bytes in ((10 * needed, 0), (needed + 1000, sum(t.nbytes for t in tensors.values()))):
        monkeypatch.setattr(store, "ram", lambda free=available: (free, free))
        open_store(checkpoint, prefix, GEOMETRY, LAYERS, "native", silent)
        assert sum(dropped) == n_bytes


def test_a_node_that_does_not_exist_is_a_notice(tmp_path: Path) -> None:
    tensors = expert_tensors("int4")
    found = open_store(save(tensors, tmp_path), prefix, GEOMETRY, LAYERS, "native", silent, (0, 700))
    assert len(found.notices) == 1 and found.notices[0].startswith("memory node 700: E")
    check_bytes(found, tensors)


def test_memory_of_a_node() -> None:
    memory = numa.huge_memory(5 << 20)
    assert numa.address_of(memory) % numa.HUGE_PAGE == 0 and len(memory) == 5 << 20
    assert numa.prefer_node(memory, 0) is None
    memory[-1] = 1


def test_a_shard_that_shrinks_is_told(tmp_path: Path) -> None:
    checkpoint = save(expert_tensors("bf16"), tmp_path)
    path = tmp_path / "1.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"1\.safetensors: ends within tensor .*; download it again"):
        open_store(checkpoint, prefix, GEOMETRY, LAYERS, "native", silent)


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
