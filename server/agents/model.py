"""What an agent asks: a conversation and tools in, one whole turn out, patient with a server that is busy.

Called by `run.py`.
"""

import asyncio
import random
import secrets
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.upstream import Upstream, UpstreamError

Json = dict[str, Any]
BUSY = (429, 503)  # statuses that ask for patience
PATIENCE = 8  # tries of one turn
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one turn."""

    prompt: int = 0
    cached: int = 0  # of the prompt
    completion: int = 0


@dataclass(slots=True)
class Turn:
    """An assistant's message in OpenAI's shape, why it ended, and what it cost."""

    message: Json
    finish: str = ""
    usage: Usage = field(default_factory=Usage)


class TooLong(Exception):
    """The conversation has outgrown the model's context."""


class Model(Protocol):
    """Anything that answers a conversation."""

    async def ask(self, messages: list[Json], tools: list[Json], patient: bool, told: Callable[[int], None]) -> Turn:
        """The next turn; a `patient` one lets others pass. `told(n)` hears of n more pieces of text as they come.

        Raises UpstreamError, TooLong. Cancelling it stops the model within one step.
        """


@dataclass(slots=True)
class ServedModel:
    """A model behind chat completions. `options` go with every request, such as sampling or max_tokens."""

    upstream: Upstream
    options: Json = field(default_factory=dict)

    async def ask(self, messages: list[Json], tools: list[Json], patient: bool, told: Callable[[int], None]) -> Turn:
        """As `Model`: a busy server is asked again, later each time."""
        for attempt in range(PATIENCE):
            try:
                return await self._ask(messages, tools, patient, told)
            except UpstreamError as error:
                if error.status == 400 and "context" in str(error):
                    raise TooLong(str(error)) from None
                if error.status not in BUSY or attempt == PATIENCE - 1:
                    raise
                wait = error.retry_after if error.retry_after is not None else 2.0**attempt
                await asyncio.sleep(min(wait, LONGEST_WAIT) * random.uniform(1, 1.5))  # 100 agents at once: spread
        raise AssertionError("the last try raises")

    async def _ask(self, messages: list[Json], tools: list[Json], patient: bool, told: Callable[[int], None]) -> Turn:
        body = {"messages": messages, "stream_options": {"include_usage": True}, **self.options}
        if patient:
            body["service_tier"] = "flex"
        if tools:
            body["tools"] = tools
        folding = _Folding()
        async with aclosing(self.upstream.stream(body)) as events:
            async for event in events:
                told(folding.add(event))
        return folding.turn()


class _Folding:
    """A turn put together from its chunks."""

    def __init__(self) -> None:
        self._text = {"content": "", "reasoning_content": ""}
        self._calls: list[Json] = []
        self._places: dict[int, int] = {}  # of the call that an index means now
        self._finish = ""
        self._usage: Usage | None = None
        self._pieces = 0

    def add(self, event: Json) -> int:
        """Take a chunk; 1 where it brought text."""
        if event["usage"]:
            self._usage = Usage(**event["usage"])
        came = 0
        for choice in event["choices"]:
            self._finish = choice.get("finish_reason") or self._finish
            delta = choice["delta"]
            for name, text in (
                ("content", delta["content"]),
                ("reasoning_content", delta["reasoning_content"] or delta["reasoning"]),
            ):
                self._text[name] += text
                came = came or bool(text)
            for call in delta["tool_calls"]:
                self._call(call)
                came = 1
        self._pieces += came
        return int(came)

    def _call(self, call: Json) -> None:
        """A piece of a call; an index that comes with another id means another call."""
        place = self._places.get(call["index"])
        if place is None or (call["id"] and self._calls[place]["id"] not in ("", call["id"])):
            place = self._places[call["index"]] = len(self._calls)
            self._calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        mine = self._calls[place]
        mine["id"] = call["id"] or mine["id"]
        mine["function"]["name"] = call["name"] or mine["function"]["name"]
        mine["function"]["arguments"] += call["arguments"]

    def turn(self) -> Turn:
        if not self._finish:
            raise UpstreamError("the server's answer broke off")
        message: Json = {"role": "assistant", "content": self._text["content"]}
        if self._text["reasoning_content"]:
            message["reasoning_content"] = self._text["reasoning_content"]
        if self._calls:
            seen: set[str] = set()
            for i, call in enumerate(self._calls):
                if not call["id"] or call["id"] in seen:
                    call["id"] = f"functions.{call['function']['name']}:{i}.{secrets.token_hex(4)}"
                seen.add(call["id"])
            message["tool_calls"] = self._calls
        return Turn(message, str(self._finish), self._usage or Usage(completion=self._pieces))
