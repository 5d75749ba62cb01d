"""A scheduler in a house of its own, for the tests: few pages, a fake step, and a check after every move."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from hybrid.batch import Batch, Sampling
from server.request import Progress, Request
from server.scheduler import Scheduler, SchedulerConfig
from tests.reference.fake_step import FakeStep

GREEDY = Sampling(temperature=0.0)


def small(**changes: Any) -> SchedulerConfig:
    """Few pages, so that a handful of tokens fills them."""
    sizes: dict[str, Any] = {"n_pages": 16, "page_size": 4, "max_batch_tokens": 8, "max_running": 4}
    return SchedulerConfig(**{**sizes, **changes})


def request(i: int, prompt: Iterable[int], max_tokens: int = 4, **more: object) -> Request:
    return replace(Request(i, tuple(prompt), max_tokens, GREEDY), **more)  # type: ignore[arg-type]


class House:
    """A scheduler, its fake step and all progress so far, checked after every move."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config, lambda batch: self.seconds(batch))
        self.step = FakeStep(config.n_pages, config.page_size, tokens=range(50), n_ram_pages=config.n_ram_pages)
        self.progress: dict[int, list[Progress]] = {}
        self.batches: list[Batch] = []
        self.seconds: Callable[[Batch], float] = lambda batch: 1.0

    def note(self, *progress: Progress | None) -> None:
        for p in progress:
            if p is not None:
                self.progress.setdefault(p.request_id, []).append(p)

    def add(self, *requests: Request) -> None:
        for r in requests:
            self.note(self.scheduler.add(r))
            self.scheduler.check()

    def cancel(self, request_id: int) -> None:
        self.note(self.scheduler.cancel(request_id))
        self.scheduler.check()

    def launch(self) -> Batch | None:
        batch = self.scheduler.next()
        self.scheduler.check()
        if batch is not None:
            self.batches.append(batch)
            config = self.scheduler.config
            assert 0 < batch.n_tokens <= config.max_batch_tokens
            assert len(batch.rows) <= config.max_running
        return batch

    def land(self, batch: Batch) -> None:
        self.note(*self.scheduler.commit(replace(self.step(batch), seconds=self.seconds(batch))))
        self.scheduler.check()

    def run(self, steps: int = 10_000) -> None:
        for _ in range(steps):
            batch = self.launch()
            if batch is None:
                return
            self.land(batch)

    def tokens(self, request_id: int) -> list[int]:
        return [p.token for p in self.progress[request_id] if p.token is not None]

    def finish(self, request_id: int) -> str | None:
        return self.progress[request_id][-1].finish


def alone(r: Request) -> list[Progress]:
    """What a request answers by itself, whole prompt in one step, in a fresh house."""
    house = House(SchedulerConfig(n_pages=64, page_size=4, max_batch_tokens=256))
    house.add(r)
    house.run()
    return [replace(p, cached_tokens=0) for p in house.progress[r.id]]


def assert_same_as_alone(house: House, r: Request) -> None:
    assert [replace(p, cached_tokens=0) for p in house.progress[r.id]] == alone(r)


def assert_empty(house: House) -> None:
    stats = house.scheduler.stats()
    assert house.scheduler.idle
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert house.scheduler.next() is None
