"""The engine process and its bridge: loading, steps, crashes of every kind, cancellation, the end."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from hybrid.batch import Batch, Sampling, StepOutput
from server import engine_process
from server.bridge import GAUGES, EngineBridge
from server.engine_process import Built
from server.request import (
    Cancel,
    EngineStats,
    Failed,
    FromEngine,
    LoadProgress,
    Notice,
    Progress,
    Ready,
    Request,
    Shutdown,
    Submit,
    Tallies,
    ToEngine,
)
from server.scheduler import SchedulerConfig
from server.settings import ServerSettings
from tests.reference.fake_engine import END_ID
from tests.reference.fake_server import write_model
from tests.reference.fake_step import FakeStep

BUILDS = "tests.reference.fake_engine"
LONG = 400  # tokens: more than a test waits for


def settings(model: Path) -> ServerSettings:
    return ServerSettings(model=model, max_running=8, max_batch_tokens=64)


def request(number: int, prompt: str, max_tokens: int) -> Request:
    greedy = Sampling(temperature=0.0)
    return Request(number, tuple(prompt.encode()), max_tokens, greedy, frozenset({END_ID}))


@asynccontextmanager
async def bridging(model: Path, build: str = "build") -> AsyncIterator[EngineBridge]:
    bridge = EngineBridge(settings(model), f"{BUILDS}:{build}")
    bridge.start()
    try:
        yield bridge
    finally:
        await bridge.stop()


async def ready(bridge: EngineBridge) -> None:
    assert await bridge.loaded() is None
    await until(lambda: bridge.phase == "ready")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def answer(queue: "asyncio.Queue[Progress]") -> list[Progress]:
    got: list[Progress] = []
    async with asyncio.timeout(30):
        while not got or got[-1].finish is None:
            got.append(await queue.get())
    return got


async def ask(bridge: EngineBridge, number: int, prompt: str, max_tokens: int = 8) -> list[Progress]:
    queue: asyncio.Queue[Progress] = asyncio.Queue()
    bridge.submit(request(number, prompt, max_tokens), queue.put_nowait)
    return await answer(queue)


def is_empty(stats: EngineStats) -> bool:
    return stats.running == stats.waiting == stats.pages_used == 0


async def test_loads_and_answers(tiny_model: Path) -> None:
    said: list[LoadProgress | Notice | Ready] = []
    bridge = EngineBridge(settings(tiny_model), f"{BUILDS}:build", said.append)
    assert bridge.phase == "loading"
    bridge.start()
    await ready(bridge)
    assert [type(message) for message in said] == [LoadProgress, Notice, Ready]
    assert bridge.ready is not None and (bridge.ready.n_pages, bridge.ready.page_size) == (512, 16)
    got = await ask(bridge, 1, "script:hey;")
    assert [progress.token for progress in got] == [*b"hey", END_ID]
    assert got[-1].finish == "stop"
    await until(lambda: is_empty(bridge.stats))
    assert bridge.stats.generated_tokens == 4
    await bridge.stop()


async def test_many_requests_share_steps(tiny_model: Path) -> None:
    async with bridging(tiny_model) as bridge:
        await ready(bridge)
        alone = [await ask(bridge, i, f"prompt {i}") for i in range(12)]
        steps = bridge.stats.steps
        together = await asyncio.gather(*(ask(bridge, 100 + i, f"prompt {i}") for i in range(12)))
        assert [[p.token for p in one] for one in together] == [[p.token for p in one] for one in alone]
        assert bridge.stats.steps - steps < steps
        await until(lambda: is_empty(bridge.stats))


async def test_an_idle_engine_takes_no_processor_time(tiny_model: Path) -> None:
    async with bridging(tiny_model) as bridge:
        await ready(bridge)
        await ask(bridge, 1, "warm up")
        await until(lambda: is_empty(bridge.stats))
        process, used = psutil.Process(bridge.pid), 1.0
        for _ in range(5):  # the end of the last answer may still be in the first second
            before = process.cpu_times()
            await asyncio.sleep(1.0)
            after = process.cpu_times()
            used = min(used, round(after.user + after.system - before.user - before.system, 3))
            if used == 0:
                break
        assert used == 0  # not one tick of 10 ms in a second


async def test_cancel_frees_pages_and_silences_the_sink(tiny_model: Path) -> None:
    async with bridging(tiny_model, "build_slow") as bridge:
        await ready(bridge)
        queue: asyncio.Queue[Progress] = asyncio.Queue()
        for number in range(1, 12):  # 8 run, 3 wait
            bridge.submit(request(number, "go on", LONG), queue.put_nowait)
        await queue.get()
        await until(lambda: bridge.stats.running == 8 and bridge.stats.waiting == 3)
        steps = bridge.stats.steps
        for number in range(1, 12):
            bridge.cancel(number)
        while not queue.empty():
            queue.get_nowait()
        await until(lambda: is_empty(bridge.stats))
        # The step in flight may be followed by one that began before the cancellations had all arrived.
        assert bridge.stats.steps - steps <= 2
        assert queue.empty()


@pytest.mark.parametrize(
    ("poison", "reason"),
    [("!", "RuntimeError: the device ran out of memory"), ("@", "the engine process exited with status 7")],
)
async def test_a_step_that_fails_ends_its_requests_and_the_engine_starts_again(
    tiny_model: Path, poison: str, reason: str
) -> None:
    async with bridging(tiny_model, "build_fragile") as bridge:
        await ready(bridge)
        good = await ask(bridge, 1, "fine")
        before = bridge.stats
        bystander: asyncio.Queue[Progress] = asyncio.Queue()
        bridge.submit(request(2, "bystander", LONG), bystander.put_nowait)
        got = await ask(bridge, 3, poison)
        assert got[-1].finish == "error" and got[-1].error == f"the engine stopped: {reason}"
        assert (await answer(bystander))[-1].finish == "error"
        assert bridge.ready is None and is_empty(bridge.stats)
        await until(lambda: bridge.phase == "ready")
        assert bridge.restarts == 1
        assert [p.token for p in await ask(bridge, 4, "fine")] == [p.token for p in good]
        counters = [field.name for field in fields(EngineStats) if field.name not in GAUGES]
        assert all(getattr(bridge.stats, name) >= getattr(before, name) for name in counters)
        assert bridge.stats.generated_tokens >= 16


async def test_kill_9_is_survived(tiny_model: Path) -> None:
    async with bridging(tiny_model, "build_slow") as bridge:
        await ready(bridge)
        queue: asyncio.Queue[Progress] = asyncio.Queue()
        bridge.submit(request(1, "go on", LONG), queue.put_nowait)
        await queue.get()
        first = bridge.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        got = await answer(queue)
        assert got[-1].finish == "error" and "SIGKILL" in (got[-1].error or "")
        await until(lambda: bridge.phase == "ready")
        assert bridge.pid != first and not psutil.pid_exists(first)
        assert (await ask(bridge, 2, "again"))[-1].finish == "length"


async def test_an_engine_that_dies_while_loading_again_is_given_up(tmp_path: Path) -> None:
    async with bridging(tmp_path, "build_once") as bridge:
        await ready(bridge)
        assert bridge.pid is not None
        os.kill(bridge.pid, signal.SIGKILL)
        await until(lambda: bridge.phase == "failed")
        assert bridge.failure is not None
        assert bridge.failure.message == "the engine process exited with status 9"
        assert bridge.restarts == 1


@pytest.mark.parametrize(
    ("build", "configuration", "message"),
    [
        ("build_misconfigured", True, "model.safetensors: shard 2 of 3 is missing; download it again"),
        ("build_broken", False, "KeyError: 'oops'"),
    ],
)
async def test_a_failed_first_load_is_told(tiny_model: Path, build: str, configuration: bool, message: str) -> None:
    async with bridging(tiny_model, build) as bridge:
        failure = await bridge.loaded()
        assert failure is not None
        assert (failure.message, failure.configuration) == (message, configuration)
        assert bridge.phase == "failed" and bridge.restarts == 0


async def test_progress_of_loading(tiny_model: Path) -> None:
    async with bridging(tiny_model, "build_never") as bridge:
        await until(lambda: bridge.loading.stage == "loading weights")
        assert (bridge.loading.bytes_done, bridge.loading.bytes_total) == (50, 100)
        assert bridge.loading.eta_s is not None and bridge.ready is None


async def test_signals_of_the_group_do_not_reach_the_engine(tiny_model: Path) -> None:
    async with bridging(tiny_model) as bridge:
        await ready(bridge)
        assert bridge.pid is not None
        os.kill(bridge.pid, signal.SIGINT)
        os.kill(bridge.pid, signal.SIGTERM)
        assert (await ask(bridge, 1, "still here"))[-1].finish == "length"
        assert bridge.restarts == 0


async def test_fail_all_tells_every_request(tiny_model: Path) -> None:
    async with bridging(tiny_model, "build_slow") as bridge:
        await ready(bridge)
        queues: list[asyncio.Queue[Progress]] = [asyncio.Queue() for _ in range(3)]
        for number, queue in enumerate(queues):
            bridge.submit(request(number, "go on", LONG), queue.put_nowait)
        bridge.fail_all("closing")
        assert [(await answer(queue))[-1].error for queue in queues] == ["closing"] * 3
        await until(lambda: is_empty(bridge.stats))


async def test_stop_leaves_nothing_behind(tiny_model: Path) -> None:
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    for _ in range(2):
        async with bridging(tiny_model, "build_slow") as bridge:
            await ready(bridge)
            bridge.submit(request(1, "go on", LONG), lambda _: None)
            pid = bridge.pid
        assert pid is not None and not psutil.pid_exists(pid)
    await asyncio.to_thread(int)  # the pool's own first thread
    assert process.num_fds() <= before[0] + 1 and threading.active_count() <= before[1] + 2


PARENT = """
import asyncio, sys
from pathlib import Path
from server.bridge import EngineBridge
from server.settings import ServerSettings

async def main():
    bridge = EngineBridge(ServerSettings(model=Path(sys.argv[1])), "tests.reference.fake_engine:" + sys.argv[2])
    bridge.start()
    if sys.argv[2] == "build":
        await bridge.loaded()
    print(bridge.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("build", ["build", "build_never"])
def test_the_engine_dies_with_its_parent(tiny_model: Path, build: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PARENT, str(tiny_model), build]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(timeout=30)


async def test_tallies_arrive_and_are_those_of_the_engine_that_answers(tmp_path: Path) -> None:
    async with bridging(write_model(tmp_path / "tiny"), "build_recording") as bridge:
        await ready(bridge)
        assert bridge.tallies == ()
        await ask(bridge, 1, "abcd", max_tokens=5)
        await until(lambda: sum(tally.steps for tally in bridge.tallies) == 5)
        assert [(tally.kind, tally.most, tally.steps) for tally in bridge.tallies] == [
            ("decode", 1, 4),
            ("prompt", 4, 1),
        ]
        await ask(bridge, 2, "@")  # the engine dies
        assert bridge.tallies == ()


async def test_the_record_is_written_when_idle_after_a_crash_and_at_the_end(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    record = model / "record"
    async with bridging(model, "build_recording") as bridge:
        await ready(bridge)
        await ask(bridge, 1, "abcd")
        await until(lambda: record.exists() and record.read_text() == "written\n")
        await ask(bridge, 2, "!")  # a step raises
        await until(lambda: bridge.phase == "ready")
        assert record.read_text() == "written\n" * 2
    assert record.read_text() == "written\n" * 3


class Parent(engine_process.Inbox):
    """Says Shutdown as soon as the engine waits for something to do."""

    def get(self, block: bool = True, timeout: float | None = None) -> ToEngine:
        return Shutdown() if self.empty() else super().get(block, timeout)


class Run:
    """One request of `n_steps` steps through the engine's loop, in a time that only its steps move."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, n_steps: int, seconds: float, cancel_at: int | None = None
    ) -> None:
        self.now = 1000.0
        self.n_steps, self.seconds, self.cancel_at = 0, seconds, cancel_at
        self.records: list[int] = []  # steps done by then
        self.inbox = Parent()
        self._fake = FakeStep(64, 16)
        self._sent: list[FromEngine] = []
        monkeypatch.setattr(engine_process.time, "monotonic", lambda: self.now)
        built = Built(self.step, lambda: None, SchedulerConfig(64), 512, "fake", record=self.record)
        self.inbox.put(Submit(request(1, "abcd", n_steps)))
        engine_process.run(self.inbox, self._sent.append, built)

    def step(self, batch: Batch) -> StepOutput:
        self.now += self.seconds
        self.n_steps += 1
        if self.n_steps == self.cancel_at:
            self.inbox.put(Cancel(1))
        return self._fake(batch)

    def record(self, last: bool) -> None:
        self.records.append(self.n_steps)

    @property
    def told(self) -> list[int]:
        """Steps that each account knew of."""
        return [sum(one.steps for one in sent.tallies) for sent in self._sent if isinstance(sent, Tallies)]


def test_a_busy_engine_tells_every_second_and_an_idle_one_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run(monkeypatch, n_steps=11, seconds=0.4).told == [1, 4, 7, 10, 11]


def test_a_busy_engine_records_every_minute_and_an_idle_one_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run(monkeypatch, n_steps=7, seconds=25.0).records == [3, 6, 7]
    assert Run(monkeypatch, n_steps=6, seconds=25.0).records == [3, 6]  # nothing new, nothing written


def test_nothing_is_kept_back_after_a_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, n_steps=11, seconds=0.4, cancel_at=3)
    assert (run.n_steps, run.told, run.records) == (3, [1, 3], [3])


@pytest.mark.parametrize("poison", [False, True])
def test_a_record_that_fails_does_not_keep_the_engine_from_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, poison: bool
) -> None:
    closed, inbox = Mock(), Parent()
    step = Mock(side_effect=RuntimeError("out of memory")) if poison else FakeStep(64, 16)
    record = Mock(side_effect=MemoryError("no room"))
    built = Built(step, closed, SchedulerConfig(64), 512, "fake", record=record)
    monkeypatch.setattr(engine_process, "_load", lambda *_: built)
    inbox.put(Submit(request(1, "abcd", 3)))
    connection = Mock()
    assert engine_process._load_and_run(connection, settings(tmp_path), "", inbox) == (1 if poison else 0)
    assert (connection.send.call_args.args == (Failed("RuntimeError: out of memory"),)) is poison
    assert closed.called is not poison
    assert "the routing record could not be written" in caplog.text
