"""The append-only log of runs in SQLite, written before anybody hears of an event.

What is appended together in one moment is committed together, by a thread of its own, so that a hundred agents cost a
hundred rows and not a hundred commits. Whoever follows a run reads it from the log and then from a bounded queue;
one that is too slow is dropped with a marker, and catches up from the log. Called by `run.py` and by who shows a run.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

Json = dict[str, Any]

QUEUED = 1000  # events that a follower may lag behind
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, began REAL NOT NULL, task TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS events (
    run TEXT NOT NULL, seq INTEGER NOT NULL, at REAL NOT NULL, agent TEXT NOT NULL, kind TEXT NOT NULL,
    data TEXT NOT NULL, PRIMARY KEY (run, seq)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
"""
VERSION = 1


class JournalError(RuntimeError):
    """The log cannot be read or written. One line with the file."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `seq` counts from 1 in each run, without gaps."""

    run: str
    seq: int
    at: float  # seconds since 1970
    agent: str  # its id, "" for the run itself
    kind: str
    data: Json


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in a list."""

    run: str
    began: float  # seconds since 1970
    task: str
    last: Event


class Journal:
    """One file. Used by one event loop."""

    def __init__(self, path: Path) -> None:
        """Open or create it. Raises JournalError."""
        self._path = path
        self._thread = ThreadPoolExecutor(1, "journal")
        self._next: dict[str, int] = {}
        self._waiting: list[tuple[Event, asyncio.Future[Event]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._followers: dict[str, set[asyncio.Queue[Event | None]]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)  # prompts and files of the user are in it
            self._base = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=60000"):
                self._base.execute(f"PRAGMA {pragma}")
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise JournalError(f"{path}: a log of version {version}, this program knows {VERSION}; name another")
            self._base.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{path}: {error}; name another file") from None

    async def begin(self, run: str, task: str) -> None:
        """A new run. Raises JournalError."""
        await self._in_thread(lambda: self._base.execute("INSERT INTO runs VALUES (?, ?, ?)", (run, time.time(), task)))
        self._next[run] = 1

    async def append(self, run: str, agent: str, kind: str, data: Json) -> Event:
        """Write an event; it is in the file when this returns, and the followers have it. Raises JournalError."""
        event = Event(
            run, 0, time.time(), agent, kind, data
        )  # its number comes with the writing: no gap after an error
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((event, written))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return await asyncio.shield(written)

    def read(self, run: str, after: int = 0) -> list[Event]:
        """The events of a run behind `after`, in order. Raises JournalError."""
        try:
            rows = self._base.execute(
                "SELECT seq, at, agent, kind, data FROM events WHERE run = ? AND seq > ? ORDER BY seq", (run, after)
            ).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"{self._path}: {error}") from None
        return [Event(run, seq, at, agent, kind, json.loads(data)) for seq, at, agent, kind, data in rows]

    def runs(self) -> list[RunLine]:
        """All runs with their last event, the newest first."""
        rows = self._base.execute(
            "SELECT run, began, task, seq, at, agent, kind, data FROM runs JOIN events AS e USING (run) "
            "WHERE seq = (SELECT max(seq) FROM events WHERE run = e.run) ORDER BY began DESC"
        )
        return [
            RunLine(run, began, task, Event(run, seq, at, agent, kind, json.loads(data)))
            for run, began, task, seq, at, agent, kind, data in rows
        ]

    async def follow(self, run: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        """The events behind `after` and then each as it is written; None, and the end, where the reader was too slow:
        it goes on with another call."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(QUEUED + 1)
        followers = self._followers.setdefault(run, set())
        followers.add(queue)
        try:
            for event in self.read(run, after):  # no await between: nothing can be delivered meanwhile
                after = event.seq
                yield event
            while True:
                got = await queue.get()
                if got is None:
                    yield None
                    return
                if got.seq > after:
                    yield got
        finally:
            followers.discard(queue)

    async def close(self) -> None:
        """Write what waits and close the file."""
        while self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing])
        self._thread.shutdown()
        self._base.close()

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            following = dict(self._next)
            events = []
            for event, _ in batch:
                events.append(replace(event, seq=following[event.run]))
                following[event.run] += 1
            try:
                await self._in_thread(partial(self._write, events))
            except JournalError as error:
                _refuse(batch, error)
                continue
            except BaseException as error:
                _refuse(batch, JournalError(f"{self._path}: {error!r}"))
                self._flushing = None
                raise
            self._next |= {event.run: following[event.run] for event in events}
            for event, (_, written) in zip(events, batch, strict=True):
                self._deliver(event)
                written.set_result(event)
        self._flushing = None

    def _write(self, events: list[Event]) -> None:
        rows = [(e.run, e.seq, e.at, e.agent, e.kind, json.dumps(e.data)) for e in events]
        self._base.execute("BEGIN IMMEDIATE")
        try:
            self._base.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._base.execute("COMMIT")
        except BaseException:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            raise

    async def _in_thread(self, work: Callable[[], object]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise JournalError(f"{self._path}: {error}; is the disk full, or does another program hold it?") from None

    def _deliver(self, event: Event) -> None:
        for queue in list(self._followers.get(event.run, ())):
            if queue.qsize() < QUEUED:
                queue.put_nowait(event)
            else:
                queue.put_nowait(None)
                self._followers[event.run].discard(queue)


def _refuse(batch: list[tuple[Event, asyncio.Future[Event]]], error: JournalError) -> None:
    for _, written in batch:
        if not written.done():
            written.set_exception(error)
            written.exception()  # whoever appended may have been cancelled
