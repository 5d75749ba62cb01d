"""offload.uses against sums spelt out, and against what is known of chains whose future is known."""

import numpy as np
import pytest

from offload.uses import CAUTION, HALVES, MEMORY, UseForecast


def test_the_weights_are_those_of_loops() -> None:
    rng = np.random.default_rng(1)
    steps, horizon = rng.random((40, 2, 5)) < 0.3, 8.0
    forecast = UseForecast(2, 5, horizon)
    for used in steps:
        found = forecast.observe(used)
    # Traces by definition, then every expert's and step's contribution, the older the less.
    n, last = len(HALVES) + 1, len(steps) - 1
    traces = np.ones((len(steps), 2, 5, n))
    for t in range(len(steps)):
        for i, half in enumerate(HALVES):
            weights = 0.5 ** ((t - np.arange(t + 1)) / half)
            traces[t, ..., i] = np.tensordot(weights, steps[: t + 1], 1) / weights.sum()
    squares = CAUTION * np.eye(n) * (1 + 0.5 ** (last / MEMORY))
    targets = np.zeros(n)
    for t in range(last):
        for layer in range(2):
            for expert in range(5):
                now, then = traces[t, layer, expert], traces[t + 1, layer, expert]
                fade = 0.5 ** ((last - 1 - t) / MEMORY) / 10
                squares += fade * np.outer(now, now - (1 - 1 / horizon) * then)
                targets += fade * now * steps[t + 1, layer, expert]
    assert found == pytest.approx(traces[last] @ np.linalg.solve(squares, targets), rel=1e-6)


@pytest.mark.parametrize(("stay", "begin"), [(0.9, 0.05), (0.5, 0.1), (0.1, 0.1)])
def test_the_value_of_a_chain(stay: float, begin: float) -> None:
    """Experts that are used with probability `stay` after a use and `begin` otherwise: the expected fading sum of
    coming uses follows from two equations."""
    rng = np.random.default_rng(2)
    horizon, used = 10.0, np.zeros((1, 200), np.bool_)
    forecast = UseForecast(1, 200, horizon)
    after_use, after_none = [], []
    for step in range(800):
        used = rng.random(used.shape) < np.where(used, stay, begin)
        value = forecast.observe(used)
        if step >= 500:  # enough is learned
            after_use.append(value[used].mean())
            after_none.append(value[~used].mean())
    chances = np.array([[1 - begin, begin], [1 - stay, stay]])  # from and to: not used, used
    sums = np.linalg.solve(np.eye(2) - (1 - 1 / horizon) * chances, chances[:, 1])
    assert np.mean(after_use) == pytest.approx(sums[1], rel=0.05)
    assert np.mean(after_none) == pytest.approx(sums[0], rel=0.05)


def test_what_is_always_or_never_used() -> None:
    forecast = UseForecast(1, 4, 16.0)
    for _ in range(200):
        value = forecast.observe(np.array([[True, False, True, False]]))
    assert value[0] == pytest.approx([16, 0, 16, 0], abs=0.5)
