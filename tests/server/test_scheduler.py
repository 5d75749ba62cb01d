"""The scheduler over a fake step whose tokens depend on everything its pages hold, so that page faults show."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest

from hybrid.batch import RowOutput, Sampling, StepOutput, TokenLogprob
from server.policy import Policy
from server.request import Progress, Request
from server.scheduler import Scheduler, SchedulerConfig
from tests.server.house import GREEDY, House, alone, assert_empty, assert_same_as_alone, request, small

# One request


def test_a_request_runs_to_its_limit_and_leaves_nothing() -> None:
    house = House(small())
    house.add(request(1, range(10), max_tokens=3))
    house.run()
    assert [p.finish for p in house.progress[1]] == [None, None, "length"]
    assert [[row.ids for row in b.rows] for b in house.batches[:2]] == [[tuple(range(8))], [(8, 9)]]
    assert [b.rows[0].position for b in house.batches] == [0, 8, 10, 11]
    assert [b.rows[0].n_sampled for b in house.batches[1:]] == [0, 1, 2]
    assert [b.rows[0].sampling for b in house.batches] == [None, GREEDY, GREEDY, GREEDY]
    assert_empty(house)


def test_a_stop_id_ends_the_answer_and_is_part_of_it() -> None:
    free = [p.token for p in alone(request(1, range(6), max_tokens=8))]
    stop = free[3]
    assert stop is not None
    house = House(small())
    house.add(request(1, range(6), max_tokens=8, stop_ids=frozenset({stop})))
    house.run()
    assert house.tokens(1) == free[: free.index(stop) + 1]
    assert house.finish(1) == "stop"


def test_a_stop_id_beats_the_limit() -> None:
    last = alone(request(1, range(6), max_tokens=3))[-1].token
    assert last is not None
    house = House(small())
    house.add(request(1, range(6), max_tokens=3, stop_ids=frozenset({last})))
    house.run()
    assert house.finish(1) == "stop"


def test_the_last_token_needs_no_page() -> None:
    house = House(small(n_pages=2))
    house.add(request(1, range(5), max_tokens=4))  # 5 + 3 computed positions fill two pages of four
    house.run()
    assert len(house.tokens(1)) == 4
    assert_empty(house)


def test_penalised_rows_carry_the_ids_so_far_and_others_do_not() -> None:
    house = House(small(max_batch_tokens=4))
    plain = request(1, range(6), max_tokens=3)
    house.add(replace(plain, id=2, sampling=Sampling(presence_penalty=0.5)), plain)
    house.run()
    rows = [row for b in house.batches for row in b.rows]
    assert all(row.prompt == row.output == () for row in rows if row.request_id == 1 or row.sampling is None)
    penalised = [row for row in rows if row.request_id == 2 and row.sampling is not None]
    assert [row.prompt for row in penalised] == [tuple(range(6))] * 3
    assert [row.output for row in penalised] == [tuple(house.tokens(2)[:n]) for n in range(3)]


# Scoring


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_prompt_logprobs_over_chunks(max_batch_tokens: int, max_tokens: int) -> None:
    house = House(small(max_batch_tokens=max_batch_tokens))
    r = request(1, range(11), max_tokens, prompt_logprobs=2)
    house.add(r)
    house.run()
    assert_same_as_alone(house, r)
    first, *rest = house.progress[1]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert [s.token for s in first.prompt_logprobs[1:] if s is not None] == list(range(1, 11))
    assert all(p.prompt_logprobs is None for p in rest)
    assert house.progress[1][-1].finish == "length"
    assert len(house.tokens(1)) == max_tokens
    assert_empty(house)


def test_targets_cross_chunk_borders() -> None:
    house = House(small(max_batch_tokens=4))
    house.add(request(1, range(9), 0, prompt_logprobs=0))
    house.run()
    assert [b.rows[0].targets for b in house.batches] == [(1, 2, 3, 4), (5, 6, 7, 8), None]
    assert all(b.rows[0].sampling is None for b in house.batches)


def test_a_prompt_of_one_token_has_one_empty_score() -> None:
    house = House(small())
    house.add(request(1, [7], 0, prompt_logprobs=3))
    house.run()
    assert house.progress[1] == [Progress(1, finish="length", prompt_logprobs=(None,))]


def test_scoring_takes_no_shared_pages() -> None:
    house = House(small())
    house.add(request(1, range(12)))
    house.run()
    scored = request(2, range(12), 2, prompt_logprobs=1)
    house.add(scored)
    house.run()
    assert_same_as_alone(house, scored)
    assert {p.cached_tokens for p in house.progress[2]} == {0}
    assert house.scheduler.stats().prefix_queries == 12


def test_max_tokens_zero_without_logprobs_just_reads_the_prompt() -> None:
    house = House(small())
    house.add(request(1, range(9), 0))
    house.run()
    assert house.progress[1] == [Progress(1, finish="length")]
    assert house.scheduler.stats().generated_tokens == 0


def test_scores_survive_preemption() -> None:
    """The scored prompt is the younger one and loses its pages half way; it goes on from what is scored and kept."""
    house = House(small(n_pages=7, max_batch_tokens=3))
    old, scored = request(1, range(8), max_tokens=16), request(2, range(20, 36), 2, prompt_logprobs=1)
    house.add(old, scored)
    house.run()
    for r in (old, scored):
        assert_same_as_alone(house, r)
    rows = [row for b in house.batches for row in b.rows if row.request_id == 2]
    again = next(n for n in range(1, len(rows)) if rows[n].position < rows[n - 1].position)
    assert rows[again - 1].targets is not None
    assert rows[again].position == 4


# Sharing


def test_a_shared_prefix_is_reported_and_not_computed_again() -> None:
    house = House(small())
    house.add(request(1, range(10)))
    house.run()
    house.batches.clear()
    second = request(2, [*range(9), 40, 41])
    house.add(second)
    house.run()
    assert {p.cached_tokens for p in house.progress[2]} == {8}
    assert (house.batches[0].rows[0].position, house.batches[0].rows[0].ids) == (8, (8, 40, 41))
    assert_same_as_alone(house, second)
    stats = house.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (21, 8)


def test_the_next_turn_reuses_the_answer_too() -> None:
    house = House(small())
    house.add(request(1, range(6), max_tokens=7))
    house.run()
    house.add(request(2, [*range(6), *house.tokens(1), 3, 4]))
    house.run()
    assert house.progress[2][0].cached_tokens == 12


def test_twins_that_arrive_together_wait_for_the_first_ones_pages() -> None:
    house = House(small(max_batch_tokens=64))
    twins = [request(i, range(12)) for i in range(1, 4)]
    house.add(*twins)
    house.run()
    assert [len(row.ids) for batch in house.batches[:2] for row in batch.rows] == [12, 1, 4, 4]
    for r in twins:
        assert_same_as_alone(house, r)
    assert [house.progress[r.id][0].cached_tokens for r in twins] == [0, 8, 8]


def test_without_prefix_once_twins_do_not_read_unwritten_pages() -> None:
    house = House(small(max_batch_tokens=64, policy=Policy(prefix_once=False)))
    twins = [request(i, range(12)) for i in range(1, 4)]
    house.add(*twins)
    house.run()
    for r in twins:
        assert_same_as_alone(house, r)
        assert house.progress[r.id][0].cached_tokens == 0


def test_who_shares_little_does_not_wait() -> None:
    house = House(small(max_batch_tokens=64))
    house.add(request(1, range(12)), request(2, [*range(4), *range(20, 30)]))
    house.run(1)
    assert [row.request_id for row in house.batches[0].rows] == [1, 2]


def test_the_prefix_is_read_anew_where_its_reader_is_cancelled() -> None:
    house = House(small(max_batch_tokens=6))
    house.add(request(1, range(12)), request(2, [*range(11), 40]))
    house.run(1)
    assert [row.request_id for row in house.batches[0].rows] == [1]
    house.cancel(1)
    house.run()
    assert house.progress[2][0].cached_tokens == 4
    assert house.finish(2) == "length"
    assert_empty(house)


# Order, fairness, preemption


def test_decoding_goes_before_prompts() -> None:
    house = House(small(max_batch_tokens=4))
    house.add(request(1, [1], max_tokens=6))
    house.run(1)
    house.add(request(2, range(12)))
    house.run(2)
    assert [(row.request_id, len(row.ids)) for row in house.batches[-1].rows] == [(1, 1), (2, 3)]


def test_one_step_carries_the_end_of_one_prompt_and_the_start_of_the_next() -> None:
    house = House(small(max_batch_tokens=8))
    house.add(request(1, range(11)), request(2, range(20, 29)))
    house.run(2)
    assert [(row.request_id, len(row.ids)) for row in house.batches[-1].rows] == [(1, 3), (2, 5)]


def test_with_one_token_to_a_step_the_older_goes_first() -> None:
    house = House(small(max_batch_tokens=1))
    house.add(request(1, range(6)), request(2, [1], max_tokens=20))
    house.run()
    order = [b.rows[0].request_id for b in house.batches]
    assert order == sorted(order)


def test_a_large_request_is_not_starved_by_a_stream_of_short_ones() -> None:
    house = House(small(n_pages=8))
    house.add(request(1, range(8), max_tokens=6), request(2, range(50, 75), max_tokens=4))
    for i in range(3, 80):
        house.add(request(i, [i], max_tokens=2))
        house.run(1)
        if house.progress.get(2):
            break
    assert i < 30, "the large request must start once the first one is done"
    assert not any(house.progress.get(j) for j in range(3, i + 1)), "and nobody may overtake it"
    house.run()
    assert_empty(house)


def test_the_youngest_is_preempted_and_answers_the_same() -> None:
    house = House(small(n_pages=8))
    requests = [request(i, range(10 * i, 10 * i + 6), max_tokens=20) for i in range(1, 4)]
    house.add(*requests)
    house.run()
    stats = house.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.generated_tokens == 60
    assert stats.prompt_tokens == 18
    for r in requests:
        assert_same_as_alone(house, r)
    starts = {i: [row.position for b in house.batches for row in b.rows if row.request_id == i] for i in (1, 2, 3)}
    assert starts[1] == sorted(starts[1]), "the oldest never gives way"
    assert starts[3] != sorted(starts[3]), "the youngest did"
    assert_empty(house)


def test_the_oldest_running_request_advances_in_every_step() -> None:
    house = House(small(n_pages=7, max_batch_tokens=3))
    requests = [request(i, range(i, i + 9), max_tokens=12) for i in range(1, 7)]
    house.add(*requests)
    done: set[int] = set()
    while (batch := house.launch()) is not None:
        assert min(r.id for r in requests if r.id not in done) in {row.request_id for row in batch.rows}
        house.land(batch)
        done = {i for i, p in house.progress.items() if p[-1].finish is not None}
    assert house.scheduler.stats().preemptions > 0
    assert_empty(house)


def test_preempted_requests_report_the_hits_of_their_first_admission() -> None:
    house = House(small(n_pages=8))
    requests = [request(i, range(10 * i, 10 * i + 6), max_tokens=20) for i in range(1, 4)]
    house.add(*requests)
    house.run()
    assert house.scheduler.stats().preemptions > 0
    assert {p.cached_tokens for all_of in house.progress.values() for p in all_of} == {0}
    assert house.scheduler.stats().prefix_queries == 18


# Refusal and cancellation


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [(33, 0, "33 prompt tokens"), (30, 4, "room for 33 tokens, but the KV pages hold 32"), (0, 4, "prompt is empty")],
)
def test_what_can_never_fit_is_refused_with_a_reason(prompt: int, max_tokens: int, words: str) -> None:
    house = House(small(n_pages=8))
    house.add(request(1, range(prompt), max_tokens))
    assert house.finish(1) == "error"
    assert words in (house.progress[1][0].error or "")
    assert_empty(house)


@pytest.mark.parametrize(("prompt", "max_tokens"), [(32, 0), (32, 1), (29, 4), (1, 32)])
def test_what_fits_exactly_runs_alone(prompt: int, max_tokens: int) -> None:
    house = House(small(n_pages=8))
    house.add(request(1, range(prompt), max_tokens), request(2, range(prompt), max_tokens))
    house.run()
    for i in (1, 2):
        assert house.finish(i) == "length"
        assert len(house.tokens(i)) == max_tokens
    assert_empty(house)


def test_cancelled_in_the_queue() -> None:
    house = House(small(max_running=1))
    house.add(request(1, range(5)), request(2, range(5)))
    house.run(1)
    house.cancel(2)
    assert house.progress[2] == [Progress(2, finish="cancelled")]
    house.run()
    assert 2 not in {row.request_id for b in house.batches for row in b.rows}
    assert_empty(house)


def test_cancelled_between_steps_frees_pages_at_once() -> None:
    house = House(small())
    house.add(request(1, range(5)))
    house.run(1)
    house.cancel(1)
    assert house.finish(1) == "cancelled"
    assert_empty(house)


def test_cancelled_in_flight_keeps_its_pages_until_the_commit_and_drops_the_token() -> None:
    house = House(small(n_pages=2))
    house.add(request(1, range(5)))
    batch = house.launch()
    assert batch is not None
    house.cancel(1)
    house.cancel(1)  # twice is once
    house.add(request(2, range(20, 25)))
    assert house.scheduler.stats().pages_used == 2
    assert 1 not in house.progress
    house.land(batch)
    assert house.progress[1] == [Progress(1, finish="cancelled")]
    assert house.scheduler.stats().pages_used == 0
    house.run()
    assert_same_as_alone(house, request(2, range(20, 25)))
    assert_empty(house)


def test_cancelling_the_unknown_or_finished_is_ignored() -> None:
    house = House(small())
    house.add(request(1, range(5), max_tokens=1))
    house.run()
    assert house.scheduler.cancel(1) is None
    assert house.scheduler.cancel(99) is None
    assert len(house.progress[1]) == 1


# Misuse


def test_misuse_is_an_error() -> None:
    scheduler = Scheduler(small())
    scheduler.add(request(1, range(5)))
    with pytest.raises(ValueError, match="already in use"):
        scheduler.add(request(1, range(5)))
    with pytest.raises(ValueError, match="do not match"):
        scheduler.commit(StepOutput(()))
    scheduler.next()
    with pytest.raises(RuntimeError, match="before the step in flight"):
        scheduler.next()
    with pytest.raises(ValueError, match="do not match"):
        scheduler.commit(StepOutput((RowOutput(2, 5),)))


@pytest.mark.parametrize("name", ["n_pages", "page_size", "max_batch_tokens", "max_running"])
def test_sizes_are_named_where_they_are_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        small(**{name: 0})


def test_logprobs_and_step_costs_are_passed_on() -> None:
    scheduler = Scheduler(small())
    scheduler.add(request(1, range(5), max_tokens=1))
    scheduler.next()
    logprob = TokenLogprob(9, -0.5, ((9, -0.5),))
    answer = StepOutput((RowOutput(1, 9, logprob),), seconds=0.25, expert_bytes=1000, distinct_experts=7)
    assert scheduler.commit(answer) == (Progress(1, 9, logprob, "length"),)
    stats = scheduler.stats()
    assert (stats.steps, stats.step_seconds, stats.expert_bytes, stats.distinct_experts) == (1, 0.25, 1000, 7)


def test_it_loads_neither_torch_nor_numba() -> None:
    code = "import sys, server.scheduler; sys.exit(any(m in sys.modules for m in ('torch', 'numba', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Random workloads


def random_request(rng: random.Random, i: int, capacity: int) -> Request:
    """Prompts with few distinct beginnings; sizes up to what fits alone."""
    n_prompt = rng.randint(1, rng.choice([capacity, max(capacity // 4, 1)]))
    family, n_shared = rng.randrange(3), rng.randint(0, n_prompt)
    prompt = tuple(family if k < n_shared else rng.randrange(50) for k in range(n_prompt))
    return Request(
        id=i,
        prompt=prompt,
        max_tokens=rng.randint(0, min(capacity - n_prompt + 1, 25)),
        sampling=rng.choice([GREEDY, Sampling(seed=i, logprobs=2), Sampling(seed=i, frequency_penalty=0.5)]),
        stop_ids=frozenset({rng.randrange(50)}),
        prompt_logprobs=rng.choice([None, None, 0, 2]),
        group=rng.choice(["", "a", "b"]),
        patient=rng.random() < 0.5,
    )


def random_life(seed: int) -> tuple[House, list[Request]]:
    """Arrivals and cancellations at any time, in few pages, until everything is done."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        n_pages=rng.randint(2, 14),
        page_size=rng.randint(1, 4),
        max_batch_tokens=rng.choice([1, 2, 3, 5, 17, 64]),
        max_running=rng.randint(1, 6),
    )
    house = House(config)
    requests: list[Request] = []
    arrivals = 14
    while arrivals or not house.scheduler.idle:
        if arrivals and rng.random() < 0.5:
            arrivals -= 1
            requests.append(random_request(rng, len(requests), config.capacity))
            house.add(requests[-1])
        batch = house.launch()
        if requests and rng.random() < 0.05:
            house.cancel(rng.choice(requests).id)
        if batch is not None:
            house.land(batch)
    return house, requests


@pytest.mark.parametrize("seed", range(60))
def test_random_lives_answer_as_if_alone(seed: int) -> None:
    house, requests = random_life(seed)
    for r in requests:
        got = [replace(p, cached_tokens=0) for p in house.progress[r.id]]
        assert [p.finish for p in got].count(None) == len(got) - 1, "one finish, at the end"
        if got[-1].finish == "cancelled":
            assert got[:-1] == alone(r)[: len(got) - 1]
        else:
            assert got == alone(r)
    assert_empty(house)


def test_random_lives_cover_what_they_are_meant_to() -> None:
    lives = [random_life(seed)[0] for seed in range(60)]
    assert sum(house.scheduler.stats().preemptions for house in lives) > 50
    assert sum(house.scheduler.stats().prefix_hits for house in lives) > 100
    finishes = [p.finish for house in lives for all_of in house.progress.values() for p in all_of]
    assert min(finishes.count(reason) for reason in ("stop", "length", "cancelled")) > 20


def test_a_life_is_deterministic() -> None:
    (first, _), (second, _) = random_life(7), random_life(7)
    assert first.batches == second.batches
    assert first.progress == second.progress
