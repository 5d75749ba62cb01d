"""Bad requests and bad checkpoints: a clear error that names the field or the file, and a server that stays up."""

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid.random_checkpoint import write_checkpoint
from tests import families
from tests.system.serving import ROOT, Server, command, environment, free_port

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
USER: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def post(server: Server, path: str, body: bytes, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    """Status and decoded body of a POST."""
    request = urllib.request.Request(server.url + path, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture(autouse=True)
def still_up(server: Server) -> Any:
    """After every case the same server still answers, from the same engine process."""
    before = [process.pid for process in server.tree()]
    yield
    status, body = post(
        server, COMPLETIONS, json.dumps({"model": server.name, "prompt": [1, 2], "max_tokens": 1}).encode()
    )
    assert status == 200 and body["choices"]
    assert [process.pid for process in server.tree()] == before


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": USER, "max_tokens": 2} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": [1, 2, 3], "max_tokens": 2} | fields


# path, body without the model, the field that the error must name
WRONG_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, chat(messages="hi"), "messages"),
    (CHAT, chat(messages=[]), "messages"),
    (CHAT, chat(messages=["hi"]), "messages"),
    (CHAT, chat(messages=[{"content": "hi"}]), "role"),
    (CHAT, chat(messages=[{"role": "wizard", "content": "hi"}]), "role"),
    (CHAT, chat(messages=[{"role": "user", "content": 7}]), "content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "content"),
    (CHAT, chat(temperature="hot"), "temperature"),
    (CHAT, chat(temperature=-1), "temperature"),
    (CHAT, chat(top_p=2), "top_p"),
    (CHAT, chat(top_p=True), "top_p"),
    (CHAT, chat(max_tokens="many"), "max_tokens"),
    (CHAT, chat(max_tokens=-1), "max_tokens"),
    (CHAT, chat(max_tokens=10**30), "max_tokens"),
    (CHAT, chat(max_tokens=2.5), "max_tokens"),
    (CHAT, chat(n=0), "n"),
    (CHAT, chat(n=10**6), "n"),
    (CHAT, chat(stream="yes"), "stream"),
    (CHAT, chat(stop=5), "stop"),
    (CHAT, chat(stop=["a"] * 100), "stop"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(logit_bias={"x": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"99999": 1}), "logit_bias"),
    (CHAT, chat(logit_bias=[1]), "logit_bias"),
    (CHAT, chat(seed="x"), "seed"),
    (CHAT, chat(tools="all"), "tools"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools"),
    (CHAT, chat(tool_choice="required"), "tool_choice"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format"),
    (CHAT, chat(thinking="on"), "thinking"),
    (CHAT, chat(thinking={"type": "perhaps"}), "thinking"),
    (CHAT, chat(chat_template_kwargs={"thinking": "no"}), "thinking"),
    (CHAT, chat(reasoning_effort=3), "reasoning_effort"),
    (COMPLETIONS, {"max_tokens": 2}, "prompt"),
    (COMPLETIONS, completion(prompt={}), "prompt"),
    (COMPLETIONS, completion(prompt=[]), "prompt"),
    (COMPLETIONS, completion(prompt=[512]), "prompt"),
    (COMPLETIONS, completion(prompt=[-1]), "prompt"),
    (COMPLETIONS, completion(prompt=[1.5]), "prompt"),
    (COMPLETIONS, completion(prompt=[True]), "prompt"),
    (COMPLETIONS, completion(prompt=[1, "a"]), "prompt"),
    (COMPLETIONS, completion(logprobs=21), "logprobs"),
    (COMPLETIONS, completion(logprobs=-1), "logprobs"),
    (COMPLETIONS, completion(echo="yes"), "echo"),
    (COMPLETIONS, completion(suffix="end"), "suffix"),
    (TOKENIZE, {}, "prompt"),
    (TOKENIZE, {"prompt": 5}, "prompt"),
    (DETOKENIZE, {"tokens": "abc"}, "tokens"),
    (DETOKENIZE, {"tokens": [10**12]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "field"), WRONG_FIELDS)
def test_wrong_field_is_named(server: Server, path: str, body: dict[str, Any], field: str) -> None:
    status, answer = post(server, path, json.dumps(body | {"model": server.name}).encode())
    assert status == 400, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert field in (error["param"] or "") and field in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b'{"a": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
    ids=["empty", "cut", "array", "null", "nan", "utf8", "overflow", "deep", "deep_objects"],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE])
def test_malformed_json(server: Server, path: str, body: bytes) -> None:
    status, answer = post(server, path, body)
    assert status == 400 and "body" in answer["error"]["message"]


def test_unknown_model(server: Server) -> None:
    status, answer = post(server, CHAT, json.dumps(chat(model="gpt-9")).encode())
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert "gpt-9" in answer["error"]["message"] and server.name in answer["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_prompt_longer_than_the_context(server: Server, path: str) -> None:
    limit = post(server, TOKENIZE, json.dumps({"prompt": "a"}).encode())[1]["max_model_len"]
    text = "a" * (limit + 1)
    body = chat(messages=[{"role": "user", "content": text}]) if path == CHAT else completion(prompt=text)
    status, answer = post(server, path, json.dumps(body | {"model": server.name}).encode())
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert str(limit) in answer["error"]["message"]


def test_answer_longer_than_the_context(server: Server) -> None:
    limit = post(server, TOKENIZE, json.dumps({"prompt": "a"}).encode())[1]["max_model_len"]
    status, answer = post(server, COMPLETIONS, json.dumps(completion(model=server.name, max_tokens=limit)).encode())
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_lone_surrogate_and_control_characters_are_served(server: Server) -> None:
    body = b'{"model": "%s", "max_tokens": 1, "messages": [{"role": "user", "content": "\\ud83d \\u0000"}]}'
    status, answer = post(server, CHAT, body % server.name.encode())
    assert status == 200 and answer["choices"]


def test_wrong_route_method_and_content_type(server: Server) -> None:
    assert post(server, "/v1/nothing", b"{}")[0] == 404
    assert server.get(CHAT)[0] == 405
    assert post(server, CHAT, json.dumps(chat(model=server.name)).encode(), "text/plain")[0] == 415


# Checkpoints. Each breaks a sound copy and says what the one line on stderr must name.


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"].update(changes)
    path.write_text(json.dumps(raw))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def missing_shard(directory: Path) -> list[str]:
    gone = shards(directory)[-1]
    gone.unlink()
    return [gone.name]


def truncated_shard(directory: Path) -> list[str]:
    cut = shards(directory)[0]
    cut.write_bytes(cut.read_bytes()[:-100])
    return [cut.name]


def truncated_header(directory: Path) -> list[str]:
    cut = shards(directory)[0]
    cut.write_bytes(cut.read_bytes()[:50])
    return [cut.name]


def pointer_instead_of_shard(directory: Path) -> list[str]:
    pointer = shards(directory)[0]
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return [pointer.name]


def wider_experts_in_config(directory: Path) -> list[str]:
    edit_config(directory, moe_intermediate_size=96)
    return ["experts", "96"]


def wider_attention_in_config(directory: Path) -> list[str]:
    edit_config(directory, v_head_dim=48)
    return ["self_attn"]


def more_layers_in_config(directory: Path) -> list[str]:
    edit_config(directory, num_hidden_layers=5)
    return ["layers.4"]


def more_experts_in_config(directory: Path) -> list[str]:
    edit_config(directory, n_routed_experts=24)
    return ["24"]


def wrong_type_in_config(directory: Path) -> list[str]:
    edit_config(directory, hidden_size="wide")
    return ["hidden_size", "config.json"]


def unknown_family(directory: Path) -> list[str]:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return ["model_type", "llama"]


def config_is_not_json(directory: Path) -> list[str]:
    (directory / "config.json").write_text("{")
    return ["config.json"]


def no_config(directory: Path) -> list[str]:
    (directory / "config.json").unlink()
    return ["config.json"]


def no_tokenizer(directory: Path) -> list[str]:
    (directory / "tiktoken.model").unlink()
    return ["tiktoken.model"]


def tokenizer_of_a_larger_vocabulary(directory: Path) -> list[str]:
    edit_config(directory, vocab_size=500)
    return ["tokenizer", "511", "vocab_size 500"]


BREAKS: list[Callable[[Path], list[str]]] = [
    missing_shard,
    truncated_shard,
    truncated_header,
    pointer_instead_of_shard,
    wider_experts_in_config,
    wider_attention_in_config,
    more_layers_in_config,
    more_experts_in_config,
    wrong_type_in_config,
    unknown_family,
    config_is_not_json,
    no_config,
    no_tokenizer,
    tokenizer_of_a_larger_vocabulary,
]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint of several shards."""
    directory = tmp_path_factory.mktemp("sound") / "model"
    write_checkpoint(families.kimi_k25(), directory, seed=1, tokenizer=None, shard_bytes=1 << 19)
    assert len(shards(directory)) > 2
    return directory


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_broken_checkpoint_ends_with_one_clear_line(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], list[str]]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(sharded, directory)
    named = damage(directory)
    done = subprocess.run(
        [*command(directory, free_port()), "--log-level", "error"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 78, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for name in named:
        assert name in lines[0]
