"""Ask the system to read mapped experts from the disk before a layer needs them.

Works on address ranges only. Called by experts.py for hinted experts of a mapped store. Where every page is in
memory already it costs one system call for each range and changes nothing.
"""

import ctypes
import mmap
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def page_start(address: int) -> int:
    return address - address % mmap.PAGESIZE


def in_memory(address: int) -> bool:
    """Whether the page at `address` is in the page cache. Linux says yes to all for files of another owner."""
    answer = ctypes.create_string_buffer(1)
    return _libc.mincore(page_start(address), mmap.PAGESIZE, answer) == 0 and bool(answer.raw[0] & 1)


def read_ahead(ranges: Iterable[tuple[int, int]]) -> int:
    """Start reading the ranges (address, bytes) whose middle page is not in memory; returns their bytes.

    One page stands for a range: experts are read and dropped as a whole, and asking about each of an expert's 6,000
    pages would cost more than it saves.
    """
    started = 0
    for address, n_bytes in ranges:
        if not in_memory(address + n_bytes // 2):
            first = page_start(address)
            _libc.madvise(first, address + n_bytes - first, mmap.MADV_WILLNEED)
            started += n_bytes
    return started
