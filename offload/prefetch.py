"""What the router's look-ahead says should be read ahead, how good it was, and whether reading ahead pays.

It pays where the engine waits less for the disk with it than without it. That is measured, not reckoned: now and then
one window of steps runs the other way, and the way with less waiting for each expert run is kept. A wrong guess costs
disk time that a missing expert may have needed, and a slot. Knows scores and seconds, no disk. Called by paging.py.
"""

import statistics
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

WINDOW = 16  # steps that are judged together
KEPT = 8  # windows between two trials of the other way
BETTER = 0.95  # the other way must wait for so much of the time, else nothing is changed


def ranked(scores: torch.Tensor, k: int) -> npt.NDArray[np.int64]:
    """The experts among any token's best k by scores (T, E), those first that more tokens put higher."""
    return in_order(tally(scores, k).cpu())


def tally(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Points (E,) where the scores (T, E) are: a token gives k to its best expert, k - 1 to the next and so on."""
    best = scores.topk(min(k, scores.shape[-1]), -1)  # (T, k)
    places = torch.arange(best.indices.shape[-1], 0, -1.0, device=scores.device).expand_as(best.indices)
    points = torch.zeros(scores.shape[-1], device=scores.device)
    return points.index_add_(0, best.indices.flatten(), (places * best.values.isfinite()).flatten())


def in_order(points: torch.Tensor) -> npt.NDArray[np.int64]:
    """The experts with points (E,), most first."""
    order = points.argsort(descending=True, stable=True)
    return order[: int((points > 0).sum())].numpy()


@dataclass(slots=True)
class Recall:
    """How many of a layer's experts its hints had named."""

    named: int = 0
    wanted: int = 0
    found: int = 0

    @property
    def share(self) -> float | None:
        return self.found / self.wanted if self.wanted else None


class Switch:
    """Whether to read ahead, by the seconds waited for the disk for each expert that ran."""

    def __init__(self) -> None:
        self.on = True
        self._trial = False  # the other way is being tried
        self._steps: list[float] = []
        self._kept = 0  # windows since the last trial
        self._usual = 0.0  # seconds for an expert in the window before the trial

    def step(self, waited: float, experts: int) -> None:
        """A step has ended that waited so many seconds for so many experts."""
        self._steps.append(waited / max(1, experts))
        if len(self._steps) == WINDOW:
            self._window(statistics.fmean(self._steps))
            self._steps.clear()

    def _window(self, seconds: float) -> None:
        if self._trial:
            self._trial, self._kept = False, 0
            if seconds >= BETTER * self._usual:
                self.on = not self.on
            return
        self._kept += 1
        if self._kept == KEPT:
            self._trial, self._usual = True, seconds
            self.on = not self.on
