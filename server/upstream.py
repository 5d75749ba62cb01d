"""Chat completions of an OpenAI-compatible server, ours or any other, over HTTP.

Called by `chat_client.py` and by the agents' model (`agents/model.py`).
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

Json = dict[str, Any]
MOST_CALLS = 4096  # of one turn


class UpstreamError(RuntimeError):
    """The server cannot be reached, refused or broke off. One line for the user.

    `status`: of an answer that was not 200. `retry_after`: seconds, where the server named them.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(slots=True)
class Upstream:
    """One server. `model` None is the first one that it lists."""

    url: str
    model: str | None = None
    api_key: str | None = None

    async def stream(self, body: Json) -> AsyncGenerator[Json, None]:
        """The events of a streamed chat completion; closing the iterator cancels it on the server.

        `choices` with a `delta` each: texts `content`, `reasoning_content` and `reasoning`, and `tool_calls` with
        index, id, name and arguments; `usage`, None or the counts prompt, cached and completion. Raises UpstreamError.
        """
        try:
            async with self._session() as session:
                body = {"model": await self._model(session), **body, "stream": True}
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                    await _check(response)
                    async for event in _events(response):
                        if error := event.get("error"):
                            raise UpstreamError(str(error.get("message", error) if isinstance(error, dict) else error))
                        yield _checked(event)
        except aiohttp.ClientError as error:
            raise UpstreamError(f"{self.url}: {error}; is the server running? (hybrid serve)") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UpstreamError(f"{self.url}: what answers there is no OpenAI-compatible server") from None

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            yield session

    async def _model(self, session: aiohttp.ClientSession) -> str:
        if self.model is None:
            async with session.get(f"{self.url}/v1/models") as response:
                await _check(response)
                self.model = str((await response.json())["data"][0]["id"])
        return self.model


def server_url(text: str) -> str:
    """`text` as people write it: without a scheme, or with the `/v1` that other clients want."""
    url = text.rstrip("/").removesuffix("/v1")
    return url if "://" in url else f"http://{url}"


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = await response.text()
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:200] or response.reason
    after = response.headers.get("Retry-After", "")
    raise UpstreamError(
        f"the server answered {response.status}: {message}",
        status=response.status,
        retry_after=float(after) if after.isdigit() else None,
    )


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


def _checked(event: Json) -> Json:
    """The event in the shape that its readers count on; raises TypeError or ValueError for another."""
    choices = []
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        calls = [_call(call, i) for i, call in enumerate(delta.get("tool_calls") or ())]
        texts = {name: _text(delta.get(name)) for name in ("content", "reasoning_content", "reasoning")}
        choices.append({**choice, "delta": {**texts, "tool_calls": calls}})
    usage = event.get("usage") or None
    if usage is not None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        counts = {"prompt": usage.get("prompt_tokens"), "cached": cached, "completion": usage.get("completion_tokens")}
        usage = {name: int(count or 0) for name, count in counts.items()}
    return {"choices": choices, "usage": usage}


def _call(call: Json, place: int) -> Json:
    function, index = call.get("function") or {}, call.get("index")
    index = place if index is None else int(index)
    if not 0 <= index < MOST_CALLS:
        raise ValueError(index)
    return {"index": index, "id": _text(call.get("id")), **{k: _text(function.get(k)) for k in ("name", "arguments")}}


def _text(value: object) -> str:
    """Text that every file and terminal can hold: half an emoji, as models write, becomes a replacement character."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(value)
    return value.encode(errors="surrogatepass").decode("utf-8", errors="replace") if not value.isascii() else value
