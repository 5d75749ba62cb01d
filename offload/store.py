"""Where every routed expert's bytes lie, each expert once.

A published format that the kernels read (int4, fp8, bf16) is used in place: the shards stay mapped and the table
below points into them. Another target is made at load by `offload.requantise`. The store knows geometry and bytes,
not arithmetic; the caller supplies the tensor names. `offload.experts` and hybrid's engine call it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import psutil

from offload.checkpoint import READ_AHEAD, Checkpoint, CheckpointError, TensorInfo
from offload.config import FP8_BLOCK, GROUP, PROJECTIONS, ExpertFormat, ExpertGeometry, Projection
from offload.requantise import MatrixSource, Source, requantise

Prefix = Callable[[int, int, Projection], str]
Progress = Callable[[str, int, int], None]
Target = Literal["native", "int8", "int4"]

UNQUANTISED: dict[str, Source] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
UNREAD_PARTS = ("weight_g_idx", "weight_zero_point")  # of compressed-tensors; each would change the values
SAME_RANGE = 1 << 20  # neighbouring tensors closer than this are read as one range


class ExpertStore:
    """The experts of all layers as addresses. `close` only after the last kernel that uses them has returned."""

    def __init__(
        self,
        geometry: ExpertGeometry,
        fmt: ExpertFormat,
        layers: Sequence[int],
        addresses: npt.NDArray[np.int64],
        owners: Sequence[memoryview],
        resident: bool,
        notices: Sequence[str],
    ) -> None:
        self.geometry = geometry
        self.format: ExpertFormat = fmt
        self.layers = tuple(layers)
        self.n_bytes = len(self.layers) * geometry.n_experts * geometry.expert_bytes(fmt)
        self.addresses = addresses  # (n_layers, E, 3, 2): gate/up/down; 0 data, 1 scales (0 where the format has none)
        self.resident = resident  # False: larger than RAM, so parts of it come from the disk when they are used
        self.notices = tuple(notices)  # lines for the user: weight error, what was not read ahead
        self._owners = list(owners)

    def close(self) -> None:
        """Lets go of the memory; the addresses are void afterwards."""
        for owner in self._owners:
            owner.release()
        self._owners.clear()


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of a matrix, as a source format has it."""

    suffix: str
    dtype: str
    shape: tuple[int, int]


def open_store(
    checkpoint: Checkpoint,
    prefix: Prefix,
    geometry: ExpertGeometry,
    layers: Sequence[int],
    target: Target,
    progress: Progress,
) -> ExpertStore:
    """Check every expert tensor of `layers` and make the store.

    `prefix(layer, expert, projection)` names a matrix without its `.weight…` ending. `progress(stage, done, total)`
    counts bytes of the checkpoint. Raises CheckpointError that names the tensor, what was expected and what was found.
    """
    source = _source_format(checkpoint, prefix, layers)
    fmt: ExpertFormat = _stored_format(source, target)
    _check_groups(geometry, source, fmt)
    matrices = [
        _matrix(checkpoint, prefix(layer, expert, projection), geometry.shape(projection), source)
        for layer in layers
        for expert in range(geometry.n_experts)
        for projection in PROJECTIONS
    ]
    shape = (len(layers), geometry.n_experts, len(PROJECTIONS), 2)
    if fmt == source:
        notices = _read_ahead(checkpoint, matrices, progress)
        table = [[matrix.data_address, matrix.scales_address] for matrix in matrices]
        owners = [checkpoint.buffer(path) for path in sorted({matrix.data.path for matrix in matrices})]
        owners += [checkpoint.buffer(path) for path in sorted({m.scales.path for m in matrices if m.scales})]
        addresses = np.array(table, np.int64).reshape(shape)
        return ExpertStore(geometry, fmt, layers, addresses, owners, not notices, notices)
    made = requantise(matrices, source, fmt, len(layers), progress)
    notices = made.notices(layers, source, fmt)
    return ExpertStore(geometry, fmt, layers, made.addresses.reshape(shape), [made.memory], True, notices)


def _stored_format(source: Source, target: Target) -> ExpertFormat:
    if target != "native":
        return target
    return "bf16" if source == "f16" or source == "f32" else source


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
    """One checked matrix. `weight_shape` is optional; where it is there, it must agree."""
    for part in UNREAD_PARTS:
        if f"{name}.{part}" in checkpoint:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {name}.{part}: reordered or asymmetric weights are not supported; "
                "use a checkpoint quantised symmetrically, with actorder null"
            )
    infos = [_checked(checkpoint, name, part, shape) for part in _parts(source, *shape)]
    if source == "int4" and f"{name}.weight_shape" in checkpoint:
        _check_weight_shape(checkpoint, f"{name}.weight_shape", shape)
    scales = infos[1] if len(infos) == 2 else None
    return MatrixSource(
        checkpoint=checkpoint,
        data=infos[0],
        scales=scales,
        shape=shape,
        data_address=checkpoint.address(infos[0].name),
        scales_address=checkpoint.address(scales.name) if scales else 0,
    )


def _checked(checkpoint: Checkpoint, name: str, part: _Part, shape: tuple[int, int]) -> TensorInfo:
    info = checkpoint.info(name + part.suffix)
    if (info.dtype, info.shape) != (part.dtype, part.shape):
        raise CheckpointError(
            f"{info.path}: tensor {info.name}: expected {part.dtype} {list(part.shape)} for {shape[0]} outputs and "
            f"{shape[1]} inputs, found {info.dtype} {list(info.shape)}; config.json and the shards do not belong "
            "together"
        )
    return info


def _check_weight_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> None:
    """int32 in the published files, int64 in others; some writers give the packed shape instead."""
    info = checkpoint.info(name)
    found = [int(n) for n in checkpoint.array(name)] if info.dtype in ("I32", "I64") and info.shape == (2,) else None
    if found not in ([shape[0], shape[1]], [shape[0], shape[1] // 8]):
        shown = f"{info.dtype} {list(info.shape)}" if found is None else str(found)
        raise CheckpointError(
            f"{info.path}: tensor {name}: expected I32 or I64 holding {list(shape)}, found {shown}; "
            "config.json and the shards do not belong together"
        )


def _read_ahead(checkpoint: Checkpoint, matrices: Sequence[MatrixSource], progress: Progress) -> list[str]:
    """Read mapped experts once from end to end, so that the first request does not wait for the disk page by page.

    Returns a notice instead where they would not stay in memory.
    """
    ranges = list(_ranges(matrices))
    total = sum(end - begin for _, begin, end in ranges)
    available = psutil.virtual_memory().available
    if total > available:
        return [
            f"experts take {total / 1e9:.1f} GB and {available / 1e9:.1f} GB of RAM are free: "
            "they are not read ahead and come from the disk when first used"
        ]
    done = 0
    progress("reading experts", 0, total)
    for info, begin, end in ranges:
        for start in range(begin, end, READ_AHEAD):
            stop = min(start + READ_AHEAD, end)
            checkpoint.read_ahead(info.path, start, stop)
            done += stop - start
            progress("reading experts", done, total)
    return []


def _ranges(matrices: Sequence[MatrixSource]) -> Iterator[tuple[TensorInfo, int, int]]:
    """Ranges of the files that hold the experts, in file order, near neighbours joined: (any tensor, begin, end)."""
    infos = [info for matrix in matrices for info in (matrix.data, matrix.scales) if info is not None]
    infos.sort(key=lambda info: (info.path, info.offset))
    first, end = infos[0], infos[0].offset
    for info in infos:
        if info.path != first.path or info.offset > end + SAME_RANGE:
            yield first, first.offset, end
            first = info
        end = info.offset + info.n_bytes
    yield first, first.offset, end
