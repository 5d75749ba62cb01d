"""Worker threads that run one compiled job together, and sleep between jobs.

A job is the address of a C function (pool, argument, worker) -> status; what it does is the caller's business
(kernels.layer for the experts). Workers run without the interpreter lock; the thread that submits is free until it
waits. Used by experts.py, and by placement to measure rates.
"""

import os
import platform
import threading
from pathlib import Path

import numpy as np

from offload.kernels import sync

CPUS = Path("/sys/devices/system/cpu")
THREAD_GONE = -1  # status when a worker's thread ended with an exception


class PoolError(RuntimeError):
    """A job failed in a worker, or the pool cannot take one."""


def physical_cores(allowed: set[int], cpus: Path = CPUS) -> tuple[int, ...]:
    """The first allowed CPU of each physical core; every CPU counts as a core where the system does not say."""
    taken: set[int] = set()
    first = []
    for cpu in sorted(allowed):
        if cpu not in taken:
            first.append(cpu)
            taken |= _siblings(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list") | {cpu}
    return tuple(first)


def _siblings(path: Path) -> set[int]:
    """CPU numbers of a list such as `0,64` or `0-1`."""
    if not path.is_file():
        return set()
    ranges = [part.split("-") for part in path.read_text().strip().split(",") if part]
    return {cpu for bounds in ranges for cpu in range(int(bounds[0]), int(bounds[-1]) + 1)}


def allowed_cpus() -> set[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


class WorkerPool:
    """Persistent workers. One job at a time: submit, then wait."""

    def __init__(self, threads: int | None = None):
        """`threads` None: one for each physical core this process may use. Raises ValueError when below 1."""
        cores = physical_cores(allowed_cpus())
        self.n_workers = len(cores) if threads is None else threads
        if self.n_workers < 1:
            raise ValueError(f"threads: {threads} workers cannot run anything, give 1 or more, or leave it out")
        # Without a core of its own a worker may share one with another worker for whole scheduler ticks (8 ms
        # measured against 1 us). With more workers than cores the scheduler has to move them about: no pinning then.
        pins = cores if 1 < self.n_workers <= len(cores) else ()
        sync.warm()
        self._memory = np.zeros(sync.POOL_WORDS + sync.LINE // 8, np.int64)
        self._address = -(-self._memory.ctypes.data // sync.LINE) * sync.LINE
        self._control(sync.N_WORKERS, self.n_workers)
        self._control(sync.FUTEX, sync.FUTEX_NUMBERS.get(platform.machine(), 0) if os.name == "posix" else 0)
        self._busy = False
        self._closed = False
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(i, pins[i] if pins else None), name=f"expert-{i}", daemon=True)
            for i in range(self.n_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: int, argument: int) -> None:
        """Start the C function at address `function` on every worker. Returns at once."""
        if self._closed or self._error is not None:
            raise PoolError("the worker pool is closed" if self._closed else f"a worker ended with {self._error!r}")
        if self._busy:
            raise PoolError("a job is running: wait for it before the next submit")
        self._busy = True
        sync.dispatch(self._address, function, argument)

    def wait(self) -> None:
        """Block, without the interpreter lock, until the job is done. Raises PoolError when a worker failed."""
        if not self._busy:
            raise PoolError("no job is running: submit one first")
        status = sync.join(self._address)
        self._busy = False
        if self._error is not None:
            raise PoolError(f"a worker ended with {self._error!r}") from self._error
        if status != 0:
            raise PoolError(f"a worker failed with status {status}")

    def close(self) -> None:
        """End the threads. A running job is finished first; a second call does nothing."""
        if self._closed:
            return
        if self._busy:
            sync.join(self._address)
        self._closed = True
        sync.dispatch(self._address, 0, 0)
        for thread in self._threads:
            thread.join()

    def _run(self, worker: int, cpu: int | None) -> None:
        try:
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
            sync.serve(self._address, worker)
        except BaseException as error:  # noqa: BLE001 whatever ended the thread, the submitter must hear of it
            # wait() raises it; nobody may hang on a worker that is gone.
            self._error = error
            sync.release(self._address, THREAD_GONE)

    def _control(self, offset: int, value: int) -> None:
        self._memory[(self._address - self._memory.ctypes.data + offset) // 8] = value
