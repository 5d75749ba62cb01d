"""How fast this machine reads its memory: the ceiling that expert kernels are measured against.

Plain vector loads, one pinned thread on each core, in the ways that may be fastest: several stretches at once keep more
lines in flight than one, and asking for lines ahead sometimes helps. Each thread reads memory of its own node where the
nodes are named. Knows nothing about experts. Called by `placement.measure` and the benches.
"""

import functools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.numa import huge_memory, prefer_node

READ_BYTES = 1 << 30
MOST_EACH = 1 << 29  # bytes that one thread reads in a pass: far more than the cache that it can fill
READS = 3
ALIGN = 1 << 16
STREAMS, AHEAD = (1, 2, 4, 8), (0, 4096)  # stretches that one thread reads at once, bytes it asks for before
WAYS = tuple((streams, ahead) for streams in STREAMS for ahead in AHEAD)
LINE, TURN_LINES = 64, 4  # bytes of a cache line; lines of one stretch before the next one's turn


class ReadCeiling:
    """Reads large arrays, one for each memory node, with one pinned thread on each of `cpus`."""

    def __init__(self, cpus: Sequence[int], n_bytes: int = READ_BYTES, nodes: Sequence[int] = ()) -> None:
        """`nodes`: the memory node that each CPU reads from; without them memory lies where the system puts it.

        `notices` says for which nodes the system would not promise that.
        """
        of_cpus = tuple(nodes) or (0,) * len(cpus)
        distinct = sorted(set(of_cpus))
        self.notices: list[str] = []
        arenas = {node: self._arena(n_bytes // len(distinct), node if nodes else None) for node in distinct}
        self._memory = [arenas[node] for node in of_cpus]  # of each thread
        self._pools = [ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {cpu})) for cpu in cpus]
        _read(arenas[distinct[0]].ctypes.data, TURN_LINES * LINE, 1, 0)  # compiles

    def measure(self) -> float:
        """Bytes per second of all threads: the best pass of the best way."""
        return max(self._pass(len(self._pools), *way) for way in WAYS for _ in range(READS))

    def rates(self, threads: int, passes: int) -> list[float]:
        """Bytes per second of the first `threads` CPUs, in so many passes of the way that is best for them."""
        best = max(WAYS, key=lambda way: self._pass(threads, *way))
        return [self._pass(threads, *best) for _ in range(passes)]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()

    def _arena(self, n_bytes: int, node: int | None) -> npt.NDArray[np.uint8]:
        memory = huge_memory(n_bytes)
        if node is not None and (why := prefer_node(memory, node)):
            self.notices.append(f"memory node {node}: {why}; reads may cross to another node")
        arena = np.frombuffer(memory, np.uint8)
        arena[::4096] = 1  # so that every page is real memory
        return arena

    def _pass(self, threads: int, streams: int, ahead: int) -> float:
        memory = self._memory[:threads]
        addresses = [arena.ctypes.data for arena in memory]
        parts = [
            min(arena.nbytes // addresses.count(at), MOST_EACH) for arena, at in zip(memory, addresses, strict=True)
        ]
        part = min(parts) // ALIGN * ALIGN  # the same for each thread: a pass ends when the last one does
        begins = [at + addresses[:i].count(at) * part for i, at in enumerate(addresses)]
        began = time.perf_counter()
        tasks = [
            pool.submit(_read, begin, part // streams, streams, ahead)
            for pool, begin in zip(self._pools[:threads], begins, strict=True)
        ]
        for task in tasks:
            task.result()
        return threads * part / (time.perf_counter() - began)


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


@njit(nogil=True, cache=True)
def _read(begin, stretch, streams, ahead):  # type: ignore[no-untyped-def]
    return _read_stretches(begin, stretch, streams, ahead)
