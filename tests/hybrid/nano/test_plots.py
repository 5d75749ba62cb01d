"""hybrid.nano.plots: what is read from the log, and the pictures themselves where matplotlib is installed."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hybrid.nano.plots import ALL, DECODED, PlotError, main, phase_starts, plots, read_log, thinned
from hybrid.routes import Record, read_record, write_record


def line(phase: str, steps: int, **values: Any) -> dict[str, Any]:
    return {"phase": phase, "step": steps, "steps": steps, "tokens": 1000 * steps, "seconds": 1.0 * steps, **values}


LOG = [
    line("early", 25, loss=5.0), line("early", 50, loss=3.0), line("early", 50, scores={"copy": 0.5}),
    line("full", 75, loss=2.0), line("full", 100, loss=1.0),
    line("full", 100, scores={"copy": 0.9, "tool": 0.2, "chat": 1.0}),
    line("late", 125, loss=0.5), line("late", 150, scores={"copy": 1.0, "tool": 0.8}),
]  # fmt: skip


def training(directory: Path, *lines: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "log.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return directory


def record(path: Path, n_layers: int) -> Path:
    experts = np.sort(np.random.default_rng(2).random((60, n_layers, 8)).argsort(axis=2)[..., :2], axis=2)
    layers, zeros = np.arange(1, n_layers + 1), np.zeros((n_layers, 8), np.float32)
    turns, kinds = np.array([[20, 60]]), np.array(["chat"])
    write_record(
        path,
        Record("0", layers, zeros, np.zeros(60, int), np.array([0]), kinds, turns, kinds, experts, zeros[None, :][:0]),
    )
    return path


def test_the_log_in_order(tmp_path: Path) -> None:
    assert read_log(training(tmp_path, *LOG)) == LOG


def test_what_was_done_again_counts_once(tmp_path: Path) -> None:
    """Cut off after step 100, gone on from a state of step 50."""
    again = [line("full", 75, loss=2.5), line("full", 100, loss=1.5), line("full", 125, loss=1.2)]
    assert read_log(training(tmp_path, *LOG[:6], *again)) == [*LOG[:3], *again]
    # and from a state between two lines: the loss of step 100 is replaced with the scores behind it
    assert read_log(training(tmp_path, *LOG[:6], LOG[4])) == LOG[:5]


def test_a_line_that_is_being_written_is_skipped(tmp_path: Path) -> None:
    log = training(tmp_path, *LOG[:3]) / "log.jsonl"
    whole = log.read_bytes()
    for end in (1, 20, len(whole.splitlines()[2]) - 1):
        log.write_bytes(whole + whole.splitlines()[2][:end])
        assert read_log(tmp_path) == LOG[:3]
    log.write_bytes(whole[:-1])  # whole but for the end of the line
    assert read_log(tmp_path) == LOG[:3]
    log.write_bytes(b'{"phase": "early\n' + whole)
    with pytest.raises(PlotError, match=r"log\.jsonl: line 1: .*; delete it$"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected keys and values"),
        ('{"steps": 3, "tokens": 5}', "expected phase to be a name"),
        ('{"phase": 1, "steps": 3, "tokens": 5}', "expected phase to be a name"),
        ('{"phase": "early", "tokens": 5}', "expected steps to be a whole number"),
        ('{"phase": "early", "steps": 3}', "expected tokens to be a whole number"),
        ('{"phase": "early", "steps": 3, "tokens": 5, "loss": "low"}', "expected loss to be a number"),
        ('{"phase": "early", "steps": 3, "tokens": 5, "scores": 1}', "expected scores to be numbers by name"),
    ],
)
def test_a_line_of_something_else(tmp_path: Path, text: str, said: str) -> None:
    log = training(tmp_path, *LOG[:3]) / "log.jsonl"
    log.write_text(f"{log.read_text()}{text}\n")
    with pytest.raises(PlotError) as caught:
        read_log(tmp_path)
    assert str(caught.value) == f"{log}: line 4: {said}; delete it"


def test_phases_begin_where_the_one_before_ended() -> None:
    assert phase_starts(LOG) == [(0, "early"), (50_000, "full"), (100_000, "late")]


@pytest.mark.parametrize(("n", "left"), [(1, 1), (400, 400), (401, 201), (1001, 334)])
def test_thinning_keeps_the_mean(n: int, left: int) -> None:
    found = thinned([(float(i), 2.0) for i in range(n)])
    assert len(found) == left
    assert {y for _, y in found} == {2.0}
    size = -(-n // 400)
    assert found[0][0] == pytest.approx((size - 1) / 2)
    assert found[-1][0] == pytest.approx(np.mean(np.arange((left - 1) * size, n)))


@pytest.mark.parametrize("n_layers", [1, 5])
def test_the_pictures(tmp_path: Path, n_layers: int) -> None:
    pytest.importorskip("matplotlib")
    directory, source = training(tmp_path / "training", *LOG), record(tmp_path / "r.npz", n_layers)
    plots(directory, source, tmp_path / "one")
    plots(directory, source, tmp_path / "two")
    for name in ("loss.svg", "load.svg"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content.count(b"<svg") == 1
        assert content == (tmp_path / "two" / name).read_bytes()  # the same data is the same file
        assert len(content) < 80_000
    load = (tmp_path / "one" / "load.svg").read_text()
    assert len(re.findall(rf"<path[^>]*fill: {ALL}", load)) == n_layers + 1  # one more in the legend


def test_a_record_without_answers_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    directory, whole = training(tmp_path / "training", *LOG), read_record(record(tmp_path / "r.npz", 2))
    write_record(tmp_path / "bare.npz", replace(whole, turns=whole.turns[:0], kinds=whole.kinds[:0]))
    plots(directory, tmp_path / "r.npz", tmp_path / "whole")
    plots(directory, tmp_path / "bare.npz", tmp_path / "bare")
    # a line for each layer and one in the legend
    drawn = [(tmp_path / name / "load.svg").read_text().count(f"stroke: {DECODED}") for name in ("whole", "bare")]
    assert drawn == [3, 0]


def test_an_svg_of_a_long_training_is_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    long = []
    for i in range(1, 1001):
        long.append(line(f"phase {i // 300}", 25 * i, loss=1 / i + (i % 7) / 100))
        if i % 16 == 0:
            long.append(line(f"phase {i // 300}", 25 * i, scores={"tool": i / 1000, "fan-out 4": (i % 37) / 37}))
    plots(training(tmp_path / "training", *long), record(tmp_path / "r.npz", 4), tmp_path)
    assert (tmp_path / "loss.svg").stat().st_size < 80_000


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, source = training(tmp_path / "training", *LOG), record(tmp_path / "r.npz", 2)

    def without(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(PlotError, match=r"pip install matplotlib$"):
        plots(directory, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = record(tmp_path / "r.npz", 2)
    ready = training(tmp_path / "ready", *LOG)
    for arguments, said in (
        ([tmp_path / "none", source], "none/log.jsonl: cannot be read: No such file or directory; name a directory of"),
        ([training(tmp_path / "new", LOG[2]), source], "new/log.jsonl: no loss yet: train on"),
        ([ready, tmp_path / "none.npz"], "none.npz: cannot be read: No such file or directory"),
    ):
        with pytest.raises(SystemExit):
            main([*map(str, arguments), str(tmp_path / "out")])
        assert said in capsys.readouterr().err.splitlines()[-1]
