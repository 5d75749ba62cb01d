"""Hand a job to parked threads and meet again: a generation word, task counters, barriers, one done count.

Shared memory, one cache line for each word that several threads write (a waitable line holds its value and the number
of sleepers). Waiting spins for some microseconds and then sleeps in the kernel, so an idle pool costs nothing and
more workers than cores still make progress. Knows nothing about experts; pool.py owns the memory and the threads.

Why nothing can hang on a reset: counters, barriers and the done count are set to zero only by `dispatch`, which runs
only after every worker has added itself to the done count, and that is the last word a worker touches before it
waits for the next generation.

Why a stuck worker can be told from a slow one: within a job the lines from DONE to WORKERS only grow, so one sum of
them shows whether anybody moved; and each worker writes down the last generation that it finished.
"""

# mypy: disallow-untyped-defs=False

from numba import njit

from offload.config import MAX_NODES
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
CONTROL = 1 * LINE  # two lines, written by the submitter, read by all
N_WORKERS, FUNCTION, ARGUMENT, FUTEX, STATUS, GONE, SPINS = (CONTROL + 8 * i for i in range(7))
PATIENCE = CONTROL + LINE  # a timespec: the longest sleep of a submitter, before it looks whether anybody moved
DONE = 3 * LINE  # waitable: workers that have finished the job
BARRIERS = 4 * LINE  # two waitable lines
N_BARRIERS = 2
COUNTERS = 6 * LINE  # task counters: four kinds, one of each for every node
N_COUNTERS = 4
WORKERS = COUNTERS + N_COUNTERS * MAX_NODES * LINE  # a line for each worker: the last generation it finished, its ticks
TICKS = 8  # byte offset within a worker's line

SLEEPERS = 8  # byte offset of the sleepers count within a waitable line
# How often to look before sleeping. Workers that meet in a job have a core each: 20 us (Zen 3) to 50 us (Intel since
# Skylake) of `pause`. Where every core has a worker, the submitter shares one with a worker, and each keeps the other
# from running while it spins: an empty job on two cores takes 80 us with 1000, 18 us with 100 (Zen 3, 2026-11-22).
MEETING_SPINS, IDLE_SPINS = 1000, 100
# Between the layers of a device, where there are processors to spare: its part of a decode step takes some 0.3 ms, and
# waking every worker from its sleep would take a microsecond or two for each.
PATIENT_SPINS = 20_000
FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 128, 129, 2**31 - 1  # private to this process
FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98}  # the system call by architecture
NAP = 100  # microseconds between looks where there is no futex
ABORTED = 1 << 20  # more than any number of workers: added to a line, it releases everybody who waits there


@njit(**NOPYTHON)
def wait_change(pool, line, seen, spins, patience):
    """Block until the line's value differs from `seen`; returns the new value.

    `patience` is 0 or the address of a timespec: then `seen` comes back after one sleep that nobody ended.
    """
    for _ in range(spins):
        if atomic_load(line) != seen:
            return atomic_load(line)
        relax()
    number = atomic_load(pool + FUTEX)
    woken = True
    atomic_add(line + SLEEPERS, 1)
    while atomic_load(line) == seen and (woken or patience == 0):
        # The kernel compares the low half again before it sleeps, so a change in between is not missed.
        if number > 0:
            woken = system_call(number, line, FUTEX_WAIT, seen & 0xFFFFFFFF, patience) == 0
        else:
            sleep_microseconds(NAP)
            woken = False
    atomic_add(line + SLEEPERS, -1)
    return atomic_load(line) if woken or patience == 0 else seen


@njit(**NOPYTHON)
def wake(pool, line):
    if atomic_load(line + SLEEPERS) > 0 and atomic_load(pool + FUTEX) > 0:
        system_call(atomic_load(pool + FUTEX), line, FUTEX_WAKE, EVERYBODY, 0)


@njit(**NOPYTHON)
def arrive(pool, line):
    """Add one to a line; the last worker wakes who waits there."""
    n_workers = atomic_load(pool + N_WORKERS)
    if atomic_add(line, 1) + 1 >= n_workers:
        wake(pool, line)


@njit(**NOPYTHON)
def await_all(pool, line, spins, patience):
    """Block until every worker has arrived at the line, or the job was aborted, or a worker's thread is gone.

    False where `patience` (wait_change) ended it before.
    """
    n_workers = atomic_load(pool + N_WORKERS)
    value = atomic_load(line)
    while value < n_workers and atomic_load(pool + GONE) == 0:
        before = value
        value = wait_change(pool, line, before, spins, patience)
        if value == before:
            return False
    return True


@njit(**NOPYTHON)
def barrier(pool, index):
    """All workers meet; False when one of them failed and the job must be left."""
    line = pool + BARRIERS + index * LINE
    arrive(pool, line)
    await_all(pool, line, MEETING_SPINS, 0)
    return atomic_load(pool + STATUS) == 0 and atomic_load(pool + GONE) == 0


@njit(**NOPYTHON)
def take(pool, counter, node):
    """The next task number of a node's counter."""
    return atomic_add(pool + COUNTERS + (counter * MAX_NODES + node) * LINE, 1)


@njit(**NOPYTHON)
def tick(pool, worker):
    """Show that this worker gets on, within a long task."""
    atomic_add(pool + WORKERS + worker * LINE + TICKS, 1)


@njit(**NOPYTHON)
def abort(pool, status):
    """Mark the job as failed, unless it is already, and release every worker from its barriers."""
    if atomic_load(pool + STATUS) == 0:
        atomic_store(pool + STATUS, status)
    for index in range(N_BARRIERS):
        atomic_add(pool + BARRIERS + index * LINE, ABORTED)
        wake(pool, pool + BARRIERS + index * LINE)


@njit(cache=True, **NOPYTHON)
def serve(pool, worker):
    """A worker's life: run each published job once, until the job is 0."""
    seen = 0
    while True:
        seen = wait_change(pool, pool + GENERATION, seen, atomic_load(pool + SPINS), 0)
        function = atomic_load(pool + FUNCTION)
        if function == 0:
            return
        status = call_job(function, pool, atomic_load(pool + ARGUMENT), worker)
        if status != 0:
            abort(pool, status)
        atomic_store(pool + WORKERS + worker * LINE, seen)
        arrive(pool, pool + DONE)


@njit(cache=True, **NOPYTHON)
def dispatch(pool, function, argument):
    """Publish a job to all workers; the one before it must have been joined."""
    for index in range(N_BARRIERS):
        atomic_store(pool + BARRIERS + index * LINE, 0)
    for counter in range(N_COUNTERS):
        for node in range(MAX_NODES):
            atomic_store(pool + COUNTERS + (counter * MAX_NODES + node) * LINE, 0)
    atomic_store(pool + DONE, 0)
    atomic_store(pool + STATUS, 0)
    atomic_store(pool + FUNCTION, function)
    atomic_store(pool + ARGUMENT, argument)
    atomic_add(pool + GENERATION, 1)
    wake(pool, pool + GENERATION)


@njit(cache=True, **NOPYTHON)
def dismiss(pool):
    """End every worker that is not in a job, and the others after it. Resets nothing: some may still be in one."""
    atomic_store(pool + FUNCTION, 0)
    atomic_add(pool + GENERATION, 1)
    wake(pool, pool + GENERATION)


@njit(cache=True, **NOPYTHON)
def join(pool):
    """Wait until every worker has finished the job, but only for one sleep: False says that it still runs."""
    return await_all(pool, pool + DONE, IDLE_SPINS, pool + PATIENCE)


@njit(cache=True, **NOPYTHON)
def release(pool, status):
    """A worker is stuck or its thread is gone: let everybody else go, the submitter too, now and in later jobs."""
    atomic_store(pool + GONE, 1)
    abort(pool, status)
    atomic_add(pool + DONE, ABORTED)
    wake(pool, pool + DONE)


def warm() -> None:
    """Compile, or load from the cache, what Python calls; nothing is compiled when this file is imported."""
    serve.compile("void(int64, int64)")
    dispatch.compile("void(int64, int64, int64)")
    dismiss.compile("void(int64)")
    join.compile("boolean(int64)")
    release.compile("void(int64, int64)")
