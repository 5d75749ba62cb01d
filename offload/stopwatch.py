"""How long the device worked on something, without waiting for it. Called by offload/split.py."""

import time
from typing import Any

import torch


class PlainStopwatch:
    """The CPU as the device: it works while the caller does, so all of it is time that the step waits."""

    overlaps = False

    def start(self) -> Any:
        return time.perf_counter()

    def stop(self, started: Any) -> Any:
        return time.perf_counter() - started

    def seconds(self, lap: Any) -> float | None:
        """None while the device is not done."""
        return float(lap)


class CudaStopwatch:
    """Events on the current stream."""

    overlaps = True

    def start(self) -> Any:
        return self._event()

    def stop(self, started: Any) -> Any:
        return started, self._event()

    def seconds(self, lap: Any) -> float | None:
        """None while the device is not done."""
        started, ended = lap
        return float(started.elapsed_time(ended)) / 1e3 if ended.query() else None

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


Stopwatch = PlainStopwatch | CudaStopwatch


def stopwatch_of(device: torch.device) -> Stopwatch:
    """For work on this device."""
    return CudaStopwatch() if device.type == "cuda" else PlainStopwatch()
