"""Who runs next: continuous batching with chunked prefill over a page table. No torch, no clock, no threads.

The engine's process drives it: `next()` gives a batch, the engine runs it, `commit()` takes the answer; `add()` and
`cancel()` may come at any time between. Who goes first is `policy.py`'s business; here pages are dealt and rows are
put together. Two lanes: where patient requests (a swarm's sub-agents) run beside others, the others get steps of their
own for as long as the patient ones have had more than their share of the time. None starves: see docs/SCHEDULING.md.
It does not know what a token means, how a step is computed or who reads the answers.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hybrid.batch import Batch, Row, RowOutput, StepOutput
from hybrid.pages import Holding, PageTable
from server.policy import Policy
from server.prefixes import Coming
from server.request import EngineStats, FinishReason, Progress, Request
from server.sequence import Sequence

Chunks = list[tuple[Sequence, int]]  # who gets how many new ids in a step

MOST_ALONE = 4  # times the longest step: more seconds than that the express lane has never in a row
MOST_GIVEN_WAY = 2  # times that a patient request makes room for a newcomer before its next token
EXPRESS_PAGES = 0.5  # of all pages: up to here patient requests give way to others that wait


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes of the page table and of one step."""

    n_pages: int
    page_size: int = 16  # tokens
    max_batch_tokens: int = 2048  # new ids in one step
    max_running: int = 64  # requests that hold pages at the same time
    n_ram_pages: int = 0  # for prefixes that nobody holds
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        for name in ("n_pages", "page_size", "max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def capacity(self) -> int:
        """Tokens that one request can hold when it is alone."""
        return self.n_pages * self.page_size


class Scheduler:
    """The queue, the running requests and the only page table.

    `expect` tells the seconds of a batch before it runs; nothing but the lanes asks.
    """

    def __init__(self, config: SchedulerConfig, expect: Callable[[Batch], float] = lambda batch: 0.0) -> None:
        self.config = config
        self._policy = config.policy
        self._expect = expect
        self._pages = PageTable(config.n_pages, config.page_size, config.n_ram_pages)
        self._known: dict[int, Sequence] = {}  # by request id, in order of arrival
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []  # in order of admission
        self._in_flight: list[tuple[Sequence, Row]] | None = None
        self._n_added = 0
        self._owed = 0.0  # seconds that the patient requests have had, or will have, beyond their share
        self._slowest = 0.0  # seconds of the last step that they had a part in
        self._alone = 0.0  # seconds of the steps since then while some of them ran
        self._longest = 0.0  # of these
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
        sequence = Sequence(request, Holding(list(request.prompt)), self._n_added)
        self._n_added += 1
        self._known[request.id] = sequence
        self._waiting.append(sequence)
        if not self._policy.patient(sequence):  # paid in advance: a step for all would come before the first token
            self._owed = max(self._owed, self._slowest)
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
        chunks = self._chosen(express=True) if self._hurried() else []
        chunks = chunks or self._chosen(express=False)
        if not chunks:
            assert self.idle, "requests wait but none can run"
            return None
        self._in_flight = [(sequence, sequence.row(n)) for sequence, n in chunks]
        return Batch(tuple(row for _, row in self._in_flight), self._pages.take_moves())

    def commit(self, out: StepOutput) -> tuple[Progress, ...]:
        """Take the answer to the batch in flight; return what it did for each request that got further."""
        flight = self._in_flight
        if flight is None or [row.request_id for _, row in flight] != [answer.request_id for answer in out.rows]:
            raise ValueError("the answer's rows do not match the batch in flight")
        self._in_flight = None
        self._share_time(flight, out.seconds)
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
        ram = self._pages.ram
        return replace(
            self._totals,
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self._pages.n_used,
            pages_total=self._pages.n_pages,
            ram_pages_used=ram.n_used,
            ram_pages_total=ram.n_pages,
            demoted=ram.n_demoted,
            promoted=ram.n_promoted,
            ram_hits=ram.n_promoted * self.config.page_size,
        )

    def check(self) -> None:
        """Assert that queue, running requests and page table agree."""
        assert set(self._known.values()) == {*self._running, *self._waiting}, "requests are lost"
        assert len(self._known) == len(self._running) + len(self._waiting), "a request runs and waits"
        assert self._waiting == sorted(self._waiting, key=_arrival), "the queue is out of order"
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
            half_read = [self._policy.patient(sequence) for sequence in self._running if sequence.n_left > 1]
            assert max(half_read.count(True), half_read.count(False)) <= 1, "two prompts of one lane are half read"

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

    def _hurried(self) -> bool:
        """Whether the next step is for those alone that are not patient: one of them waits for a place, or others have
        had more than their share."""
        if not any(map(self._policy.patient, self._running)):
            self._alone = self._longest = 0.0
            return False
        # Bounded, as newcomers and prompts without end would never pay back what is owed.
        longest = max(self._slowest, self._longest)
        waits = any(not self._policy.patient(one) for one in self._waiting)
        return (waits or self._owed > 0) and self._alone + self._longest <= MOST_ALONE * longest

    def _share_time(self, flight: list[tuple[Sequence, Row]], seconds: float) -> None:
        """Enter a step of so many seconds: patient requests may stretch it to `slowdown` times what others need."""
        seconds = seconds if math.isfinite(seconds) else 0.0
        express = tuple(row for sequence, row in flight if not self._policy.patient(sequence))
        slowdown = self._policy.slowdown
        if len(express) == len(flight):
            # A step with a prompt pays nothing back: the time between tokens is what is promised.
            self._owed -= (slowdown - 1) * seconds if all(len(row.ids) == 1 for row in express) else 0.0
            self._alone, self._longest = self._alone + seconds, max(self._longest, seconds)
        else:
            self._alone = self._longest = 0.0
            self._slowest = seconds
            self._owed += seconds - (slowdown * self._expect(Batch(express)) if express else 0.0)
        hurried = any(not self._policy.patient(one) for one in self._known.values())
        most = MOST_ALONE * max(self._slowest, self._longest)
        self._owed = min(max(self._owed, 0.0), most) if hurried else 0.0

    def _chosen(self, express: bool) -> Chunks:
        """Who gets how many new ids, all or only those that are not patient."""
        chunks = self._continue(express)
        self._admit(chunks, express)
        return chunks

    def _continue(self, express: bool) -> Chunks:
        """New ids for the running requests: rows that decode first, then the prompt that is half read."""
        chunks: Chunks = []
        left = self.config.max_batch_tokens
        for sequence in sorted(self._running, key=self._turn):
            skipped = express and self._policy.patient(sequence)
            if left == 0 or skipped or not sequence.held.pages:  # without pages: it gave way to one before it
                continue
            n = self._claim(sequence, min(sequence.n_left, left), chunks)
            if n > 0:
                chunks.append((sequence, n))
                left -= n
        return chunks

    def _turn(self, sequence: Sequence) -> tuple[bool, bool, int]:
        return sequence.n_left > 1, self._policy.patient(sequence), sequence.number

    def _claim(self, sequence: Sequence, n: int, chunks: Chunks) -> int:
        """Pages for `n` more ids, or as many as there is room for, but at least one: others give way, if they are not
        in the step already.

        0 means that `sequence` was itself the first to give way and is back in the queue. Alone it always has room.
        """
        while (room := self._pages.room(sequence.held) - sequence.n_computed) < 1:
            if self._preempt(self._idle(chunks)) is sequence:
                return 0
        n = min(n, room)
        self._pages.grow(sequence.held, sequence.n_computed + n)
        return n

    def _idle(self, chunks: Chunks) -> list[Sequence]:
        """Running requests that have no part in the step so far."""
        flying = {sequence for sequence, _ in chunks}
        return [sequence for sequence in self._running if sequence not in flying]

    def _preempt(self, candidates: list[Sequence]) -> Sequence:
        """Put one running request back into the queue. It keeps its ids and computes them again."""
        sequence = self._policy.victim(candidates, self._running)
        self._running.remove(sequence)
        self._vacate(sequence)
        sequence.gave_way += 1
        bisect.insort(self._waiting, sequence, key=_arrival)
        self._count(preemptions=1)
        return sequence

    def _admit(self, chunks: Chunks, express: bool) -> None:
        """Start waiting requests with what is left of the step's new ids, and add them to it."""
        left = self.config.max_batch_tokens - sum(n for _, n in chunks)
        if left == 0:
            return
        eligible = [one for one in self._waiting if not (express and self._policy.patient(one))]
        order = self._policy.order(eligible, list(self._running))
        coming = Coming(self._policy, self._pages)
        for reader in self._running if eligible else ():
            coming.add(reader)
        n_deferred, started = 0, None  # so many at most as there are places: hashing their prompts takes time
        while (
            left > 0 and n_deferred <= self.config.max_running and (self._policy.bus or all(n == 1 for _, n in chunks))
        ):
            try:
                sequence = next(order) if started is None else order.send(started)
            except StopIteration:
                break
            started = False
            if self._policy.prefix_once and coming.worth_waiting(sequence):
                n_deferred += 1
                continue
            sequence.n_computed = self._pages.share(sequence.held, sequence.shareable)
            if not self._make_room(sequence, chunks):
                self._vacate(sequence)
                break
            sequence.n_computed = self._pages.fetch(sequence.held, sequence.shareable)
            self._start(sequence)
            n = min(left, sequence.n_left)
            self._pages.grow(sequence.held, sequence.n_computed + n)
            coming.add(sequence)
            chunks.append((sequence, n))
            left -= n
            started = True

    def _make_room(self, sequence: Sequence, chunks: Chunks) -> bool:
        """Whether it can start. Patient requests give way to one that is not, as long as such have half the pages."""
        while len(self._running) >= self.config.max_running or not self._fits(sequence):
            patient = [one for one in self._idle(chunks) if self._policy.patient(one) and one.gave_way < MOST_GIVEN_WAY]
            if self._policy.patient(sequence) or not patient or self._express_pages(sequence) > EXPRESS_PAGES:
                return False
            self._preempt(patient)
        return True

    def _express_pages(self, newcomer: Sequence) -> float:
        """Share of all pages that requests which are not patient need for their ids, the newcomer among them."""
        express = [one for one in self._running if not self._policy.patient(one)]
        needed = sum(self._pages.pages_for(len(one.held.ids)) for one in (*express, newcomer))
        return needed / self._pages.n_pages

    def _start(self, sequence: Sequence) -> None:
        """Move it from the queue to the running ones."""
        at = bisect.bisect_left(self._waiting, sequence.number, key=_arrival)
        for earlier in self._waiting[:at]:
            earlier.overtaken += 1
        sequence.overtaken = 0
        self._running.append(self._waiting.pop(at))
        self._note_admission(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        """Room for all its ids beside what running requests still need for theirs, plus a page each to go on with.

        Without that margin a newcomer would be preempted within a few steps and its work done twice.
        """
        promised = sum(self._lacking(running) + 1 for running in self._running)
        return self._lacking(sequence) + promised <= self._pages.n_free

    def _lacking(self, sequence: Sequence) -> int:
        """Pages that its ids so far still need."""
        return max(self._pages.pages_for(len(sequence.held.ids)) - len(sequence.held.pages), 0)

    def _note_admission(self, sequence: Sequence) -> None:
        if sequence.cached_tokens is not None:  # a preempted request finds its own pages again: no news
            return
        sequence.cached_tokens = sequence.n_computed
        if not sequence.scoring:
            self._count(prefix_queries=len(sequence.request.prompt), prefix_hits=sequence.n_computed)

    def _commit_row(self, sequence: Sequence, row: Row, answer: RowOutput) -> Progress | None:
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

    def _advance(self, sequence: Sequence, answer: RowOutput) -> Progress:
        """All ids are computed: append the sampled token, if any, and say whether it was the last."""
        request, first = sequence.request, sequence.n_output == 0
        sequence.gave_way = 0
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

    def _end(self, sequence: Sequence, progress: Progress) -> Progress:
        """Forget a request and free its pages."""
        del self._known[sequence.request.id]
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._vacate(sequence)
        return progress

    def _vacate(self, sequence: Sequence) -> None:
        self._pages.release(sequence.held)
        sequence.n_computed = 0

    def _count(self, **more: float) -> None:
        self._totals = replace(self._totals, **{name: getattr(self._totals, name) + n for name, n in more.items()})


def _arrival(sequence: Sequence) -> int:
    return sequence.number
