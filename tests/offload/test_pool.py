"""The pool with jobs made for the purpose: who runs what, barriers, failures, stuck workers, sleep and the end."""

import contextlib
import gc
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from numba import cfunc, types

from offload.config import MAX_NODES
from offload.kernels import sync
from offload.kernels.intrinsics import (
    NOPYTHON,
    atomic_add,
    atomic_load,
    load_i64,
    relax,
    sleep_microseconds,
    store_i64,
)
from offload.pool import PoolError, WorkerPool
from offload.topology import Place, allowed_cpus

ROUNDS = 200
DISPATCHES = 10_000
NODES = 2
JOB_FUNCTION = types.int64(types.int64, types.int64, types.int64)  # pool, argument, worker -> status


@cfunc(JOB_FUNCTION, **NOPYTHON)
def count(pool, argument, worker):  # type: ignore[no-untyped-def]
    """argument -> int64 by worker"""
    atomic_add(argument + 8 * worker, 1)
    return 0


@cfunc(JOB_FUNCTION, **NOPYTHON)
def meet(pool, argument, worker):  # type: ignore[no-untyped-def]
    """argument -> arrivals, workers, then what each worker saw after the first and after the second barrier."""
    atomic_add(argument, 1)
    sync.barrier(pool, 0)
    store_i64(argument + 16 + 16 * worker, atomic_load(argument))
    sync.barrier(pool, 1)
    atomic_add(argument, 1)
    store_i64(argument + 24 + 16 * worker, load_i64(argument + 16 + 16 * ((worker + 1) % load_i64(argument + 8))))
    return 0


@cfunc(JOB_FUNCTION, **NOPYTHON)
def share(pool, argument, worker):  # type: ignore[no-untyped-def]
    """argument -> number of tasks of each counter and node, then how often each of them was taken"""
    n_tasks = load_i64(argument)
    taken = argument + 8
    for counter in range(sync.N_COUNTERS):
        for node in range(NODES):
            task = sync.take(pool, counter, node)
            while task < n_tasks:
                atomic_add(taken + 8 * task, 1)
                task = sync.take(pool, counter, node)
            taken += 8 * n_tasks
    return 0


@cfunc(JOB_FUNCTION, **NOPYTHON)
def fail(pool, argument, worker):  # type: ignore[no-untyped-def]
    """The last of `argument` workers fails while the others wait for it."""
    if worker == argument - 1:
        return 42
    return 0 if sync.barrier(pool, 0) and sync.barrier(pool, 1) else 1


@cfunc(JOB_FUNCTION, **NOPYTHON)
def hold(pool, argument, worker):  # type: ignore[no-untyped-def]
    """argument -> flag, worker: that one stays until the flag is set, the others wait for it at a barrier."""
    while worker == load_i64(argument + 8) and atomic_load(argument) == 0:
        relax()
    return 0 if sync.barrier(pool, 0) else 1


@cfunc(JOB_FUNCTION, **NOPYTHON)
def crawl(pool, argument, worker):  # type: ignore[no-untyped-def]
    """Worker 0 takes `argument` tasks of 50 ms."""
    while worker == 0 and sync.take(pool, 0, 0) < argument:
        sleep_microseconds(50_000)
    return 0 if sync.barrier(pool, 0) else 1


def places(n_workers: int) -> list[Place]:
    return [Place(None, worker % NODES) for worker in range(n_workers)]


@pytest.fixture(params=[1, 2, 7], ids="{} workers".format)
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    """More workers than cores too."""
    made = WorkerPool(places(request.param))
    yield made
    made.close()


def run(pool: WorkerPool, function, memory: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    pool.submit(function.address, memory.ctypes.data)
    pool.wait()


def test_every_worker_runs_every_job_once(pool: WorkerPool) -> None:
    counts = np.zeros(pool.n_workers, np.int64)
    for done in range(1, ROUNDS + 1):
        run(pool, count, counts)
        assert counts.tolist() == [done] * pool.n_workers


def test_nobody_passes_a_barrier_before_all_have_come(pool: WorkerPool) -> None:
    for _ in range(ROUNDS):
        memory = np.zeros(2 + 2 * pool.n_workers, np.int64)
        memory[1] = pool.n_workers
        run(pool, meet, memory)
        assert memory[0] == 2 * pool.n_workers
        assert set(memory[2:].tolist()) == {pool.n_workers}


def test_every_task_is_taken_once() -> None:
    pool = WorkerPool(places(3))
    for n_tasks in (0, 1, 1000):
        n_all = n_tasks * sync.N_COUNTERS * NODES
        memory = np.zeros(1 + n_all, np.int64)
        memory[0] = n_tasks
        run(pool, share, memory)
        assert memory[1:].tolist() == [1] * n_all
    pool.close()


def test_the_words_of_a_pool_do_not_overlap() -> None:
    lines = [sync.GENERATION, sync.CONTROL, sync.PATIENCE, sync.DONE]
    lines += [sync.BARRIERS + i * sync.LINE for i in range(sync.N_BARRIERS)]
    lines += [sync.COUNTERS + i * sync.LINE for i in range(sync.N_COUNTERS * MAX_NODES)]
    assert [*lines, sync.WORKERS] == [i * sync.LINE for i in range(len(lines) + 1)]
    assert max(sync.GONE, sync.SPINS) < sync.PATIENCE


def test_thousands_of_random_jobs_with_more_workers_than_cores() -> None:
    pool, draw = WorkerPool(places(5)), random.Random(0)
    counts, met, shared = np.zeros(5, np.int64), np.zeros(12, np.int64), np.zeros(1 + 8 * sync.N_COUNTERS * 2, np.int64)
    shared[0], met[1] = 8, 5
    jobs = {"count": (count, counts.ctypes.data), "meet": (meet, met.ctypes.data), "share": (share, shared.ctypes.data)}
    jobs["fail"] = (fail, 5)
    ran = dict.fromkeys(jobs, 0)
    for _ in range(DISPATCHES):
        name = draw.choice(list(jobs))
        ran[name] += 1
        met[0] = 0
        pool.submit(jobs[name][0].address, jobs[name][1])
        if draw.random() < 0.01:
            time.sleep(0.0002)  # long enough for all to park
        with pytest.raises(PoolError, match="status 42") if name == "fail" else contextlib.nullcontext():
            pool.wait()
        if name == "meet":
            assert met.tolist() == [10, *[5] * 11]
    pool.close()
    assert counts.tolist() == [ran["count"]] * 5
    assert shared[1:].tolist() == [ran["share"]] * (len(shared) - 1)


def test_a_failing_worker_releases_the_others_and_the_pool_goes_on(pool: WorkerPool) -> None:
    counts = np.zeros(pool.n_workers, np.int64)
    for done in range(1, 20):
        pool.submit(fail.address, pool.n_workers)
        with pytest.raises(PoolError, match="status 42"):
            pool.wait()
        run(pool, count, counts)
        assert counts.tolist() == [done] * pool.n_workers


def test_a_worker_that_is_gone_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = sync.serve

    def serve_or_raise(address: int, worker: int) -> None:
        if worker == 1:
            raise MemoryError("no stack")
        serve(address, worker)

    monkeypatch.setattr(sync, "serve", serve_or_raise)
    monkeypatch.setattr(sync, "warm", lambda: None)
    pool = WorkerPool(places(3))
    try:
        with pytest.raises(PoolError, match="no stack"):
            for _ in range(2):
                pool.submit(fail.address, 4)
                pool.wait()
    finally:
        pool.close()
    assert not any(thread.is_alive() for thread in pool._threads)


def test_idle_workers_sleep_in_the_kernel(pool: WorkerPool) -> None:
    run(pool, count, np.zeros(pool.n_workers, np.int64))
    deadline = time.monotonic() + 30
    while pool._read(sync.GENERATION + sync.SLEEPERS) < pool.n_workers and time.monotonic() < deadline:
        time.sleep(0.001)
    assert pool._read(sync.GENERATION + sync.SLEEPERS) == pool.n_workers
    run(pool, count, np.zeros(pool.n_workers, np.int64))


@pytest.mark.parametrize(("n_cpus", "spins"), [(9, sync.PATIENT_SPINS), (3, sync.IDLE_SPINS)])
def test_workers_spin_for_longer_only_where_that_leaves_processors(
    monkeypatch: pytest.MonkeyPatch, n_cpus: int, spins: int
) -> None:
    pool = WorkerPool([Place(None, 0)] * 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(n_cpus)))
    pool.spin_between_jobs()
    assert pool._read(sync.SPINS) == spins
    test_idle_workers_sleep_in_the_kernel(pool)
    pool.close()


def test_without_futex_workers_nap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "FUTEX_NUMBERS", {})
    pool = WorkerPool(places(3))
    counts = np.zeros(3, np.int64)
    for _ in range(10):
        time.sleep(0.001)
        run(pool, count, counts)
    pool.close()
    assert counts.tolist() == [10] * 3


def test_the_submitter_is_free_between_submit_and_wait() -> None:
    """A job that ends only when the submitting thread says so, after submit has returned."""
    pool, memory = WorkerPool(places(2)), np.zeros(2, np.int64)
    pool.submit(hold.address, memory.ctypes.data)
    memory[0] = 1
    pool.wait()
    pool.close()


def test_what_a_job_reads_is_let_go_when_it_is_done() -> None:
    pool, counts = WorkerPool(places(2)), np.zeros(2, np.int64)
    pool.submit(count.address, counts.ctypes.data, alive=(alive := threading.Event()))
    kept = weakref.ref(alive)
    del alive
    assert kept() is not None
    pool.wait()
    assert kept() is None
    pool.close()


@pytest.mark.parametrize("futex", [True, False], ids=["futex", "naps"])
def test_a_stuck_worker_is_an_error_and_its_memory_stays(monkeypatch: pytest.MonkeyPatch, futex: bool) -> None:
    if not futex:
        monkeypatch.setattr(sync, "FUTEX_NUMBERS", {})
    cpu, memory = min(allowed_cpus()), np.array([0, 1])
    pool = WorkerPool([Place(None, 0), Place(cpu, 0), Place(None, 0)], stuck_seconds=0.2)
    threads, flag = pool._threads, memory[:1]
    pool.submit(hold.address, memory.ctypes.data, alive=(alive := threading.Event()))
    with pytest.raises(PoolError, match=rf"nothing for 0\.2 s: worker 1 \(CPU {cpu}\) has not finished"):
        pool.wait()
    assert pool.broken
    with pytest.raises(PoolError, match=rf"broken: .* worker 1 \(CPU {cpu}\)"):
        pool.submit(count.address, memory.ctypes.data)
    with pytest.raises(PoolError, match="no job"):
        pool.wait()
    pool.close()
    assert [thread.is_alive() for thread in threads] == [False, True, False]
    kept = weakref.ref(alive), weakref.ref(pool._lines)
    del pool, alive
    gc.collect()
    assert all(ref() is not None for ref in kept)

    flag[0] = 1
    threads[1].join(30)
    assert not threads[1].is_alive()
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_close_gives_a_stuck_job_up() -> None:
    pool, memory = WorkerPool(places(2), stuck_seconds=0.1), np.zeros(2, np.int64)
    pool.submit(hold.address, memory.ctypes.data, alive=memory)
    pool.close()
    assert pool.broken
    memory[0] = 1
    for thread in pool._threads:
        thread.join(30)
        assert not thread.is_alive()


def test_workers_that_wait_for_each_other_are_told() -> None:
    """A barrier that one worker forgets: nobody is left in the job once it is given up."""

    @cfunc(JOB_FUNCTION, **NOPYTHON)
    def forget(pool, argument, worker):  # type: ignore[no-untyped-def]
        return 0 if worker == 0 or sync.barrier(pool, 0) else 1

    pool = WorkerPool(places(3), stuck_seconds=0.1)
    pool.submit(forget.address, 0)
    with pytest.raises(PoolError, match="waiting for each other"):
        pool.wait()
    pool.close()
    assert not any(thread.is_alive() for thread in pool._threads)


def test_a_slow_job_that_goes_on_is_left_alone() -> None:
    pool = WorkerPool(places(3), stuck_seconds=0.5)
    pool.submit(crawl.address, 20)  # twice as long
    pool.wait()
    assert not pool.broken
    pool.close()


def test_a_leap_of_the_clock_is_not_a_stuck_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped sees its clock leap between two looks, without a chance to move for its workers."""
    leaps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "monotonic", lambda: next(leaps))
    pool, memory = WorkerPool(places(2), stuck_seconds=3), np.zeros(2, np.int64)
    released = threading.Timer(1.8, memory.__setitem__, (0, 1))
    pool.submit(hold.address, memory.ctypes.data)
    released.start()
    pool.wait()
    pool.close()
    released.join()


def test_ctrl_c_ends_a_wait_and_the_job_goes_on() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    pool, memory = WorkerPool(places(2)), np.zeros(2, np.int64)
    pool.submit(hold.address, memory.ctypes.data)
    main = threading.main_thread().ident
    assert main is not None
    interrupt = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        pool.wait()
    signal.signal(signal.SIGINT, before)
    interrupt.join()
    memory[0] = 1
    pool.wait()
    pool.close()


def test_misuse_is_refused() -> None:
    pool, counts = WorkerPool(places(1)), np.zeros(1, np.int64)
    with pytest.raises(PoolError, match="no job"):
        pool.wait()
    pool.submit(count.address, counts.ctypes.data)
    with pytest.raises(PoolError, match="is running"):
        pool.submit(count.address, counts.ctypes.data)
    pool.wait()
    pool.close()
    with pytest.raises(PoolError, match="closed"):
        pool.submit(count.address, counts.ctypes.data)


def test_close_ends_the_threads_once_the_job_is_done() -> None:
    before = threading.active_count()
    pool, counts = WorkerPool(places(3)), np.zeros(3, np.int64)
    assert threading.active_count() == before + 3
    pool.submit(count.address, counts.ctypes.data)
    pool.close()
    pool.close()
    assert counts.tolist() == [1] * 3
    assert threading.active_count() == before


def test_close_waits_for_a_running_job() -> None:
    pool, memory = WorkerPool(places(3)), np.zeros(2, np.int64)
    pool.submit(hold.address, memory.ctypes.data)
    release = threading.Timer(0.1, memory.__setitem__, (0, 1))
    release.start()
    pool.close()
    assert memory[0] == 1
    assert not pool.broken
    assert not any(thread.is_alive() for thread in pool._threads)
    release.join()
