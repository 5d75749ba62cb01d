import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from offload.prefetch import in_memory, read_ahead

SIZE = 8 << 20


def dropped(path: Path) -> tuple[mmap.mmap, int]:
    """A mapped file none of whose pages are in the page cache, and its address."""
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = mmap.mmap(descriptor, SIZE)
    os.close(descriptor)
    return mapped, np.frombuffer(mapped, np.uint8).ctypes.data


def test_what_is_not_in_memory_is_read(tmp_path: Path) -> None:
    mapped, address = dropped(tmp_path / "experts")
    if in_memory(address + SIZE // 2):
        pytest.skip("this file system keeps its pages in memory")
    first, second = (address + 100, 1 << 20), (address + (4 << 20), 1 << 20)
    assert read_ahead([first]) == 1 << 20
    deadline = time.monotonic() + 30
    while not in_memory(first[0] + (1 << 19)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_memory(first[0] + (1 << 19))
    assert read_ahead([first]) == 0
    assert read_ahead([second]) in (0, 1 << 20)  # the system may have read on by itself
    assert len(mapped) == SIZE


def test_private_memory_is_left_alone() -> None:
    array = np.ones(1 << 20, np.uint8)
    assert in_memory(array.ctypes.data)
    assert read_ahead([(array.ctypes.data + 5, array.nbytes - 5)]) == 0
