"""Whether this process had the machine to itself: timings beside other work say nothing about the machine.

torch's threads wait for each other many times in a layer, so that one other busy process makes a step several times
slower. Linux only. Called by benches that must compare.
"""

import os
import time

import psutil

QUIET = 0.05  # share of all processors that others may have
NAP = 0.5  # seconds between looks


class Others:
    """What other processes do on the processors, between one look and the next."""

    def __init__(self) -> None:
        self._last = self._now()

    def look(self) -> float:
        """Share of all processors' time that went to others since the last look. Look half a second apart or more:
        the system counts in hundredths of seconds."""
        before, self._last = self._last, self._now()
        passed, busy, own = (after - start for after, start in zip(self._last, before, strict=True))
        return max(0.0, busy - own) / (passed * (os.cpu_count() or 1))

    def wait(self, seconds: float) -> bool:
        """Sleep until they are quiet, so many seconds at most; False where they are not by then."""
        deadline = time.perf_counter() + seconds
        while True:
            self.look()
            time.sleep(NAP)
            if self.look() <= QUIET:
                return True
            if time.perf_counter() > deadline:
                return False

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        return time.perf_counter(), times.user + times.nice + times.system + times.steal, time.process_time()
