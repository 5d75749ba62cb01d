"""A run as it goes, on a terminal: one line for each agent, or a plain line for each that ends where there is none.

Reads the run's events only, so that it shows a run of another process as well. Called by `swarm.py`.
"""

import time
import unicodedata
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.agents.journal import Event

STYLES = {"thinks": "cyan", "calls": "yellow", "done": "green", "failed": "red", "cancelled": "red", "waits": "dim"}
REFRESHES = 8  # a second
SHORT = 60  # characters of a call


@dataclass(slots=True)
class Line:
    """What is shown of an agent."""

    name: str
    depth: int
    state: str = "waits"
    doing: str = ""
    steps: int = 0
    tokens: int = 0  # written, of finished turns
    pieces: int = 0  # that came of the running turn
    since: float = field(default_factory=time.monotonic)  # when the turn began


class View:
    """The tree of one run. A context manager: it draws while it is open."""

    def __init__(self, console: Console, most_calls: int) -> None:
        self._console = console
        self._most_calls = most_calls
        self._lines: dict[str, Line] = {}
        self._n_calls = 0
        self._live = Live(get_renderable=self._drawn, console=console, refresh_per_second=REFRESHES, transient=True)

    def __enter__(self) -> "View":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def told(self, agent: str, pieces: int) -> None:
        """Text came."""
        if (line := self._lines.get(agent)) is not None:
            line.pieces += pieces

    def take(self, event: Event) -> None:
        """The next event of the run."""
        if not event.agent:
            return
        line = self._lines.setdefault(event.agent, Line("orchestrator", event.agent.count(".")))
        match event.kind:
            case "created":
                line.name = _one_line(event.data["name"])
            case "thinks":
                line.state, line.doing, line.pieces, line.since = "thinks", "", 0, time.monotonic()
            case "turn":
                line.state = "calls" if event.data["message"].get("tool_calls") else "done"
                line.steps += 1
                line.tokens += event.data["usage"]["completion"]
            case "called":
                self._n_calls += 1
                function = event.data["call"]["function"]
                line.doing = f"{function['name']} {function['arguments']}"[:SHORT]
            case "limit":
                line.doing = event.data["reason"]
            case "closed":
                line.state = event.data["ending"]
                self._tell(line)

    def _tell(self, line: Line) -> None:
        if not self._console.is_terminal:
            self._console.print(
                f"{line.name}: {line.state}, {line.steps} steps, {line.tokens} tokens",
                markup=False,
                highlight=False,
            )

    def _drawn(self) -> RenderableType:
        lines = [*self._lines.values()]
        counts = ", ".join(f"{n} {state}" for state in STYLES if (n := sum(line.state == state for line in lines)))
        head = Text(f"{len(lines)} agents ({counts}), {self._n_calls} of {self._most_calls} tool calls", style="bold")
        table = Table.grid(padding=(0, 2))
        room = max(3, self._console.height - 4)
        # With more agents than lines those at work are shown, in their order.
        shown = lines if len(lines) <= room else [line for line in lines if line.state in ("thinks", "calls")][:room]
        for line in shown:
            seconds = time.monotonic() - line.since
            rate = f"{line.pieces / seconds:.0f}/s" if line.state == "thinks" and seconds > 0.2 else ""
            table.add_row(
                Text("  " * line.depth + line.name),
                Text(line.state, style=STYLES[line.state]),
                f"{line.steps} steps",
                f"{line.tokens + (line.pieces if line.state == 'thinks' else 0)} tokens",
                rate,
                Text(_one_line(line.doing), style="dim", overflow="ellipsis", no_wrap=True),
            )
        return Group(head, table)


def _one_line(text: str) -> str:
    """Nothing that moves the cursor or turns the direction of writing."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cf") else " " for c in text)
