"""server.sampling_defaults: generation_config.json under the request, Kimi's advice under that."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid.batch import Sampling
from hybrid.config_json import ConfigError
from server import default_model
from server.openai_request import read_sampling
from server.request import Progress, Request
from server.sampling_defaults import SamplingDefaults, load_sampling_defaults
from server.validation import Fields
from tests.reference.fake_server import FakeServer, fake_server, write_model

DEEPSEEK_V3 = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


def loaded(directory: Path, published: Any, is_kimi: bool = False) -> SamplingDefaults:
    text = published if isinstance(published, str) else json.dumps(published)
    (directory / "generation_config.json").write_text(text)
    return load_sampling_defaults(directory, is_kimi)


def test_without_a_word_from_the_checkpoint(tmp_path: Path) -> None:
    plain = load_sampling_defaults(tmp_path, is_kimi=False)
    assert plain == SamplingDefaults(Sampling(), Sampling(), Sampling())
    kimi = load_sampling_defaults(tmp_path, is_kimi=True)
    assert (kimi.thinking.temperature, kimi.thinking.top_p) == (1.0, 0.95)
    assert (kimi.instant.temperature, kimi.instant.top_p) == (0.6, 0.95)
    assert kimi.completion == Sampling()
    assert loaded(tmp_path, {"eos_token_id": 1, "max_length": 8192, "temperature": None}, is_kimi=True) == kimi


def test_the_file_beats_what_suits_the_model(tmp_path: Path) -> None:
    found = loaded(tmp_path, DEEPSEEK_V3)
    assert found.thinking == found.instant == found.completion == Sampling(temperature=0.6, top_p=0.95)
    found = loaded(tmp_path, {"temperature": 0.3, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}, is_kimi=True)
    assert found.thinking == Sampling(temperature=0.3, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.05)


def test_not_sampling_is_greedy(tmp_path: Path) -> None:
    found = loaded(tmp_path, {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1}, is_kimi=True)
    for sampling in (found.thinking, found.instant, found.completion):
        assert (sampling.temperature, sampling.repetition_penalty) == (0.0, 1.1)
    assert found.thinking.top_p == 0.95  # for a request that sends a temperature


def test_the_file_says_off_as_a_request_does(tmp_path: Path) -> None:
    assert loaded(tmp_path, {"top_k": 0, "min_p": 0, "temperature": 1, "top_p": 1.0}).completion == Sampling(top_p=1.0)
    assert loaded(tmp_path, {"top_k": -1}).completion == Sampling()


@pytest.mark.parametrize(
    ("published", "words"),
    [
        ({"temperature": "hot"}, "temperature: must be a number from 0 to 100"),
        ({"temperature": -1}, "temperature: must be"),
        ('{"temperature": NaN}', "temperature: must be"),
        ({"top_p": 1.5}, "top_p: must be"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"top_k": 2.5}, "top_k: must be an integer"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be"),
        ({"do_sample": "no"}, "do_sample: must be true or false"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, published: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, published)
    assert str(caught.value).startswith(f"{tmp_path / 'generation_config.json'}: ")
    assert words in str(caught.value)


def test_a_request_beats_the_file() -> None:
    defaults = Sampling(temperature=0.0, top_p=0.5, top_k=7, min_p=0.2, repetition_penalty=1.3)
    assert read_sampling(Fields({}), defaults) == defaults
    assert read_sampling(Fields({"temperature": 0.7, "top_p": 0.9}), defaults) == Sampling(
        temperature=0.7, top_p=0.9, top_k=7, min_p=0.2, repetition_penalty=1.3
    )
    off = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    assert read_sampling(Fields(off), defaults) == Sampling(top_p=1.0)


def drawn(server: FakeServer, path: str, body: dict[str, Any]) -> Sampling:
    """How the tokens of a request are drawn, as the engine is told; without the seed."""
    bridge, asked = server.service.bridge, list[Request]()
    submit = bridge.submit

    def note(request: Request, sink: Callable[[Progress], None]) -> None:
        asked.append(request)
        submit(request, sink)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge, "submit", note)
        assert server.ask("POST", path, {**body, "max_tokens": 1}).status == 200
    (request,) = asked
    return replace(request.sampling, seed=0)


def test_each_way_to_ask_a_kimi_gets_its_own_advice(tmp_path: Path) -> None:
    model = write_model(tmp_path / "kimi")
    (model / "generation_config.json").write_text('{"max_length": 262144, "eos_token_id": 258}')
    thinking, instant = Sampling(temperature=1.0, top_p=0.95), Sampling(temperature=0.6, top_p=0.95)
    with fake_server(model) as server:
        assert drawn(server, CHAT, ASK) == thinking
        assert drawn(server, CHAT, {**ASK, "model": "tiny-thinking"}) == thinking
        assert drawn(server, CHAT, {**ASK, "model": "tiny-instant"}) == instant
        # The mode decides, not the name it was asked for by.
        assert drawn(server, CHAT, {**ASK, "model": "tiny-thinking", "reasoning_effort": "none"}) == instant
        assert drawn(server, CHAT, {**ASK, "model": "tiny-instant", "thinking": {"type": "enabled"}}) == thinking
        for name in ("tiny", "tiny-instant"):
            assert drawn(server, COMPLETIONS, {"prompt": "x", "model": name}) == Sampling(temperature=1.0)
        said = {**ASK, "model": "tiny-instant", "temperature": 0.3, "top_k": 9}
        assert drawn(server, CHAT, said) == Sampling(temperature=0.3, top_p=0.95, top_k=9)


def test_kimis_advice_is_not_for_a_model_with_its_own_template(tmp_path: Path) -> None:
    model = write_model(tmp_path / "other")
    config = json.loads((model / "config.json").read_text())["text_config"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with fake_server(model) as server:
        for name in ("tiny-thinking", "tiny-instant"):
            assert drawn(server, CHAT, {**ASK, "model": name}) == Sampling(temperature=1.0)
        assert drawn(server, COMPLETIONS, {"prompt": "x"}) == Sampling(temperature=1.0)


def test_nano_is_greedy_until_a_request_says_otherwise() -> None:
    # The fake's greedy tokens depend on nothing but the prompt; a sampled answer depends on the seed.
    with fake_server(default_model.directory()) as server:

        def answers(path: str, body: dict[str, Any]) -> list[Any]:
            return [
                server.ask("POST", path, {**body, "max_tokens": 8, "seed": seed}).body["choices"] for seed in (1, 2)
            ]

        for path, body in (
            (CHAT, {**ASK, "model": "tiny-thinking"}),
            (CHAT, {**ASK, "model": "tiny-instant"}),
            (COMPLETIONS, {"prompt": "x"}),
        ):
            assert drawn(server, path, body).temperature == 0
            first, second = answers(path, body)
            assert first == second
            assert drawn(server, path, {**body, "temperature": 0.7}).temperature == 0.7
            first, second = answers(path, {**body, "temperature": 0.7})
            assert first != second
