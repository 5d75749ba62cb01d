"""The model card's pictures: `python -m hybrid.nano.plots TRAINING_DIR RECORD OUT_DIR` writes loss.svg and load.svg.

matplotlib is optional, so it is imported only to draw; without a date and with a fixed salt the same data is the same
file. Reads the log of `hybrid.nano.train` and a record of `hybrid.nano.record`; knows no network.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.routes import Record, RecordError, read_record

LIMIT = 3.0  # of a load, in units of the mean
COLUMNS = 4  # layers side by side
POINTS = 400  # of the loss
ALL, DECODED, WARNING, FAINT = "#9ecae1", "#08519c", "#d55e00", "#888888"
# The scores that are drawn, where the log has them: colour and dash, told apart by the colour-blind too.
SCORES = {
    "copy": ("#999999", "-"), "tool": ("#0072b2", "-"), "tool unseen": ("#0072b2", "--"),
    "sub-agent call": ("#009e73", "-"), "sub-agent message": ("#009e73", "--"),
    "fan-out 4": ("#d55e00", "-"), "fan-out 10": ("#d55e00", "--"), "fan-out numbered 30": ("#d55e00", ":"),
    "merge 4": ("#cc79a7", "-"), "sum think": ("#000000", "-"), "sum direct": ("#000000", ":"),
}  # fmt: skip

Line = dict[str, Any]  # of the log
# Of a line: the first three are always there.
KEYS: dict[str, type] = {"phase": str, "steps": int, "tokens": int, "loss": float, "scores": dict}
ALWAYS = ("phase", "steps", "tokens")
NOUNS = {str: "a name", int: "a whole number", float: "a number", dict: "numbers by name"}


class PlotError(ValueError):
    """A picture cannot be drawn. One line with the remedy."""


def read_log(directory: Path) -> list[Line]:
    """The lines of log.jsonl in order of their steps; what a training that was cut off did again counts once, and a
    last line that it did not finish not at all.

    Raises PlotError.
    """
    path = directory / "log.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise PlotError(f"{path}: cannot be read: {error.strerror}; name a directory of hybrid.nano.train") from None
    kept: list[Line] = []
    for number, text in enumerate(lines, 1):
        try:
            line = _line(text)
        except ValueError as error:
            if number == len(lines) and not isinstance(error, PlotError):
                break  # cut off while it was written
            raise PlotError(f"{path}: line {number}: {error}; delete it") from None
        while kept and _order(kept[-1]) >= _order(line):
            kept.pop()
        kept.append(line)
    if not any("loss" in line for line in kept):
        raise PlotError(f"{path}: no loss yet: train on")
    return kept


def _line(text: bytes) -> Line:
    """One line of the log. Raises PlotError where it is another's, ValueError where it is not JSON."""
    line = json.loads(text)
    if not isinstance(line, dict):
        raise PlotError("expected keys and values")
    for key, kind in KEYS.items():
        if not isinstance(line.get(key, None if key in ALWAYS else kind()), kind):
            raise PlotError(f"expected {key} to be {NOUNS[kind]}")
    return line


def _order(line: Line) -> tuple[int, bool]:
    return line["steps"], "scores" in line  # which follow the loss of the same step


def phase_starts(log: Sequence[Line]) -> list[tuple[int, str]]:
    """Tokens seen before each phase, and its name."""
    starts: list[tuple[int, str]] = []
    seen = 0
    for line in log:
        if not starts or line["phase"] != starts[-1][1]:
            starts.append((seen, line["phase"]))
        seen = line["tokens"]
    return starts


def draw_training(log: Sequence[Line], figures: Any) -> Any:
    """Loss and scores over the tokens seen, phases marked. `figures` is the module matplotlib.figure."""
    figure = figures.Figure(figsize=(9.0, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    losses = thinned([(line["tokens"] / 1e6, line["loss"]) for line in log if "loss" in line])
    top.plot(*zip(*losses, strict=True), color=DECODED, linewidth=0.9)
    top.set_yscale("log")
    top.set_ylabel("loss")
    probes = [line for line in log if "scores" in line]
    for name, (colour, dash) in SCORES.items():
        points = [(line["tokens"] / 1e6, line["scores"][name]) for line in probes if name in line["scores"]]
        if points:
            bottom.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.3, label=name)
    bottom.set_ylim(-0.03, 1.03)
    bottom.set_ylabel("held-out turns right to the last token")
    bottom.set_xlabel("million tokens seen")
    if probes:
        bottom.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=2.5)
    for tokens, name in phase_starts(log):
        for axes in (top, bottom):
            axes.axvline(tokens / 1e6, color=FAINT, linewidth=0.8)
        place = {"xy": (tokens / 1e6, 1.02), "xycoords": ("data", "axes fraction"), "rotation": 30}
        top.annotate(name, **place, color=FAINT)
    for axes in (top, bottom):
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlim(0, log[-1]["tokens"] / 1e6)
    return figure


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of as many neighbours as leave POINTS points at most: a long training's curve stays a small file."""
    n = -(-len(points) // POINTS)
    groups = [points[i : i + n] for i in range(0, len(points), n)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def draw_load(record: Record, figures: Any) -> Any:
    """Each layer's experts by falling load, over all tokens and over those that a server decodes."""
    n_layers = len(record.layers)
    columns = min(COLUMNS, n_layers)
    rows = -(-n_layers // columns)
    figure = figures.Figure(figsize=(2.6 * columns, 2.6 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    masks = (None, record.decoded) if record.decoded.any() else (None,)
    counts = [record.counts(mask) for mask in masks]
    loads = [found / found.mean(axis=1, keepdims=True) for found in counts]
    edges = [i + 0.5 for i in range(record.n_experts + 1)]
    for i, axes in enumerate(grid.flat[:n_layers]):
        everything, *answers = (sorted(load[i], reverse=True) for load in loads)
        axes.stairs(everything, edges, fill=True, color=ALL, label="all tokens")
        for decoded in answers:
            axes.stairs(decoded, edges, color=DECODED, linewidth=1.2, label="answers only")
        axes.axhline(1, color=FAINT, linewidth=0.8, label="mean")
        axes.axhline(LIMIT, color=WARNING, linewidth=0.9, linestyle="--", label=f"limit {LIMIT:.0f}")
        busiest = " / ".join(f"{load[i].max():.2f}" for load in loads)
        axes.set_title(f"layer {record.layers[i]}: busiest {busiest}", fontsize=9)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("experts, busiest first")
    for axes in grid.flat[n_layers:]:
        axes.set_axis_off()
    grid[0, 0].set_ylim(0, 1.05 * max(LIMIT, *(float(load.max()) for load in loads)))
    for row in grid:
        row[0].set_ylabel("load over the mean")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def plots(directory: Path, record: Path, out: Path) -> None:
    """Write loss.svg and load.svg. Raises PlotError, RecordError and OSError."""
    log, routes = read_log(directory), read_record(record)
    try:
        matplotlib = importlib.import_module("matplotlib")
        figures = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise PlotError("pictures are drawn by matplotlib, which is missing: pip install matplotlib") from None
    out.mkdir(parents=True, exist_ok=True)
    style = {"svg.hashsalt": "hybrid", "font.size": 9, "axes.spines.right": False, "axes.spines.top": False}
    with matplotlib.rc_context(style):
        for name, figure in (("loss", draw_training(log, figures)), ("load", draw_load(routes, figures))):
            figure.savefig(out / f"{name}.svg", format="svg", metadata={"Date": None, "Creator": None})


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.nano.plots", description=__doc__)
    parser.add_argument("directory", type=Path, help="of python -m hybrid.nano.train")
    parser.add_argument("record", type=Path, help="of python -m hybrid.nano.record")
    parser.add_argument("out", type=Path, help="directory to write to")
    options = parser.parse_args(arguments)
    try:
        plots(options.directory, options.record, options.out)
    except (PlotError, RecordError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
