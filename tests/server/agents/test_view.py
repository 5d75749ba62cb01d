"""What a run looks like on a terminal, and where there is none."""

import io
import time

from rich.console import Console

from server.agents.journal import Event
from server.agents.view import View


def event(agent: str, kind: str, **data: object) -> Event:
    return Event("r", 1, 0.0, agent, kind, data)


def turn(calls: bool) -> dict[str, object]:
    return {"message": {"tool_calls": [1]} if calls else {}, "usage": {"completion": 7}}


def drawn(view: View, console: Console) -> list[str]:
    with console.capture() as captured:
        console.print(view._drawn())
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_tree() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30, color_system=None)
    view = View(console, 1500)
    view.take(event("", "began"))
    view.take(event("main", "thinks"))
    view.take(event("main", "turn", **turn(True)))
    for i in range(2):
        view.take(event(f"main.{i}", "created", name=f"Find\x1b[31mer {i}"))
    view.take(event("main.0", "thinks"))
    view.told("main.0", 50)
    view._lines["main.0"].since = time.monotonic() - 2
    view.take(event("main.1", "turn", **turn(False)))
    view.take(event("main.1", "closed", ending="done"))
    call = {"function": {"name": "search", "arguments": '{"query": "x\ny"}'}}
    view.take(event("main", "called", call=call))
    head, *rows = drawn(view, console)
    assert head == "3 agents (1 thinks, 1 calls, 1 done), 1 of 1500 tool calls"
    assert rows[0].split() == ["orchestrator", "calls", "1", "steps", "7", "tokens", "search", '{"query":', '"x', 'y"}']
    assert rows[1].split()[-7:] == ["0", "thinks", "0", "steps", "50", "tokens", "25/s"] and rows[1].startswith(
        "  Find"
    )
    assert rows[2].split()[-6:] == ["1", "done", "1", "steps", "7", "tokens"]
    assert "\x1b" not in "".join(rows)


def test_more_agents_than_lines_shows_those_at_work() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=10, color_system=None)
    view = View(console, 1500)
    for i in range(100):
        view.take(event(f"main.{i}", "created", name=f"agent {i}"))
    for i in (40, 90):
        view.take(event(f"main.{i}", "thinks"))
    head, *rows = drawn(view, console)
    assert head.startswith("100 agents (2 thinks, 98 waits)")
    assert [row.split()[1] for row in rows] == ["40", "90"]


def test_no_terminal_gets_a_line_for_each_sub_agent() -> None:
    out = io.StringIO()
    with View(Console(file=out), 1500) as view:
        view.take(event("main.1", "created", name="Reader"))
        view.take(event("main.1", "turn", **turn(False)))
        view.take(event("main.1", "closed", ending="failed"))
    assert out.getvalue() == "Reader: failed, 1 steps, 7 tokens\n"
