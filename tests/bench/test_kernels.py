"""The parts of the kernel bench that decide what its figures mean, and one contest on a layer of a few kilobytes."""

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest

from offload import formats
from tests.bench import figures
from tests.bench.contest import Contest
from tests.bench.figures import Figure, Ratio, Turn
from tests.bench.kernels import experts_that_fit
from tests.bench.peers import inputs
from tests.bench.peers.child import Work
from tests.bench.peers.family import Family, FamilyError, not_installed
from tests.bench.peers.inputs import SHAPES
from tests.bench.peers.llama import q4_0
from tests.reference import experts

PYTHON = Path(sys.executable)
ROWS = (1, 4)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    made = Work(
        tmp_path, 6, 128, 64, 2, inputs.CHECK_ROWS, (min(psutil.Process().cpu_affinity()),), (0,), ("portable",)
    )
    inputs.write(made, ROWS, 1)
    return made


def test_a_figure_pools_calls_and_a_rate_belongs_to_its_round() -> None:
    turns = [Turn((0.1, 0.3), (1e9, 3e9), 2e10), Turn((0.2,), (2e9,), 1e10)]
    figure = Figure.of(4, "ours", turns)
    assert figure.calls == 3
    assert (figure.milliseconds, figure.tokens_per_second) == pytest.approx((200, 20))
    assert figure.bytes_per_second == pytest.approx(1e10)
    assert figure.share_of_read == pytest.approx((0.5 + 1.0) / 2)


def test_ratios_compare_within_rounds() -> None:
    """The machine halves its speed in the second round: the ratio does not change."""
    ours = [Turn((t,), (1e9,), 1e10) for t in (1.0, 2.0, 2.0)]
    theirs = [Turn((t,), (1e9,), 1e10) for t in (3.0, 6.0, 5.0)]
    ratio = Ratio.of(1, "theirs", theirs, "ours", ours)
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.5, 3.0)
    results = {1: {"ours": ours, "theirs": theirs, "left early": theirs[:1]}}
    assert [r.name for r in figures.ratios(results, ["ours"])] == ["theirs"]
    assert "3.00× (2.50–3.00)" in figures.table(results, "ours")
    head, _, line = figures.markdown(results, "ours").splitlines()
    assert head.count("|") == line.count("|") == 5


def test_all_contestants_get_as_many_experts() -> None:
    k25 = SHAPES["k25"]
    alone, together = (experts_that_fit(k25, 4e9, names) for names in (["hybrid"], ["hybrid", "llama", "torch"]))
    assert alone > 3 * together > 0
    assert experts_that_fit(SHAPES["nano"], 1e12, ["hybrid"]) == 64


def test_routes_take_no_expert_twice() -> None:
    ids = inputs.routes(np.random.default_rng(0), (50, 3), 9, 8)
    assert ids.shape == (50, 3, 8)
    assert all(len(set(token)) == 8 for token in ids.reshape(-1, 8).tolist())
    assert set(ids.reshape(-1).tolist()) == set(range(9))


def test_q4_0_holds_the_same_weights(work: Work) -> None:
    data, scales = work.template("gate")
    blocks = q4_0(data, scales).reshape(*scales.shape, 18)
    factors = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    values = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.float32) - 8
    dense = [formats.dequantise("int4", np.array(d), np.array(s)) for d, s in zip(data, scales, strict=True)]
    np.testing.assert_array_equal((values * factors).reshape(np.shape(dense)), dense)


def test_the_reference_is_the_obvious_one(work: Work) -> None:
    x, ids, shares, y = (work.array(f"check-{name}") for name in ("x-gaussian", "ids", "weights", "y-gaussian"))
    dense = {}
    for matrix in ("gate", "up", "down"):
        data, scales = (np.array(part) for part in work.template(matrix))
        dense[matrix] = [experts.dense("int4", d.view(np.uint8), s) for d, s in zip(data, scales, strict=True)]
    for token in range(2):
        expected = np.zeros(work.hidden)
        for expert, share in zip(ids[token] % inputs.TEMPLATES, shares[token], strict=True):
            g = dense["gate"][expert] @ x[token]
            expected += share * (dense["down"][expert] @ (g / (1 + np.exp(-g)) * (dense["up"][expert] @ x[token])))
        np.testing.assert_allclose(y[token], expected, rtol=1e-9, atol=1e-12)


def test_a_contest(work: Work) -> None:
    """Ours and torch's: both answer well, both are timed, both lie still when it is not their turn."""
    contest = Contest(work, 1000)
    with ExitStack() as stack:
        for name in ("hybrid", "torch"):
            contest.start(name, PYTHON, stack)
        assert list(contest.about) == ["hybrid portable a8", "hybrid portable a16", "torch bf16"]
        contest.check()
        for rows in ROWS:
            contest.round(0, rows, 1e10, call_limit=100.0)
        ours = [c for c in psutil.Process().children() if any("tests.bench.peers" in word for word in c.cmdline())]
        assert len(ours) == 2 and {child.status() for child in ours} == {psutil.STATUS_STOPPED}
    limits = {"hybrid portable a8": 0.03, "hybrid portable a16": 2e-4, "torch bf16": 0.01}
    for name, limit in limits.items():
        assert all(error < limit for error in contest.accuracy[name].values()), (name, contest.accuracy[name])
    assert [list(by_name) for by_name in contest.results.values()] == [list(limits)] * 2
    contest.round(0, 4, 1e10, call_limit=0.0)
    assert set(contest.absent) == {f"{name}, 4 rows" for name in limits}


def test_who_cannot_run_says_why(work: Work) -> None:
    assert not_installed(PYTHON, "no_such_package") == f"no_such_package is not installed in {PYTHON}"
    assert not_installed(Path("/no/such/python"), "numpy") == "/no/such/python: No such file or directory"
    with pytest.raises(FamilyError, match="llama_cpp"):
        Family("llama", PYTHON, work)
