"""placement.tune: which candidate is kept, what a run leaves in the plan, and the plan of a real tiny model."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid.batch import StepOutput
from hybrid.config import ModelConfig
from hybrid.random_checkpoint import write_checkpoint
from offload.topology import deal
from placement import tune as tuning
from placement.cost import resolve
from placement.document import Measured
from placement.forecast import Cache as Tokens
from placement.forecast import predict as forecast
from placement.hardware import Hardware
from placement.plan import Goal, Plan, Point, Prediction, Settings, Trial, model_fingerprint, read_plan, write_plan
from placement.planner import setup_of
from placement.profile import Device, Gemm, Kernel, Memory, Profile
from placement.routing import uniform
from placement.tune import TuneError, best, text, thread_candidates, tune
from tests import families

SETTINGS = Settings(
    device="cpu", weights="float32", expert_format="int4", expert_precision="a8", experts="numba", isa=None, threads=1,
    slots=(), experts_leave_ram=False, experts_mapped=False, embedding_in_ram=False, ring=0, stream_from_rows=None,
    page_size=8, pages_on_device=64, pages_in_ram=0, max_batch_tokens=128, max_running=8, max_model_len=256,
)  # fmt: skip


def points(*sizes: int) -> tuple[Point, ...]:
    return tuple(Point(size, 0.001, size / 0.001, "weights") for size in sizes)


def profile() -> Profile:
    """Any rates: what is predicted is not what is tested."""
    some, rows = Measured(1e-3), (1, 64)
    device = Device(
        "cpu", "CPU", (Gemm("float32", 4096, dict.fromkeys(rows, some)),), Measured(1e9), Measured(1e9), Measured(1e9),
        some, some, some, Measured(0.0),
    )  # fmt: skip
    hardware = Hardware("CPU", 2, 1, None, (), (), ("avx2",), 1 << 30, 1 << 30, "madvise", None, (), "disk")
    kernel = Kernel("numba/avx2/int4/a8", 7168, 2048, dict.fromkeys(rows, some))
    return Profile("here", "measured", "2026", hardware, Memory({1: Measured(1e10)}), (kernel,), device)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tune") / "model"
    write_checkpoint(families.kimi_k25(), out, seed=3, tokenizer=None)
    return out


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there must be, however much time there is."""
    monkeypatch.setattr(tuning, "SHARE", 0.0)


@pytest.fixture
def plan(directory: Path) -> Plan:
    model = ModelConfig.from_directory(directory)
    return Plan(
        "tiny", model_fingerprint(model), "here", "", "measured", Goal("latency", 128, 4), SETTINGS, (), (),
        Prediction(points(1, 4), points(32, 200)), (),
    )  # fmt: skip


class Log:
    """What a run tells and saves."""

    def __init__(self) -> None:
        self.saved: list[Plan] = []
        self.told: list[str] = []
        self.stages: list[str] = []

    def tune(self, directory: Path, plan: Plan, seconds: float, rates: Profile | None = None) -> Plan:
        def progress(stage: str, done: int, total: int) -> None:
            self.stages.append(stage)

        return tune(directory, plan, rates or profile(), seconds, self.saved.append, progress, self.told.append)


def rounds(**seconds: list[float]) -> list[dict[str, float]]:
    return [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]


@pytest.mark.parametrize(
    ("own", "other", "kept"),
    [
        ([10, 10, 10, 10], [8, 8, 8, 8], "other"),
        ([10, 10, 10, 10], [9.8, 9.8, 9.8, 9.8], "own"),  # within the margin
        ([10, 30, 10, 30], [9, 27, 9, 27], "other"),  # slow phases hit both
        ([10, 10, 10, 10], [8, 8, 12, 12], "own"),  # faster in half of the rounds
        ([10, 10, 10, 10], [12, 12, 12, 12], "own"),
    ],
)
def test_a_difference_within_the_noise_changes_nothing(own: list[float], other: list[float], kept: str) -> None:
    found, ratios = best(rounds(own=own, other=other), "own")
    assert found == kept
    assert ratios["own"] == 1


def test_the_fastest_of_several_is_kept() -> None:
    found, ratios = best(rounds(own=[10] * 3, a=[9] * 3, b=[7] * 3, c=[8] * 3), "own")
    assert found == "b"
    assert ratios == {"own": 1, "a": 0.9, "b": 0.7, "c": 0.8}


def test_candidates_are_around_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "find_topology", topology({0: 8}))
    assert thread_candidates(6) == (4, 5, 6, 7, 8)
    assert thread_candidates(1) == (1, 2, 4, 8)
    monkeypatch.setattr(tuning, "find_topology", topology({0: 2, 1: 2}))
    assert thread_candidates(2) == (2, 3, 4), "one worker would be on one node, and the experts lie on two"


def topology(cores: dict[int, int]) -> Callable[[int | None], object]:

    return lambda threads=None: deal(
        threads or sum(cores.values()), {node: list(range(n)) for node, n in cores.items()}
    )


def test_a_run_tries_measures_and_can_be_read_again(directory: Path, plan: Plan, tmp_path: Path) -> None:
    log = Log()
    tuned = log.tune(directory, plan, 1000.0)
    assert log.saved[-1] == tuned
    settings = {trial.setting for trial in tuned.trials}
    assert settings == {"threads", "chunk"}
    for setting in settings:
        assert sum(trial.kept for trial in tuned.trials if trial.setting == setting) == 1
    kept = {trial.setting: trial.value for trial in tuned.trials if trial.kept}
    assert kept == {"threads": str(tuned.settings.threads), "chunk": str(tuned.settings.max_batch_tokens)}
    assert {choice.what for choice in tuned.choices} >= {"threads", "step"}
    assert tuned.prediction is not None
    for point in (*tuned.prediction.decode, *tuned.prediction.prefill):
        assert point.measured is not None and 0 < point.measured < 10
    write_plan(tmp_path / "plan.yaml", tuned)
    again = read_plan(tmp_path / "plan.yaml")
    assert [trial.value for trial in again.trials] == [trial.value for trial in tuned.trials]
    assert [point.measured is not None for point in again.prediction.decode] == [True, True]  # type: ignore[union-attr]


def test_a_run_goes_on_where_one_was_cut_off(directory: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    class CutOffError(Exception):
        pass

    def cut_off(*args: object) -> Plan:
        raise CutOffError

    log = Log()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_try_chunks", cut_off)
        with pytest.raises(CutOffError):
            log.tune(directory, plan, 1000.0)
    half = log.saved[-1]
    assert {trial.setting for trial in half.trials} == {"threads"}
    monkeypatch.setattr(tuning, "_try_threads", cut_off)  # not again
    whole = log.tune(directory, half, 1000.0)
    assert {trial.setting for trial in whole.trials} == {"threads", "chunk"}
    assert whole.trials[: len(half.trials)] == half.trials
    n_saved = len(log.saved)
    assert log.tune(directory, whole, 1000.0) == whole, "nothing is left to do"
    assert len(log.saved) == n_saved


def test_figures_that_take_too_long_are_named(directory: Path, plan: Plan) -> None:
    """And the others are measured."""
    assert plan.prediction is not None
    slow = replace(plan.prediction, prefill=(replace(points(200)[0], seconds=3600.0),))
    tried = (Trial("threads", "1", 1.0, 1.0, True), Trial("chunk", "128", 1.0, 1.0, True))
    log = Log()
    tuned = log.tune(directory, replace(plan, prediction=slow, trials=tried), 1000.0)
    assert tuned.prediction is not None
    assert all(point.measured for point in tuned.prediction.decode)
    assert tuned.prediction.prefill == slow.prefill
    assert log.told == ["prefill 200 was not measured: no time left; running again goes on there"]


class Steps:
    """Prompts take a second, whatever the step size."""

    def __init__(self, engine: object) -> None:
        self.sizes: list[int] = []

    def prompt(self, tokens: int, chunk: int) -> list[StepOutput]:
        self.sizes.append(chunk)
        return [StepOutput((), 1.0)]


def chunks(plan: Plan) -> tuple[Plan, list[str]]:
    """The plan with step sizes compared: the smallest is kept, as all take the same time."""
    log = Log()
    run = tuning.Run(log.saved.append, lambda *stage: None, log.told.append, 100.0, time.monotonic() + 100.0)
    tried = tuning._try_chunks(Steps(None), plan, run)  # type: ignore[arg-type]
    assert log.saved == [tried]
    return tried, log.told


def again(plan: Plan, before: int, model: ModelConfig, rates: Profile) -> tuple[Plan, list[str]]:
    log = Log()
    run = tuning.Run(log.saved.append, lambda *stage: None, log.told.append, 100.0, time.monotonic() + 100.0)
    found = tuning._predicted_again(plan, before, model, rates, run)
    assert log.saved == [found]
    return found, log.told


@pytest.mark.parametrize(("own", "tried"), [(128, [128, 64]), (512, [512, 128]), (100, [100]), (4096, [4096])])
def test_the_plans_own_step_size_is_among_the_candidates(plan: Plan, own: int, tried: list[int]) -> None:
    """Also one that is longer than the goal's prompts (128 tokens)."""
    found, _ = chunks(replace(plan, settings=replace(plan.settings, max_batch_tokens=own)))
    assert [int(trial.value) for trial in found.trials] == tried
    assert found.trials[0].ratio == 1
    assert found.settings.max_batch_tokens == min(tried)


def test_prompts_are_predicted_for_the_step_that_was_kept(directory: Path, plan: Plan) -> None:
    model, rates = ModelConfig.from_directory(directory), profile()
    ready = resolve(model, rates, setup_of(plan, rates), uniform(model))
    of = {chunk: forecast(ready, Goal("latency", 300, 4), Tokens(512), chunk) for chunk in (128, 64)}
    changed = replace(plan, settings=replace(plan.settings, max_batch_tokens=64), prediction=of[128])
    found, told = again(changed, 128, model, rates)
    assert found.prediction is not None
    assert told == []
    assert found.prediction.decode == of[128].decode
    for point, expected in zip(found.prediction.prefill, of[64].prefill, strict=True):
        assert (point.size, point.binding) == (expected.size, expected.binding)
        assert point.seconds == pytest.approx(expected.seconds)
        assert point.tokens_per_second == pytest.approx(expected.tokens_per_second)


def test_figures_that_come_from_a_record_of_routing_stay_so(directory: Path, plan: Plan) -> None:
    """Whoever planned with one has other figures; the step size changes them, and they are not made anew."""
    model = ModelConfig.from_directory(directory)
    found, _ = again(replace(plan, settings=replace(plan.settings, max_batch_tokens=64)), 128, model, profile())
    half = replace(
        plan,
        prediction=Prediction(
            (),
            tuple(
                replace(p, seconds=p.seconds / 2, tokens_per_second=p.tokens_per_second * 2) for p in points(32, 200)
            ),
        ),
    )
    other, _ = again(replace(half, settings=replace(plan.settings, max_batch_tokens=64)), 128, model, profile())
    assert found.prediction is not None and other.prediction is not None
    for one, two in zip(found.prediction.prefill, other.prediction.prefill, strict=True):
        assert two.seconds == pytest.approx(one.seconds / 2)
    assert found.prediction.prefill[0].seconds == pytest.approx(0.001), (
        "a prompt of 32 tokens is one step before and after"
    )


def test_a_rate_that_is_missing_loses_no_comparison(directory: Path, plan: Plan) -> None:
    model, rates = ModelConfig.from_directory(directory), replace(profile(), device=None)
    changed = replace(plan, settings=replace(plan.settings, max_batch_tokens=64))
    found, told = again(changed, 128, model, rates)
    assert found == replace(changed, notes=(*plan.notes, *told))
    assert told[0].startswith(
        "prompts were predicted for steps of 128 tokens, and not again for 64: profile here has no"
    )
    tuned = Log().tune(directory, plan, 1000.0, rates)
    assert {trial.setting for trial in tuned.trials} == {"threads", "chunk"}


def test_no_time_changes_nothing(directory: Path, plan: Plan) -> None:
    log = Log()
    tuned = log.tune(directory, plan, 1e-9)
    assert (tuned.trials, tuned.settings) == ((), plan.settings)
    assert [line.split(":")[0] for line in log.told[:2]] == ["threads", "step sizes"]


def test_a_plan_beyond_this_engine_is_refused(directory: Path, plan: Plan) -> None:
    with pytest.raises(TuneError, match="KV streamed from RAM, which this engine does not do; plan with --servable"):
        Log().tune(directory, replace(plan, settings=replace(plan.settings, pages_in_ram=1)), 1.0)


def test_predicted_beside_measured(plan: Plan) -> None:
    assert plan.prediction is not None
    decode = (Point(1, 0.012, 83, "weights", measured=0.010), Point(4, 0.03, 133, "weights"))
    shown = text(replace(plan, prediction=replace(plan.prediction, decode=decode))).splitlines()
    (one,) = (line.split() for line in shown if "batch 1 " in line)
    assert one[-1] == "+20%"
    assert any("–" in line for line in shown if "batch 4" in line)
    assert "median error 20% of 1 figures" in shown[-1]
    assert math.isclose(tuning.error(decode[0]), 0.2)
