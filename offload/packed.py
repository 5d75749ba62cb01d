"""The packed file of a checkpoint's experts: `hybrid pack` writes it beside the shards, a start maps it.

    8 bytes       magic
    8 bytes       length of the JSON, little-endian
    JSON          what the file holds, and the fingerprint of the shards it was made from
    at 4096       a record of 32 bytes for each layer: mark, squared weight error, squared weights
    at 2 MiB      all experts, layer by layer, each as offload/config.py draws it for one memory node

While it is written it is called `.partial` and locked. A layer's record is written when its bytes are on the disk, so
that a run that was killed goes on behind the last record. The name without `.partial` means that all layers are there.
A file that belongs to other shards, another version or another model is never used. Called by offload/store.py.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shlex
import shutil
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offload.checkpoint import MADV_POPULATE_READ, READ_AHEAD, Checkpoint, CheckpointError
from offload.config import ExpertFormat, ExpertGeometry, Progress
from offload.kernels.pack import aligned
from offload.numa import HUGE_PAGE, address_of
from offload.pipeline import ask_disk, pipeline
from offload.reading import ExpertReader
from offload.requantise import Squares, error_notice
from offload.sources import Source, packed_path

MAGIC = b"hybridpk"
VERSION = 1  # of this header and of the layout in offload/config.py
RECORDS_AT = 4096
RECORD = struct.Struct("<8sdd8x")
MARK = b"finished"
DATA_AT = HUGE_PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a packed file holds."""

    geometry: ExpertGeometry
    format: ExpertFormat
    published: Source
    layers: tuple[int, ...]
    fingerprint: str

    @property
    def n_experts(self) -> int:
        return len(self.layers) * self.geometry.n_experts

    @property
    def expert_bytes(self) -> int:
        return self.geometry.expert_bytes(self.format)

    @property
    def n_bytes(self) -> int:
        return self.n_experts * self.expert_bytes

    def as_json(self) -> dict[str, Any]:
        g = self.geometry
        sizes = {"experts": g.n_experts, "hidden": g.hidden, "inner": g.inner, "expert_bytes": self.expert_bytes}
        kind = {"version": VERSION, "format": self.format, "published": self.published}
        return {**kind, **sizes, "layers": list(self.layers), "fingerprint": self.fingerprint}

    def header(self) -> bytes:
        text = json.dumps(self.as_json()).encode()
        assert len(text) <= RECORDS_AT - 16 and RECORDS_AT + RECORD.size * len(self.layers) <= DATA_AT
        return MAGIC + len(text).to_bytes(8, "little") + text

    def command(self, directory: Path) -> str:
        """What the user runs to get the file."""
        wanted = f" --expert-format {self.format}" if self.format in ("int8", "int4") else ""
        native = self.published == self.format or self.format == "bf16"
        return f"hybrid pack {shlex.quote(str(directory))}{'' if native else wanted}"


def fingerprint(checkpoint: Checkpoint) -> str:
    """Changes with the name, size, time of change or header of any shard."""
    digest = hashlib.sha256()
    for path in sorted({info.path for info in checkpoint.tensors.values()}):
        status = path.stat()
        with checkpoint.buffer(path) as shard:
            header = bytes(shard[: 8 + int.from_bytes(shard[:8], "little")])
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0{len(header)}\0".encode() + header)
    return digest.hexdigest()


def usable(directory: Path, contents: Contents, notices: list[str]) -> bool:
    """Whether there is a packed file that holds just `contents`; a notice says why one that is there does not.

    Raises CheckpointError where it is damaged.
    """
    path, command = packed_path(directory, contents.format), contents.command(directory)
    if not path.exists():
        return False
    found, wanted = _read_header(path, command), contents.as_json()
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if not different:
        size, expected = path.stat().st_size, DATA_AT + contents.n_bytes
        if size != expected:
            raise _damaged(path, f"it has {size} bytes and should have {expected}", command)
        if any(mark != MARK for mark, _, _ in _records(path, contents)):
            raise _damaged(path, "a layer is missing", command)
        return True
    if different == ["fingerprint"]:
        why = "the shards are others, or newer, than those it was made from"
    else:
        key = different[0]
        why = f"its {key} is {found.get(key)!r:.60}, this model's is {wanted[key]!r:.60}"
    notices.append(f"{path.name} is not used: {why}; `{command}` writes it anew")
    return False


def _read_header(path: Path, command: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(RECORDS_AT)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    try:
        found = json.loads(start[16 : 16 + int.from_bytes(start[8:16], "little")])
    except (ValueError, RecursionError):
        found = None
    if start[:8] != MAGIC or not isinstance(found, dict):
        raise _damaged(path, "its header is not that of a packed file", command)
    return found


def _damaged(path: Path, what: str, command: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, {what}; delete it, or write it anew with `{command}`")


def _records(path: Path, contents: Contents) -> list[tuple[bytes, float, float]]:
    with path.open("rb") as file:
        file.seek(RECORDS_AT)
        table = file.read(RECORD.size * len(contents.layers)).ljust(RECORD.size * len(contents.layers), b"\0")
    return list(RECORD.iter_unpack(table))


def error_notices(directory: Path, contents: Contents) -> list[str]:
    """The weight error, where the file's format is not the published one."""
    if contents.published == contents.format:
        return []
    squares = np.array([record[1:] for record in _records(packed_path(directory, contents.format), contents)])
    return [error_notice(squares, contents.layers, contents.published, contents.format)]


def open_mapped(directory: Path, contents: Contents, progress: Progress) -> memoryview:
    """The experts' bytes in a usable file, mapped and in memory."""
    with packed_path(directory, contents.format).open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[DATA_AT:]
        _read_ahead(mapped, file.fileno(), progress)
    return mapped


def _read_ahead(mapped: memoryview, file: int, progress: Progress) -> None:
    """Bring every page into memory and into the page table, so that no request waits for the disk."""
    total, base = len(mapped), address_of(mapped)
    stage = "reading packed experts"

    def touch(at: int) -> None:
        size = min(READ_AHEAD, total - at)
        if _libc.madvise(base + at, size, MADV_POPULATE_READ):  # an older kernel: touch every page instead
            np.frombuffer(mapped, np.uint8)[at : at + size : mmap.PAGESIZE].max()

    def ask(at: int) -> None:
        ask_disk(file, DATA_AT + at, min(READ_AHEAD, total - at))

    def done(at: int, nothing: None) -> None:
        progress(stage, min(at + READ_AHEAD, total), total)

    progress(stage, 0, total)
    pipeline(range(0, total, READ_AHEAD), ask, touch, done, READ_AHEAD)


def write(directory: Path, contents: Contents, reader: ExpertReader, progress: Progress) -> None:
    """Write the file, or go on where an earlier run was cut off. Raises CheckpointError, one line for the user."""
    path = packed_path(directory, contents.format)
    partial = path.with_name(path.name + ".partial")
    _check_space(partial, contents)
    try:
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(file, partial)
            _write_layers(file, contents, reader, progress)
            os.rename(partial, path)
        finally:
            os.close(file)
        _sync_directory(directory)
    except OSError as error:
        remedy = "run it again when that is mended, it goes on where it stopped"
        if error.errno in (errno.EROFS, errno.EACCES):
            remedy = "the directory must be writable: make one that is, with links to the shards and the other files"
        raise CheckpointError(f"{partial}: cannot be written ({error.strerror}); {remedy}") from error


def _check_space(partial: Path, contents: Contents) -> None:
    there = partial.stat().st_blocks * 512 if partial.exists() else 0
    needed, free = DATA_AT + contents.n_bytes - there, shutil.disk_usage(partial.parent).free
    if needed > free:
        final = partial.with_suffix("")
        outdated = f": {final.name} is out of date and may be deleted" if final.exists() else ""
        raise CheckpointError(
            f"{partial.parent}: the packed experts take {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of the disk are "
            f"free; make room there{outdated}"
        )


def _lock(file: int, partial: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = True
    else:  # or one that ended just now, and whose file this was
        busy = not partial.exists() or not os.path.samestat(os.fstat(file), partial.stat())
    if busy:
        raise CheckpointError(f"{partial}: another `hybrid pack` is writing it; wait until it has ended")


def _write_layers(file: int, contents: Contents, reader: ExpertReader, progress: Progress) -> None:
    n_experts = contents.geometry.n_experts
    finished = _finished_layers(file, contents)
    missing = {i: n_experts for i in range(len(contents.layers)) if i not in finished}
    squares = np.zeros((len(contents.layers), 2))
    n_done = len(finished) * n_experts
    buffers = threading.local()
    gate_up = contents.geometry.n_units("gate_up") * contents.geometry.unit_bytes("gate_up", contents.format)

    def work(expert: int) -> Squares:
        if not hasattr(buffers, "memory"):
            buffers.memory = aligned(contents.expert_bytes)
        memory = buffers.memory
        found = reader.pack(expert, memory.ctypes.data + np.array([[0, gate_up]]))
        at = DATA_AT + expert * contents.expert_bytes
        _write_at(file, memoryview(memory), at)
        os.posix_fadvise(file, at, contents.expert_bytes, os.POSIX_FADV_DONTNEED)  # starts writing it to the disk now
        return found

    def done(expert: int, found: Squares) -> None:
        nonlocal n_done
        layer = expert // n_experts
        squares[layer] += found
        missing[layer] -= 1
        if not missing[layer]:
            os.fdatasync(file)
            record = RECORD.pack(MARK, *squares[layer])
            _write_at(file, memoryview(record), RECORDS_AT + layer * RECORD.size)
            os.fdatasync(file)
        n_done += 1
        progress("packing experts", n_done * contents.expert_bytes, contents.n_bytes)

    progress("packing experts", n_done * contents.expert_bytes, contents.n_bytes)
    experts = [layer * n_experts + expert for layer in missing for expert in range(n_experts)]
    reader.run(experts, work, done, drop=True)


def _finished_layers(file: int, contents: Contents) -> set[int]:
    """Layers that an earlier run has left; a file of other contents is begun anew."""
    header, size = contents.header(), DATA_AT + contents.n_bytes
    if os.fstat(file).st_size == size and os.pread(file, len(header), 0) == header:
        table = os.pread(file, RECORD.size * len(contents.layers), RECORDS_AT)
        return {i for i, (mark, _, _) in enumerate(RECORD.iter_unpack(table)) if mark == MARK}
    os.ftruncate(file, 0)
    os.ftruncate(file, size)
    _write_at(file, memoryview(header), 0)
    os.fsync(file)
    return set()


def _write_at(file: int, data: memoryview, at: int) -> None:
    while data:
        n_written = os.pwrite(file, data, at)
        data, at = data[n_written:], at + n_written


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
