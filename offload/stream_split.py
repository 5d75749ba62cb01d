"""Which of a layer's experts go over the link to the device, so that the CPU and the device end together.

Every upload takes as long as any other, and an expert costs the CPU more the more rows it has. So those with the most
rows go, and how many is found by one scan over the experts by falling rows: the law of HybriMoE and DALI, here with
the order in time of uploads and products, with what lies on the device already, and with the RAM that uploads and
kernels read at the same time. `placement/expert_cost.py` prices a plan with the same law. Knows no bytes and no
devices. Called by `offload.streaming`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StreamRates:
    """Seconds of one expert, here and there."""

    upload: float  # over the link
    read: float  # its bytes from RAM at the whole bandwidth
    cpu_rows: tuple[float, ...]  # at which the CPU was timed, ascending
    cpu_seconds: tuple[float, ...]
    cpu_slope: float  # for each row beyond the last
    device_read: float  # of its bytes in the device's memory
    device_row: float
    beside_copies: float = 1.0  # the CPU's time while experts are uploaded, over its time alone

    def on_cpu(self, rows: Integers) -> Floats:
        """Straight lines between the rows that were timed; 0 of none."""
        beyond = np.maximum(rows - self.cpu_rows[-1], 0) * self.cpu_slope
        return np.asarray(np.interp(rows, (0.0, *self.cpu_rows), (0.0, *self.cpu_seconds)) + beyond)

    def on_device(self, rows: Integers) -> Floats:
        """Reading the expert or multiplying, whichever is longer; 0 of none."""
        return np.where(rows > 0, np.maximum(self.device_read, rows * self.device_row), 0.0)

    def may_pay(self, tokens: int) -> bool:
        """Whether an expert with so many rows could be copied sooner than computed: else not even the scan pays."""
        return bool(self.on_cpu(np.array([tokens]))[0] > self.upload)


def best_stream(rates: StreamRates, rows: Integers, ready: Integers, resident: Integers) -> list[int]:
    """The experts for the link, in the order of their uploads.

    `rows` (E,) tokens of each expert, 0 for those that are settled elsewhere; `ready` experts lie in the ring already,
    and stand first in the answer where they have rows. `resident` (E,) are the rows of experts in VRAM.
    """
    waiting = rows.copy()
    waiting[ready] = 0
    first = ready[np.argsort(-rows[ready], kind="stable")]
    first = first[rows[first] > 0]
    others = np.argsort(-waiting, kind="stable")[: np.count_nonzero(waiting)]
    order = np.concatenate((first, others))
    ends = makespans(rates, rows[order], len(first), float(rates.on_device(resident).sum()))
    n = len(first) + int(np.argmin(ends[len(first) :]))
    return [int(expert) for expert in order[:n]]


def makespans(rates: StreamRates, rows: Integers, n_ready: int, busy: float) -> Floats:
    """(n + 1,) seconds of a layer if the first k of its experts (`rows` (n,), in order) run on the device, the rest on
    the CPU. The first `n_ready` need no upload; the device has `busy` seconds of other work first.

    The device ends at the latest of: an upload's end and all products from that expert on. Uploads and kernels
    together take at least as long as RAM needs for all their bytes.
    """
    uploads = np.maximum(np.arange(len(rows) + 1) - n_ready, 0)
    on_cpu, products = rates.on_cpu(rows), np.append(0.0, np.cumsum(rates.on_device(rows)))
    rest = on_cpu.sum() - np.append(0.0, np.cumsum(on_cpu))
    reading = (len(rows) - n_ready) * rates.read
    host = np.where(uploads > 0, np.maximum(rest * rates.beside_copies, reading), rest)
    starts = np.maximum.accumulate(np.append(busy, uploads[1:] * rates.upload - products[:-1]))
    return np.maximum(host, products + starts)
