"""The engine divides a layer's experts by the figures that the plan was priced with."""

from dataclasses import replace

import numpy as np
import pytest

from offload.stream_split import best_stream
from placement.cost import resolve
from placement.expert_cost import _best_stream
from placement.ledger import PlacementError
from placement.planner import setup_of, shipped_profiles
from placement.profile import Profile, read_profile
from placement.routing import uniform
from placement.stream_rates import stream_rates_of
from tests.reference import plans
from tests.reference.k25 import K25

EXPERT = 24_772_608
BOX = read_profile(shipped_profiles()["ddr5-4800-8ch_rtx4090"])
RING = {"device": "cuda", "weights": "bfloat16", "expert_precision": "a8", "ring": 4 * EXPERT}
PLAN = plans.plan(K25, BOX.hardware, **RING)


def test_the_figures_are_the_profiles() -> None:
    rates, priced = stream_rates_of(K25, BOX, PLAN), resolve(K25, BOX, setup_of(PLAN, BOX), uniform(K25)).experts
    assert rates is not None
    assert rates.upload == EXPERT / priced.link and rates.read == EXPERT / priced.ram_read
    rows = np.array([1, 2, 3, 7, 40, 300, 5000])
    assert rates.on_cpu(rows) == pytest.approx(priced.rows.many(rows.astype(np.float64)))
    many = rates.on_device(np.array([100_000]))[0]
    assert many == pytest.approx(100_000 * priced.expert_flops / priced.device.flops)
    assert 0.5e-3 < rates.upload < 1.5e-3, "PCIe 4"
    assert not rates.may_pay(4) and rates.may_pay(512)


def test_a_layer_is_divided_nearly_as_the_planner_thinks() -> None:
    """Certain rows instead of expected ones; and the planner starts the link earlier and forgets the RAM's rate."""
    rates, priced = stream_rates_of(K25, BOX, PLAN), resolve(K25, BOX, setup_of(PLAN, BOX), uniform(K25)).experts
    assert rates is not None
    for rows in (40, 100, 400):
        all_alike = np.full(384, rows)
        cpu, device = rates.on_cpu(all_alike), rates.on_device(all_alike)
        thought = _best_stream(priced, np.ones(384), cpu, device, 0, 0.0, 0.0)
        found = len(best_stream(rates, all_alike, np.zeros(0, np.int64), np.zeros(0, np.int64)))
        assert thought > 20 and abs(found - thought) <= 0.05 * thought + 1


def test_what_cannot_be_known_is_refused() -> None:
    assert stream_rates_of(K25, None, plans.plan(K25, BOX.hardware)) is None
    with pytest.raises(
        PlacementError, match=r"the plan streams experts .* no profile of this machine; run `hybrid mea"
    ):
        stream_rates_of(K25, None, PLAN)
    without: Profile = replace(BOX, link=None)
    with pytest.raises(PlacementError, match="no link between RAM and its device"):
        stream_rates_of(K25, without, PLAN)
