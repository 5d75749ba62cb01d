"""server.options: kinds, bounds, and the words of each refusal."""

import dataclasses
from pathlib import Path

import pytest

from server.options import SETTLED, SettingsError, read_environment, read_file, refuse_settled, server_options
from server.settings import ServerSettings

OPTIONS = server_options()
BY_FIELD = {option.field: option for option in OPTIONS}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hybrid.yaml"
    path.write_text(text)
    return path


def test_every_setting_is_an_option_with_help() -> None:
    assert [option.field for option in OPTIONS] == [field.name for field in dataclasses.fields(ServerSettings)]
    assert all(len(option.help) > 10 for option in OPTIONS)


def test_names() -> None:
    option = BY_FIELD["max_model_len"]
    assert (option.flag, option.key, option.variable) == ("--max-model-len", "max-model-len", "HYBRID_MAX_MODEL_LEN")


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("port", "0", 0),
        ("port", "65535", 65535),
        ("kv_memory", "4096", 4096),
        ("kv_memory", "1.5GiB", 3 * 2**29),
        ("kv_memory", "2 MB", 2_000_000),
        ("device", "cuda", "cuda"),
        ("api_key", "a,b", ("a", "b")),
        ("api_key", "a,,b,", ("a", "b")),
        ("drain_seconds", "0.5", 0.5),
        ("model", "/m", Path("/m")),
        ("plan", "/p.yaml", Path("/p.yaml")),
        ("served_model_name", "123", "123"),
    ],
)
def test_from_text(field: str, text: str, value: object) -> None:
    assert BY_FIELD[field].from_text(text) == value


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "http"),
        ("max_running", "0"),
        ("max_running", "1.5"),
        ("kv_memory", "1 GX"),
        ("kv_memory", "GiB"),
        ("kv_memory", "inf"),
        ("kv_memory", "1e999GiB"),
        ("api_key", ","),
        ("device", "gpu"),
        ("drain_seconds", "-1"),
        ("drain_seconds", "nan"),
        ("model", "~no-such-user/x"),
        ("plan", "~no-such-user/p.yaml"),
    ],
)
def test_from_text_refuses(field: str, text: str) -> None:
    with pytest.raises(ValueError):
        BY_FIELD[field].from_text(text)


def test_file_values_of_every_kind(tmp_path: Path) -> None:
    text = "model: /m\nport: 9000\nmax_model_len: 10\nkv-memory: 1GiB\napi-key: [a, b]\ndevice: cpu\ndrain-seconds: 3\n"
    assert read_file(write(tmp_path, text), OPTIONS) == {
        "model": Path("/m"),
        "port": 9000,
        "max_model_len": 10,
        "kv_memory": 2**30,
        "api_key": ("a", "b"),
        "device": "cpu",
        "drain_seconds": 3.0,
    }


def test_empty_file_and_empty_value_leave_the_defaults(tmp_path: Path) -> None:
    assert read_file(write(tmp_path, ""), OPTIONS) == {}
    assert read_file(write(tmp_path, "port:\n"), OPTIONS) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1\n", ["unknown key prot", "did you mean port?"]),
        ("zzz: 1\n", ["unknown key zzz"]),
        ("port: '8000'\n", ["port: expected a whole number from 0 to 65535, found '8000'"]),
        ("port: true\n", ["port: expected a whole number from 0 to 65535, found True"]),
        ("port: 99999\n", ["port: expected a whole number from 0 to 65535, found 99999"]),
        ("threads: 0\n", ["threads: expected a whole number above 0, found 0"]),
        ("served-model-name: 3\n", ["served-model-name: expected text, found 3"]),
        ("device: gpu\n", ["device: expected one of auto, cpu, cuda, found 'gpu'"]),
        ("api-key: [1]\n", ["api-key: expected text that is not empty, or a list of such texts"]),
        ("api-key: ''\n", ["api-key: expected text that is not empty"]),
        ("api-key: ['']\n", ["api-key: expected text that is not empty"]),
        ("- port\n", ["expected keys and values, found list"]),
        ("port: [\n", ["not YAML in line"]),
        ("port: !!python/object/apply:os.getcwd []\n", ["not YAML"]),
    ],
)
def test_file_refusals_name_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        read_file(path, OPTIONS)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read: No such file"):
        read_file(tmp_path / "none.yaml", OPTIONS)


def test_environment() -> None:
    environ = {"HYBRID_PORT": "1", "HYBRID_DEVICE": "", "PORT": "2", "HYBRID_CONFIG": "x"}
    assert read_environment(environ, OPTIONS) == {"port": 1}


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("HYBRID_PROT", "1", "unknown environment variable HYBRID_PROT; did you mean HYBRID_PORT?"),
        ("HYBRID_PORT", "x", "HYBRID_PORT=x: expected a whole number from 0 to 65535"),
        ("HYBRID_EXPERT_FORMAT", "fp4", "HYBRID_EXPERT_FORMAT=fp4: expected one of native, int8, int4"),
    ],
)
def test_environment_refusals(variable: str, text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_environment({variable: text}, OPTIONS)
    assert str(caught.value) == words


def test_kinds_of_paths() -> None:
    assert {option.field: option.kind for option in OPTIONS if option.kind in ("path", "file")} == {
        "model": "path",
        "plan": "file",
        "profile": "file",
        "record_routing": "file",
    }


@pytest.mark.parametrize("field", SETTLED)
def test_what_a_plan_settles_is_refused_beside_it(field: str) -> None:
    given = {"plan": Path("p.yaml"), "port": 1, field: BY_FIELD[field].default}
    with pytest.raises(SettingsError) as caught:
        refuse_settled(given)
    assert str(caught.value) == f"{BY_FIELD[field].flag} is settled by --plan p.yaml; leave one out"
    del given["plan"]
    refuse_settled(given)


def test_what_a_plan_leaves_open() -> None:
    refuse_settled({option.field: option.default for option in OPTIONS if option.field not in SETTLED})


@pytest.mark.parametrize(("text", "value"), [("8GiB", 8 << 30), ("0", 0), ("64000", 64000)])
def test_memory_for_kept_pages(text: str, value: int) -> None:
    (option,) = (option for option in server_options() if option.flag == "--kv-ram")
    assert option.from_text(text) == value
