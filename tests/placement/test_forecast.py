"""placement.forecast: closed forms against the steps one by one."""

from dataclasses import replace

import pytest

from placement.cost import Load, Rates, Setup, prompt_seconds, resolve, step_cost
from placement.forecast import (
    Cache,
    batch_held,
    batch_run,
    best_chunk,
    cached_tokens,
    decode_step,
    first_token,
    human_seconds,
    makespan,
    predict,
    prefill_seconds,
    request_tokens,
    score,
    share_in_ram,
    swarm_of,
)
from placement.plan import Goal
from placement.planner import shipped_profiles
from placement.profile import read_profile
from placement.routing import uniform
from tests.reference.k25 import K25

SWARM = Goal("swarm", 9792, 100)


@pytest.fixture(scope="module")
def rates() -> Rates:
    profile = read_profile(shipped_profiles()["ddr5-4800-8ch_rtx4090"])
    return resolve(K25, profile, Setup("fp8", "numba/avx512vnni/int4/a8", streams=True), uniform(K25))


def test_a_swarm_shares_its_prompt() -> None:
    assert cached_tokens(SWARM, 100) == 8192 + 100 * 1600
    assert request_tokens(SWARM) == 9792
    assert cached_tokens(Goal("throughput", 5000, 9), 3) == 15_000


@pytest.mark.parametrize("longest", [1, 100, 1600, 5000, 9791])
def test_a_swarm_fits_into_a_short_context(longest: int) -> None:
    swarm = swarm_of(3, longest)
    assert swarm.shared_tokens + swarm.private_tokens + swarm.answer_tokens <= longest
    assert min(swarm.shared_tokens, swarm.private_tokens, swarm.answer_tokens) >= 0


@pytest.mark.parametrize("goal", [SWARM, Goal("latency", 3000, 7), Goal("swarm", 20_000, 5)])
def test_batch_held_is_the_largest_that_fits(goal: Goal) -> None:
    for tokens in (0, goal.context - 1, goal.context, 30_000, 60_000, 168_192, 10**6):
        fitting = [n for n in range(1, goal.concurrency + 1) if max(goal.context, cached_tokens(goal, n)) <= tokens]
        assert batch_held(goal, tokens) == max(fitting, default=0)


def test_a_batch_is_no_larger_than_may_run(rates: Rates) -> None:
    goal = Goal("throughput", 1000, 9)
    caches = [Cache(8500), Cache(8500, running=4), Cache(8500, running=20), Cache(10, running=4)]
    assert [batch_run(goal, cache) for cache in caches] == [8, 4, 8, 1]
    assert [point.size for point in predict(rates, goal, caches[1], 512).decode] == [1, 2, 4]
    four = step_cost(rates, Load.decode(4, 1000)).seconds
    assert score(rates, goal, caches[1], 512) == pytest.approx(four * 9 / 4)


def test_the_devices_pages_fill_up_first() -> None:
    cache, goal = Cache(3000, 3000), Goal("throughput", 1000, 9)
    assert [share_in_ram(goal, cache, batch, 1000) for batch in (1, 3, 4, 6)] == [0, 0, 1 / 4, 1 / 2]


def test_many_chunks_are_summed_as_their_steps_would_be(rates: Rates) -> None:
    for tokens, chunk in ((20_000, 512), (32_768, 1024), (10_001, 256), (700, 256), (9 * 256, 256)):
        assert first_token(rates, tokens, chunk) == pytest.approx(prompt_seconds(rates, tokens, chunk), 0.01)


def test_private_prompts_of_a_swarm_share_steps(rates: Rates) -> None:
    shared = prompt_seconds(rates, 8192, 8192)
    together = [13] * 7 + [9]  # agents whose 600 tokens fit into 8192 at once, 100 in all
    steps = [step_cost(rates, Load(0, 0, ((600, 8192),) * n, n)).seconds for n in together]
    assert prefill_seconds(rates, SWARM, 8192) == pytest.approx(shared + sum(steps))
    alone = prompt_seconds(rates, 8192, 512) + 100 * prompt_seconds(rates, 600, 512, 8192)
    assert prefill_seconds(rates, SWARM, 512) == pytest.approx(alone, 0.01)


def test_makespan_against_every_step(rates: Rates) -> None:
    """All 100 agents decode 1000 tokens; contexts grow step by step, where the closed form takes their mean."""
    cache = Cache(200_000)
    steps = sum(step_cost(rates, Load.decode(100, 8792 + n)).seconds for n in range(1, 1001))
    assert makespan(rates, SWARM, cache, 65536) == pytest.approx(prefill_seconds(rates, SWARM, 65536) + steps, 0.01)
    half = Cache(cached_tokens(SWARM, 50))
    slower = step_cost(rates, Load.decode(50, 9292)).seconds * 2 * 1000
    assert makespan(rates, SWARM, half, 65536) == pytest.approx(prefill_seconds(rates, SWARM, 65536) + slower)


def test_tokens_in_ram_cross_the_link_once_and_take_their_share_of_its_bandwidth(rates: Rates) -> None:
    slow_link = replace(rates, experts=replace(rates.experts, link=1e9))
    cache = Cache(100_000, 68_192)
    step = decode_step(slow_link, SWARM, cache, 100)
    assert step.moved["link"] == pytest.approx(68_192 * 70272 + 100 * 2 * 4 * 7168 * 60)  # and the hidden states
    assert step.binding == "link"
    assert decode_step(rates, SWARM, Cache(168_192), 100).parts["link"] == 0
    # One token a step, all of its context in RAM: reading it delays the kernels, which wait for RAM.
    goal = Goal("latency", 8192, 1)
    near, far = (decode_step(rates, goal, cache, 1) for cache in (Cache(8192), Cache(0, 8192)))
    assert far.seconds - near.seconds == pytest.approx(8192 * 70272 / 245e9, 0.02)
    waits = far.parts["CPU experts"] - near.parts["CPU experts"]
    assert waits == pytest.approx(far.seconds - near.seconds)


def test_score_is_what_the_goal_asks_for(rates: Rates) -> None:
    cache = Cache(4 * 8192)
    assert score(rates, Goal("latency", 8192, 1), cache, 512) == step_cost(rates, Load.decode(1, 8192)).seconds
    # Eight wish to run and four may: a token for each takes two steps of four.
    four = step_cost(rates, Load.decode(4, 8192)).seconds
    assert score(rates, Goal("throughput", 8192, 8), cache, 512) == pytest.approx(2 * four)
    assert score(rates, SWARM, cache, 512) == makespan(rates, SWARM, cache, 512)


def test_prediction(rates: Rates) -> None:
    found = predict(rates, Goal("throughput", 8192, 24), Cache(10**6), 4096)
    assert [point.size for point in found.decode] == [1, 2, 4, 8, 16, 24]
    assert [point.size for point in found.prefill] == [256, 1024, 2048, 8192]
    assert found.swarm is None
    for point in found.decode:
        cost = step_cost(rates, Load.decode(point.size, 8192))
        assert (point.seconds, point.binding) == (cost.seconds, cost.binding)
    for point in found.prefill:
        assert point.seconds == prompt_seconds(rates, point.size, 4096)
    assert all(p.tokens_per_second == p.size / p.seconds for p in (*found.decode, *found.prefill))
    assert [point.size for point in predict(rates, Goal("latency", 100, 1), Cache(100), 512).prefill] == [100]
    swarm = predict(rates, SWARM, Cache(10**6), 4096).swarm
    assert swarm is not None and swarm.seconds == makespan(rates, SWARM, Cache(10**6), 4096)


def test_best_chunk_is_the_smallest_good_one(rates: Rates) -> None:
    sizes = (256, 1024, 4096, 8192, 16384)
    chunk, seconds = best_chunk(rates, Goal("latency", 8192, 1), sizes, 1.05)
    assert set(seconds) == set(sizes)
    assert seconds[chunk] <= 1.05 * min(seconds.values())
    assert all(seconds[size] > 1.05 * min(seconds.values()) for size in sizes if size < chunk)
    assert chunk == 8192


def test_human_seconds() -> None:
    shown = [human_seconds(value) for value in (3e-7, 0.0123, 0.25, 1.5, 99.94, 2747.4)]
    assert shown == ["0.3 us", "12.3 ms", "250 ms", "1.5 s", "99.9 s", "2,747 s"]
