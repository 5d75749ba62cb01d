"""placement.slots: the greedy deal against every possible one, and where greedy is not enough."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.slots import SlotMarket

Values = npt.NDArray[np.float64]


def worth(values: Values, slots: Sequence[int]) -> float:
    """Seconds that a deal saves."""
    return sum(float(row[:n].sum()) for row, n in zip(values, slots, strict=True))


def best_deal(values: Values, n: int) -> float:
    """The largest sum of any deal of n slots, by trying all of them."""
    n_layers, n_slots = values.shape
    deals = itertools.product(range(n_slots + 1), repeat=n_layers)
    return max(worth(values, deal) for deal in deals if sum(deal) == n)


@st.composite
def concave(draw: st.DrawFn) -> Values:
    """Savings of up to three layers of up to four experts, falling along each layer; equal ones are likely."""
    n_layers, n_slots = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 9), min_size=n_slots, max_size=n_slots)
    return np.array([sorted(draw(rows), reverse=True) for _ in range(n_layers)], np.float64)


@given(concave())
def test_greedy_is_optimal_for_concave_savings(values: Values) -> None:
    market = SlotMarket(values)
    for n in range(values.size + 1):
        slots = market.deal(n)
        assert sum(slots) == n
        assert worth(values, slots or (0,) * len(values)) == best_deal(values, n)


def test_greedy_is_not_optimal_where_savings_rise() -> None:
    # The first layer's good expert stands behind a poor one; greedy takes the sure 2 of the other layer first.
    values = np.array([[1.0, 10.0], [2.0, 0.0]])
    assert SlotMarket(values).deal(2) == (1, 1)
    assert worth(values, (1, 1)) == 3 < best_deal(values, 2) == worth(values, (2, 0)) == 11


def test_equal_layers_get_equal_shares() -> None:
    market = SlotMarket(np.tile([0.3, 0.2, 0.2, 0.2], (5, 1)))
    for n in range(1, 20):
        slots = market.deal(n)
        assert max(slots) - min(slots) <= 1


@pytest.mark.parametrize("n", [-1, 0])
def test_nothing_to_deal(n: int) -> None:
    assert SlotMarket(np.ones((2, 3))).deal(n) == ()


def test_no_more_slots_than_experts() -> None:
    assert SlotMarket(np.ones((2, 3))).deal(100) == (3, 3)
