"""Who goes first: lanes, groups, and what the policies are measured against."""

import itertools
from collections.abc import Callable, Iterable

import pytest

from server.policy import FIRST_COME, MOST_OVERTAKEN
from server.request import Request
from server.scheduler import MOST_ALONE
from tests.server.house import House, assert_empty, request, small


def group(ids: Iterable[int], name: str = "swarm", max_tokens: int = 4) -> list[Request]:
    return [request(i, [i, 1, 2, 3], max_tokens, group=name, patient=True) for i in ids]


def test_a_newcomer_gets_a_step_of_its_own_and_half_of_the_time() -> None:
    """A step for all takes three seconds, one of them more than the express lane's two steps of a second may."""
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=8))
    house.seconds = lambda batch: 3.0 if len(batch.rows) > 1 else 1.0
    house.add(*group(range(1, 5), max_tokens=30))
    house.run(2)
    house.add(request(9, [9], max_tokens=12))
    house.run(12)
    lanes = [{row.request_id for row in batch.rows} for batch in house.batches[2:14]]
    assert lanes[:3] == [{9}] * 3, "paid in advance"
    assert lanes[3:] == [{1, 2, 3, 4, 9}, {9}] * 4 + [{1, 2, 3, 4, 9}]
    house.run()
    assert_empty(house)


def test_all_ride_along_where_that_costs_the_express_lane_little() -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=8))
    house.add(*group(range(1, 5), max_tokens=30))
    house.run(2)
    house.add(request(9, [9], max_tokens=12))
    house.run()
    assert [len(batch.rows) for batch in house.batches[2:14]] == [1] + [5] * 11


def test_the_longer_a_step_for_all_takes_the_more_steps_the_express_lane_gets() -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=8))
    house.seconds = lambda batch: float(len(batch.rows)) ** 2
    house.add(*group(range(1, 5), max_tokens=30))
    house.add(request(9, [9], max_tokens=60))
    house.run(60)
    express = [len(batch.rows) == 1 for batch in house.batches]
    seconds = [house.seconds(batch) for batch in house.batches]
    for_all = sum(s for s, alone in zip(seconds, express, strict=True) if not alone)
    assert for_all > 0
    assert sum(seconds) <= 2.0 * 60 + 25  # 60 tokens of a second each alone, and one step too many
    assert sum(seconds) >= 1.8 * 60, "and the others get what is left"


def test_prompts_without_end_do_not_keep_patient_ones_out() -> None:
    """Somebody always reads a prompt of two tokens and is gone; steps take a second."""
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=8))
    house.add(*group(range(1, 5), max_tokens=9))
    house.run(1)
    house.add(request(100, [100, 0], 1))
    for i in range(101, 160):
        house.add(request(i, [i, 0], 1))
        house.run(1)
    for_all = [n for n, batch in enumerate(house.batches) if batch.rows[0].request_id < 100]
    assert house.finish(1) == "length"
    assert max(later - n for n, later in itertools.pairwise(for_all)) == MOST_ALONE + 1


def test_patient_ones_alone_are_never_held_up() -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=8))
    house.add(*group(range(1, 5)))
    house.run()
    assert [len(batch.rows) for batch in house.batches] == [4, 4, 4, 4]


@pytest.mark.parametrize("seconds", [lambda n: 1.0, lambda n: 1 + n / 10, float])
def test_a_second_user_gets_a_place_too(seconds: Callable[[int], float]) -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=4))
    house.seconds = lambda batch: seconds(len(batch.rows))
    house.add(*group(range(1, 5), max_tokens=40))
    house.run(2)
    house.add(request(8, [8], max_tokens=60))
    house.run(6)
    house.add(request(9, [9], max_tokens=4))
    house.scheduler._owed = 0.0  # as after a preemption
    house.run(6)
    assert 9 in house.progress


def test_a_patient_one_cannot_be_pushed_out_for_ever() -> None:
    """Users whose prompts take half of the pages come again and again while it reads a long one."""
    house = House(small(n_pages=20, page_size=2, max_batch_tokens=4, max_running=4))
    house.add(request(0, range(34), 3, group="swarm", patient=True))
    for i in range(1, 100):
        house.add(request(i, [i, *range(100 * i, 100 * i + 17)], 1))
        house.run(6)
    assert house.finish(0) == "length"


def test_nobody_waits_for_a_prefix_that_a_patient_one_reads() -> None:
    """Its reader stands still in steps of the express lane."""
    house = House(small(n_pages=64, max_batch_tokens=4, max_running=4))
    house.seconds = lambda batch: 50.0 if any(row.request_id == 1 for row in batch.rows) else 1.0
    house.add(request(1, [*range(32), 40], 2, group="swarm", patient=True))
    house.run(2)
    house.add(request(2, [2], 50), request(3, [*range(32), 41], 2))
    house.run(20)
    assert house.finish(3) == "length"


def test_hurried_ones_start_before_patient_ones() -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=2))
    house.add(*group(range(1, 4), max_tokens=9), request(9, [9], 9))
    house.run(1)
    assert {row.request_id for row in house.batches[0].rows} == {9, 1}


def test_the_youngest_patient_one_of_the_largest_group_gives_way() -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=4))
    house.add(request(1, [1], 30, group="small", patient=True), *group(range(2, 5), "large", max_tokens=30))
    house.run(2)
    house.add(request(9, [9], 2))
    house.run(1)
    assert [row.request_id for row in house.batches[-1].rows] == [9]
    assert {one.request.id for one in house.scheduler._running} == {1, 2, 3, 9}


def test_hurried_ones_take_no_more_than_half_of_the_pages() -> None:
    house = House(small(n_pages=12, page_size=4, max_batch_tokens=64, max_running=8))
    house.add(*(request(i, range(10 * i, 10 * i + 15), 9, group="swarm", patient=True) for i in (1, 2)))
    house.run(1)
    house.add(request(8, range(80, 96), 9), request(9, range(90, 106), 9))
    house.run(2)
    assert {8} == {one.request.id for one in house.scheduler._running if not one.request.patient}


def test_places_go_to_the_group_that_holds_fewest() -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=4))
    house.add(*group(range(1, 9), "large"), *group((20, 21), "small"))
    house.run(1)
    assert [row.request_id for row in house.batches[0].rows] == [1, 20, 2, 21]


def test_the_longest_answers_of_a_group_come_first() -> None:
    house = House(small(n_pages=64, max_batch_tokens=64, max_running=2))
    lengths = {1: 3, 2: 9, 3: 6, 4: 12}
    house.add(*(request(i, [i], n, group="swarm", patient=True) for i, n in lengths.items()))
    house.run()
    started = list(dict.fromkeys(row.request_id for batch in house.batches for row in batch.rows))
    assert started == [4, 2, 3, 1]
    assert len(house.batches) == 15, "30 tokens in two places"


def test_nobody_is_overtaken_for_ever() -> None:
    house = House(small(n_pages=64, max_running=1))
    house.add(request(0, [0], 1, group="swarm", patient=True))
    for i in range(1, 200):
        house.add(request(i, [i], 2, group="swarm", patient=True))
        if i > 1:
            house.run(1)
        if 0 in house.progress:
            break
    assert house.finish(0) == "length"
    assert i <= 2 * (MOST_OVERTAKEN + 3)


def test_a_hurried_one_takes_the_pages_of_patient_ones() -> None:
    house = House(small(n_pages=8, max_batch_tokens=64, max_running=8))
    house.add(*(request(i, range(10 * i, 10 * i + 9), 4, group="swarm", patient=True) for i in (1, 2)))
    house.run(1)
    assert house.scheduler.stats().running == 2
    house.add(request(9, range(50, 58), 4))
    house.run(1)
    assert [row.request_id for row in house.batches[-1].rows] == [9]
    house.run()
    assert house.scheduler.stats().preemptions > 0
    assert_empty(house)


def test_first_come_first_served_is_still_there() -> None:
    """What the policies are measured against: one prompt to a step, in order of arrival."""
    house = House(small(n_pages=64, max_batch_tokens=64, policy=FIRST_COME))
    house.add(*group(range(1, 4)), request(9, [9]))
    house.run()
    assert [[row.request_id for row in batch.rows if row.position == 0] for batch in house.batches[:4]] == [
        [1], [2], [3], [9],
    ]  # fmt: skip
