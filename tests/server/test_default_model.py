"""server.default_model: nano ships whole, is found where it was installed, and a start without it says so."""

import json
import os
from pathlib import Path

import pytest

from hybrid.config import ModelConfig
from server import app, default_model
from server.__main__ import main
from server.options import SettingsError
from server.settings import ServerSettings


def test_the_files_are_those_of_a_published_checkpoint() -> None:
    directory = default_model.directory()
    assert (directory.parent.parent / "config.py").is_file()  # beside the code of this very installation
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) <= set(default_model.FILES)
    config = ModelConfig.from_directory(directory)
    assert config.model_type == "kimi_k25"
    assert config.expert_format == "int4"
    assert config.max_position_embeddings >= 8192
    assert config.n_routed_experts >= 32 and config.num_experts_per_tok >= 4


@pytest.mark.parametrize("gone", default_model.FILES)
def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    whole = default_model.directory()
    partial = tmp_path / "nano" / "model"
    partial.mkdir(parents=True)
    for name in set(default_model.FILES) - {gone}:
        (partial / name).symlink_to(whole / name)
    monkeypatch.setattr(default_model.resources, "files", lambda package: tmp_path)
    with pytest.raises(SettingsError, match="this installation has no nano: install hybrid again") as error:
        default_model.directory()
    assert str(error.value).startswith(f"{partial / gone}: ")
    (partial / gone).symlink_to(whole / gone)
    assert default_model.directory() == partial


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the operator's own settings."""
    for name in [name for name in os.environ if name.startswith("HYBRID_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_settings")
def test_a_start_without_a_model_serves_nano(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[ServerSettings] = []
    monkeypatch.setattr(app, "run", lambda settings: served.append(settings) or 0)
    assert main(["serve"]) == 0
    assert (served[0].model, served[0].name) == (default_model.directory(), "nano")
    assert capsys.readouterr().err == default_model.NOTICE + "\n"
    assert main(["serve", "--model", str(tmp_path)]) == 0
    assert served[1].model == tmp_path
    assert capsys.readouterr().err == ""  # the notice is for nano alone


@pytest.mark.usefixtures("no_settings")
def test_a_start_without_nano_is_one_line_and_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(default_model.resources, "files", lambda package: tmp_path)
    assert main(["serve"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hybrid: {tmp_path / 'nano' / 'model' / 'config.json'}: no such file")
