"""A torch-free stand-in for `Engine.step`: the next token is a hash of everything its pages hold.

It keeps its own page store. What it writes for a position depends on every position before it, as KV does, and what it
answers depends on all that it reads back. A wrong page id, a page given away too early, a prefix shared before it was
computed or a wrong position therefore changes the tokens or raises `FakeStepError`. It lets the scheduler, the bridge
and the HTTP side be tested without a model.
"""

import struct
import time
from collections.abc import Sequence
from hashlib import blake2b

from hybrid.batch import Batch, Moves, Row, RowOutput, StepOutput, TokenLogprob


class FakeStepError(AssertionError):
    """The batch asks for something that no correct scheduler asks for."""


def _number(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest())


def _logprob(token: int, state: bytes, n_alternatives: int) -> TokenLogprob:
    top = tuple((i, -(1.0 + i) / 8) for i in range(n_alternatives))
    return TokenLogprob(token, -(_number(state, token) % 1000) / 100, top)


class FakeStep:
    """`tokens` are the ids it answers with; `delay_s` is slept in every step, so that a test can act meanwhile."""

    def __init__(
        self,
        n_pages: int,
        page_size: int,
        tokens: Sequence[int] = range(256),
        delay_s: float = 0.0,
        n_ram_pages: int = 0,
    ) -> None:
        self.page_size = page_size
        self.tokens = tokens
        self.delay_s = delay_s
        # A position's "KV": a hash of its id, its position and every slot before it.
        self._store: list[list[bytes | None]] = [[None] * page_size for _ in range(n_pages)]
        self._ram: list[list[bytes | None]] = [[None] * page_size for _ in range(n_ram_pages)]

    def __call__(self, batch: Batch) -> StepOutput:
        """Write every row's ids, then answer every row: as in a real layer, all rows' KV is written first."""
        if not batch.rows or len({row.request_id for row in batch.rows}) != len(batch.rows):
            raise FakeStepError("a batch has at least one row, and at most one for each request")
        self._move(batch.moves)
        for row in batch.rows:
            self._write(row)
        rows = tuple(self._answer(row) for row in batch.rows)
        time.sleep(self.delay_s)
        return StepOutput(rows, seconds=0.001, expert_bytes=batch.n_tokens, distinct_experts=len(rows))

    def _move(self, moves: Moves) -> None:
        """Out, then in. A page that went out is given up: who reads it without writing it first finds nothing there."""
        if len({to for _, to in moves.demoted}) < len(moves.demoted):
            raise FakeStepError("two pages are demoted to one place")
        out = [(to, self._store[page]) for page, to in moves.demoted]
        for page, _ in moves.demoted:
            self._store[page] = [None] * self.page_size
        for to, slots in out:
            if None in slots:
                raise FakeStepError(f"a page that is not full is demoted to {to}")
            self._ram[to] = slots
        for source, page in moves.promoted:
            self._store[page] = list(self._ram[source])

    def _write(self, row: Row) -> None:
        end = row.position + len(row.ids)
        if not row.ids or len(row.pages) != -(-end // self.page_size):
            raise FakeStepError(f"request {row.request_id}: {len(row.pages)} pages for positions up to {end}")
        digest = blake2b(self._read(row, row.position), digest_size=8)
        for position, token in enumerate(row.ids, row.position):
            state = digest.copy()
            state.update(struct.pack("<qq", token, position))
            page, offset = divmod(position, self.page_size)
            self._store[row.pages[page]][offset] = state.digest()
            digest.update(state.digest())

    def _read(self, row: Row, end: int) -> bytes:
        """The states of positions 0 .. end - 1, 8 bytes each, as they lie in the row's pages now."""
        slots = [slot for page in row.pages for slot in self._store[page]][:end]
        states = [slot for slot in slots if slot is not None]
        if len(states) != end:
            raise FakeStepError(f"request {row.request_id} reads a position before {end} that was never written")
        return b"".join(states)

    def _answer(self, row: Row) -> RowOutput:
        end = row.position + len(row.ids)
        kv, states = self._read(row, end), []
        digest = blake2b(kv[: 8 * row.position], digest_size=8)
        for position in range(row.position, end):
            digest.update(kv[8 * position : 8 * position + 8])
            states.append(digest.digest())
        targets = row.targets or ()
        if row.targets is not None and len(row.ids) - len(targets) not in (0, 1):
            raise FakeStepError(f"request {row.request_id}: {len(targets)} targets for {len(row.ids)} ids")
        scored = tuple(
            _logprob(target, state, row.n_alternatives) for target, state in zip(targets, states, strict=False)
        )
        if row.sampling is None:
            return RowOutput(row.request_id, scored=scored)
        token = self.tokens[self._draw(row, states[-1]) % len(self.tokens)]
        n_alternatives = row.sampling.logprobs
        logprob = None if n_alternatives is None else _logprob(token, states[-1], n_alternatives)
        return RowOutput(row.request_id, token, logprob, scored)

    def _draw(self, row: Row, state: bytes) -> int:
        """Greedy rows depend on the pages alone; others also on what a real sampler would look at."""
        sampling = row.sampling
        assert sampling is not None
        seed = None if sampling.temperature == 0 else (sampling.seed, row.n_sampled)
        counted = (row.prompt, row.output) if sampling.penalised else None
        return _number(state, seed, counted)
