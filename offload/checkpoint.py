"""Reads a Hugging Face directory of safetensors: names, shapes and the mapped bytes.

Each shard is mapped read-only and never copied. Everything a damaged or hostile file can say is checked before the
first byte of a tensor is handed out; pickle files are not read. It does not know what a tensor means. The expert
store and hybrid's weight loader call it.

A safetensors file is: 8 bytes with the header's length, little-endian; the header, JSON, which gives for every name
its dtype, shape and [begin, end) counted from the header's end; the tensors' bytes.
"""

import itertools
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit
MAX_ELEMENTS = 1 << 48
MAX_DIMENSIONS = 32
READ_AHEAD = 1 << 25
MADV_POPULATE_READ = 22  # Linux 5.14; not yet named by the mmap module

# What a dtype's bytes are handed out as: bf16 and fp8 have no NumPy type, so their bits.
NUMPY_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "|b1",
        "U8": "|u1",
        "I8": "|i1",
        "F8_E4M3": "|u1",
        "F8_E5M2": "|u1",
        "F8_E8M0": "|u1",
        "I16": "<i2",
        "U16": "<u2",
        "F16": "<f2",
        "BF16": "<u2",
        "I32": "<i4",
        "U32": "<u4",
        "F32": "<f4",
        "I64": "<i8",
        "U64": "<u8",
        "F64": "<f8",
    }
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: one line with the file or tensor, what is wrong, and the remedy."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; `offset` counts from the start of the file."""

    name: str
    dtype: str  # as the file spells it: "BF16", "F32", "I32", "F8_E4M3", ...
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


class Checkpoint:
    """All tensors of one directory. The mappings live as long as this object or any array it gave out."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        weight_map = _read_index(directory / INDEX_NAME) if (directory / INDEX_NAME).is_file() else None
        paths = _shard_paths(directory, weight_map)
        self._maps = {path: _map_file(path) for path in paths}
        self._bases = {path: int(np.frombuffer(m, np.uint8).ctypes.data) for path, m in self._maps.items()}
        headers = {path.name: _read_header(path, mapped) for path, mapped in self._maps.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge(directory, headers, weight_map))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError where the checkpoint has no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.directory}: tensor {name} is missing; the checkpoint does not fit its config.json, "
                "or its download is incomplete"
            )
        return self.tensors[name]

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """The tensor over the mapped bytes, read-only: bf16 as uint16, fp8 as uint8, else its own type.

        A copy is made only where the file does not align the tensor to its element size.
        """
        info = self.info(name)
        array = np.frombuffer(
            self._map(info.path), NUMPY_TYPES[info.dtype], count=math.prod(info.shape), offset=info.offset
        ).reshape(info.shape)
        return array if array.flags.aligned else array.copy()

    def address(self, name: str) -> int:
        """The address of the tensor's mapped bytes."""
        info = self.info(name)
        self._map(info.path)  # raises where the checkpoint is closed
        return self._bases[info.path] + info.offset

    def buffer(self, path: Path) -> memoryview:
        """One shard's mapped bytes. Whoever holds it keeps the mapping alive beyond `close`."""
        return memoryview(self._map(path))

    def read_ahead(self, path: Path, begin: int, end: int) -> None:
        """Brings bytes [begin, end) of a shard into memory and into the page table, and asks for what follows."""
        mapped = self._map(path)
        first = begin - begin % mmap.PAGESIZE
        if end < len(mapped):
            after = end - end % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, after, min(READ_AHEAD, len(mapped) - after))
        try:
            mapped.madvise(MADV_POPULATE_READ, first, end - first)
        except OSError:  # an older kernel: touch every page instead
            np.frombuffer(mapped, np.uint8)[first : end : mmap.PAGESIZE].max(initial=0)

    def close(self) -> None:
        """Unmaps the shards. One that an array or a store still refers to stays mapped until that is gone."""
        maps, self._maps = self._maps, {}
        self.tensors = MappingProxyType({})
        for mapped in maps.values():
            try:
                mapped.close()
            except BufferError:  # still referred to: the last reference unmaps it
                continue

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            raise CheckpointError(f"{path}: the checkpoint is closed, or this is not one of its shards")
        return self._maps[path]


def _read_index(path: Path) -> dict[str, str]:
    """The index's map from tensor name to shard file name."""
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON index ({_one_line(error)}); download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map that names the shard of each tensor; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "\0" in shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{path}: weight_map sends {name[:200]!r} to {shard!r:.200}, which is not a file name in the same "
                "directory; download the index again"
            )
    return weight_map


def _shard_paths(directory: Path, weight_map: dict[str, str] | None) -> list[Path]:
    """The shards to map: the index's, or the single file, or every safetensors file of the directory."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give the folder that holds config.json and the shards")
    if weight_map is not None:
        paths = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} of {len(paths)} shards named by {INDEX_NAME} are missing, "
                f"the first is {missing[0]!r:.200}; download them"
            )
        return paths
    paths = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if paths:
        return paths
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise CheckpointError(
            f"{directory}: only pickle weights (.bin, .pt) here, which can run code and are not read; "
            "use a safetensors version of the checkpoint"
        )
    raise CheckpointError(f"{directory}: no *.safetensors file; give the folder that holds the checkpoint's shards")


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if (size := path.stat().st_size) < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(error)}); check the file") from error


def _not_safetensors(path: Path, mapped: mmap.mmap) -> CheckpointError:
    """What a file is whose first bytes are no header length: usually an LFS pointer or a web page."""
    start = mapped[:64]
    if start.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in its directory")
    if start.lstrip().startswith(b"<"):
        return CheckpointError(f"{path}: a web page (HTML or XML), not the weights; download the file again")
    return CheckpointError(
        f"{path}: not a safetensors file, or truncated: it claims a header of {int.from_bytes(start[:8], 'little')} "
        f"bytes, and {len(mapped) - 8} bytes follow; download it again"
    )


def _read_header(path: Path, mapped: mmap.mmap) -> dict[str, TensorInfo]:
    """Parses and checks one shard's header."""
    length = int.from_bytes(mapped[:8], "little")
    if length > min(len(mapped) - 8, MAX_HEADER) or length < 2:
        raise _not_safetensors(path, mapped)
    try:
        header = json.loads(mapped[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header of {length} bytes is not JSON ({_one_line(error)}); download the file again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; download the file again")
    header.pop("__metadata__", None)
    infos = {name: _tensor_info(path, name, entry, 8 + length, len(mapped)) for name, entry in header.items()}
    _check_overlap(path, infos)
    return infos


def _tensor_info(path: Path, name: str, entry: object, base: int, file_size: int) -> TensorInfo:
    """Checks one header entry: known dtype, plausible shape, bytes that fit the shape and lie in the file."""
    shown = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{shown}: its header entry is not an object; download the file again")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_TYPES:
        raise CheckpointError(f"{shown}: dtype {dtype!r:.60} is not one of {', '.join(NUMPY_TYPES)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise CheckpointError(f"{shown}: shape {_short(shape)} is not a list of plausible sizes; download it again")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{shown}: data_offsets {_short(offsets)} are not [begin, end); download the file again")
    n_bytes = math.prod(shape) * np.dtype(NUMPY_TYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != n_bytes:
        raise CheckpointError(
            f"{shown}: {dtype} of shape {shape} takes {n_bytes} bytes, data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}; download the file again"
        )
    if base + offsets[1] > file_size:
        raise CheckpointError(
            f"{shown} ends at byte {base + offsets[1]}, the file at {file_size}: the file is truncated; "
            "download it again"
        )
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], n_bytes)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    """True for a list of integers in 0 .. 2^62 (a bool is no integer here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _short(value: object) -> str:
    """A value from a file, for a message: a huge integer must not raise, a long list must not fill the screen."""
    try:
        return f"{value!r:.100}"
    except ValueError:
        return "with an absurd number"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_overlap(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Two tensors that share bytes mean a damaged header. Gaps are harmless: some writers align tensors."""
    filled = sorted((info for info in infos.values() if info.n_bytes), key=lambda info: info.offset)
    for before, after in itertools.pairwise(filled):
        if before.offset + before.n_bytes > after.offset:
            raise CheckpointError(
                f"{path}: tensors {before.name[:200]!r} and {after.name[:200]!r} overlap at byte {after.offset}; "
                "download the file again"
            )


def _merge(
    directory: Path, headers: Mapping[str, Mapping[str, TensorInfo]], weight_map: dict[str, str] | None
) -> dict[str, TensorInfo]:
    """All tensors by name: the index's where there is one, else every shard's. Stray rotary buffers are left out."""
    merged: dict[str, TensorInfo] = {}
    if weight_map is None:
        for infos in headers.values():
            for name, info in infos.items():
                if name in merged:
                    raise CheckpointError(
                        f"{directory}: tensor {name[:200]!r} is in both {merged[name].path.name} and "
                        f"{info.path.name}, and no {INDEX_NAME} says which counts; remove one"
                    )
                merged[name] = info
    else:
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise CheckpointError(
                    f"{directory / INDEX_NAME}: tensor {name[:200]!r} should be in {shard}, which does not hold it; "
                    "index and shards are of different versions, download both again"
                )
            merged[name] = headers[shard][name]
    return {name: info for name, info in merged.items() if not name.endswith("inv_freq")}
