"""Runs with a scripted model: every result accounted for, failures as data, limits, cancellation, a full context."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.agents.budget import Limits
from server.agents.journal import Journal, JournalError
from server.agents.model import TooLong, Turn, Usage
from server.agents.run import LAST, Outcome, Run, RunFailed
from server.agents.tools import Json, ToolError, declared
from server.upstream import UpstreamError

WIDE = Limits()
Script = Callable[[list[Json], list[Json]], Turn | str | BaseException]


@dataclass
class ScriptedModel:
    """Answers by a function of the conversation; counts how many turns run at once."""

    script: Script
    seconds: float = 0.0
    asked: list[list[Json]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def ask(self, messages: list[Json], tools: list[Json], patient: bool, told: Callable[[int], None]) -> Turn:
        self.asked.append(list(messages))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
            said = self.script(messages, tools)
        finally:
            self.running -= 1
        if isinstance(said, BaseException):
            raise said
        told(1)
        return said if isinstance(said, Turn) else Turn({"role": "assistant", "content": said}, "stop", Usage(10, 5, 2))


@dataclass
class Echo:
    """A tool that says its text again, after a while."""

    seconds: float = 0.0
    calls: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    declaration: Json = field(default_factory=lambda: declared("echo", "Say it again.", text=""))

    async def run(self, arguments: dict[str, str]) -> str:
        self.calls.append(arguments["text"])
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.stopped.append(arguments["text"])
            raise
        if arguments["text"] == "bad":
            raise ToolError("that is bad")
        return arguments["text"]


numbers = itertools.count()


def calling(*calls: tuple[str, Any], content: str = "") -> Turn:
    made = [
        {
            "id": f"functions.{name}:{next(numbers)}",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
        }
        for name, given in calls
    ]
    return Turn({"role": "assistant", "content": content, "tool_calls": made}, "tool_calls", Usage(10, 5, 2))


def results(messages: list[Json]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "tool"]


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    made = Journal(tmp_path / "runs.db")
    yield made
    await made.close()


async def go(journal: Journal, model: ScriptedModel, *tools: Any, limits: Limits = WIDE) -> Outcome:
    return await Run("r", journal, model, tools, limits).go("the task")


def kinds(journal: Journal, kind: str) -> list[Json]:
    return [event.data for event in journal.read("r") if event.kind == kind]


def swarm_of(agents: int, calls: int) -> Script:
    """An orchestrator that creates `agents` sub-agents, each of which echoes `calls` texts one by one and reports."""

    def script(messages: list[Json], tools: list[Json]) -> Turn | str:
        task = messages[1]["content"]
        if task != "the task":
            done = len(results(messages))
            return f"{task}: {done}" if done == calls else calling(("echo", {"text": f"{task} {done}"}))
        names = [f"agent {i}" for i in range(agents)]
        match len([message for message in messages if message["role"] == "assistant"]):
            case 0:
                return calling(*(("create_subagent", {"name": name, "system_prompt": "echo"}) for name in names))
            case 1:
                return calling(*(("assign_task", {"agent": name, "prompt": name}) for name in names))
        return "\n".join(results(messages)[agents:])

    return script


async def test_a_hundred_sub_agents_with_fifteen_calls_each(journal: Journal) -> None:
    echo, model = Echo(0.002), ScriptedModel(swarm_of(100, 15), 0.002)
    outcome = await go(journal, model, echo, limits=Limits(tool_calls=1700))
    assert outcome.answer.splitlines() == [f"agent {i}: 15" for i in range(100)]
    assert sorted(echo.calls) == sorted(f"agent {i} {j}" for i in range(100) for j in range(15))
    assert (outcome.limit, outcome.tool_calls) == (None, 1500 + 200)
    # Three turns of the orchestrator, one after another; below the second, 15 calls and the report of the slowest.
    assert (outcome.steps, outcome.critical_steps) == (3 + 100 * 16, 3 + 16)
    assert outcome.tokens == 12 * outcome.steps
    assert model.most_running == 100
    events = journal.read("r")
    assert [event.seq for event in events] == [*range(1, len(events) + 1)]
    called = [data["call"]["id"] for data in kinds(journal, "called")]
    assert sorted(called) == sorted(data["call"] for data in kinds(journal, "result")) and len(called) == 1700
    assert [data["ending"] for data in kinds(journal, "closed")] == ["done"] * 100


async def test_a_call_is_in_the_log_before_it_is_made(journal: Journal) -> None:
    seen = []

    class Looking(Echo):
        async def run(self, arguments: dict[str, str]) -> str:
            seen.append([data["call"]["function"]["name"] for data in kinds(journal, "called")])
            return "ok"

    said = iter([calling(("echo", {"text": "a"})), "done"])
    await go(journal, ScriptedModel(lambda *_: next(said)), Looking())
    assert seen == [["echo"]]


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (("echo", {"text": "bad"}), "Error: that is bad"),
        (("echo", "{"), "Error: echo: the arguments are not JSON: "),
        (("echo", "[]"), "Error: echo: the arguments are no object"),
        (("echo", {}), "Error: echo: text must be a text"),
        (("echo", {"text": 3}), "Error: echo: text must be a text"),
        (("echo", {"text": "a", "more": "b"}), "Error: echo: there is no parameter 'more'; there are text"),
        (("shout", {}), "Error: there is no tool 'shout'; there are create_subagent, assign_task, echo"),
        (("assign_task", {"agent": "x", "prompt": "y"}), "Error: there is no sub-agent 'x'; there are: none; create"),
    ],
)
async def test_what_fails_is_data(journal: Journal, call: tuple[str, Any], answer: str) -> None:
    """The bad call's error, and the good call's result beside it."""
    said = iter([calling(call, ("echo", {"text": "good"})), "done"])
    model = ScriptedModel(lambda *_: next(said))
    assert (await go(journal, model, Echo())).answer == "done"
    bad, good = results(model.asked[1])
    assert bad.startswith(answer) and good == "good"
    assert [data["failed"] for data in kinds(journal, "result")].count(True) == 1


async def test_a_sub_agent_that_fails_kills_no_sibling(journal: Journal) -> None:
    def script(messages: list[Json], tools: list[Json]) -> Turn | str | BaseException:
        if messages[1]["content"] == "agent 1":
            return UpstreamError("the server answered 500: broken")
        return swarm_of(3, 2)(messages, tools)

    outcome = await go(journal, ScriptedModel(script), Echo())
    assert outcome.answer.splitlines() == [
        "agent 0: 2",
        "Error: the sub-agent 'agent 1' failed: the server answered 500: broken",
        "agent 2: 2",
    ]
    assert sorted(data["ending"] for data in kinds(journal, "closed")) == ["done", "done", "failed"]


async def test_sub_agents_create_none(journal: Journal) -> None:
    def script(messages: list[Json], tools: list[Json]) -> Turn | str:
        if messages[1]["content"] == "the task":
            return swarm_of(1, 0)(messages, tools)
        assert [tool["function"]["name"] for tool in tools] == ["echo"]
        if not results(messages):
            return calling(("create_subagent", {"name": "b", "system_prompt": ""}))
        return results(messages)[0]

    answer = (await go(journal, ScriptedModel(script), Echo())).answer
    assert answer == "Error: there is no tool 'create_subagent'; there are echo"


async def test_one_sub_agent_too_many(journal: Journal) -> None:
    said = iter(
        [
            calling(*(("create_subagent", {"name": f"{i % 4}", "system_prompt": ""}) for i in range(6))),
            calling(*(("assign_task", {"agent": "0", "prompt": f"{i}"}) for i in range(9))),
        ]
    )

    def script(messages: list[Json], tools: list[Json]) -> Turn | str:
        return next(said, "done") if messages[1]["content"] == "the task" else "ok"

    model = ScriptedModel(script, 0.01)
    await go(journal, model, limits=Limits(subagents=3))
    made, tasks = results(model.asked[-1])[:6], results(model.asked[-1])[6:]
    assert made[:3] == ["0 is ready.", "1 is ready.", "2 is ready."]
    assert made[3].startswith("Error: there are 3 sub-agents, the most")
    assert made[4].startswith("Error: there is a sub-agent '0' already")
    assert tasks == ["ok"] * 9
    assert model.most_running == 3


async def test_the_same_call_again_and_again(journal: Journal) -> None:
    said = iter([*(calling(("echo", {"text": "again"})) for _ in range(5)), "done"])
    model, echo = ScriptedModel(lambda *_: next(said)), Echo()
    await go(journal, model, echo)
    assert len(echo.calls) == 3
    assert all(text.startswith("Error: this very call was made 3 times") for text in results(model.asked[-1])[3:])


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(tool_calls=4), "all 4 tool calls of the run are made"),
        (Limits(orchestrator_steps=4), "all 4 steps of this agent are taken"),
        (Limits(tokens=40), "48 of 40 tokens are used"),
        (Limits(seconds=0.1), "0.1 seconds have passed"),
    ],
)
async def test_a_limit_leaves_one_last_turn(journal: Journal, limits: Limits, reason: str) -> None:
    def script(messages: list[Json], tools: list[Json]) -> Turn | str:
        return calling(("echo", {"text": f"{len(messages)}"})) if tools else "so far"

    model = ScriptedModel(script)
    outcome = await go(journal, model, Echo(0.03 if limits.seconds < 1 else 0), limits=limits)
    assert (outcome.answer, outcome.limit) == ("so far", reason)
    assert model.asked[-1][-1] == {"role": "user", "content": LAST.format(reason)}
    assert kinds(journal, "limit") == [{"reason": reason}]


async def test_more_calls_in_a_turn_than_are_left(journal: Journal) -> None:
    said = iter([calling(*(("echo", {"text": f"{i}"}) for i in range(7))), "done"])
    echo, model = Echo(), ScriptedModel(lambda *_: next(said))
    outcome = await go(journal, model, echo, limits=Limits(tool_calls=5))
    assert len(echo.calls) == 5 and outcome.tool_calls == 5
    assert [text.startswith("Error: all 5 tool calls") for text in results(model.asked[1])] == [False] * 5 + [True] * 2


async def test_a_tool_that_hangs_is_stopped(journal: Journal) -> None:
    said = iter([calling(("echo", {"text": "long"})), "done"])
    echo, model = Echo(60), ScriptedModel(lambda *_: next(said))
    await go(journal, model, echo, limits=Limits(tool_seconds=0.05))
    assert results(model.asked[1]) == ["Error: echo took longer than 0.05 s and was stopped"]
    assert echo.stopped == ["long"]


async def test_a_result_of_a_gigabyte_is_cut(journal: Journal) -> None:
    said = iter([calling(("echo", {"text": "ä" * 100_000})), "done"])
    model = ScriptedModel(lambda *_: next(said))
    await go(journal, model, Echo(), limits=Limits(output_bytes=1001))
    (result,) = results(model.asked[1])
    assert result == "ä" * 250 + "\n[199,000 bytes left out]\n" + "ä" * 250


async def test_cancelled_in_the_middle_everything_ends(journal: Journal) -> None:
    """A parent with children in tools: all stop, all are closed, and the log says so."""
    echo, model = Echo(60), ScriptedModel(swarm_of(20, 1))
    run = asyncio.create_task(go(journal, model, echo))
    while len(echo.calls) < 20:
        await asyncio.sleep(0.01)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert sorted(echo.stopped) == sorted(echo.calls)
    assert [data["ending"] for data in kinds(journal, "closed")] == ["cancelled"] * 20
    assert journal.read("r")[-1].kind == "cancelled"
    assert len(asyncio.all_tasks()) == 1


async def test_a_context_that_fills_is_compacted(journal: Journal) -> None:
    """Old results go first, the last two next; what calls and answers belong together stays."""

    def script(messages: list[Json], tools: list[Json]) -> Turn | str | BaseException:
        if sum(len(message["content"]) for message in messages) > 3000:
            return TooLong("the prompt is too long")
        n = len(results(messages))
        return "done" if n == 6 else calling(("echo", {"text": f"{n}" * 900}))

    model = ScriptedModel(script)
    assert (await go(journal, model, Echo())).answer == "done"
    assert {data["kept"] for data in kinds(journal, "compacted")} == {2}
    assert results(model.asked[-1])[:3] == ["[900 characters of an older result left out]"] * 3
    assert results(model.asked[-1])[-1] == "5" * 900


async def test_a_context_that_stays_too_long_ends_the_run(journal: Journal) -> None:
    with pytest.raises(RunFailed, match="too long"):
        await go(journal, ScriptedModel(lambda *_: TooLong("the prompt is too long")))
    assert journal.read("r")[-1].kind == "failed"


async def test_a_full_disk_ends_the_run_with_one_error(journal: Journal) -> None:
    pages = journal._base.execute("PRAGMA page_count").fetchone()[0]
    journal._base.execute(f"PRAGMA max_page_count = {pages + 3}")
    with pytest.raises(JournalError, match="is the disk full"):
        await go(journal, ScriptedModel(swarm_of(20, 5)), Echo())


async def test_a_turn_that_hangs_ends_with_the_time(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(messages: list[Json], tools: list[Json]) -> Turn | str:
        return "late" if tools else "so far"

    model = ScriptedModel(script)
    ask = model.ask

    async def slow(messages: list[Json], tools: list[Json], patient: bool, told: Callable[[int], None]) -> Turn:
        if tools:
            await asyncio.sleep(60)
        return await ask(messages, tools, patient, told)

    monkeypatch.setattr(model, "ask", slow)
    outcome = await asyncio.wait_for(go(journal, model, limits=Limits(seconds=0.1)), 10)
    assert (outcome.answer, outcome.limit) == ("so far", "0.1 seconds have passed")


@pytest.mark.parametrize("said", ["", " \n"])
async def test_no_answer_is_no_success(journal: Journal, said: str) -> None:
    with pytest.raises(RunFailed, match=r"the model gave no answer \(its turn ended with stop\)"):
        await go(journal, ScriptedModel(lambda *_: said))
    assert journal.read("r")[-1].kind == "failed"


async def test_a_tool_that_breaks_is_data(journal: Journal) -> None:
    class Broken(Echo):
        async def run(self, arguments: dict[str, str]) -> str:
            raise RuntimeError("a fault of its own")

    said = iter([calling(("echo", {"text": "a"})), "done"])
    model = ScriptedModel(lambda *_: next(said))
    assert (await go(journal, model, Broken())).answer == "done"
    assert results(model.asked[1]) == ["Error: RuntimeError('a fault of its own')"]


async def test_half_an_emoji_reaches_no_tool_and_no_log_as_it_is(journal: Journal) -> None:
    said = iter([calling(("echo", '{"text": "a\\ud800b"}')), "done"])
    model, echo = ScriptedModel(lambda *_: next(said)), Echo()
    assert (await asyncio.wait_for(go(journal, model, echo), 10)).answer == "done"
    assert echo.calls == ["a?b"]
