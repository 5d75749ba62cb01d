"""Work on a row of items by all cores, with the disk asked for the items that come next.

Knows nothing of what the items are. offload/reading.py and offload/packed.py call it.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 1 << 28  # bytes that the disk is asked for beyond what is being worked on
ASKED = 1 << 20  # at a time: the system cuts a longer wish short

Item = TypeVar("Item")
Result = TypeVar("Result")


def pipeline(
    items: Sequence[Item],
    ask: Callable[[Item], None],
    work: Callable[[Item], Result],
    done: Callable[[Item, Result], None],
    item_bytes: int,
) -> None:
    """For every item `ask(item)`, then `work(item)` on some thread, then `done(item, result)`; ask and done in order.

    The first exception ends it, after the threads have stopped.
    """
    threads = len(os.sched_getaffinity(0))
    most = 2 * threads + AHEAD // item_bytes
    jobs: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")

    def finish() -> None:
        item, job = jobs.popleft()
        done(item, job.result())

    try:
        for item in items:
            ask(item)
            jobs.append((item, pool.submit(work, item)))
            if len(jobs) > most:
                finish()
        while jobs:
            finish()
    finally:
        pool.shutdown(cancel_futures=True)


def ask_disk(file: int, offset: int, n_bytes: int) -> None:
    """Start reading a range of a file into the system's cache."""
    for at in range(offset, offset + n_bytes, ASKED):
        os.posix_fadvise(file, at, min(ASKED, offset + n_bytes - at), os.POSIX_FADV_WILLNEED)
