"""server.timeline: the numbers behind the picture, and the picture itself where matplotlib is installed."""

import importlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hybrid.batch import Batch
from placement.cost import StepCost
from server.scheduler import SchedulerConfig
from server.simulate import Report, Served, Step, simulate
from server.timeline import ANSWERING, QUEUED, READING, TimelineError, binned, curves, plot, segments
from server.workload import Distribution, swarm

EMPTY = Report(0, 0.0, (), (), (), {}, {}, {}, 0)


def served(agent: int, turn: int, *times: float) -> Served:
    arrived, started, first_token, finished = times
    return Served(agent, turn, arrived, started, first_token, finished, prompt=10, cached=0, output=5)


def report(agents: int) -> Report:
    dist = Distribution.parse
    work = swarm(agents, 32, dist("1..9"), dist("1..9"), dist("1..3"), dist("3"), dist("0..40"), 1)
    return simulate(work, SchedulerConfig(4096, 4, 64, 16), by_tokens)


def by_tokens(batch: Batch) -> StepCost:
    return StepCost(1.0 + batch.n_tokens, {}, {}, distinct=1.0, binding="work")


def test_a_box_is_spread_over_the_stretches_it_touches() -> None:
    # 3 from 1 to 6, over stretches of 4: three quarters of the first, half of the second, none of the third.
    assert binned([(1.0, 6.0)], [3.0], 4.0, 3) == (2.25, 1.5, 0.0)
    assert binned([(0.0, 12.0), (4.0, 4.0)], [2.0, 99.0], 4.0, 3) == (2.0, 2.0, 2.0)
    assert binned([], [], 4.0, 2) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_area_stays_whatever_the_stretches(seed: int) -> None:
    rng = random.Random(seed)
    end, n = rng.uniform(1, 100), rng.randint(1, 50)
    spans = [tuple(sorted((rng.uniform(0, end), rng.uniform(0, end)))) for _ in range(30)]
    heights = [rng.uniform(0, 9) for _ in spans]
    means = binned([(a, b) for a, b in spans], heights, end / n, n)
    area = sum((b - a) * height for (a, b), height in zip(spans, heights, strict=True))
    assert sum(means) * end / n == pytest.approx(area)


def test_curves_of_a_case_by_hand() -> None:
    steps = (Step(0.0, 2.0, 0, 10), Step(2.0, 2.0, 1, 4), Step(6.0, 2.0, 2, 0))
    requests = (served(0, 0, 0.0, 0.0, 2.0, 4.0), served(1, 0, 1.0, 2.0, 4.0, 8.0))
    means = curves(Report(2, 8.0, requests, (), steps, {}, {}, {}, 0), 4)
    assert means.width == 2.0
    assert means.running == (1.0, 2.0, 1.0, 1.0)
    assert means.decoding == (0.0, 1.0, 0.0, 2.0)
    assert means.prefilled == (5.0, 2.0, 0.0, 0.0)


def test_a_lane_shows_queue_prompt_and_answer() -> None:
    requests = (served(0, 0, 0.0, 1.0, 3.0, 7.0), served(0, 1, 9.0, 9.0, 10.0, 12.0), served(5, 0, 0.0, 0.0, 1.0, 2.0))
    assert segments(requests, lanes=5) == {
        QUEUED: [(0, 0.0, 1.0), (0, 9.0, 0.0)],
        READING: [(0, 1.0, 2.0), (0, 9.0, 1.0)],
        ANSWERING: [(0, 3.0, 4.0), (0, 10.0, 2.0)],
    }


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", without("matplotlib"))
    with pytest.raises(TimelineError, match=r"pip install matplotlib$"):
        plot(report(2), tmp_path / "t.svg")
    assert list(tmp_path.iterdir()) == []


def without(package: str) -> Callable[[str], ModuleType]:
    def refuse(name: str) -> ModuleType:
        assert name.split(".")[0] == package
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return refuse


def test_nothing_served_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(TimelineError, match="every request was refused"):
        plot(EMPTY, tmp_path / "t.svg")


@pytest.mark.parametrize(("agents", "lanes"), [(1, 1), (30, 30), (130, 100)])
def test_the_picture(tmp_path: Path, agents: int, lanes: int) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "t.svg"
    found = report(agents)
    plot(found, path)
    svg = path.read_text()
    assert svg.count("<svg") == 1
    shown = segments(found.served, lanes)
    for colour, bars in shown.items():  # one filled shape for each bar, one more in the legend
        shapes = len(re.findall(rf"<path[^>]*fill: {colour}(?![^\"]*opacity)", svg))
        assert shapes == len(bars) + 1, colour
    plot(found, path)
    assert path.read_text() == svg  # the same report is the same file


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(TimelineError, match=r"t\.svg: cannot be written: No such file"):
        plot(report(2), tmp_path / "none" / "t.svg")
