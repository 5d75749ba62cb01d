"""server.engine_builder: what the ledger says of weights and KV is what the engine allocates, to the byte."""

from pathlib import Path
from typing import Any

import pytest

import hybrid.engine
from hybrid.batch import Batch, Row, Sampling
from hybrid.config import KvDtype, ModelConfig
from hybrid.random_checkpoint import write_checkpoint
from placement.plan import WeightDtype, write_plan
from placement.probe import find_hardware
from placement.tensor_bytes import group_of
from server.engine_builder import build_engine
from server.engine_process import Built
from server.settings import ServerSettings
from tests import families
from tests.reference import plans

RAW = {"bf16": families.kimi_k25, "fp8": families.deepseek_v3_odd}


@pytest.fixture(scope="module", params=RAW)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose matrices are published in bf16, and one in fp8."""
    path = tmp_path_factory.mktemp("built") / request.param
    write_checkpoint(RAW[request.param](), path, seed=5, tokenizer=None)
    return path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[hybrid.engine.Engine]:
    """The engines that are made."""
    made: list[hybrid.engine.Engine] = []

    class Kept(hybrid.engine.Engine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(hybrid.engine, "Engine", Kept)
    return made


def build(settings: ServerSettings) -> Built:
    return build_engine(settings, lambda *_: None, lambda _: None)


def held(engine: hybrid.engine.Engine) -> dict[str, int]:
    """Bytes of the tensors by the ledger's words for them."""
    found = {"KV": sum(part.nbytes for part in engine._cache.storage())}
    for name, tensor in engine._tensors.items():
        found[group_of(name)] = found.get(group_of(name), 0) + tensor.nbytes
    return found


@pytest.mark.parametrize(
    ("dtype", "kv"), [("float32", "model"), ("bfloat16", "int8"), ("fp8", "model"), ("int8", "fp8")]
)
def test_the_ledger_is_what_the_engine_allocates(
    directory: Path, engines: list[hybrid.engine.Engine], dtype: WeightDtype, kv: KvDtype
) -> None:
    built = build(ServerSettings(directory, device="cpu", dtype=dtype, kv_dtype=kv, kv_memory=2**20, threads=1))
    try:
        (engine,) = engines
        said = {line.what.split(":")[0]: line.size for line in built.plan.ledger if line.where == "device"}
        for what, n_bytes in held(engine).items():
            assert said[what] == n_bytes, what
        assert built.plan.settings.weights == dtype and built.plan.settings.kv_dtype == kv
        row = Row(1, tuple(range(5, 25)), 0, (0, 1), Sampling(temperature=0.0))
        (answer,) = built.step(Batch((row,))).rows
        assert answer.token is not None
    finally:
        built.close()


def test_a_plan_in_a_file_is_what_is_loaded(
    directory: Path, tmp_path: Path, engines: list[hybrid.engine.Engine]
) -> None:
    model = ModelConfig.from_directory(directory)
    path = tmp_path / "plan.yaml"
    chosen = {"weights": "int8", "kv_dtype": "fp8", "expert_precision": "a8"}
    write_plan(path, plans.plan(model, find_hardware(directory), **chosen))
    built = build(ServerSettings(directory, plan=path))
    try:
        (engine,) = engines
        assert (engine.config.dtype, engine.config.narrow, engine.config.kv_dtype) == ("bfloat16", "int8", "fp8")
        assert engine.config.n_pages == 77
        assert held(engine)["KV"] == 77 * 8 * model.num_hidden_layers * (model.latent_size + 8)
    finally:
        built.close()
