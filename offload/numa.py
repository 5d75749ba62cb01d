"""Memory of one NUMA node, in huge pages. Knows nothing of experts; offload/store.py calls it."""

import ctypes
import errno
import mmap
import os
import platform

import numpy as np

HUGE_PAGE = 1 << 21
MBIND = {"x86_64": 237, "AMD64": 237, "aarch64": 235}  # the system call's number: libc has no function for it
PREFERRED = 1  # MPOL_PREFERRED: a full node spills over to its neighbours, where MPOL_BIND would kill the process
WORD = 64  # bits of a node mask's words

_libc = ctypes.CDLL(None, use_errno=True)


def huge_memory(size: int) -> memoryview:
    """Anonymous memory that starts on a huge page and asks for huge pages. The view keeps the mapping alive."""
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared: no huge pages
    mapped.madvise(mmap.MADV_HUGEPAGE)
    start = -address_of(memoryview(mapped)) % HUGE_PAGE
    return memoryview(mapped)[start : start + size]


def address_of(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data) if len(memory) else 0


def prefer_node(memory: memoryview, node: int) -> str | None:
    """Ask that pages of `memory`, none of them touched yet, come from `node`. Returns why not, where that fails."""
    number = MBIND.get(platform.machine())
    if number is None:
        return f"no mbind known for {platform.machine()}"
    words = (ctypes.c_ulong * (node // WORD + 1))()
    words[node // WORD] = 1 << node % WORD
    arguments = (address_of(memory), len(memory), PREFERRED, ctypes.addressof(words), len(words) * WORD + 1, 0)
    if len(memory) and _libc.syscall(number, *[ctypes.c_long(argument) for argument in arguments]):
        code = ctypes.get_errno()
        return f"{errno.errorcode.get(code, code)} ({os.strerror(code)})"
    return None
