"""The engine process: loads the model, then alternates between the scheduler and the engine until told to stop.

`bridge.py` starts it as a fresh interpreter (`main`) and talks to it over one pipe with the messages of
`request.py`. Torch is imported here and nowhere else in `server`, inside `build_engine`. It ignores SIGINT and
SIGTERM, which reach the whole process group or unit: the parent decides when to stop, and when the parent is gone the
pipe ends and so does this process.
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
from typing import Literal

from hybrid.batch import Batch, StepOutput
from hybrid.config import EngineConfig, ModelConfig
from offload.checkpoint import Checkpoint
from offload.config import PoolConfig
from offload.sources import packed_path
from placement.facts import read_facts
from placement.ledger import Wishes, place
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
    ToEngine,
)
from server.scheduler import Scheduler, SchedulerConfig
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all
OnNotice = Callable[[str], None]
Inbox = queue.SimpleQueue[ToEngine]

PROGRESS_SECONDS = 0.1  # least time between two messages of the same loading stage


@dataclass(frozen=True, slots=True)
class Built:
    """A loaded engine, as the loop needs it. A test builds one around a fake `step`."""

    step: Callable[[Batch], StepOutput]
    close: Callable[[], None]
    scheduler: SchedulerConfig
    max_model_len: int
    device: str


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
    built.close()
    return 0


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
        Ready(scheduler.n_pages, scheduler.page_size, built.max_model_len, built.device, time.monotonic() - started)
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
    scheduler = Scheduler(built.scheduler)
    told = EngineStats()
    progress: list[Progress] = []
    while _drain(inbox, scheduler, progress):
        batch = scheduler.next()
        if batch is not None:
            progress.extend(scheduler.commit(built.step(batch)))
        stats = scheduler.stats()
        if progress or stats != told:
            send(Stepped(tuple(progress), stats))
            progress.clear()
            told = stats


def _drain(inbox: Inbox, scheduler: Scheduler, progress: list[Progress]) -> bool:
    """Hand every waiting message to the scheduler, and sleep for one while there is nothing to run or to tell.

    False when the parent said Shutdown.
    """
    while not inbox.empty() or (scheduler.idle and not progress):
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


def build_engine(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """The real engine: settle what goes where, show the ledger, then load.

    Raises ConfigError, CheckpointError, PlacementError or DeviceError (all ValueError) for what the operator can fix.
    """
    # Torch's OpenMP threads would otherwise spin between operations, on the cores that the expert workers need: with
    # other work on the machine a decode step of a tiny model took 600 ms instead of 21 (measured 2026-11-22).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    progress("importing torch", 0, 0)
    from hybrid.engine import Engine

    progress("placing the model", 0, 0)
    model = ModelConfig.from_directory(settings.model)
    facts = read_facts(settings.device)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if facts.device == "cuda" else "float32"
    placement = place(model, facts, _wishes(settings, dtype, _maps_packed_file(settings, model)))
    notice(placement.table())
    config = EngineConfig(
        model=settings.model,
        device=facts.device,
        dtype=dtype,
        expert_format=settings.expert_format,
        pool=PoolConfig(settings.threads, settings.expert_precision, None if settings.isa == "auto" else settings.isa),
        n_pages=placement.n_pages,
        page_size=placement.page_size,
        experts=settings.experts,
    )
    engine = Engine(config, progress=progress, notice=notice)
    sizes = SchedulerConfig(
        n_pages=placement.n_pages,
        page_size=placement.page_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
    )
    max_model_len = min(placement.max_model_len, sizes.capacity)
    return Built(engine.step, engine.close, sizes, max_model_len, facts.device_name)


def _maps_packed_file(settings: ServerSettings, model: ModelConfig) -> bool:
    """Whether the experts will come from the file of `hybrid pack`."""
    from offload.store import packed_is_used

    fmt = model.expert_format if settings.expert_format == "native" else settings.expert_format
    if settings.experts == "kt" or not packed_path(settings.model, fmt).exists():
        return False
    checkpoint = Checkpoint(settings.model)
    try:
        return packed_is_used(
            checkpoint, model.expert_name, model.expert_geometry, model.moe_layers, settings.expert_format
        )
    finally:
        checkpoint.close()


def _wishes(settings: ServerSettings, dtype: Literal["bfloat16", "float32"], packed: bool) -> Wishes:
    return Wishes(
        dtype=dtype,
        expert_target=settings.expert_format,
        max_model_len=settings.max_model_len,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        kv_bytes=settings.kv_memory,
        page_size=settings.page_size,
        packed=packed,
    )
