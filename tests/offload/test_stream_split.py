"""The scan against every subset of small layers, each timed by playing uploads and products through in order."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.stream_split import StreamRates, best_stream, makespans

NONE = np.zeros(0, np.int64)


@st.composite
def rates(draw: st.DrawFn, quick_device: bool = False) -> StreamRates:
    """CPU seconds that rise with the rows from at least the time of reading the expert."""
    read = draw(st.floats(0.01, 0.3))
    steps = draw(st.lists(st.floats(0.0, 2.0), min_size=3, max_size=3))
    upload = draw(st.floats(read, 3.0))  # the link is never faster than the memory behind it
    return StreamRates(
        upload=upload,
        read=read,
        cpu_rows=(1.0, 8.0, 64.0),
        cpu_seconds=tuple(float(seconds) for seconds in read + np.cumsum(steps)),
        cpu_slope=draw(st.floats(0.001, 0.1)),
        device_read=0.0 if quick_device else draw(st.floats(0.0, 0.02)),
        device_row=0.0 if quick_device else draw(st.floats(0.0, 1e-3)),
        beside_copies=draw(st.floats(1.0, 1.5)),
    )


def played(law: StreamRates, rows: np.ndarray, streamed: list[int], ready: set[int], resident: np.ndarray) -> float:
    """Seconds of a layer: one upload after another, each product after its upload and the product before."""
    link, device = 0.0, sum(float(law.on_device(np.array([m]))[0]) for m in resident if m)
    for expert in streamed:
        if expert not in ready:
            link += law.upload
            device = max(device, link)
        device += float(law.on_device(rows[[expert]])[0])
    cpu = sum(float(law.on_cpu(rows[[e]])[0]) for e in np.flatnonzero(rows) if e not in streamed)
    if link:
        moved = sum(1 for e in np.flatnonzero(rows) if e not in ready)
        cpu = max(cpu * law.beside_copies, moved * law.read)
    return max(cpu, device)


def best_subset(law: StreamRates, rows: np.ndarray, ready: set[int], resident: np.ndarray) -> float:
    """The least seconds of all subsets that hold what is ready, in falling order of rows after it."""
    used = [int(e) for e in np.flatnonzero(rows)]
    first = sorted((e for e in used if e in ready), key=lambda e: -rows[e])
    others = sorted((e for e in used if e not in ready), key=lambda e: -rows[e])
    return min(
        played(law, rows, [*first, *some], ready, resident)
        for n in range(len(others) + 1)
        for some in combinations(others, n)
    )


ROWS = st.lists(st.integers(0, 300), min_size=1, max_size=9).map(np.array)


@given(rates(), ROWS, st.data())
def test_the_scan_counts_as_the_play_does(law: StreamRates, rows: np.ndarray, data: st.DataObject) -> None:
    order = np.argsort(-rows, kind="stable")[: np.count_nonzero(rows)]
    n_ready = data.draw(st.integers(0, len(order)))
    busy = np.array([data.draw(st.integers(0, 400))])
    ends = makespans(law, rows[order], n_ready, float(law.on_device(busy).sum()))
    ready = {int(e) for e in order[:n_ready]}
    for n in range(n_ready, len(order) + 1):
        assert ends[n] == pytest.approx(played(law, rows, [int(e) for e in order[:n]], ready, busy))


@settings(deadline=None)
@given(rates(quick_device=True), ROWS, st.data())
def test_no_subset_is_better_where_the_link_or_the_cpu_decides(
    law: StreamRates, rows: np.ndarray, data: st.DataObject
) -> None:
    """As the law says: an upload costs the same for each, and the CPU is spared most by those with the most rows."""
    ready = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    chosen = best_stream(law, rows, np.array(sorted(ready), np.int64), NONE)
    found = played(law, rows, chosen, ready, NONE)
    assert found == pytest.approx(best_subset(law, rows, ready, NONE))


@settings(deadline=None)
@given(rates(), ROWS, st.data())
def test_little_is_lost_where_the_device_takes_time(law: StreamRates, rows: np.ndarray, data: st.DataObject) -> None:
    """What one product takes longer than another is all that an exchange of two experts can win: of those with the
    fewest and the most rows for each expert that is streamed."""
    ready = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    resident = np.array(data.draw(st.lists(st.integers(0, 100), max_size=3)), np.int64)
    chosen = best_stream(law, rows, np.array(sorted(ready), np.int64), resident)
    found, best = played(law, rows, chosen, ready, resident), best_subset(law, rows, ready, resident)
    products = law.on_device(rows[np.flatnonzero(rows)]) if rows.any() else np.zeros(1)
    assert found <= best + len(rows) * float(np.ptp(products)) + 1e-9


def test_the_split_ends_both_sides_together() -> None:
    """32 alike, a second on the CPU and three over the link: a quarter goes, where a switch would send all or none."""
    law = StreamRates(3.0, 0.01, (1.0, 100.0), (1.0, 1.0), 0.0, 0.0, 0.0)
    assert len(best_stream(law, np.full(32, 100), NONE, NONE)) == 8


def test_memory_that_both_read_stops_the_stream() -> None:
    """The CPU reads at the memory's full rate already, so nothing is won: an upload reads the same bytes."""
    law = StreamRates(2.0, 1.0, (1.0, 8.0), (1.0, 1.0), 0.0, 0.0, 0.0)
    assert best_stream(law, np.full(12, 4), NONE, NONE) == []
    assert best_stream(StreamRates(2.0, 0.1, (1.0, 8.0), (1.0, 1.0), 0.0, 0.0, 0.0), np.full(12, 4), NONE, NONE)


def test_the_most_rows_go_first_and_what_is_ready_before() -> None:
    law = StreamRates(0.5, 0.01, (1.0,), (1.0,), 1.0, 0.0, 0.0)
    rows = np.array([3, 90, 0, 50, 70])
    assert best_stream(law, rows, np.array([2, 0]), NONE)[:3] == [0, 1, 4]


def test_decoding_is_not_worth_a_thought() -> None:
    law = StreamRates(1.0, 0.1, (1.0, 32.0), (0.2, 1.3), 0.04, 0.0, 0.0)
    assert not law.may_pay(16) and law.may_pay(24)
