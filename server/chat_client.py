"""`hybrid chat`: a streaming client for the terminal and for pipes.

The answer goes to standard output, reasoning (dim) and everything else to standard error, so a pipe carries the
answer alone. Speaks plain OpenAI chat completions. Called by `__main__.py`.
"""

import asyncio
import json
import sys
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from rich.console import Console

Json = dict[str, Any]

GREETING = "Ctrl-C stops an answer, Ctrl-D leaves, /new starts over."


class ChatError(RuntimeError):
    """The server cannot be reached or refused. One line for the user."""


@dataclass(slots=True)
class ChatClient:
    """One conversation with one server. `thinking` None leaves the mode to the server."""

    url: str
    model: str | None = None
    api_key: str | None = None
    thinking: bool | None = None
    max_tokens: int | None = None
    messages: list[Json] = field(default_factory=list)

    async def ask(self, prompt: str) -> None:
        """Send one turn and print the answer as it comes. The turn is kept only where an answer came."""
        turn = {"role": "user", "content": prompt}
        reply = _Reply()
        try:
            async with self._session() as session:
                body = await self._body(session, [*self.messages, turn])
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                    await _check(response)
                    async for event in _events(response):
                        reply.show(event)
        except aiohttp.ClientError as error:
            raise ChatError(f"{self.url}: {error}; is the server running? (hybrid serve)") from None
        except (ValueError, LookupError, TypeError):
            raise ChatError(f"{self.url}: what answers there is no OpenAI-compatible server") from None
        finally:
            reply.end()
            if reply.text:
                self.messages += [turn, {"role": "assistant", "content": reply.text}]

    def _session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10))

    async def _body(self, session: aiohttp.ClientSession, messages: list[Json]) -> Json:
        if self.model is None:
            async with session.get(f"{self.url}/v1/models") as response:
                await _check(response)
                self.model = (await response.json())["data"][0]["id"]
        body: Json = {"model": self.model, "messages": messages, "stream": True}
        if self.thinking is not None:
            body["thinking"] = {"type": "enabled" if self.thinking else "disabled"}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return body


def server_url(text: str) -> str:
    """`text` as people write it: without a scheme, or with the `/v1` that other clients want."""
    url = text.rstrip("/").removesuffix("/v1")
    return url if "://" in url else f"http://{url}"


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
    except ChatError as error:
        console.print(str(error), style="red", markup=False, highlight=False)


class _Reply:
    """Prints the pieces of one answer and keeps its text."""

    def __init__(self) -> None:
        self.text = ""
        self._console = Console(stderr=True, soft_wrap=True)
        self._reasoned = False

    def show(self, event: Json) -> None:
        if "error" in event:
            raise ChatError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            self._reason(delta.get("reasoning_content") or delta.get("reasoning") or "")
            self._answer(delta.get("content") or "")
            for call in delta.get("tool_calls") or ():
                function = call.get("function", {})
                self._answer((function.get("name") or "") + (function.get("arguments") or ""))

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


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = await response.text()
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:200] or response.reason
    raise ChatError(f"the server answered {response.status}: {message}")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    """The decoded `data:` lines of an event stream, up to [DONE]. Comments and other fields are skipped."""
    pending = b""
    async for piece in response.content.iter_any():
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:"):
                continue
            if data == b"[DONE]":
                return
            yield json.loads(data)
