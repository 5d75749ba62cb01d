"""Contestants taking turns: starts their processes, times them round by round, notes who cannot take part and why.

Knows neither arguments nor tables. Called by `kernels.py`.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tests.bench import figures
from tests.bench.peers.child import Work
from tests.bench.peers.family import Family, FamilyError


class Contest:
    """Who runs, and what was measured."""

    def __init__(self, work: Work, expert_bytes: int) -> None:
        self.about: dict[str, str] = {}  # by contestant
        self.absent: dict[str, str] = {}  # who -> why
        self.results: figures.Results = {}
        self.accuracy: dict[str, dict[str, float]] = {}
        self._work = work
        self._expert_bytes = expert_bytes
        self._families: dict[str, Family] = {}  # by contestant

    def start(self, name: str, python: Path, stack: ExitStack) -> None:
        """Start a family; who cannot run is noted as absent."""
        try:
            family = Family(name, python, self._work)
        except FamilyError as error:
            self._leave(name, error)
            return
        stack.callback(family.close)
        pages = f"{family.huge_bytes / 1e9:.2f} GB on huge pages"
        self.about |= {variant: f"{text}; {pages}" for variant, text in family.variants.items()}
        self._families |= dict.fromkeys(family.variants, family)

    def check(self) -> None:
        """Everybody's relative errors."""
        for name, family in list(self._families.items()):
            try:
                self.accuracy[name] = family.errors(name)
            except FamilyError as error:
                self._leave(name, error)

    def round(self, turn: int, rows: int, ceiling: float, call_limit: float) -> None:
        """Everybody once; who begins changes from round to round."""
        ids = np.load(self._work.directory / f"ids-{rows}.npy", mmap_mode="r")[turn, 1:]
        order = list(self._families)
        first = turn % max(1, len(order))
        for name in order[first:] + order[:first]:
            expected = self._expected(name, rows)
            if expected > call_limit:
                self.absent[f"{name}, {rows} rows"] = f"would take {expected:.0f} s, --call-limit is {call_limit:.0f}"
                continue
            try:
                seconds = self._families[name].time(name, rows, turn)
            except FamilyError as error:
                self._leave(name, error)
                continue
            n_bytes = [len(np.unique(call)) * float(self._expert_bytes) for call in ids[: len(seconds)]]
            timed = figures.Turn(tuple(seconds), tuple(n_bytes), ceiling)
            self.results.setdefault(rows, {}).setdefault(name, []).append(timed)

    def _expected(self, name: str, rows: int) -> float:
        """Seconds that a call may take, judged by the largest smaller number of rows."""
        timed = {n: by_name[name][-1].median for n, by_name in self.results.items() if name in by_name and n <= rows}
        return timed[max(timed)] * rows / max(timed) if timed else 0.0

    def _leave(self, name: str, error: FamilyError) -> None:
        print(f"{name}: {error}", flush=True)
        self.absent[name] = str(error)
        self._families.pop(name, None)
