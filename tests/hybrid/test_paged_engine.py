"""A model whose experts RAM does not hold: the same tokens and logprobs as with all of them there."""

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hybrid import random_checkpoint
from hybrid.batch import Batch, Row, RowOutput, Sampling
from hybrid.config import EngineConfig, ModelConfig
from hybrid.engine import Engine
from offload.checkpoint import Checkpoint
from offload.config import PoolConfig
from offload.paging import Pager
from offload.store import pack_store
from tests import families

PAGE, ROWS, PAGES_OF_ROW = 4, 3, 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paged") / "model"
    random_checkpoint.write_checkpoint(families.kimi_k25(), out, 3, None)
    model = ModelConfig.from_directory(out)
    with closing(Checkpoint(out)) as checkpoint:
        pack_store(
            checkpoint, model.expert_name, model.expert_geometry, model.moe_layers, "native", lambda *report: None
        )
    return out


def engine_of(directory: Path, expert_ram: int) -> Engine:
    pool = PoolConfig(threads=1)
    pages = ROWS * PAGES_OF_ROW
    return Engine(EngineConfig(directory, "cpu", "float32", "native", pool, pages, PAGE, expert_ram=expert_ram))


@pytest.fixture(scope="module")
def resident(directory: Path) -> Iterator[Engine]:
    engine = engine_of(directory, 1 << 40)
    assert engine._experts.paging() is None  # type: ignore[union-attr]
    yield engine
    engine.close()


def answers(engine: Engine, seed: int) -> list[RowOutput]:
    """Greedy decoding of some requests whose prompts arrive in chunks, some rows in a step and some not."""
    draw = random.Random(seed)
    waiting = [[draw.randrange(engine.model.vocab_size) for _ in range(draw.randint(1, 12))] for _ in range(ROWS)]
    position, found = [0] * ROWS, []
    for _ in range(8):
        rows = []
        for i in draw.sample(range(ROWS), draw.randint(1, ROWS)):
            ids = tuple(waiting[i][: draw.randint(1, 8)])
            sampling = Sampling(temperature=0.0, logprobs=2) if len(ids) == len(waiting[i]) else None
            pages = tuple(range(i * PAGES_OF_ROW, i * PAGES_OF_ROW + -(-(position[i] + len(ids)) // PAGE)))
            rows.append(Row(i, ids, position[i], pages, sampling))
            position[i], waiting[i] = position[i] + len(ids), waiting[i][len(ids) :]
        for output in engine.step(Batch(tuple(rows))).rows:
            if output.token is not None:
                waiting[output.request_id].append(output.token)
            found.append(output)
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8])
@pytest.mark.parametrize("read_ahead", [False, True])
def test_the_same_tokens_and_logprobs(directory: Path, resident: Engine, share: float, read_ahead: bool) -> None:
    model = resident.model
    expert = model.expert_geometry.expert_bytes(model.expert_format)
    total = len(model.moe_layers) * model.n_routed_experts * expert
    engine = engine_of(directory, max(2 * (expert + 8192), int(share * total)))
    pager = engine._experts._pager  # type: ignore[union-attr]
    assert isinstance(pager, Pager)
    pager._forced = read_ahead
    for seed in range(3):
        assert answers(engine, seed) == answers(resident, seed)
    stats = pager.stats()
    assert stats.wanted > stats.hits and (stats.ahead > 0) == (read_ahead and pager._most_ahead > 0)
    assert any(recall.wanted for recall in stats.recall)
    engine.close()
