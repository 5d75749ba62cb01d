"""Release the workers as soon as a word in memory says that their data has come, without the interpreter.

    caller   fills the ticket, posts it, goes on
    device   writes tokens, experts and weights to the host, and then the ticket's number to the flag
    here     looks at the flag, ends a job that only warms caches, groups the tokens (grouping.py), publishes the job
    caller   waits until the ticket has been handed over, then for the workers

One ticket at a time: it is the caller's from handing over to the next post, and this thread's in between. Owned by
offload/handoff.py, which runs `serve` on a thread of its own.
"""

# mypy: disallow-untyped-defs=False

import numpy as np
from numba import from_dtype, njit

from offload.kernels.grouping import begin
from offload.kernels.intrinsics import (
    NOPYTHON,
    atomic_add,
    atomic_load,
    atomic_store,
    record_at,
    relax,
    sleep_microseconds,
)
from offload.kernels.sync import IDLE_SPINS, LINE, dispatch, join, wait_change, wake

POSTED = 0 * LINE  # waitable: tickets posted
HANDED = 1 * LINE  # waitable: tickets handed over, or given up
CLOSING = 2 * LINE  # not 0: the thread ends
TICKET_AT = 3 * LINE
TICKET = np.dtype(
    [
        ("flag", np.int64),  # -> the word that the device writes
        ("number", np.int64),  # what it must have grown to
        ("naps", np.int64),  # how often to sleep before the flag is given up
        ("warming", np.int64),  # -> stop word of a running job that warms caches, or 0
        ("function", np.int64),  # the job
        ("job", np.int64),
        ("addresses", np.int64),  # what grouping.begin takes
        ("n_experts", np.int64),
        ("x", np.int64),
        ("ids", np.int64),
        ("weights", np.int64),
        ("n_tokens", np.int64),
        ("k", np.int64),
        ("y", np.int64),
        ("ends", np.int64),
        ("chosen", np.int64),
        ("answer", np.int64),  # experts of the job, UNKNOWN_EXPERT or one of the two below: no job was published
    ]
)
BOARD_BYTES = TICKET_AT + -(-TICKET.itemsize // LINE) * LINE
NEVER_CAME, STUCK = -2, -3  # the flag; workers in the job that warms
ticket_at = record_at(from_dtype(TICKET))
# A device's part of a decode step takes up to some milliseconds, which are spun through; a prompt's takes longer, and
# then a nap late does no harm. While this thread spins the workers have nothing to do.
SPINS = 100_000  # 2 to 5 ms of `pause`
NAP = 50  # microseconds
MOST_SLEEPS = 30  # of a second at most


@njit(**NOPYTHON)
def arrived(flag, number, naps):
    """Wait for the flag; False when it did not come."""
    for _ in range(SPINS):
        if atomic_load(flag) >= number:
            return True
        relax()
    for _ in range(naps):
        if atomic_load(flag) >= number:
            return True
        sleep_microseconds(NAP)
    return atomic_load(flag) >= number


@njit(**NOPYTHON)
def left_by_all(pool):
    """Wait until all workers have left the job that warms caches; False when they do not."""
    sleeps = 0
    while not join(pool):
        sleeps += 1
        if sleeps == MOST_SLEEPS:
            return False
    return True


@njit(**NOPYTHON)
def hand_over(pool, ticket):
    """From the flag to the workers; the answer."""
    if not arrived(ticket.flag, ticket.number, ticket.naps):
        return NEVER_CAME
    if ticket.warming != 0:
        atomic_store(ticket.warming, 1)  # they leave while the tokens are grouped
    n_active = begin(
        ticket.job, ticket.addresses, ticket.n_experts, ticket.x, ticket.ids, ticket.weights, ticket.n_tokens,
        ticket.k, ticket.y, ticket.ends, ticket.chosen,
    )  # fmt: skip
    if ticket.warming != 0 and not left_by_all(pool):
        return STUCK
    if n_active >= 0:
        dispatch(pool, ticket.function, ticket.job)
    return n_active


@njit(cache=True, **NOPYTHON)
def serve(pool, board):
    """The thread's life."""
    seen = 0
    while True:
        seen = wait_change(pool, board + POSTED, seen, IDLE_SPINS, 0)
        if atomic_load(board + CLOSING) != 0:
            return
        ticket = ticket_at(board + TICKET_AT)
        ticket.answer = hand_over(pool, ticket)
        atomic_store(board + HANDED, seen)
        wake(pool, board + HANDED)


@njit(cache=True, **NOPYTHON)
def post(pool, board):
    """Let the thread take the ticket."""
    atomic_add(board + POSTED, 1)
    wake(pool, board + POSTED)


@njit(cache=True, **NOPYTHON)
def handed(pool, board, patience):
    """Wait until the posted ticket was handed over, but only for one sleep: False says that it was not."""
    seen = atomic_load(board + HANDED)
    while seen != atomic_load(board + POSTED):
        before = seen
        seen = wait_change(pool, board + HANDED, before, IDLE_SPINS, patience)
        if seen == before:
            return False
    return True


@njit(cache=True, **NOPYTHON)
def await_flag(flag, number, naps):
    """`arrived`, for a caller who waits by itself."""
    return arrived(flag, number, naps)


def warm() -> None:
    """Compile, or load from the cache."""
    serve.compile("void(int64, int64)")
    post.compile("void(int64, int64)")
    await_flag.compile("boolean(int64, int64, int64)")
    handed.compile("boolean(int64, int64, int64)")
