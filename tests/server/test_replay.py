"""`hybrid replay` as typed: the table, the same as JSON, what it writes and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.routes import Record, write_record
from offload.correction import read_correction
from server.__main__ import main

L, E, K, LENGTH, DOCUMENTS = 2, 8, 2, 14, 6


@pytest.fixture
def record() -> Record:
    rng = np.random.default_rng(1)
    n, starts = LENGTH * DOCUMENTS, np.arange(DOCUMENTS) * LENGTH
    scores = rng.random((n, L, E)).astype(np.float16)
    ahead = np.stack((scores, np.zeros_like(scores)), 2)
    ahead[:, 0] = 0
    return Record(
        "cafe", np.array([1, 2]), np.zeros((L, E), np.float32), rng.integers(9, size=n), starts,
        np.full(DOCUMENTS, "a"), np.stack((starts + 3, starts + LENGTH), 1), np.full(DOCUMENTS, "b"),
        np.sort(scores.argsort(axis=2)[..., -K:], axis=2), scores, ahead,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path, record: Record) -> Path:
    write_record(tmp_path / "r.npz", record)
    return tmp_path / "r.npz"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A config.json with as many layers and experts as the record."""
    small = json.loads((Path(__file__).parents[1] / "reference" / "small_model.json").read_text())
    text = small.get("text_config", small)
    text |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": E, "num_experts_per_tok": K}
    (tmp_path / "config.json").write_text(json.dumps(small))
    return tmp_path / "config.json"


def test_the_figures(path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(model), "--batch", "1,2", "--residency", "25,50", "--json"]
    assert main(["replay", str(path), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["layers"], found["experts"], found["experts_per_token"]) == ("cafe", [1, 2], E, K)
    assert found["decode_steps"] == DOCUMENTS * (LENGTH - 4)
    ahead = next(one for one in found["recall"]["predictors"] if one["predictor"] == "look-ahead")
    assert ahead["layers_ahead"] == 1
    assert ahead["at_k"][0] is None and ahead["at_k"][1] > 0.98
    slots = found["slots"]
    assert {(one["lanes"], one["slots"]) for one in slots} == {(1, 2), (1, 4), (2, 2), (2, 4)}
    bounds = {(one["lanes"], one["slots"]): one["hits"] for one in slots if one["policy"] == "Belady bound"}
    for one in slots:
        assert one["hits"] <= bounds[one["lanes"], one["slots"]]
        assert one["hit_rate"] == pytest.approx(one["hits"] / one["uses"])
    lru = next(one for one in slots if one["policy"] == "LRU")
    assert lru["loaded_bytes"] / lru["loads"] == slots[-1]["loaded_bytes"] / slots[-1]["loads"] > 1000


def test_the_table(path: Path, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{LENGTH * DOCUMENTS} tokens of {DOCUMENTS} documents, ")
    for name in ("look-ahead", "corrected, full", "token id", "slot policy", "Belady bound", "1 (12%)"):
        assert name in out
    assert "bytes a step" not in out
    assert main(["replay", str(path), "--residency", "50", "--batch", "1"]) == 0
    assert capsys.readouterr().out.count("Belady bound") == 1
    write_record(tmp_path / "old.npz", replace(record, ahead=None))
    assert main(["replay", str(tmp_path / "old.npz")]) == 0
    out = capsys.readouterr().out
    assert "note: no looks ahead in the record: predictors that need them are left out" in out
    assert "look-ahead " not in out


def test_many_layers_stand_below_each_other(path: Path, record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(
        path,
        replace(
            record,
            layers=np.arange(1, 11),
            bias=np.zeros((10, E), np.float32),
            ahead=None,
            scores=np.zeros((0, 10, E)),
            experts=np.tile(record.experts[:, :1], (1, 10, 1)),
        ),
    )
    assert main(["replay", str(path)]) == 0
    heads = [
        line.removeprefix("  predictor").replace("layers", "")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  predictor")
    ]
    assert [[int(part) for part in line.split("layer")[1:]] for line in heads] == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]


def test_a_correction_is_written(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.npz"
    assert main(["replay", str(path), "--correction", str(out)]) == 0
    assert f"written: {out}" in capsys.readouterr().err
    assert set(read_correction(out).maps) == {(1, 1)}
    assert read_correction(out).model == "cafe"


def test_what_is_refused(
    path: Path, model: Path, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: str) -> str:
        assert main(["replay", *arguments]) == 78
        return capsys.readouterr().err.strip()

    assert (
        refusal(str(tmp_path / "none.npz")) == f"hybrid: {tmp_path}/none.npz: cannot be read: No such file or directory"
    )
    write_record(tmp_path / "other.npz", replace(record, layers=np.array([1, 3])))
    assert "another model's?" in refusal(str(tmp_path / "other.npz"), "--model", str(model))
    write_record(tmp_path / "old.npz", replace(record, ahead=None))
    assert "has no looks ahead to learn from" in refusal(str(tmp_path / "old.npz"), "--correction", str(tmp_path / "c"))
    write_record(tmp_path / "still.npz", replace(record, turns=record.turns[:0], kinds=record.kinds[:0]))
    assert "no decode steps in one half" in refusal(str(tmp_path / "still.npz"))
    for flag, value in (("--batch", "0"), ("--batch", "1,x"), ("--residency", "101"), ("--residency", "")):
        with pytest.raises(SystemExit) as caught:
            main(["replay", str(path), flag, value])
        assert caught.value.code == 2
        assert flag in capsys.readouterr().err.splitlines()[-1]
