"""One layer's routed experts, run by all workers of a pool together: y = sum_k w_k * down(silu(gate x) * up x).

    encode the tokens' rows | barrier | tasks (expert, 32 inner rows): gate, up, silu, encode | barrier |
    tasks (32 output rows): down of every expert, weighted, straight into y

Tokens are grouped by expert, so weights are decoded once for up to four tokens. A down task owns its output rows, so
nothing is added concurrently, and each token gathers its experts in ascending order: its sum is the same alone and
in any batch, with any number of workers.

The job is a record in shared memory, filled by experts.py. Products are called by address (table.py).
"""

# mypy: disallow-untyped-defs=False

import math

import numpy as np
from numba import from_dtype, njit

from offload.config import FP8_BLOCK, GROUP, ExpertFormat
from offload.kernels.intrinsics import (
    NOPYTHON,
    call_encode,
    call_product,
    load_f32,
    load_i64,
    record_at,
    store_f32,
    store_i64,
)
from offload.kernels.product import MAX_TOKENS, TILE
from offload.kernels.sync import barrier, take

MATRIX = np.dtype(
    [
        ("rows", np.int64),
        ("n_in", np.int64),
        ("row_bytes", np.int64),
        ("scale_bytes", np.int64),  # from one row of scales to the next
        ("scale_rows", np.int64),  # weight rows that share a row of scales: 1, or 128 for fp8
    ]
)
JOB = np.dtype(
    [
        ("n_tokens", np.int64),  # T
        ("n_active", np.int64),  # experts with tokens
        ("active", np.int64),  # -> int64 (n_active, 3): expert, first assignment, assignments; experts ascending
        ("tokens", np.int64),  # -> int64 (T*K,): token of each assignment, in the experts' order
        ("weights", np.int64),  # -> float32 (T*K,): router weight of each assignment
        ("addresses", np.int64),  # -> int64 (E, 3, 2): gate, up, down; data, scales
        ("gate", MATRIX),  # up has the same shape
        ("down", MATRIX),
        ("x", np.int64),  # -> float32 (T, D)
        ("x_records", np.int64),  # -> T records
        ("x_record_bytes", np.int64),
        ("h_records", np.int64),  # -> T*K records
        ("h_record_bytes", np.int64),
        ("y", np.int64),  # -> float32 (T, D)
        ("scratch", np.int64),  # -> SCRATCH_BYTES for each worker
        ("parts", np.int64),  # activation.Layout
        ("element", np.int64),
        ("vector", np.int64),
        ("offset", np.int64),
        ("limit", np.int64),
        ("encode", np.int64),  # functions: activation.encode and the products, by tokens
        ("products", np.int64, (MAX_TOKENS,)),
    ]
)
job_at = record_at(from_dtype(JOB))
ACTIVE_COLUMNS = 3
SEGMENT = 1024  # inputs of x that one task encodes
EXPERT_BYTES, GATE, UP, DOWN = 48, 0, 16, 32  # of the address table: an expert, and its pairs of addresses
RECORDS_BYTES = 64  # a worker's scratch: addresses of up to four records, then two tiles of sums
TILES_BYTES = 4 * MAX_TOKENS * TILE
SCRATCH_BYTES = RECORDS_BYTES + 2 * TILES_BYTES
ENCODE_TASKS, GATE_UP_TASKS, DOWN_TASKS = 0, 1, 2  # counters
STOPPED = 1  # status: another worker failed


def describe(fmt: ExpertFormat, rows: int, n_in: int) -> tuple[int, int, int, int, int]:
    """A MATRIX record: the published row-major layout of a (rows, n_in) matrix."""
    if fmt == "bf16":
        return rows, n_in, 2 * n_in, 0, 1
    if fmt == "fp8":
        return rows, n_in, n_in, 4 * -(-n_in // FP8_BLOCK), FP8_BLOCK
    return rows, n_in, n_in // 2 if fmt == "int4" else n_in, 2 * (n_in // GROUP), 1


@njit(**NOPYTHON)
def tile(job, matrix, place, first, rows, n, records, out, after):
    """Products of `rows` rows from `first` with n tokens, into a tile of sums.

    The addresses of the matrix' data and scales lie at `place`; `after` is the address that will be read next.
    """
    weights = load_i64(place) + first * matrix.row_bytes
    scales = load_i64(place + 8) + first // matrix.scale_rows * matrix.scale_bytes
    stride = matrix.scale_bytes if matrix.scale_rows == 1 else 0
    function = job.products[n - 1]
    call_product(function, weights, matrix.row_bytes, scales, stride, rows, matrix.n_in, n, records, out, after)


@njit(**NOPYTHON)
def encode_into(job, values, first, n, record):
    call_encode(job.encode, values, first, n, record, job.parts, job.element, job.vector, job.offset, job.limit)


@njit(**NOPYTHON)
def encode_tokens(pool, job):
    hidden = job.gate.n_in
    segments = -(-hidden // SEGMENT)
    task = take(pool, ENCODE_TASKS)
    while task < job.n_tokens * segments:
        token, first = task // segments, task % segments * SEGMENT
        values = job.x + 4 * (token * hidden + first)
        encode_into(job, values, first, min(SEGMENT, hidden - first), job.x_records + token * job.x_record_bytes)
        task = take(pool, ENCODE_TASKS)


@njit(**NOPYTHON)
def gate_up_tile(job, expert, first, rows, start, n, scratch):
    """silu(gate x) * up x of one tile, for the n assignments from `start`."""
    for i in range(n):
        token = load_i64(job.tokens + 8 * (start + i))
        store_i64(scratch + 8 * i, job.x_records + token * job.x_record_bytes)
    gates, ups = scratch + RECORDS_BYTES, scratch + RECORDS_BYTES + TILES_BYTES
    skipped = first * job.gate.row_bytes
    tile(job, job.gate, expert + GATE, first, rows, n, scratch, gates, load_i64(expert + UP) + skipped)
    tile(job, job.gate, expert + UP, first, rows, n, scratch, ups, load_i64(expert + GATE) + skipped)
    for i in range(n):
        for k in range(i * TILE, i * TILE + rows):
            value = load_f32(gates + 4 * k)
            silu = value / (np.float32(1) + math.exp(-value))
            store_f32(ups + 4 * k, silu * load_f32(ups + 4 * k))
        encode_into(job, ups + 4 * i * TILE, first, rows, job.h_records + (start + i) * job.h_record_bytes)


@njit(**NOPYTHON)
def gate_up(pool, job, scratch):
    tiles = -(-job.gate.rows // TILE)
    task = take(pool, GATE_UP_TASKS)
    while task < job.n_active * tiles:
        active = job.active + 24 * (task // tiles)
        expert = job.addresses + load_i64(active) * EXPERT_BYTES
        start, count = load_i64(active + 8), load_i64(active + 16)
        first = task % tiles * TILE
        rows = min(TILE, job.gate.rows - first)
        for i in range(0, count, MAX_TOKENS):
            n = min(MAX_TOKENS, count - i)
            gate_up_tile(job, expert, first, rows, start + i, n, scratch)
        task = take(pool, GATE_UP_TASKS)


@njit(**NOPYTHON)
def down_tile(job, expert, first, rows, start, n, scratch):
    """y[token, first : first + rows] += weight * (down h), for the n assignments from `start`."""
    for i in range(n):
        store_i64(scratch + 8 * i, job.h_records + (start + i) * job.h_record_bytes)
    sums = scratch + RECORDS_BYTES
    after = load_i64(expert + DOWN) + (first + rows) * job.down.row_bytes
    tile(job, job.down, expert + DOWN, first, rows, n, scratch, sums, after)
    for i in range(n):
        weight = load_f32(job.weights + 4 * (start + i))
        y = job.y + 4 * (load_i64(job.tokens + 8 * (start + i)) * job.down.rows + first)
        for r in range(rows):
            store_f32(y + 4 * r, load_f32(y + 4 * r) + weight * load_f32(sums + 4 * (i * TILE + r)))


@njit(**NOPYTHON)
def down(pool, job, scratch):
    task = take(pool, DOWN_TASKS)
    while task * TILE < job.down.rows:
        first = task * TILE
        rows = min(TILE, job.down.rows - first)
        for token in range(job.n_tokens):
            for r in range(first, first + rows):
                store_f32(job.y + 4 * (token * job.down.rows + r), np.float32(0))
        for active in range(job.active, job.active + 24 * job.n_active, 24):
            expert = job.addresses + load_i64(active) * EXPERT_BYTES
            start, count = load_i64(active + 8), load_i64(active + 16)
            for i in range(0, count, MAX_TOKENS):
                n = min(MAX_TOKENS, count - i)
                down_tile(job, expert, first, rows, start + i, n, scratch)
        task = take(pool, DOWN_TASKS)


def run_layer(pool, argument, worker):
    """A worker's share of the job at `argument`; the status is 0 unless another worker failed."""
    job = job_at(argument)
    scratch = job.scratch + worker * SCRATCH_BYTES
    encode_tokens(pool, job)
    if not barrier(pool, 0):
        return STOPPED
    gate_up(pool, job, scratch)
    if not barrier(pool, 1):
        return STOPPED
    down(pool, job, scratch)
    return 0
