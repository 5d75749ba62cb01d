"""What is read ahead, and whether it pays: against plain loops, and on made-up waits."""

import numpy as np
import pytest
import torch

from offload.prefetch import KEPT, WINDOW, Switch, ranked


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_named_are_every_tokens_best(tokens: int, k: int) -> None:
    scores = torch.rand((tokens, 9), generator=torch.Generator().manual_seed(tokens))
    scores[:, [2, 5]] = float("-inf")  # ruled out
    points = np.zeros(9)
    for row in scores.numpy():
        for place, expert in enumerate(np.argsort(-row)[:k]):
            points[expert] += (k - place) * np.isfinite(row[expert])
    found = ranked(scores, k).tolist()
    assert set(found) == set(np.flatnonzero(points).tolist())
    assert (np.diff(points[found]) <= 0).all()


def run(switch: Switch, windows: int, waits: dict[bool, float]) -> list[bool]:
    """Which way each window went, where a step waits so long for 10 experts with and without reading ahead."""
    ways = []
    for _ in range(windows):
        ways.append(switch.on)
        for _ in range(WINDOW):
            switch.step(waits[switch.on], 10)
    return ways


def test_reading_ahead_stays_where_it_pays() -> None:
    switch = Switch()
    ways = run(switch, 3 * (KEPT + 1), {True: 0.01, False: 0.02})
    assert ways == 3 * ([True] * KEPT + [False])


def test_reading_ahead_ends_where_it_costs_and_comes_back() -> None:
    switch = Switch()
    assert run(switch, 2 * (KEPT + 1), {True: 0.02, False: 0.01}) == [True] * KEPT + [False] * (KEPT + 1) + [True]
    assert run(switch, 1, {True: 0.02, False: 0.01}) == [False]  # still not worth it
    assert run(switch, KEPT + 1, {True: 0.01, False: 0.02})[-3:] == [False, True, True]


def test_no_clear_difference_changes_nothing() -> None:
    switch = Switch()
    run(switch, 4 * (KEPT + 1), {True: 0.0100, False: 0.0098})
    assert switch.on


def test_more_experts_in_a_step_are_no_loss() -> None:
    """A batch of ten waits longer than one request, and not because of reading ahead."""
    switch = Switch()
    for _ in range(2 * (KEPT + 1)):
        for _ in range(WINDOW):
            batch = 10 if switch.on else 1
            switch.step(0.01 * batch * (1.0 if switch.on else 1.5), 10 * batch)
    assert switch.on
