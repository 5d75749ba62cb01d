"""From a chat or a prompt to pieces of an answer: the one way into the engine, for every wire format.

It takes a place in the queue, renders and tokenises in a worker thread, checks the length, submits one request for
each sequence and decodes what comes back. Streamed and plain replies read the same events, so they cannot differ.
Knows no HTTP. The handlers call it; it drives `bridge.py`.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hybrid.batch import Sampling
from server.admission import Admission, Ticket
from server.bridge import EngineBridge
from server.chat import Chat
from server.choice import Choice, Parser, PlainText
from server.errors import ApiError, engine_down, engine_failed, model_loading, shutting_down, too_long
from server.metrics import Metrics
from server.parse import OutputParser
from server.reply import Reply
from server.request import Request
from server.template import Template, TemplateError, canonical_ids
from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SEED_STEP = 0x9E3779B97F4A7C15  # odd, so the choices of one request get seeds that never meet
SEED_BITS = (1 << 63) - 1
LOADING_RETRY_S = 10  # Retry-After while no estimate of the loading time exists


@dataclass(frozen=True, slots=True)
class Options:
    """How to answer. `max_tokens` None: as many as the context leaves. `seed` None: a random one."""

    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    show_specials: bool = False  # plain completions: special tokens as text
    group: str = ""  # with `patient`, as `Request` has them
    patient: bool = False


class Service:
    """Everything between the handlers and the bridge; `request_id` is for the log only."""

    def __init__(
        self,
        bridge: EngineBridge,
        tokenizer: Tokenizer,
        template: Template,
        stop_ids: frozenset[int],
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.template = template
        self.draining = False
        self._stop_ids = stop_ids
        self._admission = admission
        self.metrics = metrics
        self._ids = itertools.count(1)
        self._replies: set[Reply] = set()

    async def chat(self, chat: Chat, options: Options, request_id: str = "-") -> Reply:
        """Start answering a chat. Raises ApiError before anything is generated."""
        self.max_model_len()  # first of all: is there an engine?
        ticket = self._admission.enter(options.n)
        try:
            if self.template.names_calls_by_id:
                chat = replace(chat, messages=canonical_ids(chat.messages))
            prompt, in_reasoning = await self._prepare(chat)

            def parser() -> Parser:
                return OutputParser(self.tokenizer, in_reasoning, bool(chat.tools))

            return self._start([prompt], options, parser, ticket, request_id, "messages")
        except BaseException:
            ticket.close()
            raise

    async def complete(
        self, prompts: Sequence[str | tuple[int, ...]], options: Options, request_id: str = "-"
    ) -> Reply:
        """Start continuing each prompt; choice i belongs to prompt i // n."""
        self.max_model_len()
        ticket = self._admission.enter(options.n * len(prompts))
        try:
            ids = [p if isinstance(p, tuple) else await self.tokenise(p) for p in prompts]

            def parser() -> Parser:
                return PlainText(self.tokenizer, options.show_specials)

            return self._start(ids, options, parser, ticket, request_id, "prompt")
        except BaseException:
            ticket.close()
            raise

    async def render(self, chat: Chat) -> tuple[int, ...]:
        """Token ids of a chat as it is written: `chat` makes foreign tool-call ids canonical first."""
        return (await self._prepare(chat))[0]

    async def tokenise(self, text: str, *, parse_special: bool = False, add_special: bool = True) -> tuple[int, ...]:
        """Token ids of a plain prompt, in a worker thread; `add_special` puts the tokenizer's opening ids before it."""
        ids = await asyncio.to_thread(self.tokenizer.encode, text, parse_special)
        return (*(self.tokenizer.bos_ids if add_special else ()), *ids)

    def max_model_len(self) -> int:
        """Tokens of the longest prompt and answer; raises the 503 while there is no engine to ask."""
        bridge = self.bridge
        if self.draining:
            raise shutting_down()
        if bridge.ready is not None:
            return bridge.ready.max_model_len
        if bridge.phase == "failed" and bridge.failure is not None:
            raise engine_down(bridge.failure.message)
        eta = bridge.loading.eta_s
        raise model_loading(
            f"the model is loading: {bridge.loading.stage}", LOADING_RETRY_S if eta is None else int(eta)
        )

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and wait for the running ones, at most `seconds`."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self._replies and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def end_all(self) -> None:
        """End the replies that still run with an error that says why."""
        self.draining = True
        if self._replies:
            logger.warning("%d requests were cut off", len(self._replies))
        self.bridge.fail_all("the server is shutting down")

    async def _prepare(self, chat: Chat) -> tuple[tuple[int, ...], bool]:
        """Token ids, and whether the answer begins inside reasoning. In a worker thread: templates take their time."""

        def work() -> tuple[tuple[int, ...], bool]:
            return tuple(self.template.render(chat)), self.template.starts_in_reasoning(chat)

        try:
            return await asyncio.to_thread(work)
        except TemplateError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _start(
        self,
        prompts: Sequence[tuple[int, ...]],
        options: Options,
        parser: Callable[[], Parser],
        ticket: Ticket,
        request_id: str,
        param: str,
    ) -> Reply:
        limit = self.max_model_len()
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, f"{param}: the prompt is empty", param=param)
            if len(prompt) + (options.max_tokens or 0) > limit or (options.max_tokens is None and len(prompt) >= limit):
                raise too_long(param, len(prompt), options.max_tokens or 0, limit)
        ticket.add_tokens(options.n * sum(map(len, prompts)))
        on_end = partial(self._ended, request_id)
        reply = Reply(self.bridge, self.metrics, ticket, options.n, on_end, self._failure)
        self._replies.add(reply)
        seed = secrets.randbits(63) if options.seed is None else options.seed
        for i in range(options.n * len(prompts)):
            request = self._request(prompts[i // options.n], options, (seed + i * SEED_STEP) & SEED_BITS, limit)
            reply.submit(request, Choice(self.tokenizer, parser(), options.stop, self._stop_ids))
        return reply

    def _request(self, prompt: tuple[int, ...], options: Options, seed: int, limit: int) -> Request:
        stop_ids = options.stop_token_ids if options.ignore_eos else self._stop_ids | options.stop_token_ids
        return Request(
            id=next(self._ids),
            prompt=prompt,
            max_tokens=limit - len(prompt) if options.max_tokens is None else options.max_tokens,
            sampling=replace(options.sampling, seed=seed),
            stop_ids=stop_ids,
            prompt_logprobs=options.prompt_logprobs,
            group=options.group,
            patient=options.patient,
        )

    def _failure(self, message: str) -> ApiError:
        return shutting_down() if self.draining else engine_failed(message)

    def _ended(self, request_id: str, reply: Reply) -> None:
        self._replies.discard(reply)
        logger.info("%s %s", request_id, reply.summary())
