"""Agent swarms run to their end, the model deciding every turn: the grader's own small runner.

The user asks for a property of N items; the model creates sub-agents and assigns tasks, each task is a conversation of
its own whose search tool is scripted here, and the final answer must hold every item's value. Knows the model only as
an `Ask`, not how it is reached, and is no agent runtime. Called by `hybrid.nano.evaluate`.
"""

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from hybrid.nano import words
from hybrid.nano.conversation import Json
from hybrid.nano.data import READ_FILE, SEARCH, phrase
from hybrid.nano.swarm_data import ASSIGN, CREATE, FIND, ORCHESTRATOR

# (thinking, tools, messages, max_tokens) to one choice of a chat completion: message and finish_reason.
Ask = Callable[[bool, list[Json], list[Json], int], Awaitable[Json]]
_TURNS = 6  # of the orchestrator; three are needed
_AGENT_TURNS = 4  # of a sub-agent; two are needed
_TOKENS = 2000  # of an orchestrator's turn; 30 tasks need about half
_AGENT_TOKENS = 256


class Refused(Exception):
    """The server refuses a request as invalid, such as one that is too long."""


class Failed(Exception):
    """Why a swarm did not end well. One of few messages, so that they can be counted."""


@dataclass(frozen=True, slots=True)
class Swarm:
    """One task for a swarm: the prompt, and what a search finds."""

    seed: int
    thinking: bool
    messages: Sequence[Json]  # up to the user's task
    wanted: str  # the property
    facts: Mapping[str, str]  # item to its value

    def found(self, query: str) -> str:
        """What the search tool says: at times with facts that nobody asked for, always the same for one query."""
        what, _, item = query.partition(" of ")
        if what != self.wanted or item not in self.facts:
            return "Nothing found."
        rng = random.Random(f"{self.seed} {query}")
        key = _other(what, lambda: words.a_property(rng, True))
        beside = [f"{key} of {item}", f"{what} of {_other(item, lambda: words.item(rng, True))}"]
        lines = [f"{key}: {words.value(rng, True)}" for key in rng.sample(beside, rng.choice((0, 0, 1, 2)))]
        lines.insert(rng.randint(0, len(lines)), f"{query}: {self.facts[item]}")
        return "\n".join(lines)

    def check(self, answer: str) -> None:
        """Raise Failed unless every item's value stands beside it."""
        for item, value in self.facts.items():
            if not re.search(rf"(?<![\w/.-]){re.escape(item)}: {re.escape(value)}$", answer, re.MULTILINE):
                raise Failed("an item's value is not in the final answer")


def swarm_of(seed: int, n: int, numbered: bool, thinking: bool) -> Swarm:
    """The swarm of this seed over `n` held-out items, or over numbered ones."""
    rng = random.Random(f"swarm {seed}")
    what = words.a_property(rng, True)
    items = words.items(rng, n, True)
    listed = words.listed(rng, items)
    if numbered:
        noun = rng.choice(words.COUNTED)
        items = [f"{noun} {i}" for i in range(1, n + 1)]
        listed = rng.choice(["{}s 1 to {}", "each of {}s 1 to {}", "all {}s from 1 to {}"]).format(noun, n)
    user = {"role": "user", "content": phrase(rng, FIND.asked, True).format(property=what, items=listed)}
    system = [{"role": "system", "content": ORCHESTRATOR}] if rng.random() < 0.7 else []
    return Swarm(seed, thinking, [*system, user], what, {item: words.value(rng, True) for item in items})


async def run_swarm(swarm: Swarm, ask: Ask) -> str | None:
    """Run it to its end. None where it went well, else why it did not."""
    try:
        await _Orchestrator(swarm, ask).run()
    except Failed as failure:
        return str(failure)
    except Refused:
        return "the server refused a turn as invalid"
    return None


class _Orchestrator:
    """One swarm on its way."""

    def __init__(self, swarm: Swarm, ask: Ask) -> None:
        self._swarm = swarm
        self._ask = ask
        self._agents: dict[str, str] = {}  # name to system prompt
        self._n_tasks = 0

    async def run(self) -> None:
        tools, n_items = [CREATE, ASSIGN, SEARCH], len(self._swarm.facts)
        answer = await self._converse(tools, self._swarm.messages, self._do, _TURNS, _TOKENS)
        if self._n_tasks != n_items:
            raise Failed("too few tasks" if self._n_tasks < n_items else "too many tasks")
        self._swarm.check(answer)

    async def _converse(
        self,
        tools: list[Json],
        messages: Sequence[Json],
        do: Callable[[str, Json], Awaitable[str]],
        turns: int,
        max_tokens: int,
    ) -> str:
        """Turns until one that calls nothing: its content. `do` runs a call by name and arguments."""
        talk = list(messages)
        for _ in range(turns):
            choice = await self._ask(self._swarm.thinking, tools, talk, max_tokens)
            if choice["finish_reason"] == "length":
                raise Failed("a turn did not end")
            message = choice["message"]
            calls = message.get("tool_calls", ())
            if not calls:
                return message.get("content") or ""
            talk.append(message)
            wanted = [(call["function"]["name"], _arguments(call["function"])) for call in calls]
            # All come to their end before a failure is passed on, so that none goes on alone.
            results = await asyncio.gather(*(do(*one) for one in wanted), return_exceptions=True)
            for call, result in zip(calls, results, strict=True):
                if isinstance(result, BaseException):
                    raise result
                talk.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        raise Failed("too many turns")

    async def _do(self, name: str, arguments: Json) -> str:
        """A call of the orchestrator."""
        if name == "create_subagent":
            agent, system = _texts(arguments, "name", "system_prompt")
            self._agents[agent] = system
            return f"{agent} is ready."
        if name == "assign_task":
            agent, prompt = _texts(arguments, "agent", "prompt")
            self._n_tasks += 1
            if agent not in self._agents:
                raise Failed("a task for a sub-agent that was never created")
            messages = [{"role": "system", "content": self._agents[agent]}, {"role": "user", "content": prompt}]
            return await self._converse([SEARCH, READ_FILE], messages, self._search, _AGENT_TURNS, _AGENT_TOKENS)
        return await self._search(name, arguments)

    async def _search(self, name: str, arguments: Json) -> str:
        if name != "search":
            raise Failed("a tool that the task does not need")
        (query,) = _texts(arguments, "query")
        return self._swarm.found(query)


def _other(than: str, make: Callable[[], str]) -> str:
    return next(made for made in words.distinct(make, 2) if made != than)


def _arguments(function: Json) -> Json:
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        raise Failed("arguments that are not JSON") from None
    if not isinstance(arguments, dict):
        raise Failed("arguments that are no object")
    return arguments


def _texts(arguments: Json, *names: str) -> list[str]:
    """The arguments of these names, and no others. Raises Failed."""
    if set(arguments) != set(names) or not all(isinstance(value, str) for value in arguments.values()):
        raise Failed("arguments that the tool does not have")
    return [arguments[name] for name in names]
