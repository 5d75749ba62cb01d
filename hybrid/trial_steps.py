"""Engine steps on random ids, for whoever times them: a prompt, and one new id for each of some sequences.

Ids are drawn anew for every step, so that the experts a step touches are those of fresh tokens and not of a sequence
that repeats itself. Knows nothing about times beyond what a step reports. Called by `placement.tune` and by benches.
"""

import math

import numpy as np

from hybrid.batch import Batch, Row, Sampling, StepOutput
from hybrid.engine import Engine

SEED = 7


def pages_needed(page_size: int, prompt: int, context: int, contexts: int, rows: int) -> int:
    """Cache pages for prompts up to `prompt` ids, and for decoding up to `rows` sequences over so many contexts."""
    return max(math.ceil(prompt / page_size), contexts * (context // page_size) + rows)


class TrialSteps:
    """Drives one engine, whose whole cache it uses."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._page_size = engine.config.page_size
        self._random = np.random.default_rng(SEED)
        self._context, self._contexts = 0, 1

    def prompt(self, n_tokens: int, chunk: int | None = None) -> list[StepOutput]:
        """One prompt, in chunks of so many ids or in one step; the last step draws a token."""
        pages = tuple(range(math.ceil(n_tokens / self._page_size)))
        return self._chunks(0, n_tokens, chunk or n_tokens, pages, draws=True)

    def fill(self, context: int, contexts: int, chunk: int | None) -> None:
        """Write the contexts that `decode` attends to from now on: `contexts` of `context` random ids each.

        `chunk` None leaves the cache as it is: attending takes as long whatever it holds.
        """
        self._context, self._contexts = context, contexts
        for slot in range(contexts if chunk else 0):
            self._chunks(slot, context, chunk or context, self._pages(slot), draws=False)

    def decode(self, rows: int) -> StepOutput:
        """One new id for each of `rows` sequences; where they are more than the contexts, some share one."""
        batch = [self._row(slot, 1, self._context, self._pages(slot), True) for slot in range(rows)]
        return self._engine.step(Batch(tuple(batch)))

    def _pages(self, slot: int) -> tuple[int, ...]:
        """Whole pages of a context, and a page of the slot's own for the rest of it and the new id."""
        n = self._context // self._page_size
        first = slot % self._contexts * n
        return (*range(first, first + n), self._contexts * n + slot)

    def _chunks(self, slot: int, n_tokens: int, size: int, pages: tuple[int, ...], draws: bool) -> list[StepOutput]:
        rows = [
            self._row(slot, min(size, n_tokens - a), a, pages, draws and a + size >= n_tokens)
            for a in range(0, n_tokens, size)
        ]
        return [self._engine.step(Batch((row,))) for row in rows]

    def _row(self, slot: int, n_new: int, position: int, pages: tuple[int, ...], draws: bool) -> Row:
        ids = self._random.integers(0, self._engine.model.vocab_size, n_new)
        return Row(slot, tuple(ids.tolist()), position, pages, Sampling(seed=slot) if draws else None)
