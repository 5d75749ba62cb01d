"""Experts on their way from the shards into packed units: read in file order, converted where asked, packed.

Rows are read into a small buffer of each thread and packed from there, while they are in its cache: a mapping of the
file would cost more, in page faults, than the copy. The disk is asked for the next experts meanwhile. Knows where
tensors lie and not where units go; offload/store.py (memory) and offload/packed.py (a file) say that.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from offload.checkpoint import NUMPY_TYPES, CheckpointError, TensorInfo
from offload.config import FP8_BLOCK, MATRICES, UNIT_ROWS, ExpertFormat, ExpertGeometry, Matrix
from offload.formats import Array
from offload.kernels.pack import MEMBERS, aligned, pack_units
from offload.pipeline import ask_disk, pipeline
from offload.requantise import NotFiniteError, Squares, convert, scale_rows
from offload.sources import Expert, MatrixSource, Source, check_weight_shape

# Weights of a matrix that a thread takes at a time. Twice as many no longer fit a core's share of the cache, half as
# many cost a fifth of the rate, because threads then wait for the interpreter lock (Zen 3, 2026-11-22).
CHUNK = 1 << 21
CONVERTED = 1 << 20  # likewise where the format changes, which takes some 20 MB of temporaries

Result = TypeVar("Result")


class _Buffers(threading.local):
    """Memory of one thread, by use; it grows and is used again, because fresh pages cost as much as a copy."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}

    def take(self, use: tuple[int, int], n_bytes: int) -> npt.NDArray[np.uint8]:
        if use not in self._held or self._held[use].nbytes < n_bytes:
            self._held[use] = aligned(n_bytes)
        return self._held[use][:n_bytes]


class ExpertReader:
    """All experts of a checkpoint by number (layers one after another), as packed units of one format.

    The methods may be called from several threads. Raises CheckpointError where a file cannot be read.
    """

    def __init__(
        self, experts: Sequence[Expert], geometry: ExpertGeometry, source: Source, target: ExpertFormat
    ) -> None:
        self.geometry, self.source, self.target = geometry, source, target
        self._experts = experts
        self._buffers = _Buffers()
        self._files: dict[Path, int] = {}
        try:
            for path in sorted({tensor.path for expert in range(len(experts)) for tensor in self._tensors(expert)}):
                self._files[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def __len__(self) -> int:
        return len(self._experts)

    def n_bytes(self, expert: int) -> int:
        """Published bytes."""
        return sum(tensor.n_bytes for tensor in self._tensors(expert))

    def run(
        self, experts: Iterable[int], work: Callable[[int], Result], done: Callable[[int, Result], None], drop: bool
    ) -> None:
        """`done(expert, work(expert))` for `experts` in file order: the work on all cores, `done` here.

        With `drop`, what has been read leaves the system's cache.
        """

        def finish(expert: int, result: Result) -> None:
            done(expert, result)
            for tensor in self._tensors(expert) if drop else ():
                os.posix_fadvise(self._files[tensor.path], tensor.offset, tensor.n_bytes, os.POSIX_FADV_DONTNEED)

        def ask(expert: int) -> None:
            for tensor in self._tensors(expert):
                ask_disk(self._files[tensor.path], tensor.offset, tensor.n_bytes)

        order = sorted(experts, key=lambda expert: min((t.path, t.offset) for t in self._tensors(expert)))
        pipeline(order, ask, work, finish, self.n_bytes(0))

    def pack(self, expert: int, places: npt.NDArray[np.int64]) -> Squares:
        """Pack one expert to the addresses of (nodes, 2); the squares are zero where nothing is converted."""
        squares = np.zeros(2)
        for node, row in enumerate(places.tolist()):
            for matrix, address in zip(MATRICES, row, strict=True):
                squares += self._pack_units(expert, matrix, self.geometry.units_of(matrix, node, len(places)), address)
        return squares

    def _pack_units(self, expert: int, matrix: Matrix, units: range, out: int) -> Squares:
        n_rows, n_in = self.geometry.shape(MEMBERS[matrix][0])
        each = UNIT_ROWS[matrix]
        chunk = CHUNK if self.source == self.target else CONVERTED
        step = max(1, chunk // (n_in * each))
        squares = np.zeros(2)
        for projection in MEMBERS[matrix] if units.start == 0 else ():
            if (written := self._experts[expert][projection].shape) is not None:
                check_weight_shape(written, (n_rows, n_in), self._read(written, 0, 2, (0, 0)).tolist())
        for first in range(units.start, units.stop, step):
            part = range(first, min(first + step, units.stop))
            rows = range(part.start * each, min(part.stop * each, n_rows))
            sources = []
            kept = []  # what the addresses point to
            for use, projection in enumerate(MEMBERS[matrix]):
                found = self._rows(self._experts[expert][projection], rows, use)
                data, scales, begin, more = found
                kept.append(found)
                squares += more
                sources.append((_base(data, begin), 0 if scales is None else _base(scales, begin // self._per_scale)))
            pack_units(self.target, self.geometry, matrix, sources, part, out)
            out += len(part) * self.geometry.unit_bytes(matrix, self.target)
        return squares

    @property
    def _per_scale(self) -> int:
        return FP8_BLOCK if self.target == "fp8" else 1

    def _rows(self, matrix: MatrixSource, rows: range, use: int) -> tuple[Array, Array | None, int, Squares]:
        """Rows in the target format: data, scales, the number of the data's first row, squares."""
        shared = scale_rows(self.source)
        begin = rows.start // shared * shared
        data = self._read(matrix.data, begin, rows.stop, (use, 0))
        scales = None
        if matrix.scales is not None:
            scales = self._read(matrix.scales, begin // shared, -(-rows.stop // shared), (use, 1))
        if self.source == self.target:
            return data, scales, begin, np.zeros(2)
        try:
            values, steps, squares = convert(data, scales, rows.start - begin, self.source, self.target)
        except NotFiniteError:
            raise CheckpointError(
                f"{matrix.data.path}: tensor {matrix.data.name} holds NaN or infinity in rows {rows.start} to "
                f"{rows.stop - 1}; the file is damaged, download it again"
            ) from None
        return values, steps, rows.start, squares

    def _read(self, tensor: TensorInfo, begin: int, end: int, use: tuple[int, int]) -> Array:
        """Rows [begin, end) of a tensor, in a buffer that the thread's next read for the same use overwrites."""
        kind = np.dtype(NUMPY_TYPES[tensor.dtype])
        row = kind.itemsize * math.prod(tensor.shape[1:])
        buffer = self._buffers.take(use, row * (end - begin))
        view, at = buffer.data, tensor.offset + row * begin
        while view:
            try:
                n_read = os.preadv(self._files[tensor.path], [view], at)
            except OSError as error:
                raise CheckpointError(f"{tensor.path}: cannot be read ({error.strerror}); check the disk") from error
            if n_read == 0:
                raise CheckpointError(f"{tensor.path}: ends within tensor {tensor.name}; download it again")
            view, at = view[n_read:], at + n_read
        return buffer.view(kind).reshape(end - begin, *tensor.shape[1:])

    def _tensors(self, expert: int) -> Iterator[TensorInfo]:
        for matrix in self._experts[expert].values():
            yield from matrix.tensors


def _base(rows: Array, first: int) -> int:
    """The address that row 0 would have if `rows` began at row `first`."""
    return int(rows.ctypes.data) - first * rows.strides[0]
