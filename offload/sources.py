"""Where the routed experts lie in a checkpoint, tensor by tensor, checked against what the model says.

The caller supplies the tensor names. Reads headers only, so it costs nothing on a cold disk. offload/store.py calls it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload.checkpoint import Checkpoint, CheckpointError, TensorInfo
from offload.config import FP8_BLOCK, GROUP, PROJECTIONS, ExpertFormat, ExpertGeometry, Projection

Prefix = Callable[[int, int, Projection], str]
Source = Literal["int4", "fp8", "bf16", "f16", "f32"]
Target = Literal["native", "int8", "int4"]

UNQUANTISED: dict[str, Source] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
UNREAD_PARTS = ("weight_g_idx", "weight_zero_point")  # of compressed-tensors; each would change the values


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """One expert matrix in the checkpoint, already checked, but for the two numbers in `shape`."""

    data: TensorInfo
    scales: TensorInfo | None
    shape: TensorInfo | None  # int4's weight_shape

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.data,) if self.scales is None else (self.data, self.scales)


Expert = dict[Projection, MatrixSource]


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of a matrix, as a source format has it."""

    suffix: str
    dtype: str
    shape: tuple[int, int]


def packed_path(directory: Path, fmt: ExpertFormat) -> Path:
    """Where the packed file (offload/packed.py) of a checkpoint's experts lies."""
    return directory / f"hybrid-experts-{fmt}.packed"


def formats(
    checkpoint: Checkpoint, prefix: Prefix, layers: Sequence[int], target: Target
) -> tuple[Source, ExpertFormat]:
    """The published format of all layers and the one that kernels will read.

    `prefix(layer, expert, projection)` names a matrix without its `.weight…` ending.
    """
    source = _source_format(checkpoint, prefix, layers)
    if target != "native":
        return source, target
    return source, "bf16" if source == "f16" or source == "f32" else source


def find_experts(
    checkpoint: Checkpoint,
    prefix: Prefix,
    geometry: ExpertGeometry,
    layers: Sequence[int],
    source: Source,
    fmt: ExpertFormat,
) -> list[Expert]:
    """All experts, layer by layer. Raises CheckpointError naming the tensor, what was expected and what was found."""
    _check_groups(geometry, source, fmt)
    return [
        {
            projection: _matrix(checkpoint, prefix(layer, expert, projection), geometry.shape(projection), source)
            for projection in PROJECTIONS
        }
        for layer in layers
        for expert in range(geometry.n_experts)
    ]


def _source_format(checkpoint: Checkpoint, prefix: Prefix, layers: Sequence[int]) -> Source:
    """The one format of all layers, seen at each layer's first expert."""
    formats = {layer: _matrix_format(checkpoint, prefix(layer, 0, "gate")) for layer in layers}
    first = layers[0]
    for layer, found in formats.items():
        if found != formats[first]:
            raise CheckpointError(
                f"{checkpoint.directory}: layer {first} has {formats[first]} experts and layer {layer} has {found} "
                "ones; a mix is not supported, convert the checkpoint to one expert format"
            )
    return formats[first]


def _matrix_format(checkpoint: Checkpoint, name: str) -> Source:
    if f"{name}.weight_packed" in checkpoint:
        return "int4"
    dtype = checkpoint.info(f"{name}.weight").dtype
    if dtype == "F8_E4M3":
        return "fp8"
    if dtype not in UNQUANTISED:
        raise CheckpointError(
            f"{checkpoint.directory}: {name}.weight has dtype {dtype}; experts must be packed int4 "
            "(weight_packed), F8_E4M3, BF16, F16 or F32"
        )
    return UNQUANTISED[dtype]


def _check_groups(geometry: ExpertGeometry, source: Source, fmt: ExpertFormat) -> None:
    """int4 and int8 share one scale among 32 inputs, so the inputs must divide."""
    for dimension, n_in in (("hidden_size", geometry.hidden), ("moe_intermediate_size", geometry.inner)):
        if n_in % GROUP == 0:
            continue
        if source == "int4":
            raise CheckpointError(f"{dimension} {n_in} is not a multiple of {GROUP}, which int4 experts need")
        if fmt in ("int4", "int8"):
            raise CheckpointError(
                f"{dimension} {n_in} is not a multiple of {GROUP}, so {fmt} experts cannot be made: "
                "use --expert-format native"
            )


def _parts(source: Source, n_out: int, n_in: int) -> tuple[_Part, ...]:
    """The tensors of one (n_out, n_in) matrix: data first, then scales."""
    if source == "int4":
        return (
            _Part(".weight_packed", "I32", (n_out, n_in // 8)),
            _Part(".weight_scale", "BF16", (n_out, n_in // GROUP)),
        )
    if source == "fp8":
        blocks = (-(-n_out // FP8_BLOCK), -(-n_in // FP8_BLOCK))
        return (_Part(".weight", "F8_E4M3", (n_out, n_in)), _Part(".weight_scale_inv", "F32", blocks))
    dtype = next(name for name, known in UNQUANTISED.items() if known == source)
    return (_Part(".weight", dtype, (n_out, n_in)),)


def _matrix(checkpoint: Checkpoint, name: str, shape: tuple[int, int], source: Source) -> MatrixSource:
    """One checked matrix. `weight_shape` is optional."""
    for part in UNREAD_PARTS:
        if f"{name}.{part}" in checkpoint:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {name}.{part}: reordered or asymmetric weights are not supported; "
                "use a checkpoint quantised symmetrically, with actorder null"
            )
    infos = [_checked(checkpoint, name, part, shape) for part in _parts(source, *shape)]
    written = None
    if source == "int4" and f"{name}.weight_shape" in checkpoint:
        written = checkpoint.info(f"{name}.weight_shape")
        if written.dtype not in ("I32", "I64") or written.shape != (2,):
            raise _other_shape(written, shape, f"{written.dtype} {list(written.shape)}")
    return MatrixSource(infos[0], infos[1] if len(infos) == 2 else None, written)


def _checked(checkpoint: Checkpoint, name: str, part: _Part, shape: tuple[int, int]) -> TensorInfo:
    info = checkpoint.info(name + part.suffix)
    if (info.dtype, info.shape) != (part.dtype, part.shape):
        raise CheckpointError(
            f"{info.path}: tensor {info.name}: expected {part.dtype} {list(part.shape)} for {shape[0]} outputs and "
            f"{shape[1]} inputs, found {info.dtype} {list(info.shape)}; config.json and the shards do not belong "
            "together"
        )
    return info


def check_weight_shape(written: TensorInfo, shape: tuple[int, int], found: Sequence[int]) -> None:
    """int32 in the published files, int64 in others; some writers give the packed shape instead."""
    if list(found) not in ([shape[0], shape[1]], [shape[0], shape[1] // 8]):
        raise _other_shape(written, shape, str(list(found)))


def _other_shape(written: TensorInfo, shape: tuple[int, int], found: str) -> CheckpointError:
    return CheckpointError(
        f"{written.path}: tensor {written.name}: expected I32 or I64 holding {list(shape)}, found {found}; "
        "config.json and the shards do not belong together"
    )
