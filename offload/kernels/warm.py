"""A job for workers that would else be idle: read experts that will probably run, so that they lie in the cache.

The products deal a layer's units to whoever is free (sync.take), so no worker knows beforehand which units it will
run. A worker therefore reads any piece of its memory node's share, which warms the cache that the cores share (L3);
warming a core's own L2 would need a fixed deal of units, and the balance that the free deal brings. Pieces are read in
the order given, likeliest expert first, until there are enough of them or the stop word is set.

Knows the job record (layer.py). Called by address; offload/warming.py decides when.
"""

# mypy: disallow-untyped-defs=False

import numpy as np
from numba import from_dtype, njit

from offload.config import LINE
from offload.kernels.intrinsics import NOPYTHON, atomic_add, atomic_load, load_i64, record_at
from offload.kernels.layer import job_at
from offload.kernels.sync import take, tick

WARM = np.dtype(
    [
        ("stop", np.int64),  # first: read and written atomically; not 0 ends the job
        ("lines", np.int64),  # read so far, over all jobs
        ("sink", np.int64),  # what was read, so that the compiler reads it
        ("job", np.int64),  # -> the layer's JOB: nodes, units and their bytes
        ("addresses", np.int64),  # -> int64 (E, N, 2) of the layer to come
        ("experts", np.int64),  # -> int64 (n,), likeliest first
        ("n_experts", np.int64),
        ("n_pieces", np.int64),  # a node's share of what is read at most
    ]
)
LINES, SINK = 8, 16  # byte offsets
warm_at = record_at(from_dtype(WARM))
PIECE = 64 * 1024  # bytes that a worker takes at a time
LOOK = 4096  # bytes between two looks at the stop word: 0.2 to 0.5 us of one core
PIECES = 0  # the counter


@njit(**NOPYTHON)
def touch(argument, start, n_bytes):
    """Read one word of every line; returns how many lines were read before the stop."""
    lines = sink = 0
    for first in range(start, start + n_bytes, LOOK):
        if atomic_load(argument) != 0:
            break
        stop = min(first + LOOK, start + n_bytes)
        for address in range(first, stop, LINE):
            sink += load_i64(address)
        lines += (stop - first + LINE - 1) // LINE
    atomic_add(argument + SINK, sink)
    return lines


def run_warm(pool, argument, worker):
    """A worker's share of the job at `argument`."""
    warm = warm_at(argument)
    job = job_at(warm.job)
    home = load_i64(job.worker_nodes + 8 * worker)
    gate_up = (job.gate_up.units[home + 1] - job.gate_up.units[home]) * job.gate_up.unit_bytes
    down = (job.down.units[home + 1] - job.down.units[home]) * job.down.unit_bytes
    first_down = -(-gate_up // PIECE)
    pieces = first_down - (-down // PIECE)  # of one expert
    n_pieces = min(warm.n_pieces, warm.n_experts * pieces)
    lines = 0
    task = take(pool, PIECES, home)
    while task < n_pieces and atomic_load(argument) == 0:
        expert, piece = load_i64(warm.experts + 8 * (task // pieces)), task % pieces
        place = warm.addresses + 16 * (expert * job.n_nodes + home)
        if piece < first_down:
            start, end = load_i64(place) + piece * PIECE, load_i64(place) + gate_up
        else:
            start, end = load_i64(place + 8) + (piece - first_down) * PIECE, load_i64(place + 8) + down
        lines += touch(argument, start, min(PIECE, end - start))
        tick(pool, worker)
        task = take(pool, PIECES, home)
    atomic_add(argument + LINES, lines)
    return 0
