"""What happens around every request: its id, the guards, and errors in the one shape that clients understand.

Without an API key only this machine's own programs should get an answer, so a web page must not: its Origin is
refused, and so is a Host header that is a public name (a page whose name was rebound to this address sends one).
"""

import hmac
import ipaddress
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from server.errors import NO_RETRY, ApiError
from server.keys import REQUEST_ID, SERVING, Serving

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_PATHS = ("/livez", "/readyz", "/health")  # answered without a key
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def is_our_fault(record: logging.LogRecord) -> bool:
    """A filter for aiohttp's log: bytes that are no HTTP are answered with 400 and deserve no traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


@web.middleware
async def request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take the client's x-request-id where it is one, make one where not. `on_prepare` sends it back."""
    given = request.headers.get("x-request-id", "")
    request[REQUEST_ID] = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else f"req-{secrets.token_hex(8)}"
    return await handler(request)


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every response, streams included."""
    response.headers["x-request-id"] = request.get(REQUEST_ID, "-")
    response.headers["X-Content-Type-Options"] = "nosniff"


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure as OpenAI's error body."""
    try:
        return await handler(request)
    except ApiError as error:
        return _response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{error.reason}: {request.method} {request.path[:200]}"
        answer = _response(ApiError(error.status, message, code=CODES.get(error.status)))
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except RequestPayloadError as error:  # a broken encoding, or a body shorter than announced
        return _response(ApiError(400, f"the body cannot be read: {' '.join(str(error).split())[:200]}"))
    except ConnectionError:
        return web.Response(status=400)  # the client left: nobody reads it
    except Exception:
        logger.exception("%s %s failed", request.method, request.path[:200])
        return _response(ApiError(500, "internal error", code="internal_error", headers=NO_RETRY))


def _response(error: ApiError) -> web.Response:
    return web.json_response(error.body(), status=error.status, headers=error.headers)


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The API key where there is one, else the checks against web pages."""
    serving = request.app[SERVING]
    if request.path not in OPEN_PATHS:
        if serving.api_keys:
            _check_key(request, serving)
        else:
            _check_origin(request, serving)
    return await handler(request)


def _check_key(request: web.Request, serving: Serving) -> None:
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    raw = given.encode("utf-8", "surrogateescape")
    # No `any`: all keys are compared, so the time taken says nothing.
    if not sum([hmac.compare_digest(raw, key) for key in serving.api_keys]):
        what = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer KEY"
        raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _check_origin(request: web.Request, serving: Serving) -> None:
    host = _hostname(f"//{request.headers.get('Host', '')}")
    if not _is_own(host, serving):
        raise ApiError(403, f"the Host header {host[:100]!r} is not this server; use its address, or set an API key")
    origin = request.headers.get("Origin")
    if origin is not None and not _is_own(_hostname(origin), serving):
        raise ApiError(403, "requests from web pages of other origins are refused; set an API key to allow them")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_own(host: str, serving: Serving) -> bool:
    """An address, which no one can rebind, or a name of this machine."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host in serving.hosts or host.endswith(".localhost")
    return True
