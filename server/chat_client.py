"""`hybrid chat`: a streaming client for the terminal and for pipes.

The answer goes to standard output, reasoning (dim) and everything else to standard error, so a pipe carries the
answer alone. Speaks plain OpenAI chat completions. Called by `__main__.py`.
"""

import asyncio
import sys
import unicodedata
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from server.upstream import Upstream, UpstreamError

Json = dict[str, Any]

GREETING = "Ctrl-C stops an answer, Ctrl-D leaves, /new starts over."


@dataclass(slots=True)
class ChatClient:
    """One conversation with one server. `thinking` None leaves the mode to the server."""

    upstream: Upstream
    thinking: bool | None = None
    max_tokens: int | None = None
    messages: list[Json] = field(default_factory=list)

    async def ask(self, prompt: str) -> None:
        """Send one turn and print the answer as it comes. The turn is kept only where an answer came."""
        turn = {"role": "user", "content": prompt}
        body = {"messages": [*self.messages, turn], **options(self.thinking, self.max_tokens)}
        reply = _Reply()
        try:
            async with aclosing(self.upstream.stream(body)) as events:
                async for event in events:
                    reply.show(event)
        finally:
            reply.end()
            if reply.text:
                self.messages += [turn, {"role": "assistant", "content": reply.text}]


def options(thinking: bool | None, max_tokens: int | None) -> Json:
    """What goes with a request; None leaves it to the server."""
    body: Json = {}
    if thinking is not None:
        body["thinking"] = {"type": "enabled" if thinking else "disabled"}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return body


def converse(client: ChatClient) -> None:
    """Read turns from the terminal until end of file."""
    console = Console(stderr=True)
    console.print(GREETING, style="dim", highlight=False)
    while True:
        try:
            prompt = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if prompt == "/new":
            client.messages.clear()
        elif prompt:
            _turn(client, prompt, console)


def _turn(client: ChatClient, prompt: str, console: Console) -> None:
    """One turn; Ctrl-C ends the answer (closing the connection cancels it on the server), not the conversation."""
    try:
        asyncio.run(client.ask(prompt))
    except KeyboardInterrupt:
        console.print("(stopped)", style="dim")
    except UpstreamError as error:
        console.print(str(error), style="red", markup=False, highlight=False)


class _Reply:
    """Prints the pieces of one answer and keeps its text."""

    def __init__(self) -> None:
        self.text = ""
        self._console = Console(stderr=True, soft_wrap=True)
        self._reasoned = False

    def show(self, event: Json) -> None:
        for choice in event["choices"]:
            delta = choice["delta"]
            self._reason(delta["reasoning_content"] or delta["reasoning"])
            self._answer(delta["content"])
            for call in delta["tool_calls"]:
                self._answer(call["name"] + call["arguments"])

    def end(self) -> None:
        if self.text and not self.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
        if self._reasoned and not self.text:
            self._console.print()

    def _reason(self, text: str) -> None:
        if text:
            self._reasoned = True
            self._console.print(printable(text), end="", style="dim", markup=False, highlight=False, emoji=False)

    def _answer(self, text: str) -> None:
        if not text:
            return
        if self._reasoned and not self.text:
            self._console.print("\n")
        self.text += text
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def printable(text: str) -> str:
    """`text` without control characters: a model must not be able to drive the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)
