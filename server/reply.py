"""An answer under way: the engine's progress in, pieces of text out, and the books kept while it lasts.

`service.py` makes one `Reply` for each HTTP request; the handlers iterate its events, and close it. Knows neither
wire formats nor where the prompt came from.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hybrid.batch import TokenLogprob
from server.admission import Ticket
from server.bridge import EngineBridge
from server.choice import Choice, Piece
from server.errors import ApiError
from server.metrics import Metrics
from server.request import Progress, Request

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Answered:
    """A piece of choice `index`."""

    index: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Scored:
    """Logprobs of the prompt of choice `index`, the first None. Comes before its pieces."""

    index: int
    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Choice `index` is complete."""

    index: int
    reason: Reason


Event = Answered | Scored | Finished


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one reply; a prompt that several choices share counts once."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(slots=True)
class _Sequence:
    """One choice on its way through the engine."""

    index: int
    request: Request
    choice: Choice
    last_s: float | None = None  # when its latest token came
    cached: int = 0
    done: bool = False


class Reply:
    """All choices of one request, `n` for each prompt. Iterate `events` once; `close` cancels what still runs."""

    def __init__(
        self,
        bridge: EngineBridge,
        metrics: Metrics,
        ticket: Ticket,
        n: int,
        on_end: "Callable[[Reply], None]",
        failure: Callable[[str], ApiError],
    ) -> None:
        self._bridge = bridge
        self._metrics = metrics
        self._ticket = ticket
        self._n = n
        self._on_end = on_end
        self._failure = failure
        self._sequences: dict[int, _Sequence] = {}  # by request id, in the order of the choices
        self._queue: asyncio.Queue[Progress] = asyncio.Queue()
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._reasons: list[str] = []
        self._closed = False

    def submit(self, request: Request, choice: Choice) -> None:
        """Hand the next choice to the engine; its progress comes to this reply's queue."""
        self._sequences[request.id] = _Sequence(len(self._sequences), request, choice)
        self._bridge.submit(request, self._queue.put_nowait)

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        """The prompt of each choice."""
        return [sequence.request.prompt for sequence in self._sequences.values()]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        every = self._sequences.values()
        first = [sequence for sequence in every if sequence.index % self._n == 0]  # one for each prompt
        return Usage(
            prompt=sum(len(sequence.request.prompt) for sequence in first),
            cached=sum(sequence.cached for sequence in first),
            completion=sum(sequence.choice.n_tokens for sequence in every),
            reasoning=sum(sequence.choice.n_reasoning for sequence in every),
        )

    async def events(self, quiet_s: float | None = None) -> AsyncIterator[Event | None]:
        """What happens, in order; None when nothing has for `quiet_s` seconds. Raises ApiError if the engine fails."""
        while any(not sequence.done for sequence in self._sequences.values()):
            try:
                async with asyncio.timeout(quiet_s):
                    progress = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            for event in self._take(progress):
                yield event

    def close(self) -> None:
        """Cancel what still runs and give the places in the queue back. May be called again."""
        if self._closed:
            return
        self._closed = True
        for request_id, sequence in self._sequences.items():
            if not sequence.done:
                self._bridge.cancel(request_id)
                self._note_finish(sequence, "abort")
        self._ticket.close()
        self._metrics.reply_ended(time.monotonic() - self._started_s)
        self._on_end(self)

    def summary(self) -> str:
        """One line for the log."""
        usage = self.usage
        now, first, after = time.monotonic(), self._first_s, self.usage.completion - 1
        ttft = "-" if first is None else f"{first - self._started_s:.3f}s"
        rate = "-" if first is None or after < 1 else f"{after / max(now - first, 1e-6):.1f}"
        return (
            f"in={usage.prompt} cached={usage.cached} out={usage.completion} ttft={ttft} tok/s={rate}"
            f" total={now - self._started_s:.3f}s finish={','.join(self._reasons)}"
        )

    def _take(self, progress: Progress) -> list[Event]:
        sequence = self._sequences[progress.request_id]
        if sequence.done:  # a stop string ended it while this was on its way
            return []
        if progress.finish in ("error", "cancelled"):
            self._note_finish(sequence, "error")
            raise self._failure(progress.error or "the engine cancelled the request")
        self._note_time(sequence, progress)
        index, choice = sequence.index, sequence.choice
        events: list[Event] = []
        if progress.prompt_logprobs is not None:
            events.append(Scored(index, progress.prompt_logprobs))
        if progress.token is not None:
            pieces = choice.feed(progress.token, progress.logprob, last=progress.finish == "stop")
            events += [Answered(index, piece) for piece in pieces]
        if not choice.stopped and progress.finish is None:
            return events
        if progress.finish is None:
            self._bridge.cancel(progress.request_id)
        events += [Answered(index, piece) for piece in choice.finish()]
        return [*events, Finished(index, self._finish(sequence, cut=progress.finish == "length"))]

    def _finish(self, sequence: _Sequence, cut: bool) -> Reason:
        choice = sequence.choice
        reason: Reason = "length" if cut and not choice.stopped else "stop"
        if reason == "stop" and choice.saw_tool_calls:
            reason = "tool_calls"
        self._note_finish(sequence, reason)
        return reason

    def _note_finish(self, sequence: _Sequence, reason: str) -> None:
        sequence.done = True
        self._reasons.append(reason)
        self._metrics.sequence_ended(reason)

    def _note_time(self, sequence: _Sequence, progress: Progress) -> None:
        now = time.monotonic()
        if sequence.last_s is None:
            self._ticket.started(len(sequence.request.prompt))
            sequence.cached = progress.cached_tokens
            self._first_s = self._first_s or now
            self._metrics.first_token(now - self._started_s, len(sequence.request.prompt))
        else:
            self._metrics.next_token(now - sequence.last_s)
        sequence.last_s = now
