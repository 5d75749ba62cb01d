"""A layer's tokens grouped by expert, written into the job: what a caller does before the workers start.

Compiled because numpy takes a hundred microseconds for the few numbers of one token, and a layer of a fast machine is
done in five hundred. Knows the job record (layer.py). Called by experts.py.
"""

# mypy: disallow-untyped-defs=False

from numba import njit

from offload.kernels.intrinsics import NOPYTHON, load_f32, load_i64, store_f32, store_i64
from offload.kernels.layer import job_at

UNKNOWN_EXPERT = -1
MASKED = -1  # an id that names no expert: the token does without


@njit(**NOPYTHON)
def count(ids, n, n_experts, ends):
    """How often each expert is named, into `ends`; False when an id is neither one of theirs nor masked."""
    for expert in range(n_experts):
        store_i64(ends + 8 * expert, 0)
    for i in range(n):
        expert = load_i64(ids + 8 * i)
        if expert == MASKED:
            continue
        if expert < 0 or expert >= n_experts:
            return False
        store_i64(ends + 8 * expert, load_i64(ends + 8 * expert) + 1)
    return True


@njit(cache=True, **NOPYTHON)
def begin(job_address, addresses, n_experts, x, ids, weights, n_tokens, k, y, ends, chosen):
    """Fill the job for `n_tokens` rows of x; returns how many experts they name, or UNKNOWN_EXPERT.

    `ids` int64 and `weights` float32 (n_tokens, k) are the router's; `ends` has room for an int64 for each expert.
    `chosen` are as many counters that each expert's tokens are added to. Experts ascend, and an expert's tokens too.
    """
    job = job_at(job_address)
    if not count(ids, n_tokens * k, n_experts, ends):
        return UNKNOWN_EXPERT
    n_active = start = 0
    for expert in range(n_experts):
        tokens = load_i64(ends + 8 * expert)
        if tokens > 0:
            active = job.active + 24 * n_active
            store_i64(active, expert)
            store_i64(active + 8, start)
            store_i64(active + 16, tokens)
            store_i64(chosen + 8 * expert, load_i64(chosen + 8 * expert) + tokens)
            n_active += 1
        store_i64(ends + 8 * expert, start)
        start += tokens
    for i in range(n_tokens * k):
        expert = load_i64(ids + 8 * i)
        if expert == MASKED:
            continue
        place = load_i64(ends + 8 * expert)
        store_i64(ends + 8 * expert, place + 1)
        store_i64(job.tokens + 8 * place, i // k)
        store_f32(job.weights + 4 * place, load_f32(weights + 4 * i))
    job.n_tokens, job.n_active, job.addresses, job.x, job.y = n_tokens, n_active, addresses, x, y
    return n_active


def warm() -> None:
    """Compile, or load from the cache."""
    begin.compile(f"int64({', '.join(['int64'] * 11)})")
