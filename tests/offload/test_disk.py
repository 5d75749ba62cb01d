"""Reading ranges of a file into memory: the right bytes, in the right order, and one line for what fails."""

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from offload import disk
from offload.disk import BLOCK, PIECE, DiskReader, blocks
from offload.pool import PoolError

SIZE = 5 * PIECE + 1234


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, bytes]:
    data = np.random.default_rng(3).bytes(SIZE)
    path = tmp_path / "experts"
    path.write_bytes(data)
    return path, data


@pytest.fixture(params=["direct", "buffered"])
def reader(request: pytest.FixtureRequest, file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "buffered":
        real = os.open

        def refuse(path: Any, flags: int, *more: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no direct reads here")
            return real(path, flags, *more)

        monkeypatch.setattr(disk.os, "open", refuse)
    made = DiskReader(file[0])
    assert made.direct == (request.param == "direct")
    yield made
    made.close()


def memory(n_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, n_bytes))


def test_ranges_arrive_whole(reader: DiskReader, file: tuple[Path, bytes]) -> None:
    rng = np.random.default_rng(1)
    asked = []
    ranges = [(0, SIZE), (SIZE - 1, 1), *((int(a), int(n)) for a, n in rng.integers(1, SIZE // 2, (30, 2)))]
    for at, n_bytes in ranges:
        start, size = blocks(at, n_bytes)
        assert start <= at and start + size >= at + n_bytes and size < n_bytes + 2 * BLOCK
        into = memory(size)
        asked.append((at, n_bytes, start, into, reader.read(start, into, at + n_bytes - start, bool(n_bytes % 2))))
    reader.wait(entry[-1] for entry in asked)
    for at, n_bytes, start, into, _ in asked:
        assert into[at - start : at - start + n_bytes] == file[1][at : at + n_bytes]
    assert reader.bytes_read >= sum(n for _, n in ranges)


class Gate:
    """Stands before pread: counts who is inside, notes what is asked for, lets nobody through until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real, self._open = os.preadv, threading.Event()
        self.offsets: list[int] = []
        monkeypatch.setattr(disk.os, "preadv", self._read)

    def _read(self, file: int, into: list[memoryview], at: int) -> int:
        self.offsets.append(at)
        self._open.wait()
        return self._real(file, into, at)

    def open(self) -> None:
        self._open.set()

    def settled(self, n: int) -> list[int]:
        """What was asked for once `n` are inside, and no more come."""
        deadline = time.monotonic() + 20
        while len(self.offsets) < n and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        return sorted(self.offsets)


def ask(reader: DiskReader, piece: int, n_pieces: int, urgent: bool) -> disk.Read:
    return reader.read(piece * PIECE, memory(n_pieces * PIECE), n_pieces * PIECE, urgent)


def test_few_pieces_ahead_of_use_are_under_way(file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = DiskReader(file[0])
    gate = Gate(monkeypatch)
    ahead = ask(reader, 0, 4, urgent=False)
    assert gate.settled(disk.AHEAD_THREADS) == [0, PIECE]
    urgent = ask(reader, 4, 1, urgent=True)
    assert gate.settled(3) == [0, PIECE, 4 * PIECE]  # at once, beside them
    reader.hurry(ahead)
    assert gate.settled(5) == [i * PIECE for i in range(5)]
    gate.open()
    reader.wait([ahead, urgent])
    reader.close()


def test_urgent_pieces_come_first(file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "THREADS", 1)
    reader = DiskReader(file[0])
    gate = Gate(monkeypatch)
    first = ask(reader, 4, 1, urgent=True)
    gate.settled(1)
    reads = [first, ask(reader, 0, 2, urgent=False), ask(reader, 2, 2, urgent=True)]
    gate.open()
    reader.wait(reads)
    assert gate.offsets == [i * PIECE for i in (4, 2, 3, 0, 1)]
    reader.close()


def test_a_cancelled_read_begins_no_more_pieces(file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = DiskReader(file[0])
    gate = Gate(monkeypatch)
    read = ask(reader, 0, 5, urgent=False)
    gate.settled(2)
    assert not reader.cancel(read) and not read.done  # two pieces still write into its memory
    gate.open()
    reader.settle(read)
    assert read.done and gate.settled(2) == [0, PIECE]
    whole = ask(reader, 0, 1, urgent=True)
    reader.wait([whole])
    assert reader.cancel(whole)  # it had come
    reader.close()


def test_a_file_that_shrank_is_an_error(reader: DiskReader, file: tuple[Path, bytes]) -> None:
    os.truncate(file[0], 2 * PIECE)
    with pytest.raises(PoolError, match=r"experts: experts cannot be read \(it ends at byte 2097152\); check the disk"):
        reader.wait([ask(reader, 1, 3, urgent=True)])
    reader.wait([ask(reader, 0, 2, urgent=True)])  # and the reader goes on


def test_an_error_of_the_disk_is_told(reader: DiskReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk.os, "preadv", fail)
    with pytest.raises(PoolError, match=r"cannot be read \(Input/output error\)"):
        reader.wait([ask(reader, 0, 2, urgent=False)])


def test_a_disk_that_is_stuck_is_an_error(file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "STUCK_SECONDS", 0.2)
    reader = DiskReader(file[0])
    gate = Gate(monkeypatch)
    read = ask(reader, 0, 1, urgent=True)
    for _ in range(2):
        with pytest.raises(PoolError, match=r"cannot be read \(nothing came for 0\.2 s\)"):
            reader.wait([read])
    reader.close()  # and waits for nobody
    gate.open()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"none: experts cannot be read \(No such file or directory\)"):
        DiskReader(tmp_path / "none")


def test_closing_ends_the_threads(file: tuple[Path, bytes]) -> None:
    before = threading.active_count()
    reader = DiskReader(file[0])
    assert threading.active_count() == before + disk.THREADS
    reader.close()
    reader.close()
    assert threading.active_count() == before


def test_threads_that_cannot_start_are_one_line_and_leave_none(tmp_path: Path) -> None:
    file = tmp_path / "experts"
    file.write_bytes(bytes(BLOCK))
    start, started = threading.Thread.start, 0

    def third_fails(thread: threading.Thread) -> None:
        nonlocal started
        started += 1
        if started == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = threading.active_count()
    with patch.object(threading.Thread, "start", third_fails), pytest.raises(PoolError, match="only 2 of 8 threads"):
        DiskReader(file)
    assert threading.active_count() == before
