"""Who runs next: continuous batching with chunked prefill over a page table. No torch, no clock, no threads.

The engine's process drives it: `next()` gives a batch, the engine runs it, `commit()` takes the answer; `add()` and
`cancel()` may come at any time between. Policy: first come, first served. Older requests never wait for younger
ones, so none starves: in every step the oldest running request advances, and nobody overtakes the head of the queue.
It does not know what a token means, how a step is computed or who reads the answers.
"""

from collections import deque
from dataclasses import dataclass, field, replace

from hybrid.batch import Batch, Row, RowOutput, StepOutput, TokenLogprob
from hybrid.pages import Holding, PageTable
from server.request import EngineStats, FinishReason, Progress, Request


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes of the page table and of one step."""

    n_pages: int
    page_size: int = 16  # tokens
    max_batch_tokens: int = 2048  # new ids in one step
    max_running: int = 64  # requests that hold pages at the same time

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def capacity(self) -> int:
        """Tokens that one request can hold when it is alone."""
        return self.n_pages * self.page_size


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request on its way: the ids so far (prompt and answer) and how many of them are computed."""

    request: Request
    held: Holding
    n_computed: int = 0
    cached_tokens: int | None = None  # of the first admission; None before it
    scores: list[TokenLogprob | None] = field(default_factory=lambda: [None])  # logprobs of the leading prompt ids
    cancelled: bool = False  # while in flight

    @property
    def n_output(self) -> int:
        return len(self.held.ids) - len(self.request.prompt)

    @property
    def n_left(self) -> int:
        """Ids that must be computed before the next token can be sampled: 1 for a request that decodes."""
        return len(self.held.ids) - self.n_computed

    @property
    def scoring(self) -> bool:
        """True while prompt logprobs are still missing."""
        return self.request.prompt_logprobs is not None and len(self.scores) < len(self.request.prompt)

    @property
    def shareable(self) -> int | None:
        """Tokens that may come from shared pages. A position not scored yet must be computed."""
        return len(self.scores) - 1 if self.scoring else None

    def row(self, n: int) -> Row:
        """The next `n` ids as a row; it asks for a token where they are the last ones."""
        request, ids = self.request, self.held.ids
        start, end = self.n_computed, self.n_computed + n
        sampling = request.sampling if end == len(ids) and request.max_tokens > 0 else None
        penalised = sampling is not None and sampling.penalised
        return Row(
            request_id=request.id,
            ids=tuple(ids[start:end]),
            position=start,
            pages=tuple(self.held.pages),
            sampling=sampling,
            n_sampled=self.n_output,
            targets=request.prompt[start + 1 : end + 1] if self.scoring else None,
            n_alternatives=request.prompt_logprobs or 0,
            prompt=request.prompt if penalised else (),
            output=tuple(ids[len(request.prompt) :]) if penalised else (),
        )

    def progress(self, finish: FinishReason | None) -> Progress:
        return Progress(self.request.id, finish=finish, cached_tokens=self.cached_tokens or 0)


class Scheduler:
    """The queue, the running requests and the only page table."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._pages = PageTable(config.n_pages, config.page_size)
        self._known: dict[int, _Sequence] = {}  # by request id, in order of arrival
        self._waiting: deque[_Sequence] = deque()  # oldest first; younger than all running ones
        self._running: list[_Sequence] = []  # oldest first
        self._in_flight: list[tuple[_Sequence, Row]] | None = None
        self._totals = EngineStats()  # counters only; stats() adds the gauges

    @property
    def idle(self) -> bool:
        """True where there is nothing to run and nothing to wait for."""
        return not self._known

    def add(self, request: Request) -> Progress | None:
        """Queue a request, or return its refusal, which is then all that is ever said about it."""
        if request.id in self._known:
            raise ValueError(f"request id {request.id} is already in use")
        reason = self._refusal(request)
        if reason is not None:
            return Progress(request.id, finish="error", error=reason)
        sequence = _Sequence(request, Holding(list(request.prompt)))
        self._known[request.id] = sequence
        self._waiting.append(sequence)
        return None

    def cancel(self, request_id: int) -> Progress | None:
        """Stop a request and return its last progress; None where that comes with the commit of the step in flight.

        Unknown ids are ignored (None): the request may just have finished.
        """
        sequence = self._known.get(request_id)
        if sequence is None:
            return None
        if any(sequence is flying for flying, _ in self._in_flight or ()):
            # The engine is writing to its pages: they may go to someone else only after that.
            sequence.cancelled = True
            return None
        return self._end(sequence, sequence.progress("cancelled"))

    def next(self) -> Batch | None:
        """The next step, or None when idle. Each batch must be committed before the next one is asked for."""
        if self._in_flight is not None:
            raise RuntimeError("next() was called before the step in flight was committed")
        chunks = self._continue()
        chunks += self._admit(self.config.max_batch_tokens - sum(n for _, n in chunks))
        if not chunks:
            assert self.idle, "requests wait but none can run"
            return None
        self._in_flight = [(sequence, sequence.row(n)) for sequence, n in chunks]
        return Batch(tuple(row for _, row in self._in_flight))

    def commit(self, out: StepOutput) -> tuple[Progress, ...]:
        """Take the answer to the batch in flight; return what it did for each request that got further."""
        flight = self._in_flight
        if flight is None or [row.request_id for _, row in flight] != [answer.request_id for answer in out.rows]:
            raise ValueError("the answer's rows do not match the batch in flight")
        self._in_flight = None
        self._count(
            steps=1,
            step_seconds=out.seconds,
            expert_bytes=out.expert_bytes,
            distinct_experts=out.distinct_experts,
        )
        answered = zip(flight, out.rows, strict=True)
        done = [self._commit_row(sequence, row, answer) for (sequence, row), answer in answered]
        return tuple(progress for progress in done if progress is not None)

    def stats(self) -> EngineStats:
        """Gauges now and counters since the start."""
        return replace(
            self._totals,
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self._pages.n_used,
            pages_total=self._pages.n_pages,
        )

    def check(self) -> None:
        """Assert that queue, running requests and page table agree."""
        assert list(self._known.values()) == [*self._running, *self._waiting], "requests are lost or out of order"
        assert len(self._running) <= self.config.max_running
        self._pages.check(sequence.held for sequence in self._running)
        for sequence in self._waiting:
            assert not sequence.held.pages and sequence.n_computed == 0, "a waiting request holds pages"
        for sequence in self._running:
            room = len(sequence.held.pages) * self.config.page_size
            assert sequence.n_computed <= room, "a computed position has no page"
            assert sequence.held.n_published == sequence.n_computed // self.config.page_size
            assert sequence.n_left > 0, "a running request has nothing to compute"
        flying = [sequence for sequence, _ in self._in_flight or ()]
        assert all(sequence in self._running for sequence in flying), "a step uses pages that were given away"
        if not flying:
            assert all(s.n_left == 1 for s in self._running[:-1]), "two prompts are half read"

    def _refusal(self, request: Request) -> str | None:
        if not request.prompt:
            return "the prompt is empty: it needs at least one token"
        # The last token of an answer is never computed, so it needs no place.
        n_tokens = len(request.prompt) + max(request.max_tokens - 1, 0)
        if n_tokens > self.config.capacity:
            return (
                f"{len(request.prompt)} prompt tokens and max_tokens {request.max_tokens} need room for {n_tokens} "
                f"tokens, but the KV pages hold {self.config.capacity}: shorten the prompt or lower max_tokens"
            )
        return None

    def _continue(self) -> list[tuple[_Sequence, int]]:
        """New ids for the running requests, oldest first.

        A request starts only when those before it are through with their prompts, so at most the youngest still has a
        prompt to read, and the rows that decode go before it.
        """
        chunks: list[tuple[_Sequence, int]] = []
        left = self.config.max_batch_tokens
        # Preemption takes requests off the list's end, so it ends this loop where it should.
        while left > 0 and len(chunks) < len(self._running):
            sequence = self._running[len(chunks)]
            n = self._claim(sequence, min(sequence.n_left, left))
            if n > 0:
                chunks.append((sequence, n))
                left -= n
        return chunks

    def _claim(self, sequence: _Sequence, n: int) -> int:
        """Pages for `n` more ids, or as many as there is room for, but at least one: younger requests give way.

        0 means that `sequence` was itself the youngest and is back in the queue. Alone, a request always has room.
        """
        while (room := self._pages.room(sequence.held) - sequence.n_computed) < 1:
            if self._preempt() is sequence:
                return 0
        n = min(n, room)
        self._pages.grow(sequence.held, sequence.n_computed + n)
        return n

    def _preempt(self) -> _Sequence:
        """Put the youngest running request back at the head of the queue. It keeps its ids and computes them again."""
        sequence = self._running.pop()
        self._vacate(sequence)
        self._waiting.appendleft(sequence)
        self._count(preemptions=1)
        return sequence

    def _admit(self, left: int) -> list[tuple[_Sequence, int]]:
        """Start waiting requests in order of arrival, with `left` new ids between them."""
        chunks: list[tuple[_Sequence, int]] = []
        while left > 0 and self._waiting and len(self._running) < self.config.max_running:
            sequence = self._waiting[0]
            sequence.n_computed = self._pages.share(sequence.held, sequence.shareable)
            if not self._fits(sequence):
                self._vacate(sequence)
                break
            self._running.append(self._waiting.popleft())
            self._note_admission(sequence)
            n = min(left, sequence.n_left)
            self._pages.grow(sequence.held, sequence.n_computed + n)
            chunks.append((sequence, n))
            left -= n
        return chunks

    def _fits(self, sequence: _Sequence) -> bool:
        """Room for all its ids beside what running requests still need for theirs, plus a page each to go on with.

        Without that margin a newcomer would be preempted within a few steps and its work done twice.
        """
        promised = sum(self._lacking(running) + 1 for running in self._running)
        return self._lacking(sequence) + promised <= self._pages.n_free

    def _lacking(self, sequence: _Sequence) -> int:
        """Pages that its ids so far still need."""
        return max(self._pages.pages_for(len(sequence.held.ids)) - len(sequence.held.pages), 0)

    def _note_admission(self, sequence: _Sequence) -> None:
        if sequence.cached_tokens is not None:  # a preempted request finds its own pages again: no news
            return
        sequence.cached_tokens = sequence.n_computed
        if not sequence.scoring:
            self._count(prefix_queries=len(sequence.request.prompt), prefix_hits=sequence.n_computed)

    def _commit_row(self, sequence: _Sequence, row: Row, answer: RowOutput) -> Progress | None:
        if sequence.cancelled:
            return self._end(sequence, sequence.progress("cancelled"))
        sequence.n_computed += len(row.ids)
        self._pages.publish(sequence.held, sequence.n_computed)
        if row.targets is not None:
            assert len(answer.scored) == len(row.targets), "the engine scored another number of ids than asked"
            sequence.scores[row.position + 1 :] = answer.scored
        if sequence.n_left > 0:
            return None
        progress = self._advance(sequence, answer)
        return progress if progress.finish is None else self._end(sequence, progress)

    def _advance(self, sequence: _Sequence, answer: RowOutput) -> Progress:
        """All ids are computed: append the sampled token, if any, and say whether it was the last."""
        request, first = sequence.request, sequence.n_output == 0
        if answer.token is not None:
            sequence.held.ids.append(answer.token)
        finish: FinishReason | None = None
        if answer.token in request.stop_ids:
            finish = "stop"
        elif sequence.n_output >= request.max_tokens:
            finish = "length"
        self._count(
            prompt_tokens=len(request.prompt) if first else 0,
            generated_tokens=0 if answer.token is None else 1,
        )
        scored = first and request.prompt_logprobs is not None
        return replace(
            sequence.progress(finish),
            token=answer.token,
            logprob=answer.logprob,
            prompt_logprobs=tuple(sequence.scores) if scored else None,
        )

    def _end(self, sequence: _Sequence, progress: Progress) -> Progress:
        """Forget a request and free its pages."""
        del self._known[sequence.request.id]
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._vacate(sequence)
        return progress

    def _vacate(self, sequence: _Sequence) -> None:
        self._pages.release(sequence.held)
        sequence.n_computed = 0

    def _count(self, **more: float) -> None:
        self._totals = replace(self._totals, **{name: getattr(self._totals, name) + n for name, n in more.items()})
