"""Worker threads that run one compiled job together, and sleep between jobs.

A job is the address of a C function (pool, argument, worker) -> status; what it does is the caller's business
(kernels.layer for the experts). Workers run without the interpreter lock; the thread that submits is free until it
waits. Used by experts.py, and by benches to measure rates.

A worker that is stuck (a dead disk under a mapping, a fault in a job) is an error and not a hang: whoever waits looks
now and then whether any task was taken or got on (sync.tick), and gives the job up when nothing did for
`stuck_seconds`. A job that is only slow does not trip it. The pool is broken from then on, and the stuck thread keeps
what its job reads alive.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Sequence

import numpy as np

from offload.config import MAX_NODES
from offload.kernels import sync
from offload.topology import Place

THREAD_GONE, GIVEN_UP = -1, -2  # statuses: a worker's thread ended with an exception, or nothing moved any more
STUCK_SECONDS = 30.0
LONGEST_SLEEP = 1.0  # seconds without a look, and so until ctrl-C is noticed


class PoolError(RuntimeError):
    """A job failed in a worker, or the pool cannot take one."""


class WorkerPool:
    """Persistent workers. One job at a time: submit, then wait."""

    def __init__(self, places: Sequence[Place], stuck_seconds: float = STUCK_SECONDS):
        """One worker for each place (topology.py)."""
        assert places, "a pool needs a worker"
        assert all(0 <= place.node < MAX_NODES for place in places), places
        self._places = tuple(places)
        self._stuck_seconds = stuck_seconds
        self._sleep = min(LONGEST_SLEEP, stuck_seconds / 4)
        sync.warm()
        n_bytes = sync.WORKERS + self.n_workers * sync.LINE
        memory = np.zeros(n_bytes + sync.LINE, np.uint8)
        start = -memory.ctypes.data % sync.LINE
        self._lines = memory[start : start + n_bytes].view(np.int64).reshape(-1, sync.LINE // 8)
        self._address = self._lines.ctypes.data
        self._write(sync.N_WORKERS, self.n_workers)
        self._write(sync.SPINS, sync.IDLE_SPINS)
        self._write(sync.FUTEX, sync.FUTEX_NUMBERS.get(platform.machine(), 0) if os.name == "posix" else 0)
        self._write(sync.PATIENCE, int(self._sleep), int(self._sleep % 1 * 1e9))
        self._busy = False
        self._closed = False
        self._broken = ""  # why the pool takes no more jobs
        self._cause: BaseException | None = None
        self._stuck: tuple[int, ...] = ()
        self._alive: object = None  # what the running job reads
        self._threads = [
            threading.Thread(target=self._run, args=(i, place.cpu), name=f"expert-{i}", daemon=True)
            for i, place in enumerate(places)
        ]
        for i, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:
                self._threads = self._threads[:i]
                self.close()
                raise PoolError(
                    f"only {i} of {len(places)} workers could be started ({error}): give fewer threads"
                ) from error

    @property
    def n_workers(self) -> int:
        return len(self._places)

    @property
    def address(self) -> int:
        """Where the words lie that the workers share (kernels.sync)."""
        return self._address

    def spin_between_jobs(self) -> None:
        """Let workers look for the next job for some 0.5 ms before they sleep, if that leaves processors to others."""
        if len(os.sched_getaffinity(0)) > self.n_workers + 1:
            self._write(sync.SPINS, sync.PATIENT_SPINS)

    @property
    def broken(self) -> bool:
        """True when workers may still be in a job that was given up: what it reads must not be unmapped."""
        return self._broken != ""

    @property
    def busy(self) -> bool:
        """True from submit until wait has seen the job's end."""
        return self._busy

    def submit(self, function: int, argument: int, alive: object = None) -> None:
        """Start the C function at address `function` on every worker. Returns at once.

        `alive` is kept until no worker can read it any more, whatever becomes of the job.
        """
        self.reserve(alive)
        sync.dispatch(self._address, function, argument)

    def reserve(self, alive: object = None, after: bool = False) -> None:
        """Take the pool for a job that somebody else publishes (kernels.handoff): `wait` comes after that, or `cancel`
        where it will not be published. `after` says that they join the job that still runs before.
        """
        if self._closed:
            raise PoolError("the worker pool is closed")
        if self._broken:
            raise PoolError(f"the worker pool is broken: {self._broken}") from self._cause
        if self._busy and not after:
            raise PoolError("a job is running: wait for it before the next submit")
        self._alive = (self._alive, alive) if self._busy else alive
        self._busy = True

    def cancel(self) -> None:
        """The reserved job will not be published."""
        self._busy, self._alive = False, None

    def wait(self) -> None:
        """Block, without the interpreter lock, until the job is done. Raises PoolError when a worker failed."""
        if not self._busy:
            raise PoolError("no job is running: submit one first")
        self._join()
        self._busy = False
        if self._broken:
            raise PoolError(self._broken) from self._cause
        self._alive = None
        status = self._read(sync.STATUS)
        if status != 0:
            raise PoolError(f"a worker failed with status {status}")

    def close(self) -> None:
        """End the threads, all but stuck ones. A running job is finished first; a second call does nothing."""
        if self._closed:
            return
        if self._busy:
            with contextlib.suppress(PoolError):
                self.wait()
        self._closed = True
        sync.dismiss(self._address)
        for worker, thread in enumerate(self._threads):
            if worker not in self._stuck:
                thread.join()

    def _join(self) -> None:
        """Sleep until the job is done, and look after each sleep whether anybody moved."""
        looked, moved, idle = time.monotonic(), -1, 0.0
        while not sync.join(self._address):
            now, before = time.monotonic(), moved
            moved = self._progress()
            # A process that was stopped for an hour finds that the clock has leapt: a sleep counts as one at most.
            idle = idle + min(now - looked, self._sleep) if moved == before else 0.0
            looked = now
            if idle >= self._stuck_seconds:
                self._give_up()
                return

    def _progress(self) -> int:
        """Grows whenever a worker takes a task, gets on with one, comes to a barrier or ends the job."""
        shared = self._lines[sync.DONE // sync.LINE : sync.WORKERS // sync.LINE, 0]
        return int(shared.sum() + self._lines[sync.WORKERS // sync.LINE :, sync.TICKS // 8].sum())

    def _unfinished(self) -> tuple[int, ...]:
        """Workers that are still in the job."""
        finished = self._lines[sync.WORKERS // sync.LINE :, 0]
        return tuple(np.flatnonzero(finished != self._read(sync.GENERATION)).tolist())

    def _give_up(self) -> None:
        """Let everybody leave who can, name who cannot, and take no more jobs."""
        self._broken = f"the expert workers did nothing for {self._stuck_seconds:g} s"
        sync.release(self._address, GIVEN_UP)
        deadline = time.monotonic() + self._sleep
        while self._unfinished() and time.monotonic() < deadline:
            time.sleep(0.001)
        self._stuck = self._unfinished()
        places = [(worker, self._places[worker].cpu) for worker in self._stuck]
        names = ", ".join(f"{i}" if cpu is None else f"{i} (CPU {cpu})" for i, cpu in places)
        self._broken += f": worker {names} has not finished" if names else ", waiting for each other"

    def _run(self, worker: int, cpu: int | None) -> None:
        try:
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
            sync.serve(self._address, worker)
        except BaseException as error:  # noqa: BLE001 whatever ended the thread, the submitter must hear of it
            # wait() raises it; nobody may hang on a worker that is gone.
            self._cause, self._broken = error, f"a worker ended with {error!r}"
            sync.release(self._address, THREAD_GONE)

    def _read(self, offset: int) -> int:
        return int(self._lines[offset // sync.LINE, offset % sync.LINE // 8])

    def _write(self, offset: int, *values: int) -> None:
        first = offset % sync.LINE // 8
        self._lines[offset // sync.LINE, first : first + len(values)] = values
