"""hybrid.ping_pong: which steps are split, where, and that a trial keeps what is faster."""

import pytest

from hybrid.batch import Batch, Row
from hybrid.ping_pong import HOLD, TRIES, Mode, PingPong


def batch(*lengths: int) -> Batch:
    return Batch(tuple(Row(i, (1,) * n, 0, (i,)) for i, n in enumerate(lengths)))


@pytest.mark.parametrize(
    ("mode", "lengths", "halves"),
    [
        ("off", (1, 1), None),
        ("on", (1,), None),
        ("on", (1, 1), [1, 1]),
        ("on", (1,) * 5, [2, 3]),
        ("on", (9, 1, 1, 1), [1, 3]),
        ("on", (1, 1, 1, 9), [3, 1]),
        ("on", (4, 3, 4), [1, 2]),
    ],
)
def test_rows_are_divided_by_their_ids(mode: Mode, lengths: tuple[int, ...], halves: list[int] | None) -> None:
    whole = batch(*lengths)
    parts = PingPong(mode, print).parts(whole)
    assert [len(part.rows) for part in parts] == (halves or [len(lengths)])
    assert tuple(row for part in parts for row in part.rows) == whole.rows


def steps(ping_pong: PingPong, n: int, rows: int, whole: float, halves: float) -> list[int]:
    """Into how many parts each of n steps went, where the ways take so many seconds."""
    taken = []
    for _ in range(n):
        taken.append(len(ping_pong.parts(batch(*[1] * rows))))
        ping_pong.took(batch(*[1] * rows), taken[-1], halves if taken[-1] == 2 else whole)
    return taken


@pytest.mark.parametrize(("whole", "halves", "kept"), [(1.0, 0.8, 2), (1.0, 1.2, 1), (1.0, 0.999, 1)])
def test_a_trial_keeps_the_faster_way_for_a_while(whole: float, halves: float, kept: int) -> None:
    said: list[str] = []
    ping_pong = PingPong("auto", said.append)
    tried = steps(ping_pong, 2 * TRIES, 4, whole, halves)
    assert sorted(tried) == [1] * TRIES + [2] * TRIES
    assert tried[:4] == [1, 2, 2, 1], "so that what grows from step to step counts for neither"
    assert ping_pong.choices == {4: kept == 2}
    way = "in two halves" if kept == 2 else "whole"
    assert said == [f"4 rows decode {way}: {halves * 1e3:.1f} ms in halves, {whole * 1e3:.1f} ms whole"]
    assert set(steps(ping_pong, HOLD, 4, whole, halves)) == {kept}
    assert set(steps(ping_pong, 2 * TRIES, 4, whole, halves)) == {1, 2}, "tried again"


def test_batch_sizes_are_tried_by_themselves() -> None:
    ping_pong = PingPong("auto", print)
    steps(ping_pong, 2 * TRIES, 2, 1.0, 2.0)
    steps(ping_pong, 2 * TRIES, 16, 2.0, 1.0)
    assert ping_pong.choices == {2: False, 16: True}


@pytest.mark.parametrize("lengths", [(1,), (1,) * 17, (2, 1)])
def test_other_steps_are_left_whole(lengths: tuple[int, ...]) -> None:
    ping_pong = PingPong("auto", print)
    for _ in range(4 * TRIES):
        assert len(ping_pong.parts(batch(*lengths))) == 1
        ping_pong.took(batch(*lengths), 1, 1.0)
    assert ping_pong.choices == {}
