"""hybrid.trial_steps: which rows reach the engine."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from hybrid.batch import Batch, Row, StepOutput
from hybrid.inputs import check_rows
from hybrid.trial_steps import TrialSteps, pages_needed

PAGE, VOCABULARY = 8, 50


@dataclass
class Recorder:
    """An engine that only checks and keeps what it is asked."""

    n_pages: int
    rows: list[tuple[Row, ...]] = field(default_factory=list)
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(page_size=PAGE))
    model: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def step(self, batch: Batch) -> StepOutput:
        check_rows(batch.rows, self.n_pages, PAGE, VOCABULARY)
        self.rows.append(batch.rows)
        return StepOutput(())


def test_a_prompt_goes_in_chunks_and_draws_at_its_end() -> None:
    engine = Recorder(pages_needed(PAGE, 29, 0, 1, 1))
    outputs = TrialSteps(engine).prompt(29, chunk=12)  # type: ignore[arg-type]
    rows = [row for (row,) in engine.rows]
    assert len(outputs) == 3
    assert [(row.position, len(row.ids), row.sampling is not None) for row in rows] == [
        (0, 12, False), (12, 12, False), (24, 5, True),
    ]  # fmt: skip
    assert len({row.pages for row in rows}) == 1
    assert len({token for row in rows for token in row.ids}) > 10


@pytest.mark.parametrize(("context", "contexts", "rows"), [(16, 3, 3), (19, 3, 3), (19, 2, 5), (5, 1, 4)])
def test_decoding_reads_the_contexts_that_were_written(context: int, contexts: int, rows: int) -> None:
    engine = Recorder(pages_needed(PAGE, 0, context, contexts, rows))
    steps = TrialSteps(engine)  # type: ignore[arg-type]
    steps.fill(context, contexts, chunk=16)
    filled = {row.request_id: row.pages for (row,) in engine.rows}
    assert sum(len(row.ids) for (row,) in engine.rows) == context * contexts
    for _ in range(2):
        steps.decode(rows)
    first, second = engine.rows[-2:]
    assert [row.position for row in first] == [context] * rows
    assert [row.ids for row in first] != [row.ids for row in second], "fresh ids for every step"
    whole = context // PAGE
    for row in first:
        assert row.pages[:whole] == filled[row.request_id % contexts][:whole]
    own = [page for row in first for page in row.pages[whole:]]
    assert len(set(own)) == rows and not set(own) & {page for pages in filled.values() for page in pages[:whole]}
