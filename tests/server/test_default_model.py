"""server.default_model: made once, found again, replaced when damaged."""

from pathlib import Path

import pytest

from hybrid.config import ModelConfig
from server.default_model import NAME, default_model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def never() -> None:
    raise AssertionError("the checkpoint was written again")


def test_made_once(cache: Path) -> None:
    calls: list[int] = []
    made = default_model(cache, lambda: calls.append(1))
    assert calls == [1]
    assert made.name == NAME
    assert default_model(cache, never) == made
    config = ModelConfig.from_directory(made)
    assert config.model_type == "kimi_k25"
    assert config.max_position_embeddings >= 8192
    assert config.n_routed_experts > config.num_experts_per_tok > 1
    assert list(made.parent.iterdir()) != []
    assert {path.name for path in made.parent.iterdir()} == {NAME, "manifest.json"}


def test_a_damaged_file_is_replaced(cache: Path) -> None:
    made = default_model(cache, lambda: None)
    shard = max(made.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    calls: list[int] = []
    assert default_model(cache, lambda: calls.append(1)) == made
    assert calls == [1]
    assert shard.read_bytes() == good


def test_a_missing_file_is_replaced(cache: Path) -> None:
    made = default_model(cache, lambda: None)
    (made / "config.json").unlink()
    default_model(cache, lambda: None)
    assert (made / "config.json").is_file()


def test_an_unwritable_cache_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(OSError):
        default_model(tmp_path, lambda: None)
