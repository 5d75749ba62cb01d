"""One server-sent event stream: framing, keepalive, the write timeout and the two ways to end.

The headers go out with the first frame, so that a request that fails before its first token still gets an HTTP
status. Knows nothing about what the frames say.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Mapping

from aiohttp import web

from server.chat import Json
from server.errors import ApiError

logger = logging.getLogger(__name__)

PING_SECONDS = 10.0  # quiet time after which a comment keeps proxies and clients from hanging up during a prefill
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventStream:
    """Writes frames to one client. A client that stops reading for `stall_seconds` is cut off."""

    def __init__(self, request: web.Request, stall_seconds: float, headers: Mapping[str, str]) -> None:
        self._request = request
        self._stall_seconds = stall_seconds
        self.response = web.StreamResponse(headers={**headers, **_HEADERS})

    async def run(self, frames: Awaitable[None]) -> web.StreamResponse:
        """Send what `frames` sends, then the terminal frame. An ApiError becomes a frame once headers are out."""
        try:
            await frames
            await self._write(b"data: [DONE]\n\n")
        except ApiError as error:
            if not self.response.prepared:
                raise
            await self._fail(error)
        except ConnectionError as error:
            logger.debug("stream ended early: %s", error)
        except Exception:
            if not self.response.prepared:
                raise
            logger.exception("a stream failed")
            await self._fail(ApiError(500, "internal error", code="internal_error"))
        return self.response

    async def send(self, data: Json) -> None:
        """One `data:` frame."""
        await self._write(b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n")

    async def ping(self) -> None:
        """A comment, which every client skips."""
        await self._write(b": ping\n\n")

    async def _fail(self, error: ApiError) -> None:
        """Tell the error and abort: a stream that closes cleanly without its end looks complete to clients."""
        with contextlib.suppress(ConnectionError):
            await self.send(error.body())
        if self._request.transport is not None:
            self._request.transport.close()  # after what is buffered, and in the middle of the chunked body

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                if not self.response.prepared:
                    await self.response.prepare(self._request)
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client stopped reading") from None
