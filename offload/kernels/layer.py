"""One layer's routed experts, run by all workers of a pool together: y = sum_k w_k * down(silu(gate x) * up x).

    encode the tokens' rows | barrier | gate_up units of all experts: gate, up, silu, encode | barrier |
    down units: one unit of every expert, weighted, straight into y

Tokens are grouped by expert, so weights are taken apart once for up to eight tokens. A down task owns its 64 output
rows, so nothing is added concurrently, and each token gathers its experts in ascending order: its sum is the same
alone and in any batch, with any number of workers. A worker takes the units on its own memory node
first, then helps the others.

The job is a record in shared memory, filled by experts.py. Products and encoders are called by address (table.py).
"""

# mypy: disallow-untyped-defs=False

import numpy as np
from numba import from_dtype, njit

from offload.config import GROUP, MAX_NODES
from offload.kernels import amx
from offload.kernels.intrinsics import (
    NOPYTHON,
    call_encode,
    call_multiply,
    call_product,
    call_unpack,
    load_f32,
    load_i64,
    record_at,
    store_f32,
    store_i64,
)
from offload.kernels.product import MAX_TOKENS, TOKENS, UNIT_SUMS
from offload.kernels.sync import barrier, take, tick

MATRIX = np.dtype(
    [
        ("n_in", np.int64),
        ("n_blocks", np.int64),  # of a tile
        ("unit_bytes", np.int64),
        ("steps", np.int64),  # of 32 inputs, of a tile
        ("units", np.int64, (MAX_NODES + 1,)),  # the first unit of each node, and the end
        ("record_bytes", np.int64),  # of one row of inputs
    ]
)
JOB = np.dtype(
    [
        ("n_tokens", np.int64),  # T
        ("n_active", np.int64),  # experts with tokens
        ("active", np.int64),  # -> int64 (n_active, 3): expert, first assignment, assignments; experts ascending
        ("tokens", np.int64),  # -> int64 (T*K,): token of each assignment, in the experts' order
        ("weights", np.int64),  # -> float32 (T*K,): router weight of each assignment
        ("n_nodes", np.int64),  # N
        ("addresses", np.int64),  # -> int64 (E, N, 2): a node's first gate_up unit and first down unit
        ("worker_nodes", np.int64),  # -> int64 for each worker
        ("gate_up", MATRIX),
        ("down", MATRIX),
        ("x", np.int64),  # -> float32 (T, D)
        ("x_records", np.int64),  # -> T records
        ("h_records", np.int64),  # -> T*K records
        ("y", np.int64),  # -> float32 (T, D)
        ("keep", np.int64),  # 0: y is written; else these experts are added to what y holds
        ("scratch", np.int64),  # -> SCRATCH_BYTES for each worker
        ("group_bytes", np.int64),  # of a record
        ("encode_inputs", np.int64),  # functions: the two encoders, and the products by tokens - 1
        ("encode_swiglu", np.int64),
        ("products", np.int64, (MAX_TOKENS,)),
        ("many", np.int64),  # an expert with as many tokens goes through amx.py; without AMX more than there can be
        ("x_rows", np.int64),  # -> T*K rows of bf16, in the experts' order
        ("h_rows", np.int64),  # -> T*K rows of bf16
        ("x_row_bytes", np.int64),
        ("h_row_bytes", np.int64),
        ("panels", np.int64),  # -> panel_bytes for each worker
        ("panel_bytes", np.int64),  # 0: weights are used as they lie
        ("bf16_inputs", np.int64),  # functions
        ("bf16_swiglu", np.int64),
        ("unpack", np.int64),
        ("multiply", np.int64),
    ]
)
job_at = record_at(from_dtype(JOB))
ACTIVE_COLUMNS = 3
FEW_TOKENS = TOKENS[-2]
SEGMENT = 32  # groups of x that one task encodes
RECORDS_BYTES = 64  # a worker's scratch: addresses of up to eight records, one group of inputs, then a unit's sums
GROUP_BYTES = 4 * GROUP
SUMS = RECORDS_BYTES + GROUP_BYTES
SCRATCH_BYTES = SUMS + 4 * amx.TOKENS * UNIT_SUMS
ENCODE_TASKS, ROWS_TASKS, GATE_UP_TASKS, DOWN_TASKS = range(4)  # counters; the last two by node
STOPPED = 1  # status: another worker failed


@njit(**NOPYTHON)
def together(count):
    """How many of so many tokens the next product takes: one of product.TOKENS."""
    return MAX_TOKENS if count >= MAX_TOKENS else min(count, FEW_TOKENS)


@njit(**NOPYTHON)
def padded(values, n, scratch):
    """Address of the n float32 at `values`, filled up to 32."""
    if n == GROUP:
        return values
    for i in range(GROUP):
        store_f32(scratch + RECORDS_BYTES + 4 * i, load_f32(values + 4 * i) if i < n else np.float32(0))
    return scratch + RECORDS_BYTES


@njit(**NOPYTHON)
def encode_tokens(pool, job, scratch):
    hidden = job.gate_up.n_in
    groups = -(-hidden // GROUP)
    segments = -(-groups // SEGMENT)
    task = take(pool, ENCODE_TASKS, 0)
    while task < job.n_tokens * segments:
        token, first = task // segments, task % segments * SEGMENT
        values = job.x + 4 * token * hidden
        record = job.x_records + token * job.gate_up.record_bytes
        for group in range(first, min(first + SEGMENT, groups)):
            inputs = padded(values + group * GROUP_BYTES, min(GROUP, hidden - group * GROUP), scratch)
            call_encode(job.encode_inputs, inputs, record + group * job.group_bytes)
        task = take(pool, ENCODE_TASKS, 0)


@njit(**NOPYTHON)
def encode_rows(pool, job, scratch):
    """For experts with many tokens: their inputs as rows of bf16, one after the other."""
    hidden = job.gate_up.n_in
    task = take(pool, ROWS_TASKS, 0)
    while task < job.n_active:
        start, count = load_i64(job.active + 24 * task + 8), load_i64(job.active + 24 * task + 16)
        for i in range(start, start + count if count >= job.many else start):
            values = job.x + 4 * load_i64(job.tokens + 8 * i) * hidden
            for first in range(0, hidden, GROUP):
                group = padded(values + 4 * first, min(GROUP, hidden - first), scratch)
                call_encode(job.bf16_inputs, group, job.x_rows + i * job.x_row_bytes + 2 * first)
        task = take(pool, ROWS_TASKS, 0)


@njit(**NOPYTHON)
def panel_of(job, matrix, unit, worker):
    """A unit's weights as multiply wants them."""
    if job.panel_bytes == 0:
        return unit
    panel = job.panels + worker * job.panel_bytes
    call_unpack(job.unpack, unit, matrix.n_blocks, panel)
    return panel


@njit(**NOPYTHON)
def gate_up_many(job, unit, index, start, count, worker, scratch):
    """gate_up_rows for an expert with many tokens."""
    panel = panel_of(job, job.gate_up, unit, worker)
    for first in range(start, start + count, amx.TOKENS):
        n = min(amx.TOKENS, start + count - first)
        rows = job.x_rows + first * job.x_row_bytes
        call_multiply(job.multiply, panel, job.gate_up.steps, rows, job.x_row_bytes, n, scratch + SUMS)
        for i in range(n):
            row = job.h_rows + (first + i) * job.h_row_bytes + 2 * GROUP * index
            call_encode(job.bf16_swiglu, scratch + SUMS + 4 * UNIT_SUMS * i, row)


@njit(**NOPYTHON)
def gate_up_rows(job, unit, index, start, n, scratch):
    """The inner rows of unit number `index` for the n assignments from `start`, into their records of h."""
    for i in range(n):
        token = load_i64(job.tokens + 8 * (start + i))
        store_i64(scratch + 8 * i, job.x_records + token * job.gate_up.record_bytes)
    call_product(job.products[n - 1], unit, job.gate_up.n_blocks, scratch, scratch + SUMS)
    for i in range(n):
        record = job.h_records + (start + i) * job.down.record_bytes + index * job.group_bytes
        call_encode(job.encode_swiglu, scratch + SUMS + 4 * UNIT_SUMS * i, record)


@njit(**NOPYTHON)
def gate_up(pool, job, node, worker, scratch):
    matrix = job.gate_up
    first = matrix.units[node]
    units = matrix.units[node + 1] - first
    task = take(pool, GATE_UP_TASKS, node)
    while task < job.n_active * units:
        active = job.active + 24 * (task // units)
        place = job.addresses + 16 * (load_i64(active) * job.n_nodes + node)
        unit, index = load_i64(place) + task % units * matrix.unit_bytes, first + task % units
        start, count = load_i64(active + 8), load_i64(active + 16)
        end = start + count
        if count >= job.many:
            gate_up_many(job, unit, index, start, count, worker, scratch)
            start = end
        while start < end:
            n = together(end - start)
            gate_up_rows(job, unit, index, start, n, scratch)
            start += n
        task = take(pool, GATE_UP_TASKS, node)


@njit(**NOPYTHON)
def add_down(job, first, rows, start, n, sums):
    """y[token, first : first + rows] += weight * sums, for the n assignments from `start`."""
    for i in range(n):
        weight = load_f32(job.weights + 4 * (start + i))
        y = job.y + 4 * (load_i64(job.tokens + 8 * (start + i)) * job.gate_up.n_in + first)
        for r in range(rows):
            store_f32(y + 4 * r, load_f32(y + 4 * r) + weight * load_f32(sums + 4 * (UNIT_SUMS * i + r)))


@njit(**NOPYTHON)
def down_many(job, unit, first, rows, start, count, worker, scratch):
    """down_rows for an expert with many tokens."""
    panel = panel_of(job, job.down, unit, worker)
    for i in range(start, start + count, amx.TOKENS):
        n = min(amx.TOKENS, start + count - i)
        inputs = job.h_rows + i * job.h_row_bytes
        call_multiply(job.multiply, panel, job.down.steps, inputs, job.h_row_bytes, n, scratch + SUMS)
        add_down(job, first, rows, i, n, scratch + SUMS)


@njit(**NOPYTHON)
def down_rows(job, unit, first, rows, start, n, scratch):
    for i in range(n):
        store_i64(scratch + 8 * i, job.h_records + (start + i) * job.down.record_bytes)
    call_product(job.products[n - 1], unit, job.down.n_blocks, scratch, scratch + SUMS)
    add_down(job, first, rows, start, n, scratch + SUMS)


@njit(**NOPYTHON)
def down(pool, job, node, worker, scratch):
    matrix, hidden = job.down, job.gate_up.n_in
    units = matrix.units[node + 1] - matrix.units[node]
    task = take(pool, DOWN_TASKS, node)
    while task < units:
        first = (matrix.units[node] + task) * UNIT_SUMS
        rows = min(UNIT_SUMS, hidden - first)
        for token in range(0 if job.keep else job.n_tokens):
            for r in range(first, first + rows):
                store_f32(job.y + 4 * (token * hidden + r), np.float32(0))
        for active in range(job.active, job.active + 24 * job.n_active, 24):
            tick(pool, worker)
            place = job.addresses + 16 * (load_i64(active) * job.n_nodes + node)
            unit = load_i64(place + 8) + task * matrix.unit_bytes
            start, count = load_i64(active + 8), load_i64(active + 16)
            end = start + count
            if count >= job.many:
                down_many(job, unit, first, rows, start, count, worker, scratch)
                start = end
            while start < end:
                n = together(end - start)
                down_rows(job, unit, first, rows, start, n, scratch)
                start += n
        task = take(pool, DOWN_TASKS, node)


def run_layer(pool, argument, worker):
    """A worker's share of the job at `argument`; the status is 0 unless another worker failed."""
    job = job_at(argument)
    home = load_i64(job.worker_nodes + 8 * worker)
    scratch = job.scratch + worker * SCRATCH_BYTES
    encode_tokens(pool, job, scratch)
    encode_rows(pool, job, scratch)
    if not barrier(pool, 0):
        return STOPPED
    for i in range(job.n_nodes):
        gate_up(pool, job, (home + i) % job.n_nodes, worker, scratch)
    if not barrier(pool, 1):
        return STOPPED
    for i in range(job.n_nodes):
        down(pool, job, (home + i) % job.n_nodes, worker, scratch)
    return 0
