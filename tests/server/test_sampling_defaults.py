"""server.sampling_defaults: generation_config.json under the request, Kimi's advice under that."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid.batch import Sampling
from hybrid.config_json import ConfigError
from server import default_model
from server.openai_request import read_sampling
from server.sampling_defaults import SamplingDefaults, load_sampling_defaults
from server.validation import Fields
from tests.reference.fake_server import fake_server, write_model

DEEPSEEK_V3 = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


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


def test_the_server_serves_them(tmp_path: Path) -> None:
    # The fake's greedy tokens depend on nothing but the prompt; a sampled answer depends on the seed.
    model = write_model(tmp_path / "greedy")
    (model / "generation_config.json").write_text('{"do_sample": false}')
    with fake_server(model) as server:

        def answers(path: str, body: dict[str, Any]) -> list[Any]:
            return [
                server.ask("POST", path, {**body, "max_tokens": 8, "seed": seed}).body["choices"] for seed in (1, 2)
            ]

        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
        for path, body in (
            (CHAT, {**chat, "model": "tiny-thinking"}),
            (CHAT, {**chat, "model": "tiny-instant"}),
            (COMPLETIONS, {"prompt": "x"}),
        ):
            first, second = answers(path, body)
            assert first == second
            first, second = answers(path, {**body, "temperature": 1})
            assert first != second


def test_nano_is_greedy_where_nobody_says_otherwise() -> None:
    found = load_sampling_defaults(default_model.directory(), is_kimi=True)
    assert [s.temperature for s in (found.thinking, found.instant, found.completion)] == [0.0, 0.0, 0.0]
