"""What the kernel bench's seconds say: medians, spreads, rates, and ratios of pairs, as values and as tables.

Pure arithmetic on what was measured, so that it can be tested without measuring. Called by `kernels.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Turn:
    """One contestant's forwards of one round at one number of rows."""

    seconds: tuple[float, ...]
    n_bytes: tuple[float, ...]  # of the distinct experts of each forward, in our format
    ceiling: float  # bytes per second that the memory gave in the same round

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return float(np.median(np.array(self.n_bytes) / self.seconds))


@dataclass(frozen=True, slots=True)
class Figure:
    """One contestant at one number of rows, over all rounds."""

    rows: int
    name: str
    calls: int
    milliseconds: float  # median of all calls
    low: float  # tenth percentile
    high: float  # ninetieth
    bytes_per_second: float
    share_of_read: float  # median over rounds
    tokens_per_second: float

    @classmethod
    def of(cls, rows: int, name: str, turns: Sequence[Turn]) -> "Figure":
        every = np.concatenate([turn.seconds for turn in turns])
        low, median, high = (float(value) for value in np.percentile(every, (10, 50, 90)) * 1e3)
        return cls(
            rows, name, len(every), median, low, high,
            float(np.median([turn.rate for turn in turns])),
            float(np.median([turn.rate / turn.ceiling for turn in turns])),
            rows / median * 1e3,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long `name` takes as `base`, round by round. Above 1, `base` is faster."""

    rows: int
    name: str
    base: str
    median: float
    low: float  # smallest of the rounds
    high: float  # largest

    @classmethod
    def of(cls, rows: int, name: str, turns: Sequence[Turn], base: str, against: Sequence[Turn]) -> "Ratio":
        ratios = [turn.median / other.median for turn, other in zip(turns, against, strict=True)]
        return cls(rows, name, base, float(np.median(ratios)), min(ratios), max(ratios))


Results = dict[int, dict[str, list[Turn]]]  # rows -> contestant -> its turns, rounds in order


def figures(results: Results) -> list[Figure]:
    return [Figure.of(rows, name, turns) for rows, by_name in results.items() for name, turns in by_name.items()]


def ratios(results: Results, bases: Sequence[str]) -> list[Ratio]:
    """Every contestant against each of `bases`, where both ran in all rounds."""
    return [
        Ratio.of(rows, name, turns, base, by_name[base])
        for rows, by_name in results.items()
        for base in bases
        for name, turns in by_name.items()
        if name != base and base in by_name and len(turns) == len(by_name[base])
    ]


def table(results: Results, base: str) -> str:
    """For people: one line for each contestant, by rows."""
    versus = {(ratio.rows, ratio.name): ratio for ratio in ratios(results, [base])}
    lines = [
        f"{'rows':>5} {'contestant':<26}{'ms':>9}  {'p10–p90':<17}{'GB/s':>7}{'of read':>9}{'tok/s':>9}  times {base}"
    ]
    for f in figures(results):
        spread = f"{f.low:.2f}–{f.high:.2f}"
        lines.append(
            f"{f.rows:>5} {f.name:<26}{f.milliseconds:>9.2f}  {spread:<17}{f.bytes_per_second / 1e9:>7.2f}"
            f"{f.share_of_read:>9.0%}{f.tokens_per_second:>9.1f}  {_times(versus.get((f.rows, f.name)))}"
        )
    return "\n".join(lines)


def markdown(results: Results, base: str) -> str:
    """One line for each number of rows, one column for each contestant, compared with `base`."""
    names = list(dict.fromkeys(name for by_name in results.values() for name in by_name))
    versus = {(ratio.rows, ratio.name): ratio for ratio in ratios(results, [base])}
    by_key = {(figure.rows, figure.name): figure for figure in figures(results)}
    lines = [_row(["rows", *names]), _row(["---:"] * (len(names) + 1))]
    for rows in results:
        cells = [_cell(by_key.get((rows, name)), versus.get((rows, name))) for name in names]
        lines.append(_row([str(rows), *cells]))
    return "\n".join(lines)


def _cell(figure: Figure | None, ratio: Ratio | None) -> str:
    if figure is None:
        return "–"
    if ratio is None:
        rate = f"{figure.bytes_per_second / 1e9:.1f} GB/s"
        return f"{figure.milliseconds:.1f} ms, {rate}, {figure.share_of_read:.0%} of read"
    return f"{figure.milliseconds:.1f} ms, {_times(ratio)}"


def _times(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_json(results: Results, bases: Sequence[str]) -> dict[str, Any]:
    return {
        "figures": [asdict(figure) for figure in figures(results)],
        "ratios": [asdict(ratio) for ratio in ratios(results, bases)],
        "read_bandwidth": {rows: [turn.ceiling for turn in next(iter(by.values()))] for rows, by in results.items()},
    }
