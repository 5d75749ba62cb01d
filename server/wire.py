"""What every endpoint needs on the wire: reading a body within bounds, and the usage object."""

import asyncio

from aiohttp import web

from server.chat import Json
from server.errors import ApiError, queue_full
from server.keys import BODIES
from server.reply import Usage
from server.validation import loads

MAX_BODY = 64 << 20  # bytes of one body, after decompression
MAX_BODIES = 256 << 20  # bytes of all bodies being read or decoded
LEAST_LOGPROB = -9999.0
LARGE_BODY = 1 << 16  # from here on decoding is left to a thread


async def read_body(request: web.Request) -> Json:
    """The JSON object in the body; ApiError 415, 413, 429 or 400 otherwise."""
    if request.content_type != "application/json" and not request.content_type.endswith("+json"):
        message = f"Content-Type must be application/json, not {request.content_type[:100]}"
        raise ApiError(415, message, code="unsupported_media_type")
    bodies = request.app[BODIES]
    size = 0
    parts: list[bytes] = []
    try:
        async for part in request.content.iter_any():
            size += len(part)
            bodies.n_bytes += len(part)
            if size > MAX_BODY:
                raise ApiError(413, f"the body is larger than {MAX_BODY} bytes", code="request_too_large")
            if bodies.n_bytes > MAX_BODIES:
                raise queue_full("too many large requests at once; try again later", 5)
            parts.append(part)
        raw = b"".join(parts)
        return loads(raw) if size < LARGE_BODY else await asyncio.to_thread(loads, raw)
    finally:
        bodies.n_bytes -= size


def finite(logprob: float) -> float:
    """JSON has no infinity; the least value is vLLM's."""
    return max(logprob, LEAST_LOGPROB)


def usage_json(usage: Usage) -> Json:
    """OpenAI's usage object, with Moonshot's `cached_tokens` beside it."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "cached_tokens": usage.cached,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
