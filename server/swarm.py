"""`hybrid swarm`: a task for an orchestrator and its sub-agents, against a running server.

The answer goes to standard output, the tree of agents and the cost to standard error. Called by `__main__.py`.
"""

import asyncio
import contextlib
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from server.agents.budget import Limits
from server.agents.files import file_tools
from server.agents.journal import Journal
from server.agents.model import ServedModel
from server.agents.run import Outcome, Run
from server.agents.search import Search
from server.agents.tools import Json, Tool
from server.agents.view import View
from server.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Swarm:
    """What the user asked for."""

    upstream: Upstream
    tools: Sequence[Tool]
    limits: Limits
    options: Json  # of every request
    journal: Path

    async def run(self, task: str, console: Console) -> Outcome:
        """The whole run, shown on `console`. Raises RunFailed, JournalError."""
        name = f"run-{secrets.token_hex(6)}"
        journal = Journal(self.journal)
        # Requests of one run share a group: the server prefills their common beginning once and shares places fairly.
        model = ServedModel(self.upstream, {**self.options, "prompt_cache_key": name})
        try:
            with View(console, self.limits.tool_calls) as view:
                showing = asyncio.create_task(_show(journal, name, view))
                try:
                    with _ended_by_signals():
                        return await Run(name, journal, model, self.tools, self.limits, view.told).go(task)
                finally:
                    showing.cancel()
                    await asyncio.wait([showing])
        finally:
            await journal.close()


def base_tools(workspace: Path | None, search_url: str | None) -> list[Tool]:
    """The tools that were allowed. Raises OSError for a workspace that is no directory."""
    tools: list[Tool] = [] if workspace is None else file_tools(workspace)
    return [*tools, Search(search_url)] if search_url else tools


def default_log(environ: Mapping[str, str]) -> Path:
    """Where runs are logged unless told otherwise."""
    state = environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "hybrid" / "runs.db"


def cost_of(outcome: Outcome) -> str:
    """One line."""
    limit = f"; stopped early: {outcome.limit}" if outcome.limit else ""
    return (
        f"{outcome.steps} steps, {outcome.critical_steps} of them one after another; {outcome.tool_calls} tool calls, "
        f"{outcome.tokens:,} tokens, {outcome.seconds:.1f} s{limit}"
    )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal that would end the process ends the run, so that the log and the terminal are left in order."""
    loop, run = asyncio.get_running_loop(), asyncio.current_task()
    assert run is not None, "within a task"
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, run.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _show(journal: Journal, run: str, view: View) -> None:
    after = 0
    while True:
        async with aclosing(journal.follow(run, after)) as events:
            async for event in events:
                if event is not None:
                    after = event.seq
                    view.take(event)
