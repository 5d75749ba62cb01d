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

        Raises UpstreamError.
        """
        try:
            async with self._session() as session:
                body = {"model": await self._model(session), **body, "stream": True}
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                    await _check(response)
                    async for event in _events(response):
                        if "error" in event:
                            raise UpstreamError(str(event["error"].get("message", event["error"])))
                        yield event
        except aiohttp.ClientError as error:
            raise UpstreamError(f"{self.url}: {error}; is the server running? (hybrid serve)") from None
        except (ValueError, LookupError, TypeError, AttributeError):
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
