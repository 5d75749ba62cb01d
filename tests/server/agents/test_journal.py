"""The log of runs: written before it is told, in order, whole after any crash."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from server.agents import journal as journal_module
from server.agents.journal import Event, Journal, JournalError


async def test_what_is_appended_is_in_the_file_and_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "runs.db")
    for run in ("r", "s"):
        await journal.begin(run, "a task")
    await asyncio.gather(*(journal.append(run, f"main.{i}", "turn", {"i": i}) for i in range(300) for run in "rs"))
    with sqlite3.connect(tmp_path / "deep" / "runs.db") as other:
        rows = other.execute("SELECT run, seq, data FROM events ORDER BY run, seq").fetchall()
    assert [(run, seq) for run, seq, _ in rows] == [(run, seq) for run in "rs" for seq in range(1, 301)]
    assert [json.loads(data)["i"] for run, _, data in rows if run == "s"] == [*range(300)]
    assert [event.seq for event in journal.read("r", after=290)] == [*range(291, 301)]
    (first, second) = journal.runs()
    assert (first.run, second.run, first.last.seq) == ("s", "r", 300)
    await journal.close()


async def follow(journal: Journal, n: int, after: int = 0, slow: float = 0) -> tuple[list[Event], int]:
    """`n` events with as many calls as it takes, and how often the reader was dropped."""
    events: list[Event] = []
    dropped = 0
    while len(events) < n:
        async with aclosing(journal.follow("r", events[-1].seq if events else after)) as some:
            async for event in some:
                if event is None:
                    dropped += 1
                    break
                events.append(event)
                if len(events) == n:
                    break
                await asyncio.sleep(slow)
    return events, dropped


async def test_replay_equals_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three readers, one from the middle and one too slow for its queue, see what the file says."""
    monkeypatch.setattr(journal_module, "QUEUED", 20)
    journal = Journal(tmp_path / "runs.db")
    await journal.begin("r", "a task")
    await journal.append("r", "", "began", {})
    readers = [
        asyncio.create_task(follow(journal, 501)),
        asyncio.create_task(follow(journal, 400, after=101)),
        asyncio.create_task(follow(journal, 501, slow=0.001)),
    ]
    for i in range(250):
        await asyncio.gather(*(journal.append("r", f"main.{i}", "turn", {"i": i}) for _ in range(2)))
    (live, _), (later, _), (slow, dropped) = await asyncio.wait_for(asyncio.gather(*readers), 30)
    assert live == slow == journal.read("r")
    assert later == live[101:]
    assert dropped > 0
    await journal.close()


async def test_a_full_disk_is_one_line_and_leaves_no_gap(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs.db")
    await journal.begin("r", "a task")
    await journal.append("r", "", "began", {})
    pages = journal._base.execute("PRAGMA page_count").fetchone()[0]
    journal._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalError, match=r"runs.db: database or disk is full; is the disk full"):
        await asyncio.gather(*(journal.append("r", "main", "turn", {"text": "x" * 5000}) for _ in range(3)))
    journal._base.execute("PRAGMA max_page_count = 100000")
    assert [event.seq for event in journal.read("r")] == [1]
    event = await journal.append("r", "main", "turn", {})
    assert event.seq == 2 and [event.seq for event in journal.read("r")] == [1, 2]
    await journal.close()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a data base " * 100)
    with pytest.raises(JournalError, match="text: file is not a database; name another"):
        Journal(tmp_path / "text")
    with sqlite3.connect(tmp_path / "newer") as base:
        base.execute("PRAGMA user_version = 7")
    with pytest.raises(JournalError, match="newer: a log of version 7, this program knows 1"):
        Journal(tmp_path / "newer")
    with pytest.raises(JournalError, match="name another"):
        Journal(tmp_path)


WRITER = """
import asyncio, sys
from pathlib import Path
from server.agents.journal import Journal

async def main():
    journal = Journal(Path(sys.argv[1]))
    await journal.begin(sys.argv[2], "a task")
    while True:
        for event in await asyncio.gather(*(journal.append(sys.argv[2], "main", "turn", {}) for _ in range(7))):
            print(event.seq, flush=True)

asyncio.run(main())
"""


def test_killed_at_any_time_nothing_told_is_lost(tmp_path: Path) -> None:
    """Ten times: what the writer had been promised is in the file, without gaps, and the file is sound."""
    path = tmp_path / "runs.db"
    for i in range(10):
        command = [sys.executable, "-c", WRITER, str(path), f"r{i}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = [writer.stdout.readline() for _ in range(20)]
            time.sleep(0.013 * i)
            writer.kill()
            told += [line for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        base = sqlite3.connect(path)
        found = [seq for (seq,) in base.execute("SELECT seq FROM events WHERE run = ? ORDER BY seq", (f"r{i}",))]
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        base.close()
        assert found == [*range(1, len(found) + 1)] and len(found) >= max(map(int, told))


async def test_what_cannot_be_written_is_an_error_and_not_a_wait_for_ever(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs.db")
    await journal.begin("r", "a task")
    with pytest.raises(JournalError, match=r"runs\.db"):
        await asyncio.wait_for(journal.append("r", "main", "turn", {"bad": object()}), 10)
    assert (await asyncio.wait_for(journal.append("r", "main", "turn", {}), 10)).seq == 1
    await asyncio.wait_for(journal.close(), 10)
    assert (tmp_path / "runs.db").stat().st_mode & 0o777 == 0o600
