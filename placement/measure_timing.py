"""How things are timed, and how large: the machine is slow for seconds at a time, so everything takes turns.

`take_turns` calls each of several things for a moment and then again from the start, so that a slow phase falls on all
of them alike and shows in the spread. Knows no experts and no device. Called by the other `measure_` modules.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from placement.document import Measured
from placement.profile import median_of

K = TypeVar("K")


class CannotMeasureError(RuntimeError):
    """A figure that this machine does not give. One line with the reason."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long one table of figures may take."""

    seconds: float = 3.0  # of calls, over all turns; a last turn is finished
    rounds: int = 3  # at least
    most: float = 9.0  # seconds after which fewer rounds are enough
    visit: float = 0.03  # seconds of calls of one thing before it is the next one's turn
    longest: float = 1.0  # seconds of a call; larger ones are left out then


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is timed. Tests take small ones; the figures of a profile are those of a K2.5-sized layer."""

    hidden: int = 7168
    inner: int = 2048
    rows: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    expert_bytes: int = 400_000_000  # of experts, at least; four times the caches where those are larger
    read_bytes: int = 1 << 30
    gemm: int = 4096
    gemm_rows: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 2048)
    heads: int = 64
    decodes: tuple[tuple[int, int], ...] = ((1, 8192), (8, 8192), (32, 2048))  # rows, context of each
    prompt: tuple[int, int] = (512, 2048)  # new ids, context with them
    layers: tuple[int, int] = (2, 8)  # of two tiny models that differ in nothing else
    batches: tuple[int, ...] = (1, 4, 16)
    vocabulary: int = 163_840
    copy_bytes: int = 24_772_608  # one K2.5 expert, int4
    copies: int = 20
    effort: Effort = Effort()


def take_turns(
    calls: Mapping[K, Callable[[], float]], effort: Effort, leaves_out: bool = False
) -> dict[K, list[float]]:
    """Seconds of each call, by turns; each answers the seconds that it took. Each is called once beforehand, untimed.

    `leaves_out`: the calls are in order, from the fastest on, and those after one that takes longer than
    `effort.longest` twice are left out.
    """
    found: dict[K, list[float]] = {}
    for key, call in calls.items():
        found[key] = []
        if call() > effort.longest and leaves_out and call() > effort.longest:
            break
    began, rounds = time.perf_counter(), 0
    while True:
        for key, seconds in found.items():
            seconds += _visit(calls[key], effort.visit)
        rounds += 1
        spent = time.perf_counter() - began
        if spent >= effort.seconds and (rounds >= effort.rounds or spent >= effort.most):
            return found


def medians(samples: Mapping[K, list[float]]) -> dict[K, Measured]:
    """Each thing's median and spread."""
    return {key: median_of(seconds) for key, seconds in samples.items()}


def timed(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of `run` on the device: by the device's own clock where it has one, and until it is done."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _visit(call: Callable[[], float], most: float) -> list[float]:
    seconds = [call()]
    while sum(seconds) < most:
        seconds.append(call())
    return seconds
