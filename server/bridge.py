"""The REST side of the engine process: starts it, carries messages both ways, survives its death.

One reader and one writer thread for each child, so neither a slow engine nor a full pipe ever blocks the event loop;
every message crosses with one `call_soon_threadsafe`. Everything else here runs on the event loop. `service.py`
submits and cancels, `app.py` starts and stops, `metrics.py` and `info.py` read what the engine told last. It knows
requests, not tokens' meaning.
"""

import asyncio
import logging
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Literal

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
    Stepped,
    Submit,
    Tallies,
    Tally,
)
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

Phase = Literal["loading", "ready", "failed", "stopped"]
Sink = Callable[[Progress], None]
OnMessage = Callable[[LoadProgress | Notice | Ready], None]

BUILD_ENGINE = "server.engine_builder:build_engine"
EXIT_SECONDS = 10.0  # how long a child that was asked to leave may take before it is killed
GAUGES = ("running", "waiting", "pages_used", "pages_total")  # of EngineStats; every other field is a counter


class EngineBridge:
    """One engine, through its crashes. `build` is the path of the function that builds it in the child."""

    def __init__(
        self, settings: ServerSettings, build: str = BUILD_ENGINE, on_message: OnMessage | None = None
    ) -> None:
        self.phase: Phase = "loading"
        self.loading = LoadProgress("starting")
        self.ready: Ready | None = None  # of the engine that answers now
        self.failure: Failed | None = None  # why phase is "failed", or what the last crash was
        self.stats = EngineStats()
        self.tallies: tuple[Tally, ...] = ()  # of the engine that answers now
        self.restarts = 0
        self._settings = settings
        self._build = build
        self._on_message = on_message
        self._sinks: dict[int, Sink] = {}
        self._child: _Child | None = None
        self._before = EngineStats()  # counters of the engines that died
        self._first = asyncio.Event()

    def start(self) -> None:
        """Start the engine process; loading goes on in the background."""
        loop = asyncio.get_running_loop()

        def deliver(child: _Child, message: FromEngine | None) -> None:
            loop.call_soon_threadsafe(self._deliver, child, message)

        self.phase, self.loading = "loading", LoadProgress("starting")
        self._child = _Child(_with_record(self._settings, self.restarts), self._build, deliver)

    async def loaded(self) -> Failed | None:
        """Wait for the first load to end; what it failed of, if it did."""
        await self._first.wait()
        return self.failure if self.phase == "failed" else None

    @property
    def pid(self) -> int | None:
        """The engine's process id."""
        return self._child.process.pid if self._child else None

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; `sink` gets its progress on the event loop, and always one with `finish` set."""
        assert self._child is not None and self.phase == "ready", "the caller asks `phase` first"
        self._sinks[request.id] = sink
        self._child.outbox.put(Submit(request))

    def cancel(self, request_id: int) -> None:
        """Stop a request within one step; its sink hears nothing more."""
        if self._sinks.pop(request_id, None) is not None and self._child is not None:
            self._child.outbox.put(Cancel(request_id))

    def fail_all(self, message: str) -> None:
        """End every running request with an error."""
        for request_id, sink in list(self._sinks.items()):
            self.cancel(request_id)
            sink(Progress(request_id, finish="error", error=message))

    async def stop(self) -> None:
        """Ask the child to leave and wait for it; kill it when it does not."""
        self.phase = "stopped"
        self._first.set()
        if self._child is not None:
            self._child.outbox.put(Shutdown())
            # An engine that loads would not hear it, and has nothing to finish.
            await asyncio.to_thread(self._child.end, 0.0 if self.ready is None else EXIT_SECONDS)

    def _deliver(self, child: "_Child", message: FromEngine | None) -> None:
        """A message of `child`; None says that its pipe ended."""
        if child is not self._child or self.phase == "stopped":
            return
        match message:
            case Stepped(progress, stats):
                self.stats = _sum(stats, self._before)
                for one in progress:
                    self._to_sink(one)
            case Tallies(tallies):
                self.tallies = tallies
            case LoadProgress():
                self.loading = message
            case Ready():
                self.phase, self.ready = "ready", message
                self._first.set()
            case Failed():
                child.last_words = message
            case None:
                self._gone(child)
        if self._on_message is not None and isinstance(message, LoadProgress | Notice | Ready):
            self._on_message(message)

    def _to_sink(self, progress: Progress) -> None:
        sink = self._sinks.get(progress.request_id)
        if sink is None:  # cancelled meanwhile
            return
        if progress.finish is not None:
            del self._sinks[progress.request_id]
        sink(progress)

    def _gone(self, child: "_Child") -> None:
        """The child died. An engine that had been ready is started again; one that never was, is given up."""
        self.failure = child.last_words or Failed(f"the engine process {_ending(child.process.returncode)}")
        was_ready, self.ready, self.tallies = self.ready is not None, None, ()
        if was_ready or self.restarts:  # of a first load that fails, `app.py` tells
            logger.error("the engine stopped: %s", self.failure.message)
        self._before = replace(self.stats, **dict.fromkeys(GAUGES, 0))
        self.stats = self._before
        if was_ready:
            self.restarts += 1
            logger.warning("starting the engine again; %d requests end with an error", len(self._sinks))
            self.start()
        else:
            self.phase = "failed"
            self._first.set()
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(Progress(request_id, finish="error", error=f"the engine stopped: {self.failure.message}"))


class _Child:
    """One engine process with its two threads. It is a fresh interpreter, not a fork and not a `multiprocessing`
    child, so nothing of this process's `__main__` is imported again in it."""

    def __init__(
        self, settings: ServerSettings, build: str, deliver: "Callable[[_Child, FromEngine | None], None]"
    ) -> None:
        self.outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.last_words: Failed | None = None
        ours, theirs = Pipe()
        fd = theirs.fileno()
        code = f"import sys; sys.path[:] = {sys.path!r}; from server.engine_process import main; main({fd})"
        self.process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[fd], stdin=subprocess.DEVNULL)
        theirs.close()  # the child holds the only other end, so its death ends the pipe
        self.outbox.put((settings, build))
        self._reader = threading.Thread(target=self._read, args=(ours, deliver), name="engine-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, args=(ours,), name="engine-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def end(self, seconds: float) -> None:
        """Wait for the process, by force after `seconds`. Blocks; returns when both threads are done."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reader.join()
        self._writer.join()

    def _read(self, pipe: Connection, deliver: "Callable[[_Child, FromEngine | None], None]") -> None:
        message: FromEngine | None
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = None
            if message is None:
                self._reap()
                self.outbox.put(None)
                self._writer.join()  # it may still hold the pipe
                pipe.close()
            try:
                deliver(self, message)
            except RuntimeError:  # the event loop has closed: nobody is left to tell
                self.process.kill()
                message = None
            if message is None:
                return

    def _reap(self) -> None:
        try:
            self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its end but lives on
            self.process.kill()
            self.process.wait()

    def _write(self, pipe: Connection) -> None:
        while (message := self.outbox.get()) is not None:
            try:
                pipe.send(message)
            except OSError:  # the reader sees the end of the pipe and tells
                return


def _with_record(settings: ServerSettings, restarts: int) -> ServerSettings:
    """The settings for an engine that comes after others: its routing record has a file of its own."""
    path = settings.record_routing
    if path is None or not restarts:
        return settings
    own = path.with_stem(f"{path.stem}-{restarts + 1}")
    logger.warning("the routing record goes on in %s", own)
    return replace(settings, record_routing=own)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"
    return f"exited with status {code}"


def _sum(stats: EngineStats, before: EngineStats) -> EngineStats:
    """`stats` with the counters of earlier engines added, so that they never fall."""
    counters = [field.name for field in fields(EngineStats) if field.name not in GAUGES]
    return replace(stats, **{name: getattr(stats, name) + getattr(before, name) for name in counters})
