"""The scheduler with a second tier of pages: what comes back from RAM is not computed again."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hybrid.batch import Batch, Moves, Row
from placement.cost import StepCost
from server import simulate
from tests.server.house import House, assert_empty, assert_same_as_alone, request, small


def computed(house: House) -> int:
    """New ids over all steps."""
    return sum(batch.n_tokens for batch in house.batches)


@pytest.mark.parametrize(("n_ram_pages", "again"), [(0, 31), (16, 3)])
def test_a_returning_prompt_costs_only_what_no_tier_holds(n_ram_pages: int, again: int) -> None:
    """Eight device pages, a prompt of seven full ones; another prompt takes them all."""
    house = House(small(n_pages=8, n_ram_pages=n_ram_pages, max_batch_tokens=64))
    for i, prompt in enumerate(([1] * 30, [2] * 30, [1] * 31)):
        house.add(request(i, prompt, max_tokens=1))
        house.run()
    assert house.batches[-1].n_tokens == again
    assert house.progress[2][-1].cached_tokens == 31 - again
    stats = house.scheduler.stats()
    assert (stats.promoted, stats.ram_hits) == ((7, 28) if n_ram_pages else (0, 0))
    assert stats.demoted == (14 if n_ram_pages else 0)
    assert stats.ram_pages_used == stats.demoted


def test_a_preempted_request_gets_its_pages_back() -> None:
    """Two that fit at first and not at their ends: one gives way, and comes back when the other is done."""
    asked = [request(i, [i + 1] * 13, max_tokens=30) for i in range(2)]
    counts = []
    for n_ram_pages in (0, 32):
        house = House(small(n_pages=12, n_ram_pages=n_ram_pages, max_batch_tokens=16))
        house.add(*asked)
        house.run()
        assert house.scheduler.stats().preemptions > 0
        for one in asked:
            assert_same_as_alone(house, one)
        counts.append(computed(house))
    needed = 2 * (13 + 29)
    assert counts[0] > needed + 12
    assert counts[1] <= needed + 4 * house.scheduler.stats().preemptions  # at most the page that was not full yet


def test_moves_wait_for_a_batch_that_takes_them() -> None:
    """A request that is cancelled in flight, or before it starts, leaves both tiers as they are said to be."""
    house = House(small(n_pages=8, n_ram_pages=16, max_batch_tokens=64))
    for i in range(2):
        house.add(request(i, [i + 1] * 30, max_tokens=1))
        house.run()
    house.add(request(2, [1] * 31, max_tokens=2))
    batch = house.launch()
    assert batch is not None and len(batch.moves.promoted) == 7
    house.cancel(2)
    house.land(batch)
    assert house.finish(2) == "cancelled"
    assert_empty(house)
    again = request(3, [1] * 31, max_tokens=2)
    house.add(again)
    house.run()
    assert house.batches[-2].moves.promoted == ()  # the pages are still on the device
    assert house.progress[3][0].cached_tokens == 28
    assert_same_as_alone(house, again)


def test_pages_on_their_way_take_time_in_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StepCost(2.0, {"link": 0.5, "weights": 1.5}, {"link": 7.0}, 1.0, "weights")
    monkeypatch.setattr(simulate, "step_cost", lambda rates, load: plain)
    rates = SimpleNamespace(kv_token=100, hand_over=(0.001, 0.0001))
    cost = simulate.clock(rates, page_size=10)  # type: ignore[arg-type]
    rows = (Row(1, ids=(5,), position=0, pages=(0,)),)
    assert cost(Batch(rows)) == plain
    found = cost(Batch(rows, Moves(demoted=((0, 1), (1, 2)), promoted=((5, 0),))))
    assert found.seconds == pytest.approx(2.0 + 2 * 1.0 + 0.1)
    assert found.parts == {"link": pytest.approx(0.5 + 2.1), "weights": 1.5}
    assert found.moved == {"link": 7.0 + 3 * 1000}
    assert replace(found, seconds=2.0, parts=plain.parts, moved=plain.moved) == plain
