"""The `hybrid` command as a process: exit statuses, clean streams, no tracebacks for user errors."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid.config import ModelConfig
from server.engine_builder import _maps_packed_file
from server.settings import ServerSettings

REPO = Path(__file__).resolve().parents[2]
SMALL_CONFIG = REPO / "tests" / "reference" / "small_model.json"


def hybrid(*line: str, env: dict[str, str] | None = None, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HYBRID_")}
    command = [sys.executable, "-m", "server", *line]
    return subprocess.run(
        command, cwd=REPO, env={**clean, **(env or {})}, input=stdin, capture_output=True, text=True, timeout=120
    )


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_version() -> None:
    done = hybrid("version")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("hybrid ")
    assert "torch" in lines[1]
    assert "numba" in lines[1]


def test_usage_is_2() -> None:
    done = hybrid("serve", "--port", "http")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "argument --port: expected a whole number from 0 to 65535, found 'http'" in done.stderr
    assert hybrid().returncode == 2


def test_the_home_of_nobody_is_a_usage_error() -> None:
    done = hybrid("serve", "--model", "~no-such-user/x")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    words = "expected a path (after ~, of a user with a home directory), found '~no-such-user/x'"
    assert done.stderr.splitlines()[-1].endswith(f"argument --model: {words}")
    done = hybrid("serve", env={"HYBRID_MODEL": "~no-such-user/x"})
    assert done.returncode == 78
    assert one_line(done).startswith("hybrid: HYBRID_MODEL=~no-such-user/x: expected a path")


@pytest.mark.parametrize(
    ("line", "env", "words"),
    [
        (["serve", "--model", "/no/such"], {}, "--model /no/such: no such directory"),
        (["serve"], {"HYBRID_PROT": "1"}, "unknown environment variable HYBRID_PROT; did you mean HYBRID_PORT?"),
        (["serve"], {"HYBRID_CONFIG": "/no.yaml"}, "/no.yaml: cannot be read"),
        (["make-checkpoint", "--config", "/no.json", "--out", "x", "--seed", "1"], {}, "/no.json: No such file"),
    ],
)
def test_configuration_is_78(line: list[str], env: dict[str, str], words: str) -> None:
    done = hybrid(*line, env=env)
    assert done.returncode == 78
    assert words in one_line(done)


def test_a_config_file_error_names_file_and_key(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("max-model-length: 4\n")
    done = hybrid("serve", "--config", str(config))
    assert done.returncode == 78
    assert one_line(done) == f"hybrid: {config}: unknown key max-model-length; did you mean max-model-len?"


def test_make_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "made"
    line = ("make-checkpoint", "--config", str(SMALL_CONFIG), "--out", str(out), "--seed", "3")
    done = hybrid(*line)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}\n"
    assert (out / "model.safetensors.index.json").is_file()
    again = hybrid(*line)
    assert again.returncode == 78
    assert str(out) in one_line(again)


def test_pack(tmp_path: Path) -> None:
    model = tmp_path / "made"
    assert hybrid("make-checkpoint", "--config", str(SMALL_CONFIG), "--out", str(model), "--seed", "3").returncode == 0
    done = hybrid("pack", str(model))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{model / 'hybrid-experts-int4.packed'}\n"
    assert (model / "hybrid-experts-int4.packed").is_file()
    done = hybrid("pack", str(model), "--expert-format", "int8")
    assert done.returncode == 0
    assert done.stdout == f"{model / 'hybrid-experts-int8.packed'}\n"
    assert "experts converted from int4 to int8: relative RMS weight error" in one_line(done)
    (model / "hybrid-experts-int4.packed").write_bytes(b"")
    assert hybrid("pack", str(model)).returncode == 0  # written anew
    assert (model / "hybrid-experts-int4.packed").stat().st_size > 0
    settings, config = ServerSettings(model=model), ModelConfig.from_directory(model)
    assert _maps_packed_file(settings, config)
    assert not _maps_packed_file(replace(settings, experts="kt"), config)
    os.utime(next(model.glob("*.safetensors")))  # the ledger must not count on a file that will not be used
    assert not _maps_packed_file(settings, config)


def test_pack_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    done = hybrid("pack", str(tmp_path))
    assert done.returncode == 78
    assert str(tmp_path) in one_line(done)
    assert hybrid("pack").returncode == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[]", ""), ("{}", "model_type"), ('{"model_type": "llama"}', "llama")],
)
def test_make_checkpoint_refuses_a_bad_config(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    done = hybrid("make-checkpoint", "--config", str(config), "--out", str(tmp_path / "o"), "--seed", "1")
    assert done.returncode == 78
    assert words in one_line(done)
    assert not (tmp_path / "o").exists()


def test_make_checkpoint_names_a_missing_key(tmp_path: Path) -> None:
    raw = json.loads(SMALL_CONFIG.read_text())
    del raw["text_config"]["kv_lora_rank"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(raw))
    done = hybrid("make-checkpoint", "--config", str(config), "--out", str(tmp_path / "o"), "--seed", "1")
    assert done.returncode == 78
    assert "kv_lora_rank" in one_line(done)


def test_chat_does_without_standard_input() -> None:
    line = [sys.executable, "-m", "server", "chat", "--url", "127.0.0.1:9/v1", "hello"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *line], cwd=REPO, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert one_line(done).startswith("hybrid: http://127.0.0.1:9: ")


def test_chat_without_a_server_says_so() -> None:
    done = hybrid("chat", "--url", "http://127.0.0.1:9", "hello")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is the server running?" in one_line(done)
