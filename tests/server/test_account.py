"""Predicted against achieved: which steps share a tally, sums and medians, and the predictor beside the cost model."""

import statistics

import pytest

from hybrid.batch import Batch, Row, Sampling, TokenLogprob
from hybrid.config import ModelConfig
from placement.cost import CostError, Load, Setup, resolve, step_cost
from placement.hardware import Hardware
from placement.probe import find_hardware
from placement.routing import uniform
from server.account import RECENT, Account, predictor
from tests import families
from tests.reference import plans


def batch(*lengths: int, position: int = 10) -> Batch:
    return Batch(tuple(Row(i, (1,) * n, position, (0,), Sampling()) for i, n in enumerate(lengths)))


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return find_hardware()


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_json(families.kimi_k25(), "tiny")


@pytest.mark.parametrize(
    ("lengths", "kind", "least", "most"),
    [
        ((1,), "decode", 1, 1),
        ((1, 1), "decode", 2, 2),
        ((1,) * 3, "decode", 3, 4),
        ((1,) * 4, "decode", 3, 4),
        ((1,) * 5, "decode", 5, 8),
        ((1,) * 64, "decode", 33, 64),
        ((2,), "prompt", 2, 2),
        ((1, 1, 30), "prompt", 17, 32),
        ((33,), "prompt", 33, 64),
        ((512,), "prompt", 257, 512),
    ],
)
def test_the_tally_of_a_step(lengths: tuple[int, ...], kind: str, least: int, most: int) -> None:
    account = Account()
    account.add(batch(*lengths), 0.1)
    (tally,) = account.tallies()
    assert (tally.kind, tally.least, tally.most, tally.steps) == (kind, least, most, 1)


def test_sums_over_all_and_medians_of_the_last() -> None:
    achieved = [10.0, 8.0] + [1.0 + i / 100 for i in range(RECENT)]
    predicted = [(i * 37) % 11 + 1.0 for i in range(len(achieved))]
    told = iter(predicted)
    account = Account(lambda batch: next(told))
    for seconds in achieved:
        account.add(batch(1), seconds)
    (tally,) = account.tallies()
    assert tally.steps == RECENT + 2
    assert tally.seconds == pytest.approx(sum(achieved))
    assert tally.predicted_seconds == pytest.approx(sum(predicted))
    assert tally.recent_seconds == pytest.approx(statistics.median(achieved[2:]))
    assert tally.recent_predicted_seconds == pytest.approx(statistics.median(predicted[2:]))


def test_without_a_predictor_there_are_no_predictions() -> None:
    account = Account()
    account.add(batch(1), 0.1)
    (tally,) = account.tallies()
    assert tally.predicted_seconds is None
    assert tally.recent_predicted_seconds is None
    assert tally.recent_seconds == 0.1


def test_tallies_come_in_order() -> None:
    account = Account()
    for lengths in ((300,), (1,) * 9, (4,), (1,), (1,) * 30):
        account.add(batch(*lengths), 0.1)
    found = [(tally.kind, tally.most) for tally in account.tallies()]
    assert found == [("decode", 1), ("decode", 16), ("decode", 32), ("prompt", 4), ("prompt", 512)]


def test_the_predictor_counts_contexts_chunks_and_logits(model: ModelConfig, hardware: Hardware) -> None:
    plan, profile = plans.plan(model, hardware), plans.profile(hardware)
    rates = resolve(model, profile, Setup("float32", profile.kernels[0].name), uniform(model))
    scored = tuple(TokenLogprob(1, 0.0) for _ in range(5))
    rows = (
        Row(0, (1,), 99, (0,), Sampling()),
        Row(1, (1,), 49, (0,), Sampling()),
        Row(2, (1,) * 30, 20, (0,), None),
        Row(3, (1,) * 6, 0, (0,), Sampling(), targets=tuple(one.token for one in scored)),
    )
    load = Load(decode_rows=2, context=100 + 50, chunks=((30, 20), (6, 0)), sampled=3 + 5)
    predicted = predictor(model, profile, plan)(Batch(rows))
    assert predicted == pytest.approx(step_cost(rates, load).seconds)
    assert predicted > 2e-3  # a step's fixed cost in the profile


def test_the_predictor_needs_figures_of_what_will_run(model: ModelConfig, hardware: Hardware) -> None:
    profile = plans.profile(hardware)
    with pytest.raises(CostError, match="no figures of int4 experts with a8 activations"):
        predictor(model, profile, plans.plan(model, hardware, expert_precision="a8"))
    with pytest.raises(CostError, match="no figures of kt-kernel"):
        predictor(model, profile, plans.plan(model, hardware, experts="kt"))
    with pytest.raises(CostError, match="is of cpu, not cuda"):
        predictor(model, profile, plans.plan(model, hardware, device="cuda"))


def test_kt_kernel_has_its_own_figures(model: ModelConfig, hardware: Hardware) -> None:
    plan = plans.plan(model, hardware, experts="kt")
    profile = plans.profile(hardware, kernel="kt/AVX2/int4/a8")
    assert predictor(model, profile, plan)(batch(1)) > 0
