"""The pool with jobs made for the purpose: who runs what, barriers, failures, sleep and the end."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numba import cfunc

from offload.kernels import sync
from offload.kernels.intrinsics import NOPYTHON, atomic_add, atomic_load, load_i64, store_i64
from offload.kernels.table import JOB_FUNCTION
from offload.pool import PoolError, WorkerPool, physical_cores

ROUNDS = 200


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
    """argument -> number of tasks, then how often each was taken"""
    task = sync.take(pool, 1)
    while task < load_i64(argument):
        atomic_add(argument + 8 + 8 * task, 1)
        task = sync.take(pool, 1)
    return 0


@cfunc(JOB_FUNCTION, **NOPYTHON)
def fail(pool, argument, worker):  # type: ignore[no-untyped-def]
    """The last of `argument` workers fails while the others wait for it."""
    if worker == argument - 1:
        return 42
    return 0 if sync.barrier(pool, 0) and sync.barrier(pool, 1) else 1


@pytest.fixture(params=[1, 2, 7], ids="{} workers".format)
def pool(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """More workers than cores too."""
    made = WorkerPool(request.param)
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


def test_every_task_is_taken_once(pool: WorkerPool) -> None:
    for n_tasks in (0, 1, 1000):
        memory = np.zeros(1 + n_tasks, np.int64)
        memory[0] = n_tasks
        run(pool, share, memory)
        assert memory[1:].tolist() == [1] * n_tasks


def test_a_failing_worker_releases_the_others_and_the_pool_goes_on(pool: WorkerPool) -> None:
    counts = np.zeros(pool.n_workers, np.int64)
    for done in range(1, 20):
        pool.submit(fail.address, pool.n_workers)
        with pytest.raises(PoolError, match="status"):
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
    pool = WorkerPool(3)
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
    sleepers = pool._memory[(pool._address - pool._memory.ctypes.data + sync.GENERATION + sync.SLEEPERS) // 8 :][:1]
    deadline = time.monotonic() + 30
    while sleepers[0] < pool.n_workers and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sleepers[0] == pool.n_workers
    run(pool, count, np.zeros(pool.n_workers, np.int64))


def test_without_futex_workers_nap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "FUTEX_NUMBERS", {})
    pool = WorkerPool(3)
    counts = np.zeros(3, np.int64)
    for _ in range(10):
        time.sleep(0.001)
        run(pool, count, counts)
    pool.close()
    assert counts.tolist() == [10] * 3


def test_the_submitter_is_free_between_submit_and_wait() -> None:
    """A job that ends only when the submitting thread says so, after submit has returned."""
    pool, memory = WorkerPool(2), np.zeros(1, np.int64)

    @cfunc(JOB_FUNCTION, **NOPYTHON)
    def until_told(pool, argument, worker):  # type: ignore[no-untyped-def]
        while atomic_load(argument) == 0:
            sync.relax()
        return 0

    pool.submit(until_told.address, memory.ctypes.data)
    memory[0] = 1
    pool.wait()
    pool.close()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="threads: 0"):
        WorkerPool(0)
    pool, counts = WorkerPool(1), np.zeros(1, np.int64)
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
    pool, counts = WorkerPool(3), np.zeros(3, np.int64)
    assert threading.active_count() == before + 3
    pool.submit(count.address, counts.ctypes.data)
    pool.close()
    pool.close()
    assert counts.tolist() == [1] * 3
    assert threading.active_count() == before


def siblings(root: Path, lists: dict[int, str]) -> Path:
    for cpu, text in lists.items():
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("lists", "allowed", "cores"),
    [
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, {0, 1, 4, 5}, (0, 1)),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {0, 1, 2, 3}, (0, 2)),
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, {4, 1, 5}, (1, 4)),
        ({}, {3, 7}, (3, 7)),
    ],
)
def test_one_worker_for_each_physical_core(
    tmp_path: Path, lists: dict[int, str], allowed: set[int], cores: tuple[int, ...]
) -> None:
    assert physical_cores(allowed, siblings(tmp_path, lists)) == cores
