"""Between the handlers and the engine: lengths, seeds, places in the queue, drain."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hybrid.batch import Sampling
from server.app import create_app
from server.chat import Chat, Message
from server.errors import ApiError
from server.keys import SERVING
from server.reply import Answered, Event, Finished, Reply, Scored
from server.service import Options, Service
from server.settings import ServerSettings

GREEDY = Sampling(temperature=0.0)


@asynccontextmanager
async def serving(model: Path, build: str = "build", **settings: Any) -> AsyncIterator[Service]:
    app = create_app(ServerSettings(model=model, **settings), f"tests.reference.fake_engine:{build}")
    service = app[SERVING].service
    service.bridge.start()
    try:
        assert await service.bridge.loaded() is None
        yield service
    finally:
        await service.bridge.stop()


async def collect(reply: Reply) -> list[Event]:
    try:
        return [event async for event in reply.events() if event is not None]
    finally:
        reply.close()


def texts(events: list[Event]) -> list[str]:
    """The text of each choice."""
    n = 1 + max(event.index for event in events)
    answered = [event for event in events if isinstance(event, Answered)]
    return ["".join(one.piece.delta.content for one in answered if one.index == i) for i in range(n)]


async def test_each_choice_has_a_seed_of_its_own_and_a_seed_repeats(tiny_model: Path) -> None:
    async with serving(tiny_model) as service:
        options = Options(seed=7, n=3, max_tokens=12)
        first = texts(await collect(await service.complete(["same"], options)))
        again = texts(await collect(await service.complete(["same"], options)))
        other = texts(await collect(await service.complete(["same"], Options(seed=8, n=3, max_tokens=12))))
        free = [texts(await collect(await service.complete(["same"], Options(max_tokens=12)))) for _ in range(3)]
    assert first == again and len(set(first)) == 3
    assert not set(first) & set(other)
    assert len({text for one in free for text in one}) == 3


async def test_greedy_answers_do_not_depend_on_company(tiny_model: Path) -> None:
    async with serving(tiny_model, max_batch_tokens=16, max_running=3) as service:
        options = Options(sampling=GREEDY, max_tokens=10)
        prompts = [f"prompt number {i}" for i in range(8)]
        alone = [texts(await collect(await service.complete([p], options)))[0] for p in prompts]
        together = texts(await collect(await service.complete(prompts, options)))
        assert together == alone


async def test_lengths_are_checked_with_the_numbers(tiny_model: Path) -> None:
    async with serving(tiny_model, max_model_len=64) as service:
        prompt = tuple(range(60))
        whole = await collect(await service.complete([prompt], Options(sampling=GREEDY, max_tokens=4)))
        assert isinstance(whole[-1], Finished) and whole[-1].reason == "length"
        with pytest.raises(ApiError, match=r"64 tokens, but 65 were asked for \(60 in the prompt, 5 for") as error:
            await service.complete([prompt], Options(max_tokens=5))
        assert (error.value.status, error.value.code) == (400, "context_length_exceeded")
        with pytest.raises(ApiError, match=r"the prompt has 64 tokens"):
            await service.complete([tuple(range(64))], Options())
        rest = await service.complete([prompt], Options(sampling=GREEDY))
        await collect(rest)
        assert rest.usage.completion == 4
        with pytest.raises(ApiError, match="the prompt is empty"):
            await service.complete([""], Options(max_tokens=5))
        assert (service._admission.requests, service._admission.tokens) == (0, 0)


async def test_usage_counts_a_shared_prompt_once(tiny_model: Path) -> None:
    async with serving(tiny_model) as service:
        prompt = tuple(range(40))
        first = await service.complete([prompt], Options(sampling=GREEDY, n=2, max_tokens=3))
        await collect(first)
        assert (first.usage.prompt, first.usage.completion) == (40, 6)
        second = await service.complete([prompt, tuple(range(5))], Options(sampling=GREEDY, n=2, max_tokens=3))
        await collect(second)
        assert (second.usage.prompt, second.usage.cached, second.usage.completion) == (45, 32, 12)


async def test_prompt_scores_come_first(tiny_model: Path) -> None:
    async with serving(tiny_model) as service:
        scoring = Options(max_tokens=0, prompt_logprobs=2)
        events = await collect(await service.complete([(1, 2, 3)], scoring))
    assert [type(event) for event in events] == [Scored, Finished]
    assert isinstance(events[0], Scored)
    assert events[0].logprobs[0] is None and [s.token for s in events[0].logprobs[1:] if s] == [2, 3]
    assert all(len(score.top) == 2 for score in events[0].logprobs[1:] if score)


async def test_the_queue_is_bounded(tiny_model: Path) -> None:
    async with serving(tiny_model, "build_slow", max_queued_requests=4, max_running=1) as service:
        options = Options(sampling=GREEDY, max_tokens=1000)
        running = await service.complete(["a"], options)
        events = running.events()
        assert await anext(events) is not None
        waiting = [await service.complete(["b"], options) for _ in range(4)]
        with pytest.raises(ApiError) as refused:
            await service.chat(Chat((Message("user", "hello"),)), options)
        assert refused.value.code == "queue_full" and 1 <= int(refused.value.headers["Retry-After"]) <= 60
        waiting.pop().close()
        waiting.append(await service.complete(["c"], options))
        for reply in [running, *waiting]:
            reply.close()
        await events.aclose()  # type: ignore[attr-defined]
        assert (service._admission.requests, service._admission.tokens) == (0, 0)


async def test_closing_cancels_and_may_be_repeated(tiny_model: Path) -> None:
    async with serving(tiny_model, "build_slow") as service:
        reply = await service.complete(["a"], Options(sampling=GREEDY, n=3, max_tokens=1000))
        events = reply.events()
        await anext(events)
        reply.close()
        reply.close()
        async with asyncio.timeout(10):
            while service.bridge.stats.pages_used or service.bridge.stats.running:
                await asyncio.sleep(0.01)
        assert "finish=abort,abort,abort" in reply.summary()
        await events.aclose()  # type: ignore[attr-defined]


async def test_quiet_times_are_told(tiny_model: Path) -> None:
    async with serving(tiny_model, "build_slow") as service:
        reply = await service.complete(["a"], Options(sampling=GREEDY, max_tokens=3))
        events = [event async for event in reply.events(0.01)]
        reply.close()
    assert events[0] is None and isinstance(events[-1], Finished)


async def test_drain_waits_then_the_rest_ends_with_an_error(tiny_model: Path) -> None:
    async with serving(tiny_model, "build_slow") as service:
        short = asyncio.create_task(collect(await service.complete(["a"], Options(sampling=GREEDY, max_tokens=4))))
        long = asyncio.create_task(collect(await service.complete(["b"], Options(sampling=GREEDY, max_tokens=1500))))
        await asyncio.sleep(0)
        await service.drain(1.0)
        assert short.done() and not long.done()
        with pytest.raises(ApiError) as refused:
            await service.complete(["c"], Options())
        assert (refused.value.status, refused.value.code) == (503, "shutting_down")
        service.end_all()
        with pytest.raises(ApiError, match="shutting down"):
            await long
