"""Decode steps whole against steps in two halves that take turns (`hybrid.lanes`): `python -m tests.bench.overlap`.

On the CPU as device, the device's part runs on one thread and the experts on workers with cores of their own, so the
overlap is real, but both read the same memory. Steps are taken whole, halves, halves, whole, … on one engine, a
mid-size random checkpoint; the ratio is of medians. `waiting` is the share of a step in which the device's thread did
nothing but wait for the experts: what halves are to hide. `--device-ms` puts in the device's place
one that takes so long for a layer, whatever its rows, and touches no memory here, as a GPU would: it computes nothing,
so only the times mean something. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.layers import Mlp
from hybrid.mla import Attention
from hybrid.ping_pong import Mode
from hybrid.trial_steps import TrialSteps, pages_needed
from offload.config import PoolConfig
from tests.bench import machine
from tests.bench.stepping import PAGE_SIZE, cache_folder, checkpoint, mid_size_config

TURNS: tuple[Mode, ...] = ("off", "on", "on", "off")


def main() -> int:
    """Run the bench; returns the exit status."""
    given = _arguments()
    torch.set_num_threads(given.device_threads)
    if given.device_ms:
        stand_in(given.device_ms * 1e-3)
    model = given.model or checkpoint(given.cache, mid_size_config(given.experts_gb))
    n_pages = pages_needed(PAGE_SIZE, given.context, given.context, max(given.batches), max(given.batches))
    pool = PoolConfig(threads=given.threads)
    engine = Engine(EngineConfig(model, given.device, given.dtype, "native", pool, n_pages, PAGE_SIZE))
    try:
        found = [decode(engine, batch, given.context, given.steps) for batch in given.batches]
    finally:
        engine.close()
    print(table(found))
    settings = {
        "threads": given.threads,
        "device_threads": given.device_threads,
        "context": given.context,
        "device_ms": given.device_ms,
    }
    print(
        json.dumps({"bench": "overlap", **machine.describe(), "torch": torch.__version__, **settings, "steps": found})
    )
    return 0


def stand_in(seconds: float) -> None:
    """A device that takes so long for every part's attention, and nothing for its MLPs."""

    def sleeps(attention: Attention, x: torch.Tensor, *others: object) -> torch.Tensor:
        time.sleep(seconds)
        return torch.zeros_like(x)

    Attention.__call__ = sleeps  # type: ignore[method-assign, assignment]
    Mlp.__call__ = lambda mlp, x: torch.zeros_like(x)  # type: ignore[method-assign]


def table(found: list[dict[str, Any]]) -> str:
    """The figures for people."""
    lines = [f"{'batch':>5}{'whole ms':>10}{'halves ms':>11}{'ratio':>7}{'waiting':>14}{'experts':>12}"]
    for row in found:
        whole, halves = row["off"], row["on"]
        waiting = f"{whole['waiting']:.0%}, {halves['waiting']:.0%}"
        experts = f"{whole['experts']:.0f}, {halves['experts']:.0f}"
        line = f"{row['batch']:>5}{whole['ms']:>10.1f}{halves['ms']:>11.1f}{row['ratio']:>7.2f}"
        lines.append(f"{line}{waiting:>14}{experts:>12}")
    return "\n".join(lines)


def decode(engine: Engine, batch: int, context: int, steps: int) -> dict[str, Any]:
    """One batch size, both ways in turns."""
    trial = TrialSteps(engine)
    trial.fill(context, batch, None)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    waiting: dict[str, list[float]] = {"off": [], "on": []}
    experts: dict[str, list[int]] = {"off": [], "on": []}
    for i in range(-len(TURNS), 2 * steps):
        mode = TURNS[i % len(TURNS)]
        engine.use_ping_pong(mode)
        before = engine.expert_stats().waited
        out = trial.decode(batch)
        if i >= 0:  # the first steps warm up
            seconds[mode].append(out.seconds)
            waiting[mode].append((engine.expert_stats().waited - before) / out.seconds)
            experts[mode].append(out.distinct_experts)
    result: dict[str, Any] = {"batch": batch}
    for mode in seconds:
        result[mode] = {
            "ms": statistics.median(seconds[mode]) * 1e3,
            "waiting": statistics.median(waiting[mode]),
            "experts": statistics.mean(experts[mode]),
        }
    result["ratio"] = result["off"]["ms"] / result["on"]["ms"]
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overlap", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint to time (default: a random one)")
    parser.add_argument("--experts-gb", type=float, default=1.3, help="size of the random one's experts")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where it is kept")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="expert workers")
    parser.add_argument("--device-threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--device-ms", type=float, default=0.0, help="a stand-in for the device (default: none)")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--batches", type=_numbers, default=(2, 4, 8, 16), help="batch sizes, as 2,4")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each way and batch size")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
