"""The engine process: loads the model, then alternates between the scheduler and the engine until told to stop.

`bridge.py` starts it as a fresh interpreter (`main`) and talks to it over one pipe with the messages of
`request.py`. What it loads is the builder's business (`engine_builder.py`). It ignores SIGINT and SIGTERM, which reach
the whole process group or unit: the parent decides when to stop, and when the parent is gone the pipe ends and so does
this process.
"""

import importlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from hybrid.batch import Batch, StepOutput
from placement.plan import Plan
from server.account import Account, Predict
from server.request import (
    Cancel,
    EngineStats,
    Failed,
    FromEngine,
    LoadProgress,
    Notice,
    Progress,
    Ready,
    Shutdown,
    Stepped,
    Submit,
    Tallies,
    ToEngine,
)
from server.scheduler import Scheduler, SchedulerConfig
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all
OnNotice = Callable[[str], None]
Inbox = queue.SimpleQueue[ToEngine]

PROGRESS_SECONDS = 0.1  # least time between two messages of the same loading stage
# While the engine is busy; nothing is kept back when it falls idle.
TALLY_SECONDS = 1.0  # least time between two messages of predicted against achieved
RECORD_SECONDS = 60.0  # least time between two writings of the routing record


def nothing(last: bool) -> None:
    """There is no record to write."""


@dataclass(frozen=True, slots=True)
class Built:
    """A loaded engine, as the loop needs it. A test builds one around a fake `step`."""

    step: Callable[[Batch], StepOutput]
    close: Callable[[], None]
    scheduler: SchedulerConfig
    max_model_len: int
    device: str
    plan: Plan | None = None  # in force
    profile: str = "none"  # name of the rates behind the predictions, or why there are none
    predict: Predict | None = None
    record: Callable[[bool], None] = nothing  # writes the routing record; True: for the last time


def main(fd: int) -> None:
    """Entry point of the child. `fd` is its end of the pipe; the first message is (settings, path of the builder)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(fd)
    settings, build_path = connection.recv()
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s engine: %(message)s")
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    status = _load_and_run(connection, settings, build_path, inbox)
    logging.shutdown()
    os._exit(status)  # taking torch and the mapped checkpoint apart would take seconds, for nothing


def _load_and_run(connection: Connection, settings: ServerSettings, build_path: str, inbox: Inbox) -> int:
    """The whole life of the engine; returns the exit status."""
    built = _load(connection, settings, build_path)
    if built is None:
        return 1
    try:
        run(inbox, connection.send, built)
    except Exception as error:
        logger.exception("the engine stopped")
        connection.send(Failed(_one_line(error)))
        return 1
    finally:
        _record(built, last=True)
    built.close()
    return 0


def _record(built: Built, last: bool = False) -> None:
    """Write the routing record. What goes wrong is logged: no record is worth an engine, or its orderly end."""
    try:
        built.record(last)
    except Exception:
        logger.exception("the routing record could not be written")


def _receive(connection: Connection, inbox: Inbox) -> None:
    """Move messages to the inbox. Runs beside native code, so a dead parent is noticed even in the middle of a step."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def _load(connection: Connection, settings: ServerSettings, build_path: str) -> Built | None:
    """Build the engine and report. None after a failure, which has been told to the parent."""
    started = time.monotonic()
    module, _, function = build_path.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
        built: Built = build(settings, _Reporter(connection.send), lambda text: connection.send(Notice(text)))
    except (ValueError, FileNotFoundError) as error:  # configuration, checkpoint and placement errors among them
        logger.debug("loading failed", exc_info=True)
        connection.send(Failed(_one_line(error), configuration=True))
        return None
    except Exception as error:
        logger.exception("loading failed")
        connection.send(Failed(_one_line(error)))
        return None
    scheduler = built.scheduler
    connection.send(
        Ready(
            scheduler.n_pages,
            scheduler.page_size,
            built.max_model_len,
            built.device,
            time.monotonic() - started,
            built.plan,
            built.profile,
        )
    )
    return built


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


class _Reporter:
    """Turns the loader's byte counts into LoadProgress with an estimate of the time left."""

    def __init__(self, send: Callable[[FromEngine], None]) -> None:
        self._send = send
        self._stage = ""
        self._started = self._sent = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started = stage, now
        elif now - self._sent < PROGRESS_SECONDS and done < total:
            return
        self._sent = now
        eta = (now - self._started) * (total - done) / done if done else None
        self._send(LoadProgress(stage, done, total, eta))


def run(inbox: Inbox, send: Callable[[FromEngine], None], built: Built) -> None:
    """Serve until a Shutdown arrives: one message for each step, none and no CPU time while idle."""
    books = _Books(built, send)
    scheduler = Scheduler(built.scheduler, books.expect)
    told = EngineStats()
    progress: list[Progress] = []
    while _drain(inbox, scheduler, progress, books):
        batch = scheduler.next()
        if batch is not None:
            out = built.step(batch)
            progress.extend(scheduler.commit(out))
        stats = scheduler.stats()
        if progress or stats != told:
            send(Stepped(tuple(progress), stats))
            progress.clear()
            told = stats
        if batch is not None:
            books.add(batch, out.seconds)


class _Books:
    """What is kept beside the work: the account of predicted and achieved seconds, and the routing record."""

    def __init__(self, built: Built, send: Callable[[FromEngine], None]) -> None:
        self._account = Account(built.predict)
        self.expect = self._account.expect
        self._built = built
        self._send = send
        self._told, self._written = 0.0, time.monotonic()
        self._untold = self._unwritten = False  # steps that only the books here know

    def add(self, batch: Batch, seconds: float) -> None:
        """Enter a step whose tokens are on their way."""
        self._account.add(batch, seconds)
        self._untold = self._unwritten = True
        now = time.monotonic()
        if now - self._told >= TALLY_SECONDS:
            self._tell(now)
        if now - self._written >= RECORD_SECONDS:
            self._write(now)

    def flush(self) -> None:
        """Give out what was kept back: no step may follow for hours."""
        now = time.monotonic()
        if self._untold:
            self._tell(now)
        if self._unwritten:
            self._write(now)

    def _tell(self, now: float) -> None:
        self._told, self._untold = now, False
        self._send(Tallies(self._account.tallies()))

    def _write(self, now: float) -> None:
        self._written, self._unwritten = now, False
        _record(self._built)


def _drain(inbox: Inbox, scheduler: Scheduler, progress: list[Progress], books: _Books) -> bool:
    """Hand every waiting message to the scheduler, and sleep for one while there is nothing to run or to tell.

    False when the parent said Shutdown.
    """
    while not inbox.empty() or (scheduler.idle and not progress):
        if inbox.empty():
            books.flush()
        match inbox.get():
            case Submit(request):
                said = scheduler.add(request)
            case Cancel(request_id):
                said = scheduler.cancel(request_id)
            case Shutdown():
                return False
        if said is not None:
            progress.append(said)
    return True
