"""A simulation as a picture: who waits, reads and answers when, and how full the steps are. SVG, by matplotlib.

matplotlib is optional, so it is imported only to draw. Knows nothing of what made the report. Called by the `simulate`
command for `--plot`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.simulate import Report, Served

MOST_LANES = 100
BINS = 400  # along the time axis
WIDTH, CURVES_HEIGHT, LANE_HEIGHT = 11.0, 3.6, 0.09  # inches
QUEUED, READING, ANSWERING = "#cfcfcf", "#e69f00", "#0072b2"  # told apart by the colour-blind too
PREFILL, RUNNING = "#d55e00", "#555555"


class TimelineError(ValueError):
    """The picture cannot be drawn. One line with the remedy."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Means over equal stretches of time, from the start to the last answer."""

    width: float  # seconds of one stretch
    running: tuple[float, ...]  # requests between their first step and their last
    decoding: tuple[float, ...]  # rows of a step that go on with an answer
    prefilled: tuple[float, ...]  # prompt tokens a second


def plot(report: Report, path: Path) -> None:
    """Draw `report` into an SVG file. Raises TimelineError where nothing was served, matplotlib is missing or the file
    cannot be written."""
    if not report.served:
        raise TimelineError(f"{path}: nothing to draw, every request was refused")
    drawn(lambda figures: draw(report, figures), path)


def drawn(figure_of: Callable[[Any], Any], path: Path) -> None:
    """Write the figure that `figure_of(module matplotlib.figure)` makes as SVG. Raises TimelineError."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise TimelineError("a timeline is drawn by matplotlib, which is missing: pip install matplotlib") from None
    # Without a date and with a fixed salt the same report is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "hybrid", "font.size": 9, "axes.spines.right": False}):
        figure = figure_of(figures)
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise TimelineError(f"{path}: cannot be written: {error.strerror}; name another file") from None


def draw(report: Report, figures: Any) -> Any:
    """The figure; `figures` is the module matplotlib.figure."""
    lanes = min(report.agents, MOST_LANES)
    height = max(1.5, LANE_HEIGHT * lanes)
    figure = figures.Figure(figsize=(WIDTH, height + CURVES_HEIGHT), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(height, 1.7, 1.3))
    _draw_lanes(top, report, lanes)
    _draw_curves(middle, bottom, curves(report, BINS), report.makespan)
    return figure


def curves(report: Report, n: int) -> Curves:
    """Means over `n` stretches."""
    width = report.makespan / n
    spans = [(step.start, step.start + step.seconds) for step in report.steps]
    running = binned([(r.started, r.finished) for r in report.served], [1.0] * len(report.served), width, n)
    decoding = binned(spans, [float(step.decoding) for step in report.steps], width, n)
    rates = [step.prefilled / step.seconds if step.seconds else 0.0 for step in report.steps]
    return Curves(width, running, decoding, binned(spans, rates, width, n))


def binned(spans: Sequence[tuple[float, float]], heights: Sequence[float], width: float, n: int) -> tuple[float, ...]:
    """The mean over each of `n` stretches of a sum of boxes: `heights` over `spans` (start, end), 0 elsewhere."""
    sums = [0.0] * n
    for (start, end), height in zip(spans, heights, strict=True):
        if end <= start or height == 0:
            continue
        first, last = min(int(start / width), n - 1), min(int(end / width), n - 1)
        for i in range(first, last + 1):
            overlap = min(end, (i + 1) * width) - max(start, i * width)
            sums[i] += height * max(overlap, 0.0) / width
    return tuple(sums)


def segments(served: Sequence[Served], lanes: int) -> dict[str, list[tuple[int, float, float]]]:
    """By colour the bars of the first `lanes` agents: (agent, start, seconds). Waits for tools stay blank."""
    found: dict[str, list[tuple[int, float, float]]] = {QUEUED: [], READING: [], ANSWERING: []}
    for request in served:
        if request.agent < lanes:
            ends = (request.arrived, request.started, request.first_token, request.finished)
            for colour, start, end in zip(found, ends, ends[1:], strict=False):
                found[colour].append((request.agent, start, end - start))
    return found


def _draw_lanes(axes: Any, report: Report, lanes: int) -> None:
    labels = {QUEUED: "queued", READING: "prompt", ANSWERING: "answer"}
    for colour, bars in segments(report.served, lanes).items():
        agents, starts, widths = zip(*bars, strict=True) if bars else ((), (), ())
        axes.barh(agents, widths, left=starts, height=0.8, color=colour, linewidth=0, label=labels[colour])
    shown = "" if lanes == report.agents else f" (the first {lanes} are shown)"
    axes.set_title(
        f"{report.agents} agents{shown}, {len(report.served)} requests in {report.makespan:,.1f} s, "
        f"{report.generated / report.makespan:.1f} tok/s",
        loc="left",
    )
    axes.set_ylabel("agent")
    axes.set_ylim(lanes - 0.5, -0.5)  # the first one on top
    axes.yaxis.get_major_locator().set_params(integer=True)
    _legend(axes)


def _draw_curves(middle: Any, bottom: Any, means: Curves, makespan: float) -> None:
    edges = [i * means.width for i in range(len(means.running) + 1)]
    middle.stairs(means.decoding, edges, fill=True, color=ANSWERING, alpha=0.35, label="rows that decode")
    middle.stairs(means.running, edges, color=RUNNING, label="requests running")
    middle.set_ylabel("requests")
    _legend(middle)
    bottom.stairs(means.prefilled, edges, fill=True, color=PREFILL)
    bottom.set_ylabel("prompt tok/s")
    bottom.set_xlabel("seconds")
    for axes in (middle, bottom):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
    bottom.set_xlim(0, makespan)


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)
