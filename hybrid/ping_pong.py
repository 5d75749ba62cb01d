"""Whether a step runs as two halves that take turns (`hybrid.lanes`), by trying both ways.

Halves read the device's weights twice and some experts twice, and hide the shorter of device and CPU behind the
longer: which one wins depends on the machine, the model and the batch size. No estimate is needed to find out, for
both ways give the same answer: some steps of each batch size are taken in turns, and the faster way is kept for a
while. What trying costs is bounded: 2 * TRIES of HOLD steps. Knows batches and seconds, no tensors.
Called by `hybrid.engine`.
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hybrid.batch import Batch

Notice = Callable[[str], None]
Mode = Literal["off", "auto", "on"]

ROWS = range(2, 17)  # decode rows of a step for which "auto" tries halves
TRIES = 6  # steps of each way before a choice; their medians are compared
HOLD = 2000  # steps of a batch size for which a choice stands: contexts grow, and others come and go on the machine
GAIN = 0.02  # share of a step that halves must save to be kept


@dataclass(slots=True)
class Trial:
    """Steps of one batch size. `halves` is the present choice, None while it is being tried."""

    whole_seconds: list[float] = field(default_factory=list)
    halves_seconds: list[float] = field(default_factory=list)
    halves: bool | None = None
    held: int = 0  # steps since the choice

    @property
    def next_halves(self) -> bool:
        """How the next step runs: while trying, in turns whole, halves, halves, whole."""
        tried = len(self.whole_seconds) + len(self.halves_seconds)
        return tried % 4 in (1, 2) if self.halves is None else self.halves

    def add(self, halves: bool, seconds: float) -> bool:
        """A step was taken. True where that settles the choice."""
        if self.halves is not None:
            self.held += 1
            if self.held >= HOLD:
                self.whole_seconds, self.halves_seconds, self.halves, self.held = [], [], None, 0
            return False
        (self.halves_seconds if halves else self.whole_seconds).append(seconds)
        if len(self.whole_seconds) < TRIES or len(self.halves_seconds) < TRIES:
            return False
        self.halves = statistics.median(self.halves_seconds) < (1 - GAIN) * statistics.median(self.whole_seconds)
        return True


class PingPong:
    """Splits batches: never, always, or where a trial shows that it pays."""

    def __init__(self, mode: Mode, notice: Notice) -> None:
        """`notice` hears of every choice."""
        self.mode: Mode = mode
        self._notice = notice
        self._trials: dict[int, Trial] = {}

    def parts(self, batch: Batch) -> tuple[Batch, ...]:
        """The batch, or its rows in two halves, in order."""
        trial = self._trial(batch)
        halves = trial.next_halves if trial is not None else self.mode == "on" and len(batch.rows) > 1
        if not halves:
            return (batch,)
        middle = _middle([len(row.ids) for row in batch.rows])
        return Batch(batch.rows[:middle]), Batch(batch.rows[middle:])

    def took(self, batch: Batch, n_parts: int, seconds: float) -> None:
        """What a step cost that ran in so many parts."""
        trial = self._trial(batch)
        if trial is not None and trial.add(n_parts == 2, seconds):
            whole, halves = (statistics.median(tried) * 1e3 for tried in (trial.whole_seconds, trial.halves_seconds))
            way = "in two halves" if trial.halves else "whole"
            self._notice(f"{len(batch.rows)} rows decode {way}: {halves:.1f} ms in halves, {whole:.1f} ms whole")

    @property
    def choices(self) -> dict[int, bool]:
        """Batch sizes that were tried, and whether they run in halves now."""
        return {n: trial.halves for n, trial in sorted(self._trials.items()) if trial.halves is not None}

    def _trial(self, batch: Batch) -> Trial | None:
        n = len(batch.rows)
        if self.mode != "auto" or n not in ROWS or batch.n_tokens > n:
            return None  # prompts read the same experts in both halves: no gain to look for
        return self._trials.setdefault(n, Trial())


def _middle(lengths: list[int]) -> int:
    """How many rows from the first on hold about half of the ids; at least one, and not all."""
    ends = list(itertools.accumulate(lengths))
    return 1 + min(range(len(lengths) - 1), key=lambda i: abs(2 * ends[i] - ends[-1]))
