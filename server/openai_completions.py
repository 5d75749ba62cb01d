"""`POST /v1/completions`: prompts as text or token ids, echo and logprobs, so that evaluation harnesses can score.

Logprobs come in the old format: parallel lists with one entry for each token. A token's text is what it made visible,
so the texts join to the choice's text; special tokens and open characters show as "".
"""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from hybrid.batch import TokenLogprob
from server.chat import Json
from server.errors import invalid, unsupported
from server.keys import REQUEST_ID, SERVING, Serving
from server.openai_request import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    ignored_header,
    read_ids,
    read_model,
    read_options,
    read_stream,
)
from server.reply import Answered, Finished, Reply, Scored
from server.service import Options
from server.sse import PING_SECONDS, EventStream
from server.tokenizer import Tokenizer
from server.validation import Fields
from server.wire import finite, read_body, usage_json

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Order:
    """A decoded body."""

    model: str
    prompts: tuple[Prompt, ...]
    echo: bool
    options: Options


async def completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    serving = request.app[SERVING]
    service = serving.service
    fields = Fields(await read_body(request))
    order = await _read_order(fields, serving)
    stream, include_usage = read_stream(fields)
    reply = await service.complete(order.prompts, order.options, request[REQUEST_ID])
    encoder = _Encoder(order, service.tokenizer, reply)
    headers = ignored_header(fields)
    try:
        if not stream:
            return web.json_response(text=await encoder.fold(), headers=headers)
        out = EventStream(request, serving.stall_seconds, headers)
        return await out.run(encoder.stream(out, include_usage))
    finally:
        reply.close()


async def _read_order(fields: Fields, serving: Serving) -> _Order:
    name, _ = read_model(fields, serving.name)
    options = read_options(fields, serving.sampling.completion, serving.n_vocab)
    echo = fields.boolean("echo")
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 0, MAX_TOKENS)
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens", "0 gives nothing unless echo is true")
    if fields.text("suffix"):
        raise unsupported("suffix", "inserting text is")
    prompts = _read_prompts(fields.raw("prompt"), serving.n_vocab)
    if fields.boolean("parse_special"):
        tokenise = serving.service.tokenise
        prompts = tuple([await tokenise(p, parse_special=True) if isinstance(p, str) else p for p in prompts])
    options = replace(
        options,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        sampling=replace(options.sampling, logprobs=logprobs),
        prompt_logprobs=logprobs if echo else None,
        show_specials=not fields.boolean("skip_special_tokens", True),
    )
    return _Order(name, prompts, echo, options)


def _read_prompts(value: Any, n_vocab: int) -> tuple[Prompt, ...]:
    """A prompt is text or an array of ids; `prompt` is one of them or an array of them."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise invalid("prompt", "must be a string, an array of token ids, or an array of either")
    if type(value[0]) is int:
        return (read_ids(value, "prompt", n_vocab),)
    if len(value) > MAX_PROMPTS:
        raise invalid("prompt", f"at most {MAX_PROMPTS} prompts, not {len(value)}")
    return tuple(_read_prompt(item, f"prompt[{i}]", n_vocab) for i, item in enumerate(value))


def _read_prompt(value: Any, path: str, n_vocab: int) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(path, "must be a string or an array of token ids")
    return read_ids(value, path, n_vocab)


class _Encoder:
    """Events of one reply in OpenAI's shape."""

    def __init__(self, order: _Order, tokenizer: Tokenizer, reply: Reply) -> None:
        self._order = order
        self._tokenizer = tokenizer
        self._reply = reply
        self._head: Json = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": order.model,
        }
        n = order.options.n * len(order.prompts)
        self._wants_logprobs = order.options.sampling.logprobs is not None
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._logprobs = [_Logprobs(tokenizer) for _ in range(n)]
        self._echoed: set[int] = set()

    async def stream(self, out: EventStream, include_usage: bool) -> None:
        """Send every chunk but the terminal frame."""
        reasons: dict[int, str]
        async for event in self._reply.events(PING_SECONDS):
            if event is None:
                await out.ping()
                continue
            await self._take(event)
            reasons = {event.index: event.reason} if isinstance(event, Finished) else {}
            chunk = self._choice(event.index, reasons)
            if chunk["text"] or reasons or (chunk["logprobs"] or {}).get("tokens"):
                await out.send({**self._head, "choices": [chunk], "usage": None})
        if include_usage:
            await out.send({**self._head, "choices": [], "usage": usage_json(self._reply.usage)})

    async def fold(self) -> str:
        """The plain reply."""
        reasons: dict[int, str] = {}
        async for event in self._reply.events():
            assert event is not None
            await self._take(event)
            if isinstance(event, Finished):
                reasons[event.index] = event.reason
        choices = [self._choice(index, reasons) for index in range(len(self._texts))]
        body = {**self._head, "choices": choices, "usage": usage_json(self._reply.usage)}
        return await asyncio.to_thread(json.dumps, body) if self._order.echo else json.dumps(body)

    def _choice(self, index: int, reasons: dict[int, str]) -> Json:
        """Everything collected for a choice since the last call."""
        text = "".join(self._texts[index])
        self._texts[index].clear()
        logprobs = self._logprobs[index].take() if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reasons.get(index)}

    async def _take(self, event: Answered | Scored | Finished) -> None:
        index = event.index
        if self._order.echo and index not in self._echoed:
            self._echoed.add(index)
            # In a thread: a scored prompt can be megabytes of JSON, a second of work (measured 2026-11-22).
            await asyncio.to_thread(self._echo, index, event.logprobs if isinstance(event, Scored) else ())
        if isinstance(event, Answered):
            self._texts[index].append(event.piece.delta.content)
            for token in event.piece.tokens:
                self._logprobs[index].add(token.text, token.token, token.logprob, token.top)

    def _echo(self, index: int, scores: Sequence[TokenLogprob | None]) -> None:
        """The prompt in front of the answer, as text and as tokens."""
        ids = self._reply.prompts[index]
        given = self._order.prompts[index // self._order.options.n]
        added = len(self._tokenizer.bos_ids) if isinstance(given, str) else 0
        decoder = self._tokenizer.detokenizer()
        texts = [decoder.feed(token) for token in ids]
        texts[-1] += decoder.flush()
        texts[:added] = [""] * added
        self._texts[index] += texts
        for token, text, score in zip(ids, texts, scores, strict=False):
            self._logprobs[index].add(text, token, score.logprob if score else None, score.top if score else ())


class _Logprobs:
    """The old logprobs object of one choice, piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0  # characters so far
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, text: str, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        """One token; the prompt's first one has no logprob."""
        self._tokens.append(text)
        self._logprobs.append(None if logprob is None else finite(logprob))
        self._top.append(None if logprob is None else self._named(text, token, logprob, top))
        self._offsets.append(self._offset)
        self._offset += len(text)

    def take(self) -> Json:
        """The lists since the last call."""
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return taken

    def _named(self, text: str, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Alternatives by text, best first; the token itself is always there, under the text it has in `tokens`.

        An alternative that would take a name in use, or is no text by itself, is named by its bytes.
        """
        named: dict[str, float] = {}
        for other, value in top:
            named[text if other == token else self._name(other, {*named, text})] = finite(value)
        named.setdefault(text, finite(logprob))
        return named

    def _name(self, token: int, taken: set[str]) -> str:
        name = self._tokenizer.decode([token])
        if name in taken or "\N{REPLACEMENT CHARACTER}" in name or not name:
            raw = self._tokenizer.token_bytes(token)
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if raw else f"token_id:{token}"
        return name if name not in taken else f"token_id:{token}"
