"""Microseconds of a layer's hand-off (offload/handoff.py): `python -m tests.bench.handoff`.

The device's flag is raised by this thread, as a copy engine would, some time after the layer was posted; the workers'
job only writes down the time. Measured: from the flag to the last worker's start, and from there until the caller has
the sum. Beside it, in turns, the direct way: from submit to the workers' start, and back. With --device cuda a real
segment is sent: from its enqueueing on an idle stream to the sum on the device. The last line of stdout is one JSON
document; `ratio` is direct over flag, from data to sum.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from numba import cfunc, types

from offload.config import ExpertGeometry, PoolConfig
from offload.experts import Experts
from offload.kernels.intrinsics import NOPYTHON, system_call
from offload.topology import find_topology
from tests.bench import machine
from tests.reference.expert_memory import memory_store

CLOCK_GETTIME, MONOTONIC = 228, 1  # Linux on x86-64
TARGET = 80.0  # microseconds of hand-off for a layer
GAP = 300e-6  # seconds that the device's part takes
STAMPS = np.zeros((64, 8), np.int64)  # a line for each worker: seconds, nanoseconds
STAMPS_AT = STAMPS.ctypes.data


@cfunc(types.int64(types.int64, types.int64, types.int64), **NOPYTHON)
def stamp(pool, argument, worker):  # type: ignore[no-untyped-def]
    """The time at which a worker begins."""
    system_call(CLOCK_GETTIME, MONOTONIC, STAMPS_AT + 64 * worker, 0, 0)
    return 0


class Stamped:
    """Kernels whose layer is the stamp."""

    layer = stamp.address


def main() -> int:
    """Run the bench; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.handoff", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="expert workers")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    geometry = ExpertGeometry(8, 512, 64)
    topology, device = find_topology(given.threads), torch.device(given.device)
    config, store = PoolConfig(threads=given.threads), memory_store("int4", geometry)
    direct = Experts(store, config, topology)  # type: ignore[arg-type]
    sent = Experts(store, config, topology, device)  # type: ignore[arg-type]
    for experts in (direct, sent):
        experts._kernels = Stamped()  # type: ignore[assignment]
    x = torch.randn(given.tokens, geometry.hidden, device=device)
    ids = torch.arange(given.tokens * 8, device=device).view(given.tokens, 8) % geometry.n_experts
    asked = x, ids, torch.ones(given.tokens, 8, device=device)
    found: dict[str, list[tuple[float, float]]] = {"direct": [], "flag": []}
    for _ in range(given.rounds):
        found["direct"].append(submitted(direct, asked))
        found["flag"].append(flagged(sent, asked) if given.device == "cpu" else submitted(sent, asked))
    for experts in (direct, sent):
        experts.close()
    result = {way: summary(times) for way, times in found.items()}
    ratio = result["direct"]["total_us"] / result["flag"]["total_us"]
    for way, row in result.items():
        there, back, total = (f"{row[key]:7.1f} us" for key in ("there_us", "back_us", "total_us"))
        print(f"{way:<7} to the workers {there}, back {back}, in all {total}")
    print(f"target {TARGET:g} us: {'met' if result['flag']['total_us'] <= TARGET else 'not met'}")
    print(json.dumps({"bench": "handoff", **machine.describe(), **vars(given), **result, "ratio": ratio}))
    return 0


def submitted(experts: Experts, asked: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Microseconds from submit to the workers, and from there to the sum."""
    settle(asked[0])
    began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    settle(experts.submit(3, *asked).wait())
    return between(began, time.clock_gettime_ns(time.CLOCK_MONOTONIC), experts.n_workers)


def flagged(experts: Experts, asked: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """The same from the flag on, which comes GAP after the submit."""
    handoff = experts._handoff
    assert handoff is not None
    flag = handoff._flag.numpy()
    handoff._sent += 1  # so that the flag of `send` is one short
    pending = experts.submit(3, *asked)
    time.sleep(GAP)
    began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    flag += 1
    pending.wait()
    ended = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    handoff._counter += 1  # as if the device had raised it
    return between(began, ended, experts.n_workers)


def between(began: int, ended: int, n_workers: int) -> tuple[float, float]:
    """Microseconds to the last worker's start, and from there."""
    started = int((STAMPS[:n_workers, 0] * 10**9 + STAMPS[:n_workers, 1]).max())
    return (started - began) / 1e3, (ended - started) / 1e3


def settle(tensor: torch.Tensor) -> None:
    """Let the device finish."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians, without the first tenth."""
    kept = times[len(times) // 10 :]
    return {
        "there_us": statistics.median(there for there, _ in kept),
        "back_us": statistics.median(back for _, back in kept),
        "total_us": statistics.median(there + back for there, back in kept),
        "total_p95_us": float(np.percentile([there + back for there, back in kept], 95)),
    }


if __name__ == "__main__":
    sys.exit(main())
