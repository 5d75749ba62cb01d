"""How many KV pages RAM keeps for prefixes that no running request holds: between two turns, or after a preemption.

Plain sizes in, a number of pages out. Called by `ledger.py`.
"""

KEPT_SHARE = 0.5  # of the RAM that nothing else wants: what is pinned is lost to everything else on the machine
MOST_KEPT = 64 * 2**30  # bytes where nobody asks for more: 978,000 tokens of K2.5 in bf16


def kept_pages(asked: int | None, free: int, page: int, useful: int) -> int:
    """Pages of `page` bytes: what was asked for, else a share of the `free` bytes, but no more than `useful`."""
    if asked is not None:
        return asked // page
    return max(0, min(useful, min(int(KEPT_SHARE * free), MOST_KEPT) // page))
