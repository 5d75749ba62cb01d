"""One run: an agent, or an orchestrator and the sub-agents that it creates.

The model decides; this carries it out. Every turn and every result is in the journal before anything follows from it.
Calls of one turn run side by side in one task group, so cancelling an agent ends all that it began. What fails inside
a call is text for the model that made it. When a limit is reached, one last turn without tools tells what was found.
Called by `swarm.py`.
"""

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from server.agents.budget import Budget, Limits, Spent
from server.agents.journal import Journal, JournalError
from server.agents.model import Model, TooLong, Turn
from server.agents.tools import ASSIGN, CREATE, Call, Json, Tool, ToolError, clean, read_call, shortened
from server.upstream import UpstreamError

ORCHESTRATOR = (
    "You are Kimi, an orchestrator. Split work that can be done in parallel among sub-agents: create them with a clear "
    "role, give each its task in one turn, do the rest yourself, and answer from the results."
)
MAIN = "main"
LAST_SECONDS = 60.0  # for the turn after a limit
SAME_CALLS = 3  # times that an agent may make one call before it is told to stop
LAST = "No more tools can be used: {}. Answer now from what you have, and say what is missing."
LEFT_OUT = "[{:,} characters of an older result left out]"
KEPT_RESULT = 200  # characters; longer results are what a full context can do without


class NoAnswer(Exception):
    """An agent ended without one. One line: why."""


class RunFailed(Exception):
    """The run has no answer. One line: why."""


@dataclass(slots=True, eq=False)
class Agent:
    """One conversation of the tree."""

    id: str  # "main", or its parent's with a number
    name: str
    steps: int = 0  # turns
    critical: int = 0  # steps on the longest path through it
    messages: list[Json] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    limit: str = ""  # what was spent when it wanted more


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    answer: str
    limit: str | None  # what was spent, if so
    critical_steps: int  # Kimi-K2.5's own measure: each step of the orchestrator, and the most of its sub-agents'
    steps: int
    tokens: int
    tool_calls: int
    seconds: float


class Run:
    """One run, from its task to its answer. `go` once."""

    def __init__(
        self,
        run: str,
        journal: Journal,
        model: Model,
        tools: Sequence[Tool],
        limits: Limits,
        told: Callable[[str, int], None] = lambda agent, tokens: None,
    ) -> None:
        """`told(agent id, tokens)` hears of text as it comes, more often than the journal."""
        self._run = run
        self._journal = journal
        self._model = model
        self._tools = {tool.declaration["function"]["name"]: tool for tool in tools}
        self._told = told
        self._budget = Budget(limits)
        self._limits = limits
        self._roles: dict[str, str] = {}  # system prompt of each sub-agent, by its name
        self._at_work = asyncio.Semaphore(limits.subagents)
        self._numbers = itertools.count(1)
        self._steps = 0
        self._limit: str | None = None

    async def go(self, task: str) -> Outcome:
        """Run to the end. Raises RunFailed, JournalError; cancelled, it is over within one step."""
        task = clean(task)
        await self._journal.begin(self._run, task)
        main = Agent(MAIN, "orchestrator")
        main.messages = [{"role": "system", "content": ORCHESTRATOR}, {"role": "user", "content": task}]
        await self._log("", "began", limits=asdict(self._limits))
        try:
            answer = await self._converse(main, [CREATE, ASSIGN], self._limits.orchestrator_steps)
        except asyncio.CancelledError:
            with contextlib.suppress(JournalError):
                await asyncio.shield(self._log("", "cancelled"))
            raise
        except JournalError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, UpstreamError | NoAnswer) else repr(error)
            await self._log("", "failed", reason=reason)
            raise RunFailed(reason) from error
        outcome = Outcome(
            answer,
            self._limit,
            main.critical,
            self._steps,
            self._budget.tokens,
            self._budget.tool_calls,
            self._budget.seconds,
        )
        await self._log("", "ended", answer=answer, limit=self._limit, critical_steps=main.critical)
        return outcome

    async def _converse(self, agent: Agent, swarm: list[Json], most_steps: int) -> str:
        """Turns until one that calls nothing: its text."""
        tools = [*swarm, *(tool.declaration for tool in self._tools.values())]
        for message in agent.messages:
            await self._log(agent.id, "message", message=message)
        while True:
            try:
                self._budget.check()
                if agent.limit or agent.steps >= most_steps:
                    raise Spent(agent.limit or f"all {most_steps} steps of this agent are taken")
                turn = await self._turn(agent, tools, self._budget.seconds_left)
            except Spent as spent:
                return await self._last(agent, str(spent))
            agent.steps += 1
            agent.critical += 1
            self._steps += 1
            calls = turn.message.get("tool_calls", ())
            if not calls:
                return _text(turn)
            await self._answer_calls(agent, calls, tools)

    async def _last(self, agent: Agent, why: str) -> str:
        """The turn after a limit."""
        if agent.id == MAIN:
            self._limit = why
        await self._log(agent.id, "limit", reason=why)
        await self._say(agent, {"role": "user", "content": LAST.format(why)})
        try:
            return _text(await self._turn(agent, [], LAST_SECONDS))
        except Spent:
            raise NoAnswer(f"{why}, and the last turn took more than {LAST_SECONDS:g} s") from None

    async def _turn(self, agent: Agent, tools: list[Json], seconds: float) -> Turn:
        """The next turn, if it takes no longer; raises Spent."""
        try:
            async with asyncio.timeout(seconds):
                return await self._whole_turn(agent, tools)
        except TimeoutError:
            raise Spent(self._budget.late) from None

    async def _whole_turn(self, agent: Agent, tools: list[Json]) -> Turn:
        await self._log(agent.id, "thinks")
        for room in (None, 2, 0):  # tool results that stay whole, from the newest; None: all
            if room is not None:
                await self._log(agent.id, "compacted", kept=room)
                agent.messages = _compacted(agent.messages, room)
            try:
                turn = await self._model.ask(agent.messages, tools, agent.id != MAIN, lambda n: self._told(agent.id, n))
                break
            except TooLong as error:
                reason = str(error)
        else:
            raise UpstreamError(reason)
        self._budget.tokens += turn.usage.prompt + turn.usage.completion
        agent.messages.append(turn.message)
        usage = {"prompt": turn.usage.prompt, "cached": turn.usage.cached, "completion": turn.usage.completion}
        await self._log(agent.id, "turn", message=turn.message, finish=turn.finish, usage=usage)
        return turn

    async def _answer_calls(self, agent: Agent, calls: Sequence[Json], tools: list[Json]) -> None:
        """Run the calls of a turn side by side; their results go on in the order of the calls."""
        longest = [0]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._result(agent, call, tools, longest)) for call in calls]
        except BaseExceptionGroup as several:  # the journal cannot be written: the same for all
            raise several.exceptions[0] from None
        agent.critical += max(longest)
        agent.messages += [task.result() for task in tasks]

    async def _result(self, agent: Agent, call: Json, tools: list[Json], longest: list[int]) -> Json:
        """The tool message that answers a call, whatever becomes of it."""
        await self._log(agent.id, "called", call=call)
        failed = False
        try:
            self._budget.take_call()
            made = read_call(call, tools)
            self._refuse_repetition(agent, made)
            text = await self._carry_out(agent, made, longest)
        except Spent as spent:
            agent.limit = str(spent)
            text, failed = f"Error: {spent}", True
        except ToolError as error:
            text, failed = f"Error: {error}", True
        except JournalError:
            raise
        except Exception as error:  # noqa: BLE001 a tool's own fault is no reason to end its siblings
            text, failed = f"Error: {error!r}", True
        text = shortened(text, self._limits.output_bytes)
        message = {"role": "tool", "tool_call_id": call["id"], "content": text}
        await self._log(agent.id, "result", call=call["id"], message=message, failed=failed)
        return message

    def _refuse_repetition(self, agent: Agent, call: Call) -> None:
        key = json.dumps([call.name, call.arguments], sort_keys=True)
        agent.calls[key] += 1
        if agent.calls[key] > SAME_CALLS:
            raise ToolError(f"this very call was made {SAME_CALLS} times; do something else, or answer")

    async def _carry_out(self, agent: Agent, call: Call, longest: list[int]) -> str:
        if call.name == "create_subagent":
            return self._create(call.arguments["name"], call.arguments["system_prompt"])
        if call.name == "assign_task":
            return await self._assign(agent, call.arguments["agent"], call.arguments["prompt"], longest)
        try:
            async with asyncio.timeout(self._limits.tool_seconds):
                return await self._tools[call.name].run(call.arguments)
        except TimeoutError:
            raise ToolError(f"{call.name} took longer than {self._limits.tool_seconds:g} s and was stopped") from None

    def _create(self, name: str, system_prompt: str) -> str:
        if name in self._roles:
            raise ToolError(f"there is a sub-agent {name!r} already; give it tasks, or choose another name")
        if len(self._roles) >= self._limits.subagents:
            raise ToolError(f"there are {self._limits.subagents} sub-agents, the most that a run may have; use those")
        self._roles[name] = system_prompt
        return f"{name} is ready."

    async def _assign(self, parent: Agent, name: str, prompt: str, longest: list[int]) -> str:
        """A task to its end. What stops the sub-agent is an error for the parent alone."""
        if name not in self._roles:
            there = ", ".join(self._roles) or "none; create one first"
            raise ToolError(f"there is no sub-agent {name!r}; there are: {there}")
        child = Agent(f"{parent.id}.{next(self._numbers)}", name)
        child.messages = [{"role": "system", "content": self._roles[name]}, {"role": "user", "content": prompt}]
        await self._log(child.id, "created", name=name, parent=parent.id)
        ending = "cancelled"
        try:
            async with self._at_work:
                answer = await self._converse(child, [], self._limits.subagent_steps)
            ending = "done"
            return answer
        except (UpstreamError, NoAnswer) as error:
            ending = "failed"
            raise ToolError(f"the sub-agent {name!r} failed: {error}") from None
        finally:
            longest[0] = max(longest[0], child.critical)
            await asyncio.shield(self._log(child.id, "closed", ending=ending))

    async def _say(self, agent: Agent, message: Json) -> None:
        agent.messages.append(message)
        await self._log(agent.id, "message", message=message)

    async def _log(self, agent: str, kind: str, **data: Any) -> None:
        await self._journal.append(self._run, agent, kind, data)


def _text(turn: Turn) -> str:
    """The answer; raises NoAnswer for an empty one, such as one that was cut in its reasoning."""
    text: str = turn.message["content"]
    if not text.strip():
        raise NoAnswer(f"the model gave no answer (its turn ended with {turn.finish})")
    return text


def _compacted(messages: list[Json], whole: int) -> list[Json]:
    """The conversation with all long tool results but the last `whole` left out: everything else stays, so that calls
    and results still belong together."""
    results = [i for i, message in enumerate(messages) if message["role"] == "tool"]
    old = {i for i in results[: len(results) - whole] if len(messages[i]["content"]) > KEPT_RESULT}
    return [
        {**message, "content": LEFT_OUT.format(len(message["content"]))} if i in old else message
        for i, message in enumerate(messages)
    ]
