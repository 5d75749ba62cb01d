"""offload.slots: the table under random moves, and what the policy may and must do."""

import dataclasses

import numpy as np
import pytest

from offload.slots import EMPTY, MISS, Move, Rules, SlotPolicy, SlotTable

L, E = 3, 16


def test_a_table_changed_within_a_step_raises() -> None:
    table = SlotTable([2, 2, 2], E)
    table.begin()
    with pytest.raises(RuntimeError, match="within a step"):
        table.apply([Move(0, 0, None, 5)])
    assert (table.where == MISS).all()
    table.end()
    table.apply([Move(0, 0, None, 5)])
    assert table.where[0, 5] == 0


def test_steps_do_not_overlap() -> None:
    table = SlotTable([1], E)
    with pytest.raises(AssertionError):
        table.end()
    table.begin()
    with pytest.raises(AssertionError):
        table.begin()


def test_the_table_cannot_be_written_to_past_it() -> None:
    table = SlotTable([1], E)
    with pytest.raises(ValueError, match="read-only"):
        table.where[0, 0] = 0
    table.held(0)[0] = 3
    assert table.held(0).tolist() == [EMPTY]


@pytest.mark.parametrize(
    "move", [Move(0, 0, None, 7), Move(0, 0, 4, 7), Move(0, 1, 3, 7), Move(0, 1, None, 3), Move(0, 0, 3, 3)]
)
def test_a_move_that_does_not_fit_changes_nothing(move: Move) -> None:
    table = SlotTable([2], E)
    table.apply([Move(0, 0, None, 3)])
    before = table.where.copy()
    with pytest.raises(ValueError, match="does not fit the table"):
        table.apply([Move(0, 1, None, 9), move] if move.slot == 0 else [move])
    assert np.array_equal(table.where, before)
    table.check()


def test_slots_that_cannot_be() -> None:
    for slots in ([E + 1], [-1]):
        with pytest.raises(ValueError, match="slots for each layer"):
            SlotTable(slots, E)


def stream(rng: np.random.Generator, n: int, sticky: float) -> list[list[np.ndarray]]:
    """Experts (2, 3) of each layer: an expert stays for the next step with probability `sticky`."""
    steps, before = [], [np.zeros(0, int)] * L
    for _ in range(n):
        row = []
        for layer in range(L):
            kept = before[layer][rng.random(len(before[layer])) < sticky]
            others = np.setdiff1d(rng.permutation(E), kept, assume_unique=True)
            row.append(np.concatenate((kept, others[: 6 - len(kept)])))
        steps.append([experts.reshape(2, 3) for experts in row])
        before = row
    return steps


@pytest.mark.parametrize("seed", range(6))
def test_what_the_policy_may_do(seed: int) -> None:
    """Random rules and streams: the table stays whole, uploads are bounded and pay, nothing leaves too soon."""
    rng = np.random.default_rng(seed)
    rules = Rules(
        horizon=float(rng.choice([4, 16])),
        tax=float(rng.choice([0.0, 0.5])),
        margin=float(rng.choice([0, 0.1])),
        dwell=int(rng.integers(1, 6)),
        uploads=int(rng.integers(1, 5)),
    )
    table = SlotTable(rng.integers(0, 6, L).tolist(), E)
    policy = SlotPolicy(table, rules)
    arrived: dict[tuple[int, int], int] = {}
    n_moves = 0
    for step, row in enumerate(stream(rng, 150, 0.7)):
        table.begin()
        for layer, experts in enumerate(row):
            policy.observe(layer, experts)
        table.end()
        moves = policy.decide()
        assert len(moves) <= rules.uploads
        assert len({(move.layer, move.slot) for move in moves}) == len(moves)
        for move in moves:
            assert move.into in row[move.layer]
            if move.out is not None:
                assert step - arrived[move.layer, move.out] >= rules.dwell
            arrived[move.layer, move.into] = step
        table.apply(moves)
        table.check()
        n_moves += len(moves)
    assert n_moves > 5 or sum(table.slots) < 3


def hits(policy: SlotPolicy, table: SlotTable, steps: list[list[np.ndarray]]) -> tuple[float, int]:
    """Share of the uses that were in a slot, and uploads, over the second half."""
    found, uses, loads = 0, 0, 0
    for step, row in enumerate(steps):
        late = step >= len(steps) // 2
        for layer, experts in enumerate(row):
            if late:
                found += int((table.where[layer, np.unique(experts)] != MISS).sum())
                uses += len(np.unique(experts))
            policy.observe(layer, experts)
        moves = policy.decide()
        table.apply(moves)
        loads += len(moves) * late
    return found / uses, loads


def test_it_follows_what_comes_back_at_once() -> None:
    steps = stream(np.random.default_rng(1), 400, 0.9)
    table = SlotTable([6] * L, E)
    rate, _ = hits(SlotPolicy(table), table, steps)
    assert rate > 0.7  # by chance 6 of 16


def test_it_leaves_alone_what_is_as_likely_as_any_other() -> None:
    steps = stream(np.random.default_rng(1), 600, 0.0)
    table = SlotTable([6] * L, E)
    rate, loads = hits(SlotPolicy(table), table, steps)
    assert rate == pytest.approx(6 / 16, abs=0.03)
    assert loads < 10


def test_an_upload_that_costs_more_than_it_brings_is_not_made() -> None:
    table = SlotTable([6] * L, E)
    rate, loads = hits(SlotPolicy(table, Rules(tax=1000.0)), table, stream(np.random.default_rng(1), 60, 0.9))
    assert (rate, loads) == (0, 0)
    assert (table.where == MISS).all()


def test_a_forecast_lets_in_what_was_not_used_yet() -> None:
    table = SlotTable([1] * L, E)
    policy = SlotPolicy(table)
    forecast = np.zeros((L, E))
    forecast[1, 9] = 5
    assert policy.decide(forecast) == [Move(1, 0, None, 9)]


def test_the_best_uploads_come_first_over_all_layers() -> None:
    table = SlotTable([2] * L, E)
    forecast = np.zeros((L, E))
    forecast[0, 3], forecast[2, 4], forecast[1, 5], forecast[2, 6] = 3, 9, 5, 7
    moves = SlotPolicy(table, dataclasses.replace(Rules(), uploads=3)).decide(forecast)
    assert [(move.layer, move.into) for move in moves] == [(2, 4), (2, 6), (1, 5)]
