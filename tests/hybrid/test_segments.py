"""hybrid.segments with a stand-in for graphs: fixed shapes give the eager answers, and what differs runs eagerly.

The stand-in runs a part again for every replay and writes over the tensors of the first run, as a graph does: whatever
a part reads must therefore lie where it lay.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from hybrid.batch import Batch, Row, RowOutput, Sampling
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.random_checkpoint import write_checkpoint
from hybrid.segments import LEAST_PAGES, SHAPES, Part, Segments
from offload.config import PoolConfig
from tests import families

PAGE, PAGES_EACH, REQUESTS = 4, 24, 7
GREEDY = Sampling(temperature=0.0, logprobs=4)
ROUNDING = 2e-4  # rows of another number, keys padded to another number
Replay = tuple[Callable[[], None], tuple[torch.Tensor, ...]]


class StandIn:
    """Records as a graph would; `spoil` adds something to every replay of the parts it names."""

    def __init__(self, spoil: tuple[int, ...] = ()) -> None:
        self._spoil, self._n_parts = spoil, 0

    def __call__(self, part: Part) -> Replay:
        written, number = part(), self._n_parts
        self._n_parts += 1

        def replay() -> None:
            for mine, new in zip(written, part(), strict=True):
                mine.copy_(new)
            if number in self._spoil:
                written[0].add_(1)

        return replay, written


class Failing:
    """Cannot capture."""

    def __call__(self, part: Part) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    out = tmp_path_factory.mktemp("segments") / "model"
    write_checkpoint(families.kimi_k25(), out, seed=3, tokenizer=None)
    pool = PoolConfig(threads=1, precision="a16")
    engine = Engine(EngineConfig(out, "cpu", "float32", "native", pool, PAGES_EACH * REQUESTS, PAGE))
    yield engine
    engine.close()


def segments(engine: Engine, recorder: Callable[[], object], notices: list[str]) -> Segments:
    made = Segments(engine._transformer, engine._cache, notices.append, recorder)  # type: ignore[arg-type]
    engine._segments = made
    return made


def decode_rows(rng: np.random.Generator, known: dict[int, tuple[int, ...]], some: list[int]) -> Batch:
    rows = []
    for i in some:
        pages = tuple(range(PAGES_EACH * i, PAGES_EACH * (i + 1)))
        rows.append(Row(i, known[i][-1:], len(known[i]) - 1, pages, GREEDY))
    return Batch(tuple(rows))


def prompts(engine: Engine, rng: np.random.Generator) -> dict[int, tuple[int, ...]]:
    """Requests whose cache holds all but their last id."""
    known = {i: tuple(rng.integers(0, 512, int(rng.integers(2, 80))).tolist()) for i in range(REQUESTS)}
    rows = [Row(i, ids[:-1], 0, tuple(range(PAGES_EACH * i, PAGES_EACH * (i + 1)))) for i, ids in known.items()]
    engine._segments = None
    engine.step(Batch(tuple(rows)))
    return known


def logprobs(outputs: tuple[RowOutput, ...]) -> list[float]:
    return [row.logprob.logprob for row in outputs if row.logprob is not None]


@pytest.mark.parametrize("mode", ["off", "on"])
def test_captured_steps_give_the_eager_answers(engine: Engine, mode: str) -> None:
    rng, notices = np.random.default_rng(4), list[str]()
    known = prompts(engine, rng)
    captured = segments(engine, StandIn, notices)
    engine.use_ping_pong(mode)  # type: ignore[arg-type]
    before = engine.expert_stats()
    for _ in range(24):
        some = rng.permutation(REQUESTS)[: rng.integers(1, REQUESTS + 1)].tolist()
        batch = decode_rows(rng, known, some)
        engine._segments = captured
        found = engine.step(batch)
        engine._segments = None
        expected = engine.step(batch)
        assert [row.token for row in found.rows] == [row.token for row in expected.rows]
        np.testing.assert_allclose(logprobs(found.rows), logprobs(expected.rows), rtol=0, atol=ROUNDING)
        assert found.distinct_experts == expected.distinct_experts, "repeated rows reach no expert"
        for row in found.rows:
            assert row.token is not None
            known[row.request_id] += (row.token,)
    assert captured.replayed >= 24 and not captured.eager and notices == []
    assert engine.expert_stats().tokens > before.tokens
    engine.use_ping_pong("off")


def test_a_prompt_or_too_many_rows_run_eagerly_and_are_counted(engine: Engine) -> None:
    rng, notices = np.random.default_rng(5), list[str]()
    known = prompts(engine, rng)
    captured = segments(engine, StandIn, notices)
    batch = decode_rows(rng, known, [0, 1])
    longer = Row(5, (1, 2, 3), 0, tuple(range(PAGES_EACH * 5, PAGES_EACH * 6)), GREEDY)
    engine.step(Batch((*batch.rows, longer)))
    assert captured.lane(0, batch.rows[:1] * (SHAPES[-1] + 1)) is None
    assert captured.eager == {"a prompt in the step": 1, f"more than {SHAPES[-1]} rows": 1}
    assert captured.replayed == 0
    engine._segments = None


@pytest.mark.parametrize(
    ("recorder", "says"),
    [
        (Failing, "part 0 cannot be captured"),
        (lambda: StandIn((0,)), "part 0 is different when replayed"),
        (lambda: StandIn((3,)), "part 3 is different when replayed"),
        (lambda: StandIn((5,)), "part 5 is different when replayed"),
    ],
)
@pytest.mark.parametrize("mode", ["off", "on"])
def test_what_cannot_be_replayed_runs_eagerly_and_is_said_once(
    engine: Engine, recorder: Callable[[], object], says: str, mode: str
) -> None:
    rng, notices = np.random.default_rng(6), list[str]()
    known = prompts(engine, rng)
    batch = decode_rows(rng, known, [3, 0, 1])
    engine.use_ping_pong("off")
    expected = engine.step(batch).rows
    captured = segments(engine, recorder, notices)
    engine.use_ping_pong(mode)  # type: ignore[arg-type]
    for _ in range(3):
        found = engine.step(batch).rows
        assert [row.token for row in found] == [row.token for row in expected]
        np.testing.assert_allclose(logprobs(found), logprobs(expected), rtol=0, atol=ROUNDING)
    shapes = 2 if mode == "on" else 1  # the halves have one and two rows
    assert len(notices) == shapes
    assert all(says in line for line in notices)
    assert captured.eager["cannot be captured"] >= 2 * shapes
    engine._segments = None
    engine.use_ping_pong("off")


def test_a_shape_is_a_power_of_two(engine: Engine) -> None:
    rng, notices = np.random.default_rng(7), list[str]()
    prompts(engine, rng)
    captured = segments(engine, StandIn, notices)
    pages = tuple(range(PAGES_EACH))
    with torch.inference_mode():
        short = captured.lane(0, [Row(0, (1,), 5, pages), Row(1, (1,), 6, pages), Row(2, (1,), 7, pages)])
        longer = captured.lane(0, [Row(0, (1,), LEAST_PAGES * PAGE, pages)])
        again = captured.lane(0, [Row(7, (9,), 0, pages)] * 4)
    assert short is not None and short is again and longer is not None
    assert short.x.shape[0] == 4 and short._static.pages == LEAST_PAGES
    assert longer.x.shape[0] == 1 and longer._static.pages == 2 * LEAST_PAGES
    assert len(short.result) == 4
    engine._segments = None
