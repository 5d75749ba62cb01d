"""Hand a job to parked threads and meet again: a generation word, task counters, barriers, one done count.

Shared memory of `POOL_WORDS` int64, one cache line for each word that several threads write (a waitable line holds
its value and the number of sleepers). Waiting spins for some tens of microseconds and then sleeps in the kernel, so
an idle pool costs nothing and more workers than cores still make progress. Knows nothing about experts; pool.py owns
the memory and the threads.

Why nothing can hang on a reset: counters, barriers and the done count are set to zero only by `dispatch`, which runs
only after every worker has added itself to the done count, and that is the last word a worker touches before it
waits for the next generation.
"""

# mypy: disallow-untyped-defs=False

from numba import njit

from offload.kernels.intrinsics import (
    NOPYTHON,
    atomic_add,
    atomic_load,
    atomic_store,
    call_job,
    relax,
    sleep_microseconds,
    system_call,
)

LINE = 64  # bytes, one cache line
GENERATION = 0 * LINE  # waitable: job number, changes when a job is published
DONE = 1 * LINE  # waitable: workers that have finished the job
BARRIERS = 2 * LINE  # two waitable lines
N_BARRIERS = 2
COUNTERS = 4 * LINE  # three task counters
N_COUNTERS = 3
CONTROL = 7 * LINE  # written by the submitter, read by all
N_WORKERS, FUNCTION, ARGUMENT, FUTEX, STATUS, GONE = (CONTROL + 8 * i for i in range(6))
POOL_WORDS = 8 * LINE // 8

SLEEPERS = 8  # byte offset of the sleepers count within a waitable line
SPINS = 1000  # 20 us (Zen 3) to 50 us (Intel since Skylake) of `pause`
FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 128, 129, 2**31 - 1  # private to this process
FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98}  # the system call by architecture
NAP = 100  # microseconds between looks where there is no futex
ABORTED = 1 << 20  # more than any number of workers: added to a line, it releases everybody who waits there


@njit(**NOPYTHON)
def wait_change(pool, line, seen):
    """Block until the line's value differs from `seen`; returns the new value."""
    for _ in range(SPINS):
        if atomic_load(line) != seen:
            return atomic_load(line)
        relax()
    number = atomic_load(pool + FUTEX)
    atomic_add(line + SLEEPERS, 1)
    while atomic_load(line) == seen:
        # The kernel compares the low half again before it sleeps, so a change in between is not missed.
        if number > 0:
            system_call(number, line, FUTEX_WAIT, seen & 0xFFFFFFFF)
        else:
            sleep_microseconds(NAP)
    atomic_add(line + SLEEPERS, -1)
    return atomic_load(line)


@njit(**NOPYTHON)
def wake(pool, line):
    if atomic_load(line + SLEEPERS) > 0 and atomic_load(pool + FUTEX) > 0:
        system_call(atomic_load(pool + FUTEX), line, FUTEX_WAKE, EVERYBODY)


@njit(**NOPYTHON)
def arrive(pool, line):
    """Add one to a line; the last worker wakes who waits there."""
    n_workers = atomic_load(pool + N_WORKERS)
    if atomic_add(line, 1) + 1 >= n_workers:
        wake(pool, line)


@njit(**NOPYTHON)
def await_all(pool, line):
    """Block until every worker has arrived at the line, or the job was aborted, or a worker's thread is gone."""
    n_workers = atomic_load(pool + N_WORKERS)
    value = atomic_load(line)
    while value < n_workers and atomic_load(pool + GONE) == 0:
        value = wait_change(pool, line, value)


@njit(**NOPYTHON)
def barrier(pool, index):
    """All workers meet; False when one of them failed and the job must be left."""
    line = pool + BARRIERS + index * LINE
    arrive(pool, line)
    await_all(pool, line)
    return atomic_load(pool + STATUS) == 0 and atomic_load(pool + GONE) == 0


@njit(**NOPYTHON)
def take(pool, counter):
    """The next task number of a counter."""
    return atomic_add(pool + COUNTERS + counter * LINE, 1)


@njit(**NOPYTHON)
def abort(pool, status):
    """Mark the job as failed and release every worker from its barriers."""
    atomic_store(pool + STATUS, status)
    for index in range(N_BARRIERS):
        atomic_add(pool + BARRIERS + index * LINE, ABORTED)
        wake(pool, pool + BARRIERS + index * LINE)


@njit(cache=True, **NOPYTHON)
def serve(pool, worker):
    """A worker's life: run each published job once, until the job is 0."""
    seen = 0
    while True:
        seen = wait_change(pool, pool + GENERATION, seen)
        function = atomic_load(pool + FUNCTION)
        if function == 0:
            return
        status = call_job(function, pool, atomic_load(pool + ARGUMENT), worker)
        if status != 0:
            abort(pool, status)
        arrive(pool, pool + DONE)


@njit(cache=True, **NOPYTHON)
def dispatch(pool, function, argument):
    """Publish a job to all workers; the one before it must have been joined."""
    for index in range(N_BARRIERS):
        atomic_store(pool + BARRIERS + index * LINE, 0)
    for index in range(N_COUNTERS):
        atomic_store(pool + COUNTERS + index * LINE, 0)
    atomic_store(pool + DONE, 0)
    atomic_store(pool + STATUS, 0)
    atomic_store(pool + FUNCTION, function)
    atomic_store(pool + ARGUMENT, argument)
    atomic_add(pool + GENERATION, 1)
    wake(pool, pool + GENERATION)


@njit(cache=True, **NOPYTHON)
def join(pool):
    """Wait until every worker has finished the job; returns 0 or the status of one that failed."""
    await_all(pool, pool + DONE)
    return atomic_load(pool + STATUS)


@njit(cache=True, **NOPYTHON)
def release(pool, status):
    """A worker's thread is gone for good: let everybody go, the submitter too, now and in later jobs."""
    atomic_store(pool + GONE, 1)
    abort(pool, status)
    atomic_add(pool + DONE, ABORTED)
    wake(pool, pool + DONE)


def warm() -> None:
    """Compile, or load from the cache, what Python calls; nothing is compiled when this file is imported."""
    serve.compile("void(int64, int64)")
    dispatch.compile("void(int64, int64, int64)")
    join.compile("int64(int64)")
    release.compile("void(int64, int64)")
