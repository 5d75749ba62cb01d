"""`POST /v1/chat/completions`: body to `Chat`, events to chunks, or folded into one reply.

Both replies are made of the same events. The rules of the stream (role first and once, one finish chunk, usage only
when asked for, ids and names of tool calls exactly once) are those that the official client checks.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from hybrid.batch import Sampling
from server.chat import Chat, Delta, Json, ToolDelta
from server.choice import TokenText
from server.errors import invalid, unsupported
from server.keys import REQUEST_ID, SERVING, Serving
from server.openai_request import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    ignored_header,
    read_chat,
    read_mode,
    read_model,
    read_options,
    read_stream,
)
from server.reply import Answered, Finished, Reply
from server.service import Options
from server.sse import PING_SECONDS, EventStream
from server.tokenizer import Tokenizer
from server.validation import Fields
from server.wire import finite, read_body, usage_json


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    serving = request.app[SERVING]
    fields = Fields(await read_body(request))
    name, chat, options = read_request(fields, serving)
    stream, include_usage = read_stream(fields)
    reply = await serving.service.chat(chat, options, request[REQUEST_ID])
    encoder = _Encoder(name, serving.service.tokenizer, wants_logprobs=options.sampling.logprobs is not None)
    headers = ignored_header(fields)
    try:
        if not stream:
            return web.json_response(await encoder.fold(reply, options.n), headers=headers)
        out = EventStream(request, serving.stall_seconds, headers)
        return await out.run(encoder.stream(reply, out, include_usage))
    finally:
        reply.close()


def read_request(fields: Fields, serving: Serving) -> tuple[str, Chat, Options]:
    """(model name to answer under, chat, options) of a body."""
    name, alias = read_model(fields, serving.name)
    mode, rest = read_mode(fields, alias)
    chat = read_chat(fields, mode, rest)
    defaults = serving.sampling.thinking if mode.thinking else serving.sampling.instant
    options = read_options(fields, defaults, serving.n_vocab)
    options = replace(options, max_tokens=_max_tokens(fields), sampling=_with_logprobs(fields, options.sampling))
    response_format = fields.fields("response_format")
    if response_format is not None and response_format.text("type") not in (None, "text"):
        raise unsupported("response_format", f"type {str(response_format.text('type'))[:40]} is")
    return name, _chosen_tools(fields, chat), options


def _max_tokens(fields: Fields) -> int | None:
    new, old = (fields.integer(name, 1, MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens"))
    if new is not None and old is not None and new != old:
        raise invalid("max_tokens", "and max_completion_tokens differ; send one of them")
    return old if new is None else new


def _with_logprobs(fields: Fields, sampling: Sampling) -> Sampling:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise invalid("top_logprobs", "needs logprobs to be true")
    return replace(sampling, logprobs=top or 0) if wanted else sampling


def _chosen_tools(fields: Fields, chat: Chat) -> Chat:
    choice = fields.raw("tool_choice")
    if choice is None or choice == "auto":
        return chat
    if choice == "none":
        return replace(chat, tools=())
    if choice == "required" or isinstance(choice, dict):
        raise unsupported("tool_choice", "forcing a tool call is")
    raise invalid("tool_choice", "must be none or auto")


class _Encoder:
    """Events of one reply in OpenAI's shape."""

    def __init__(self, model: str, tokenizer: Tokenizer, wants_logprobs: bool) -> None:
        self._head: Json = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._wants_logprobs = wants_logprobs

    async def stream(self, reply: Reply, out: EventStream, include_usage: bool) -> None:
        """Send every chunk but the terminal frame."""
        begun: set[int] = set()
        async for event in reply.events(PING_SECONDS):
            if event is None:
                await out.ping()
                continue
            if event.index not in begun:
                begun.add(event.index)
                await out.send(self._chunk(event.index, {"role": "assistant", "content": ""}))
            if isinstance(event, Answered):
                delta, tokens = event.piece.delta, event.piece.tokens
                await out.send(self._chunk(event.index, delta_json(delta), self._logprobs(delta, tokens)))
            elif isinstance(event, Finished):
                await out.send(self._chunk(event.index, {}, reason=event.reason))
        if include_usage:
            await out.send({**self._shell(), "choices": [], "usage": usage_json(reply.usage)})

    async def fold(self, reply: Reply, n: int) -> Json:
        """The plain reply."""
        folded = [_Folded() for _ in range(n)]
        async for event in reply.events():
            if isinstance(event, Answered):
                folded[event.index].add(event.piece.delta, self._logprobs(event.piece.delta, event.piece.tokens))
            elif isinstance(event, Finished):
                folded[event.index].reason = event.reason
        choices = [one.choice(index, self._wants_logprobs) for index, one in enumerate(folded)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage_json(reply.usage)}

    def _shell(self) -> Json:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._shell(), "choices": [choice], "usage": None}

    def _logprobs(self, delta: Delta, tokens: Sequence[TokenText]) -> Json | None:
        """Tokens of the content, or of the reasoning under a name of its own: each list joins to its own text."""
        if not self._wants_logprobs or not tokens:
            return None
        entries = [self._entry(token) for token in tokens]
        return {"content": entries} if not delta.reasoning else {"content": [], "reasoning_content": entries}

    def _entry(self, token: TokenText) -> Json:
        top = [
            {
                "token": self._alternative(i, token),
                "logprob": finite(logprob),
                "bytes": list(self._tokenizer.token_bytes(i)),
            }
            for i, logprob in token.top
        ]
        return {"token": token.text, "logprob": finite(token.logprob), "bytes": list(token.raw), "top_logprobs": top}

    def _alternative(self, token: int, chosen: TokenText) -> str:
        return chosen.text if token == chosen.token else self._tokenizer.decode([token])


def delta_json(delta: Delta) -> Json:
    """A delta as it appears in a chunk."""
    if delta.tool is not None:
        return {"tool_calls": [_tool_json(delta.tool)]}
    return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.content}


def _tool_json(tool: ToolDelta) -> Json:
    """The id, type and name come once, with the first piece: clients join what is repeated."""
    if tool.id is None:
        return {"index": tool.index, "function": {"arguments": tool.arguments}}
    function = {"name": tool.name, "arguments": tool.arguments}
    return {"index": tool.index, "id": tool.id, "type": "function", "function": function}


class _Folded:
    """One choice of a plain reply, put together from its deltas."""

    def __init__(self) -> None:
        self.reason = "stop"
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Json] = []
        self._logprobs: dict[str, list[Any]] = {"content": []}

    def add(self, delta: Delta, logprobs: Json | None) -> None:
        """Take one delta."""
        for name, entries in (logprobs or {}).items():
            self._logprobs.setdefault(name, []).extend(entries)
        if delta.tool is None:
            self._content.append(delta.content)
            self._reasoning.append(delta.reasoning)
            return
        piece = _tool_json(delta.tool)
        del piece["index"]
        if delta.tool.id is not None:
            self._calls.append(piece)
        else:
            self._calls[delta.tool.index]["function"]["arguments"] += delta.tool.arguments

    def choice(self, index: int, wants_logprobs: bool) -> Json:
        """The choice, with `content` null where there are only tool calls."""
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        message: Json = {"role": "assistant", "content": content if content or not self._calls else None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = self._logprobs if wants_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.reason}
