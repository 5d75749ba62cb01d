"""What a bench must say about where it ran, and the ceiling it is measured against."""

import functools
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import psutil
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.numa import huge_memory
from offload.topology import find_topology

REPO = Path(__file__).resolve().parents[2]
READ_BYTES = 1 << 30
READS = 3
ALIGN = 1 << 16
STREAMS, AHEAD = (1, 2, 4, 8), (0, 4096)  # stretches that one thread reads at once, bytes it asks for before
LINE, TURN_LINES = 64, 4  # bytes of a cache line; lines of one stretch before the next one's turn


def describe() -> dict[str, Any]:
    """The machine, the commit and the command, for the JSON line."""
    return {
        "cpu": _cpu_name(),
        "cores": physical_cores(),
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],  # before the run: above 0 other work shares the cores
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "command": " ".join(["python", "-m", _main_module(), *sys.argv[1:]]),
    }


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    return len(pinned_cpus())


def pinned_cpus(threads: int | None = None) -> tuple[int, ...]:
    """The CPUs that so many expert workers are pinned to."""
    places = find_topology(threads).places
    cpus = [place.cpu for place in places if place.cpu is not None]
    return tuple(cpus or sorted(os.sched_getaffinity(0))[: len(places)])


def cache_bytes() -> int:
    """All last-level caches together; 0 where the system does not say."""
    found = {}
    for level in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        found[(level / "shared_cpu_list").read_text()] = (
            int((level / "size").read_text().strip().removesuffix("K")) << 10
        )
    return sum(found.values())


def read_bandwidth(n_bytes: int = READ_BYTES) -> float:
    """Bytes per second that all cores together read from memory: the best of some passes."""
    ceiling = ReadCeiling(pinned_cpus(), n_bytes)
    try:
        return max(ceiling.measure() for _ in range(2))
    finally:
        ceiling.close()


class ReadCeiling:
    """Reads a large array with one pinned thread on each of `cpus`, in the ways that may be fastest."""

    def __init__(self, cpus: tuple[int, ...], n_bytes: int = READ_BYTES) -> None:
        self._memory = np.frombuffer(huge_memory(n_bytes), np.uint8)
        self._memory[::4096] = 1  # so that every page is real memory
        self._part = n_bytes // len(cpus) // ALIGN * ALIGN
        self._pools = [ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {cpu})) for cpu in cpus]

    def measure(self) -> float:
        """Bytes per second of the best pass of the best way."""
        return max(self._pass(streams, ahead) for streams in STREAMS for ahead in AHEAD for _ in range(READS))

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()

    def _pass(self, streams: int, ahead: int) -> float:
        stretch, begin = self._part // streams, self._memory.ctypes.data
        began = time.perf_counter()
        tasks = [
            pool.submit(_read, begin + i * self._part, stretch, streams, ahead) for i, pool in enumerate(self._pools)
        ]
        for task in tasks:
            task.result()
        return len(self._pools) * self._part / (time.perf_counter() - began)


@intrinsic
def _read_stretches(typingctx, begin, stretch, streams, ahead):  # type: ignore[no-untyped-def]
    """Load `streams` stretches of so many bytes side by side, four lines of each in turn; the sum keeps the loads."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        begin, stretch, streams, ahead = args
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        line = ir.VectorType(i64, LINE // 8)
        kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read_into_l1 = [i32(0), i32(3), i32(1)]
        sums = [cgutils.alloca_once_value(builder, line(None)) for _ in range(TURN_LINES)]
        with cgutils.for_range_slice(builder, i64(0), stretch, i64(TURN_LINES * LINE), i64) as (offset, _):
            with cgutils.for_range(builder, streams, intp=i64) as stream:
                at = builder.add(builder.add(begin, offset), builder.mul(stream.index, stretch))
                places = [builder.add(at, i64(n * LINE)) for n in range(TURN_LINES)]
                with builder.if_then(builder.icmp_signed("!=", ahead, i64(0))):
                    for place in places:
                        pointer = builder.inttoptr(builder.add(place, ahead), i8.as_pointer())
                        builder.call(prefetch, [pointer, *to_read_into_l1])
                for place, total in zip(places, sums, strict=True):
                    value = builder.load(builder.inttoptr(place, line.as_pointer()), align=LINE)
                    builder.store(builder.add(builder.load(total), value), total)
        whole = functools.reduce(builder.add, [builder.load(total) for total in sums])
        return functools.reduce(builder.add, [builder.extract_element(whole, i32(n)) for n in range(LINE // 8)])

    return types.int64(*[types.int64] * 4), codegen


@numba.njit("int64(int64, int64, int64, int64)", nogil=True)  # type: ignore[untyped-decorator]
def _read(begin: int, stretch: int, streams: int, ahead: int) -> int:
    return _read_stretches(begin, stretch, streams, ahead)  # type: ignore[no-any-return]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _main_module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
