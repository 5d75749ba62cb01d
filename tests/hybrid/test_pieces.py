"""Large steps in pieces: the same answers as in one, for prompts and decoding rows mixed."""

import itertools
import random
from collections.abc import Iterator

import pytest

import hybrid.inputs
import hybrid.layers
from hybrid.batch import Batch, Row, RowOutput, Sampling
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.inputs import in_pieces
from hybrid.random_checkpoint import write_checkpoint
from offload.config import PoolConfig
from tests import families

PAGE, N_PAGES = 8, 128
GREEDY = Sampling(temperature=0.0, logprobs=1)


@pytest.fixture(scope="module", params=["kimi_k25", "deepseek_v2_lite"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp(request.param) / "model"
    write_checkpoint(getattr(families, request.param)(), directory, seed=3, tokenizer=None)
    opened = Engine(EngineConfig(directory, "cpu", "float32", "native", PoolConfig(1, "a16"), N_PAGES, PAGE))
    yield opened
    opened.close()


def steps(chance: random.Random) -> list[Batch]:
    """Some steps of five requests: prompts in chunks, then decoding, every step with all of them."""
    ids = [[chance.randrange(512) for _ in range(chance.randrange(30, 90))] for _ in range(5)]
    where = [tuple(range(20 * i, 20 * i + 20)) for i in range(5)]
    at, batches = [0] * 5, []
    while any(a < len(known) for a, known in zip(at, ids, strict=True)):
        rows = []
        for i in chance.sample(range(5), 5):
            n = min(chance.choice([1, 1, 13, 40]), len(ids[i]) - at[i])
            if n:
                targets = tuple(ids[i][at[i] + 1 : at[i] + n + 1])
                rows.append(Row(i, tuple(ids[i][at[i] : at[i] + n]), at[i], where[i], GREEDY, targets=targets))
                at[i] += n
        batches.append(Batch(tuple(rows)))
    return batches


def answers(engine: Engine, batches: list[Batch]) -> list[RowOutput]:
    return [row for batch in batches for row in engine.step(batch).rows]


def test_pieces_give_the_answers_of_the_whole(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 depend on the number of rows in the last bits, and a row that is cut may attend by the other
    of the two paths: 2e-4, as for chunks of a prompt."""
    for seed in range(3):
        batches = steps(random.Random(seed))
        whole = answers(engine, batches)
        for size in (3, 16, 50):
            with monkeypatch.context() as patched:
                patched.setattr(hybrid.inputs, "PIECE_TOKENS", size)
                patched.setattr(hybrid.layers, "PIECE_TOKENS", size)
                assert max(len(in_pieces(batch)) for batch in batches) > 1
                cut = answers(engine, batches)
            for one, other in zip(whole, cut, strict=True):
                assert one.token == other.token
                assert one.logprob is not None and other.logprob is not None
                pairs = zip((one.logprob, *one.scored), (other.logprob, *other.scored), strict=True)
                assert all(a.logprob == pytest.approx(b.logprob, abs=2e-4) for a, b in pairs)


def test_pieces_hold_every_id_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid.inputs, "PIECE_TOKENS", 16)
    for seed in range(20):
        for batch in steps(random.Random(seed)):
            pieces = in_pieces(batch)
            sizes = [piece.n_tokens for piece in pieces]
            assert sizes[:-1] == [16] * (len(pieces) - 1) and 0 < sizes[-1] <= 16
            for row in batch.rows:
                mine = [part for piece in pieces for part in piece.rows if part.request_id == row.request_id]
                assert tuple(itertools.chain(*(part.ids for part in mine))) == row.ids
                ends = [row.position, *itertools.accumulate((len(part.ids) for part in mine), initial=row.position)]
                assert [part.position for part in mine] == ends[1:-1]
    assert in_pieces(Batch((Row(0, (1, 2), 5, (0,)),))) == [Batch((Row(0, (1, 2), 5, (0,)),))]
