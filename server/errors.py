"""Errors as the wire shows them: one exception class, one body shape.

Handlers raise `ApiError`; the middleware in `middleware.py` and the stream in `sse.py` turn it into OpenAI's body.
Knows no handler and no engine.
"""

from collections.abc import Mapping
from typing import Any

RETRY_MAX_S = 60  # clients sleep as long as Retry-After says; some give up at once when it is long
NO_RETRY = {"x-should-retry": "false"}  # the official clients run a failed request three times unless told not to


class ApiError(Exception):
    """A refusal or failure to be told to the client. `param` is the field's path, `code` is machine-readable."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type or _type_of(status)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error body. Any other shape loses the message in the official client."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 404:
        return "not_found_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400: the request is wrong, and `param` names the field."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    """400: a field we understand but cannot honour; never ignored silently."""
    return invalid(param, f"{what} not supported yet", "unsupported_parameter")


def too_long(param: str, prompt: int, wanted: int, limit: int) -> ApiError:
    """400: the prompt, or the prompt with the answer it asks for, does not fit the context."""
    if prompt > limit or not wanted:
        message = f"the prompt has {prompt} tokens; this model's maximum context length is {limit} tokens"
    else:
        message = (
            f"this model's maximum context length is {limit} tokens, but {prompt + wanted} were asked for"
            f" ({prompt} in the prompt, {wanted} for the answer); shorten the prompt or ask for fewer tokens"
        )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def queue_full(message: str, retry_after_s: int) -> ApiError:
    """429: admission refused; come back after `retry_after_s` seconds."""
    seconds = max(1, min(RETRY_MAX_S, retry_after_s))
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})


def model_loading(message: str, retry_after_s: int) -> ApiError:
    """503: the engine is not ready (yet, or again)."""
    seconds = max(1, min(RETRY_MAX_S, retry_after_s))
    return ApiError(503, message, code="model_loading", headers={"Retry-After": str(seconds)})


def shutting_down() -> ApiError:
    """503: the server is going away; another one may take the request."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})


def engine_failed(message: str) -> ApiError:
    """500: the engine died under this request; running it again may kill it again."""
    return ApiError(500, message, code="engine_error", headers=NO_RETRY)


def engine_down(message: str) -> ApiError:
    """503: the engine could not be started again, and retrying does not help."""
    return ApiError(503, f"the engine is down: {message}", code="engine_error", headers=NO_RETRY)
