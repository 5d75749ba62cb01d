"""Reads ranges of one file from the disk into given memory, urgent ones first: what pages experts in.

Threads read pieces with `pread`, past the system's page cache where the file system allows it (O_DIRECT): nothing is
kept twice, no kernel meets a page fault, and a file that shrinks is an error and not SIGBUS. Several urgent pieces are
under way at once, because a disk is fast only when it is asked for much; few pieces that are read ahead are, so that an
urgent one seldom waits for them. Knows files and addresses, no experts. Called by offload/paging.py.
"""

import collections
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from offload.pool import STUCK_SECONDS, PoolError

LOOK_SECONDS = 1.0  # between two looks at a disk that is waited for
BLOCK = 4096  # offsets, lengths and addresses of direct reads are multiples of it
PIECE = 1 << 20  # bytes of one pread
THREADS = 8  # pieces under way
AHEAD_THREADS = 2  # of these, pieces that nobody waits for yet


def blocks(at: int, n_bytes: int) -> tuple[int, int]:
    """(offset, bytes) of the whole blocks around a range."""
    start = at - at % BLOCK
    return start, -(-(at + n_bytes) // BLOCK) * BLOCK - start


class Read:
    """One range on its way into memory. Only its reader changes it."""

    __slots__ = ("_at", "_into", "_next", "_under_way", "_wanted", "cancelled", "error", "urgent")

    def __init__(self, at: int, into: memoryview, wanted: int, urgent: bool) -> None:
        self._at, self._into = at, into
        self._wanted = wanted  # bytes that must come; the rest may lie beyond the file's end
        self._next = 0  # first byte that nobody reads yet
        self._under_way = 0  # pieces
        self.urgent = urgent
        self.cancelled = False
        self.error: str | None = None

    @property
    def done(self) -> bool:
        """Nobody writes into the memory any more: all is there, or there is an error, or it was cancelled."""
        # In this order: once settled it stays so, while a piece may begin between two looks, as there is no lock here.
        return self._settled and self._under_way == 0

    @property
    def begun(self) -> bool:
        return self._next > 0

    @property
    def _settled(self) -> bool:
        """No further piece will be begun."""
        return self._next >= self._wanted or self.cancelled or self.error is not None


class DiskReader:
    """The file and its threads. Used by one thread."""

    def __init__(self, path: Path) -> None:
        """Raises PoolError where the file cannot be opened or the threads cannot start."""
        self._path = path
        try:
            self._file, self.direct = _open(path)
        except OSError as error:
            raise PoolError(self._message(error.strerror)) from error
        self.bytes_read = 0  # pieces that came
        self._closed = False
        self._stuck = False  # a thread may never come back, and may still write where it was told to
        self._ahead_under_way = 0
        self._queues: dict[bool, collections.deque[Read]] = {True: collections.deque(), False: collections.deque()}
        self._lock = threading.Lock()
        self._work, self._news = threading.Condition(self._lock), threading.Condition(self._lock)
        self._threads = [threading.Thread(target=self._run, name=f"disk-{i}", daemon=True) for i in range(THREADS)]
        for i, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:
                self._threads = self._threads[:i]
                self.close()
                raise PoolError(
                    f"only {i} of {THREADS} threads that read the disk could be started ({error})"
                ) from error

    def read(self, at: int, into: memoryview, wanted: int, urgent: bool) -> Read:
        """Begin to fill `into`, whole blocks, from offset `at` of the file; `wanted` bytes of it must be there."""
        assert at % BLOCK == 0 and len(into) % BLOCK == 0 and 0 < wanted <= len(into)
        read = Read(at, into, wanted, urgent)
        with self._lock:
            self._queues[urgent].append(read)
            self._work.notify(-(-wanted // PIECE))
        return read

    def hurry(self, read: Read) -> None:
        """Somebody waits for it now."""
        with self._lock:
            if not read.urgent and not read._settled:
                read.urgent = True
                self._queues[True].append(read)  # its place in the other queue is passed over
                self._work.notify(THREADS)

    def cancel(self, read: Read) -> bool:
        """Begin no more pieces of it; True where all of it had come. Wait for it before its memory is used again."""
        with self._lock:
            if read.done and read.error is None:
                return True
            read.cancelled = True
            return False

    def wait(self, reads: Iterable[Read]) -> None:
        """Until all are done. Raises PoolError, one line for the user, when one failed."""
        for read in reads:
            self.settle(read)
            if read.error is not None:
                raise PoolError(read.error)

    def settle(self, read: Read) -> None:
        """Until nobody writes into its memory any more. Raises PoolError where nothing comes for STUCK_SECONDS."""
        self.check()
        with self._lock:
            idle = 0.0
            while not read.done and not self._stuck:
                before, began = self.bytes_read, time.monotonic()
                self._news.wait(LOOK_SECONDS)
                # A process that was stopped, or a machine, has not waited for the disk meanwhile.
                waited = min(time.monotonic() - began, LOOK_SECONDS)
                idle = idle + waited if self.bytes_read == before else 0.0
                self._stuck = idle >= STUCK_SECONDS and not read.done
        self.check()

    def check(self) -> None:
        """Raises PoolError from the time that the disk was stuck: no memory that was being read into is safe."""
        if self._stuck:
            raise PoolError(self._message(f"nothing came for {STUCK_SECONDS:g} s"))

    def close(self) -> None:
        """End the threads, all but stuck ones; what they have begun is finished first. A second call does nothing."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            self._work.notify_all()
        if self._stuck:
            return
        for thread in self._threads:
            thread.join()
        os.close(self._file)

    def _run(self) -> None:
        while True:
            with self._lock:
                while (piece := self._next_piece()) is None and not self._closed:
                    self._work.wait()
                if piece is None:
                    return
                read, start, stop, ahead = piece
            error, n_bytes = self._fetch(read, start, stop)
            with self._lock:
                read.error = read.error or error  # before it can look done
                read._under_way -= 1
                self.bytes_read += n_bytes
                self._ahead_under_way -= ahead
                if read.done:
                    self._news.notify()
                if ahead:
                    self._work.notify()

    def _next_piece(self) -> tuple[Read, int, int, bool] | None:
        """The piece to read next, (its read, start, stop, whether ahead of use); None where there is none."""
        if self._closed:
            return None
        for urgent in (True, False):
            queue = self._queues[urgent]
            while queue and (queue[0]._settled or queue[0].urgent != urgent):
                queue.popleft()
            if queue and (urgent or self._ahead_under_way < AHEAD_THREADS):
                read = queue[0]
                start = read._next
                stop = min(start + PIECE, len(read._into))
                read._under_way += 1
                read._next = stop
                self._ahead_under_way += not urgent
                return read, start, stop, not urgent
        return None

    def _fetch(self, read: Read, start: int, stop: int) -> tuple[str | None, int]:
        """Why the piece could not be read, if so, and the bytes that came."""
        came, needed = start, min(stop, read._wanted)
        try:
            while came < needed:
                n_bytes = os.preadv(self._file, [read._into[came:stop]], read._at + came)
                came += n_bytes
                if came < needed and (end := os.fstat(self._file).st_size) < read._at + needed:
                    return self._message(f"it ends at byte {end}"), came - start
            if not self.direct:
                os.posix_fadvise(self._file, read._at + start, stop - start, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            return self._message(error.strerror), came - start
        return None, came - start

    def _message(self, why: str | None) -> str:
        return f"{self._path}: experts cannot be read ({why}); check the disk, or write the file anew"


def _open(path: Path) -> tuple[int, bool]:
    """The file, and whether it is read past the page cache: not every file system allows that."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    try:
        os.preadv(file, [mmap.mmap(-1, BLOCK)], 0)
    except OSError as error:
        os.close(file)
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    return file, hasattr(os, "O_DIRECT")
