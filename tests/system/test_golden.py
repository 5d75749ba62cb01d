"""The golden vectors through HTTP: a real server with the published tokenizer renders, encodes and decodes them."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid.random_checkpoint import write_checkpoint
from tests import families
from tests.reference.golden import cases, ids_of, text_of
from tests.system.serving import Serve, Server


@pytest.fixture(scope="module")
def server(kimi_dir: Path, serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = families.kimi_k25()
    published = json.loads((kimi_dir / "config.json").read_text())
    for level in (config, config["text_config"]):
        ids = {key: published[key] for key in level if key.endswith("_token_id") and key in published}
        level |= ids | ({"vocab_size": published["text_config"]["vocab_size"]} if "vocab_size" in level else {})
    directory = tmp_path_factory.mktemp("model") / "full-vocabulary"
    write_checkpoint(config, directory, seed=3, tokenizer=kimi_dir)
    with serve(directory) as running:
        yield running


def ask(server: Server, path: str, **body: Any) -> Any:
    data = json.dumps({"model": server.name, **body}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def unfold(value: Any) -> Any:
    """A JSON value with its long texts written out."""
    if isinstance(value, list):
        return [unfold(one) for one in value]
    if isinstance(value, dict) and not set(value) & {"repeat", "concat"}:
        return {key: unfold(one) for key, one in value.items()}
    return text_of(value) if isinstance(value, dict) else value


def test_templates(server: Server, kimi_dir: Path) -> None:
    for case in cases(kimi_dir, "template"):
        want = case.get("ids_literal") or case["ids"]
        if want is None:  # a video's ids are not known before its frames are
            continue
        answer = ask(
            server,
            "/tokenize",
            messages=unfold(case["messages"]),
            **({"tools": case["tools"]} if case["tools"] is not None else {}),
            add_generation_prompt=case["add_generation_prompt"],
            continue_final_message=case["continue_final_message"],
            chat_template_kwargs={"thinking": case["thinking"], "preserve_thinking": case["preserve_thinking"]},
        )
        assert answer["tokens"] == ids_of(want), case["id"]
        assert answer["count"] == len(answer["tokens"])


def test_encode(server: Server, kimi_dir: Path) -> None:
    plain = cases(kimi_dir, "tokens", "encode")
    special = cases(kimi_dir, "tokens", "encode_special")
    for case, key in [(case, "ids") for case in plain] + [(case, "ids_without") for case in special]:
        assert ask(server, "/tokenize", prompt=text_of(case["text"]))["tokens"] == ids_of(case[key]), case["id"]
    for case in special:
        answer = ask(server, "/tokenize", prompt=text_of(case["text"]), parse_special=True)
        assert answer["tokens"] == ids_of(case["ids"]), case["id"]


def test_decode(server: Server, kimi_dir: Path) -> None:
    for case in cases(kimi_dir, "tokens", "decode"):
        assert ask(server, "/detokenize", tokens=ids_of(case["ids"]))["prompt"] == text_of(case["text"]), case["id"]
