"""hybrid.served_record: a small model's steps; prompts in chunks, decode steps, what is run twice, what is full."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.batch import Batch, Row, Sampling, StepOutput
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.moe import Moe
from hybrid.nano import record as nano
from hybrid.routes import read_record, write_record
from hybrid.served_record import OVERHEAD, ServedRecord
from offload.config import PoolConfig

MODEL = Path(nano.__file__).with_name("model")
GREEDY = Sampling(temperature=0.0)
PAGES = tuple(range(8))


def row(request: int, ids: list[int], position: int, n_sampled: int = 0) -> Row:
    pages = tuple(8 * request + page for page in PAGES)
    return Row(request, tuple(ids), position, pages, GREEDY, n_sampled)


STEPS = [
    [row(0, [5, 6, 7, 8], 0)],
    [row(0, [9, 10], 4), row(1, [11, 12, 13], 16)],  # request 1's first page is another's
    [row(0, [20], 6, 1), row(1, [30], 19, 1)],
    [row(1, [31], 20, 2), row(0, [21], 7, 2)],
    [row(0, [5, 6, 7, 8, 9, 10, 20, 21, 22], 0, 3)],  # preempted: computed again, with one token more
    [row(2, [40], 0)],
]


def test_a_servers_steps(tmp_path: Path) -> None:
    said: list[str] = []
    served = ServedRecord(MODEL, said.append)
    seen: list[tuple[int, torch.Tensor]] = []

    def watch(moe: Moe, x: torch.Tensor, ids: torch.Tensor) -> None:
        served.watch(moe, x, ids)
        seen.append((moe.layer, ids.sort(-1).values))

    assert served.record() is None
    engine = Engine(EngineConfig(MODEL, "cpu", "float32", "native", PoolConfig(threads=1), n_pages=32), watch=watch)
    step = served.recording(engine.step)
    for rows in STEPS:
        out = step(Batch(tuple(rows)))
        assert [one.request_id for one in out.rows] == [one.request_id for one in rows]
    engine.close()
    made = served.record()
    assert made is not None
    assert made.tokens.tolist() == [5, 6, 7, 8, 9, 10, 20, 21, 22, 11, 12, 13, 30, 31, 40]
    assert made.starts.tolist() == [0, 9, 14]
    assert made.turns.tolist() == [[6, 9], [12, 14]]
    assert made.layers.tolist() == [1, 2, 3, 4]
    # By step: which rows of it are which tokens of the record.
    places: list[list[int | None]] = [[0, 1, 2, 3], [4, 5, 9, 10, 11], [6, 12], [13, 7], [None] * 8 + [8], [14]]
    for i, layer in enumerate(made.layers.tolist()):
        of_layer = [ids for number, ids in seen if number == layer]
        for chosen, tokens in zip(of_layer, places, strict=True):
            for ids, token in zip(chosen.tolist(), tokens, strict=True):
                assert token is None or made.experts[token, i].tolist() == ids
    write_record(tmp_path / "r.npz", made)
    back = read_record(tmp_path / "r.npz")
    assert np.array_equal(back.experts, made.experts)
    assert back.experts.dtype == np.uint8
    assert np.flatnonzero(back.decoded).tolist() == [6, 7, 12]
    assert said == []


class Router:
    weight = torch.zeros(300, 2)
    bias = None


class Layer:
    layer, router = 3, Router()


def choose(served: ServedRecord) -> None:
    """One more token of request 0, through a router without a bias."""
    at = served.n_tokens

    def step(batch: Batch) -> StepOutput:
        served.watch(Layer(), torch.zeros(1, 2), torch.tensor([[299, at]]))  # type: ignore[arg-type]
        return StepOutput(())

    served.recording(step)(Batch((row(0, [at], at),)))


def test_it_stops_when_it_is_full() -> None:
    said: list[str] = []
    served = ServedRecord(
        MODEL, said.append, most_bytes=5 * (2 * 2 + OVERHEAD)
    )  # five tokens of two experts, two bytes each
    for _ in range(9):
        choose(served)
    made = served.record()
    assert made is not None
    assert made.experts[:, 0].tolist() == [[at, 299] for at in range(5)]
    assert not made.bias.any()
    assert said == ["the routing record is full: 5 tokens; later ones are not recorded"]


def test_a_step_that_failed_leaves_nothing() -> None:
    served = ServedRecord(MODEL, print)

    def step(batch: Batch) -> StepOutput:
        served.watch(Layer(), torch.zeros(1, 2), torch.tensor([[1, 2]]))  # type: ignore[arg-type]
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        served.recording(step)(Batch((row(0, [7], 0),)))
    choose(served)
    assert served.n_tokens == 1
