"""server.args: precedence of the sources, and what the command line refuses."""

from pathlib import Path

import pytest

from server import args
from server.options import SettingsError, server_options
from server.settings import ServerSettings


def settings(line: list[str], environ: dict[str, str] | None = None, default: Path = Path("/")) -> ServerSettings:
    return args.serve_settings(args.parser().parse_args(["serve", *line]), environ or {}, lambda: default)


def test_defaults_are_those_of_the_dataclass(tmp_path: Path) -> None:
    assert settings(["--model", str(tmp_path)]) == ServerSettings(model=tmp_path)


def test_without_a_model_nano_is_served_under_its_name(tmp_path: Path) -> None:
    assert settings([], default=tmp_path) == ServerSettings(model=tmp_path, served_model_name="nano")
    assert settings(["--served-model-name", "mine"], default=tmp_path).name == "mine"
    assert settings(["--model", str(tmp_path)]).name == tmp_path.name


def test_the_required_interface(tmp_path: Path) -> None:
    line = f"--model {tmp_path} --device cpu --dtype float32 --expert-precision a16 --expert-format int8"
    line += " --host 127.0.0.1 --port 1234 --api-key k --served-model-name kimi"
    assert settings(line.split()) == ServerSettings(
        model=tmp_path,
        device="cpu",
        dtype="float32",
        expert_precision="a16",
        expert_format="int8",
        host="127.0.0.1",
        port=1234,
        api_key=("k",),
        served_model_name="kimi",
    )


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {tmp_path}\nport: 1\nmax-running: 1\npage-size: 1\n")
    environ = {"HYBRID_CONFIG": str(config), "HYBRID_PORT": "2", "HYBRID_MAX_RUNNING": "2"}
    found = settings(["--port", "3"], environ)
    assert (found.port, found.max_running, found.page_size) == (3, 2, 1)
    assert found.max_batch_tokens == ServerSettings(model=tmp_path).max_batch_tokens


def test_the_config_flag_beats_its_variable(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("port: 7\n")
    found = settings(["--config", str(config)], {"HYBRID_CONFIG": "/nowhere"}, default=tmp_path)
    assert found.port == 7


def test_a_repeated_flag_collects(tmp_path: Path) -> None:
    found = settings(["--api-key", "a,b", "--api-key", "c"], {"HYBRID_API_KEY": "z"}, default=tmp_path)
    assert found.api_key == ("a,b", "c")


def test_the_default_model_is_looked_for_only_where_none_is_named(tmp_path: Path) -> None:
    def refuse() -> Path:
        raise AssertionError("the default model was asked for")

    given = args.parser().parse_args(["serve"])
    assert args.serve_settings(given, {"HYBRID_MODEL": str(tmp_path)}, refuse).model == tmp_path


def test_a_model_that_is_no_directory() -> None:
    with pytest.raises(SettingsError, match="--model /no/such: no such directory"):
        settings(["--model", "/no/such"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["serve", "--port", "x"], "argument --port: expected a whole number from 0 to 65535, found 'x'"),
        (["serve", "--kv-memory", "inf"], "argument --kv-memory: expected a size such as 8GiB"),
        (["serve", "--api-key", ""], "argument --api-key: expected text that is not empty"),
        (["serve", "--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
        (["serve", "--prot", "1"], "unrecognized arguments: --prot"),
        (["serve", "stray"], "unrecognized arguments: stray"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required: COMMAND"),
        (["make-checkpoint", "--out", "x"], "required: --config, --seed"),
        (["pack"], "required: MODEL"),
        (["pack", "m", "--expert-format", "int5"], "argument --expert-format: invalid choice: 'int5'"),
        (["chat", "--thinking", "--instant"], "not allowed with"),
        (["chat", "--max-tokens", "0"], "argument --max-tokens: expected a whole number above 0, found '0'"),
    ],
)
def test_usage_errors(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        args.parser().parse_args(line)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_help_shows_every_option_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        args.parser().parse_args(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in server_options():
        assert option.flag in text
        assert " ".join(args.described(option).split()) in text


@pytest.mark.parametrize(("flag", "thinking"), [([], None), (["--thinking"], True), (["--instant"], False)])
def test_chat_modes(flag: list[str], thinking: bool | None) -> None:
    given = args.parser().parse_args(["chat", *flag, "tell", "me"])
    assert given.thinking is thinking
    assert given.prompt == ["tell", "me"]
