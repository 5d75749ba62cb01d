"""When idle workers read ahead into the processor's cache: between a layer's end and the next one's tokens.

    expect(index, scores)   the router's look-ahead names experts of a layer to come
    start(pool)             the layer before has ended: read them
    stop(pool)              tokens have come: the workers leave within half a microsecond's reading each

Reads what the shared cache holds and not more: with experts of 25 MB that is not even two. Off unless asked for;
`tests.bench.warm` says where it pays. Knows no tokens. Used by experts.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import cfunc

from offload.job import LayerJob
from offload.kernels.intrinsics import NOPYTHON
from offload.kernels.table import JOB_FUNCTION
from offload.kernels.warm import PIECE, WARM, run_warm
from offload.pool import WorkerPool
from offload.prefetch import in_order, tally
from offload.topology import read_text

SHARE = 0.5  # of the shared cache: activations and what others keep there stay
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
EVENT: Any = torch.cuda.Event  # not typed
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(slots=True)
class WarmStats:
    """Counters since the start; they only grow."""

    started: int = 0  # times that idle workers began to read
    bytes_read: int = 0


class Warmer:
    """One layer's likely experts, and the job that reads them."""

    def __init__(self, job: LayerJob, cache_bytes: int) -> None:
        """`cache_bytes` is what each node's cores share."""
        self._code = cfunc(JOB_FUNCTION, cache=True, **NOPYTHON)(run_warm)
        self._job = job
        self._record = np.zeros((), WARM)
        self._record["job"] = job.address
        self._record["n_pieces"] = int(cache_bytes * SHARE) // PIECE
        self._points: torch.Tensor | None = None  # (E,) of the layer to come, on the host once `_arrived`
        self._arrived: Any = None  # an EVENT
        self._elsewhere: npt.NDArray[np.bool_] | None = None
        self._stats = WarmStats()
        self.running = False

    @property
    def stop_word(self) -> int:
        """Address of what ends the job when it is not 0."""
        return self._record.ctypes.data

    def expect(self, index: int, scores: torch.Tensor, k: int, elsewhere: npt.NDArray[np.bool_] | None = None) -> None:
        """The layer's next run will probably choose each token's best k by scores (T, E); `elsewhere` (E,) are run by
        others."""
        points = tally(scores, k)
        if points.device.type == "cuda":  # nobody waits for it: what has not come when the layer ends is not warmed
            self._points = torch.empty(points.shape, pin_memory=True).copy_(points, non_blocking=True)
            self._arrived = EVENT()
            self._arrived.record()
        else:
            self._points, self._arrived = points, None
        self._elsewhere = elsewhere
        self._record["addresses"] = self._job.layer_addresses[index]

    def start(self, pool: WorkerPool) -> None:
        """Read what is expected, once. The pool must be idle."""
        points, self._points = self._points, None
        if points is None or not (self._arrived is None or self._arrived.query()):
            return
        experts = in_order(points)
        if self._elsewhere is not None:
            experts = experts[~self._elsewhere[experts]]
        experts = np.ascontiguousarray(experts)
        self._record["stop"] = 0
        self._record["experts"], self._record["n_experts"] = experts.ctypes.data, len(experts)
        pool.submit(self._code.address, self.stop_word, (experts, self._record))
        self.running = True
        self._stats.started += 1

    def stop(self, pool: WorkerPool) -> None:
        """End the reading, if it goes on. Raises PoolError when a worker failed."""
        if self.running:
            self._record["stop"] = 1
            self.running = False
            pool.wait()

    def stats(self) -> WarmStats:
        """The counters as they are now."""
        return WarmStats(self._stats.started, int(self._record["lines"]) * 64)


def shared_cache() -> int:
    """Bytes of the last cache that the cores of a socket share; 0 where Linux does not say."""
    sizes = [read_text(folder / "size").strip() for folder in sorted(CACHES.glob("index*"))]
    known = [int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in UNITS]
    return max(known, default=0)
