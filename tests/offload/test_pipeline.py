"""Items through the pipeline: all of them, in order, never too many at once, and no thread left behind."""

import threading
import time

import pytest

from offload import pipeline
from offload.pipeline import ask_disk


def test_every_item_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "AHEAD", 500)
    asked: list[int] = []
    finished: list[int] = []
    waiting: list[int] = []

    def ask(item: int) -> None:
        asked.append(item)
        waiting.append(len(asked) - len(finished))

    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item * item

    def done(item: int, result: int) -> None:
        assert result == item * item
        finished.append(item)

    pipeline.pipeline(range(200), ask, work, done, item_bytes=100)
    assert asked == finished == list(range(200))
    threads = len(pipeline.os.sched_getaffinity(0))
    assert max(waiting) == 2 * threads + 5 + 1


@pytest.mark.parametrize("where", ["ask", "work", "done"])
def test_the_first_exception_ends_it(where: str) -> None:
    began: list[int] = []

    def fail(place: str, item: int) -> None:
        if place == where and item == 7:
            raise KeyboardInterrupt
        began.append(item)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        pipeline.pipeline(
            range(10_000), lambda i: fail("ask", i), lambda i: fail("work", i), lambda i, _: fail("done", i), 1 << 24
        )
    assert threading.active_count() == before
    assert max(began) < 1000


def test_the_disk_is_asked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pipeline.os, "posix_fadvise", lambda file, at, n, advice: asked.append((at, n)))
    ask_disk(3, 100, 2 * pipeline.ASKED + 5)
    assert asked == [(100, 1 << 20), (100 + (1 << 20), 1 << 20), (100 + (2 << 20), 5)]
