"""Everything but the routed experts, streamed from the checkpoint to the device.

One tensor at a time, in file order: beside the weights themselves, memory peaks at the largest tensor, or where that
becomes narrow at STRIP values of it. Shapes are checked against the config before the first byte is read. Knows file
names and types, no model structure. Called by `hybrid.engine`.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np
import torch

from hybrid.config import ModelConfig, NarrowFormat, is_router
from hybrid.narrow import CODES, Matrix, Narrow, quantised
from hybrid.widths import format_of
from offload.checkpoint import Checkpoint, CheckpointError, TensorInfo
from offload.config import FP8_BLOCK, Progress

Notice = Callable[[str], None]

# Published types that hold the plain value, and torch's name for the bytes that `Checkpoint.array` hands out.
PLAIN_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STRIP = 1 << 24  # values that are narrowed at a time, 67 MB in float32
EMBEDDING = "model.embed_tokens.weight"
SHOWN_NAMES = 3  # tensor names spelled out in one message


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    notice: Notice,
    narrow: NarrowFormat | None = None,
    embedding_in_ram: bool = False,
) -> dict[str, Matrix]:
    """All tensors of `config.tensor_shapes()` by that name, on `device`: in `dtype`, the router in float32, and those
    that `hybrid.widths` names in one byte for each value where `narrow` is asked for. The embedding stays in RAM where
    that is asked for, unless it is the head as well.

    Raises CheckpointError, naming tensor, expected and found, where one is missing or does not fit the config.
    """
    found = _find(checkpoint, config)
    in_file_order = sorted(found, key=lambda name: (str(found[name].path), found[name].offset))
    total = sum(info.n_bytes for info in found.values())
    done = 0
    tensors: dict[str, Matrix] = {}
    progress("weights", done, total)
    for name in in_file_order:
        info = found[name]
        fmt = format_of(name, info.shape, narrow)
        if fmt is None:
            stays = embedding_in_ram and name == EMBEDDING and not config.tie_word_embeddings
            where = torch.device("cpu") if stays else device
            tensors[name] = _read(checkpoint, info).to(where, torch.float32 if is_router(name) else dtype)
        else:
            tensors[name] = _narrowed(checkpoint, info, fmt, device)
        done += info.n_bytes
        progress("weights", done, total)
    strange = unknown_names(config, checkpoint.tensors)
    if strange:
        notice(f"{checkpoint.directory}: {len(strange)} tensors are not used by this model: {_listed(strange)}")
    return tensors


def unknown_names(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """Names that are neither read nor known to be safe to leave out, sorted.

    Safe: rotary tables (computed here), layers beyond the last (multi-token prediction), the vision tower.
    """
    known = {config.tensor_prefix + name for name in config.tensor_shapes()}
    known |= {f"{name}_scale_inv" for name in known}
    layers = re.compile(re.escape(f"{config.tensor_prefix}model.layers.") + r"(\d+)\.(mlp\.experts\.\d+\.)?")
    moe = set(config.moe_layers)

    def is_known(name: str) -> bool:
        if name in known or name.endswith("inv_freq") or name.startswith(("vision_tower.", "mm_projector.")):
            return True
        match = layers.match(name)
        if match is None:
            return False
        return int(match[1]) >= config.num_hidden_layers or (match[2] is not None and int(match[1]) in moe)

    return sorted(name for name in names if not is_known(name))


def _find(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, TensorInfo]:
    """Where each tensor lies, with every complaint about names and shapes made at once."""
    shapes = config.tensor_shapes()
    missing = [config.tensor_prefix + name for name in shapes if config.tensor_prefix + name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: {len(missing)} tensors that config.json calls for are missing: "
            f"{_listed(missing)}; fetch the checkpoint and its config.json again, from the same revision"
        )
    found = {name: checkpoint.info(config.tensor_prefix + name) for name in shapes}
    for name, shape in shapes.items():
        _check(checkpoint, found[name], shape)
    return found


def _check(checkpoint: Checkpoint, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.path}: {info.name} has shape {list(info.shape)}, config.json calls for {list(shape)}; "
            "weights and config.json must come from the same revision"
        )
    if info.dtype == "F8_E4M3":
        scale = checkpoint.info(f"{info.name}_scale_inv")
        blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
        if scale.shape != blocks or scale.dtype != "F32":
            raise CheckpointError(
                f"{scale.path}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected F32 {list(blocks)} "
                f"(one scale for {FP8_BLOCK}x{FP8_BLOCK} weights); fetch the file again"
            )
    elif info.dtype not in PLAIN_TYPES:
        raise CheckpointError(
            f"{info.path}: {info.name} is {info.dtype}; outside the routed experts only "
            f"{', '.join(PLAIN_TYPES)} and F8_E4M3 can be loaded; use a checkpoint that keeps this tensor in bf16"
        )


def _narrowed(checkpoint: Checkpoint, info: TensorInfo, fmt: NarrowFormat, device: torch.device) -> Narrow:
    """A matrix in one byte for each value: published fp8 as it is, all else quantised row by row, in strips."""
    if fmt == "fp8" and info.dtype == "F8_E4M3":
        codes, scales = (_array(checkpoint, name) for name in (info.name, f"{info.name}_scale_inv"))
        return Narrow(codes.view(CODES[fmt]).to(device), scales.to(device))
    n_rows, n_in = info.shape
    found = Narrow(
        torch.empty((n_rows, n_in), dtype=CODES[fmt], device=device),
        torch.empty((n_rows, 1), dtype=torch.float32, device=device),
    )
    step = max(1, STRIP // n_in // FP8_BLOCK) * FP8_BLOCK
    for first in range(0, n_rows, step):
        rows = slice(first, min(first + step, n_rows))
        found.codes[rows], found.scales[rows] = quantised(_read(checkpoint, info, rows).to(device), fmt)
    if not torch.isfinite(found.scales).all():
        raise CheckpointError(f"{info.path}: {info.name} holds NaN or infinity; the file is damaged, download it again")
    return found


def _read(checkpoint: Checkpoint, info: TensorInfo, rows: slice = slice(None)) -> torch.Tensor:
    """One tensor's values in host memory: as published, or float32 where it was fp8. `rows` are of whole blocks."""
    data = _array(checkpoint, info.name, rows)
    if info.dtype != "F8_E4M3":
        return data.view(PLAIN_TYPES[info.dtype])
    first, after = (None if row is None else -(-row // FP8_BLOCK) for row in (rows.start, rows.stop))
    return from_fp8(data, _array(checkpoint, f"{info.name}_scale_inv", slice(first, after)))


def _array(checkpoint: Checkpoint, name: str, rows: slice = slice(None)) -> torch.Tensor:
    """A copy: the mapping is read-only."""
    return torch.from_numpy(np.array(checkpoint.array(name)[rows]))


def from_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(out, in) e4m3 codes times one factor for each 128 x 128 block, (out/128, in/128) rounded up: float32."""
    values = codes.view(torch.float8_e4m3fn).float()  # (out, in)
    for row, factors in enumerate(scales):  # a strip at a time: the factors spread out would be as large as the values
        strip = values[row * FP8_BLOCK : (row + 1) * FP8_BLOCK]
        strip *= factors.repeat_interleave(FP8_BLOCK)[: values.shape[1]]
    return values


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
