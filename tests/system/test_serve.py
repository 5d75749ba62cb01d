"""The server as a user meets it: the official client, the oracle behind it, many streams, an orderly end."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.reference import hf
from tests.system.serving import NO_STOP, Serve, Server, stop

N_STREAMS = 64


def ask(client: openai.OpenAI, model: str, text: str, max_tokens: int = 24, **options: Any) -> Any:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=max_tokens,
        temperature=0,
        logit_bias=NO_STOP,
        **options,
    )


@dataclass(slots=True)
class Folded:
    """What a stream says once its chunks are put together."""

    reasoning: str = ""
    content: str = ""
    finish: str | None = None
    completion_tokens: int | None = None

    def feed(self, chunk: Any) -> None:
        if chunk.usage:
            self.completion_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            self.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            self.content += choice.delta.content or ""
            self.finish = choice.finish_reason or self.finish


def streamed(client: openai.OpenAI, model: str, text: str, **options: Any) -> Folded:
    folded = Folded()
    with ask(client, model, text, stream=True, stream_options={"include_usage": True}, **options) as chunks:
        for chunk in chunks:
            folded.feed(chunk)
    return folded


def plain(client: openai.OpenAI, model: str, text: str, **options: Any) -> Folded:
    answer = ask(client, model, text, **options)
    message, finish = answer.choices[0].message, answer.choices[0].finish_reason
    reasoning = getattr(message, "reasoning_content", None) or ""
    return Folded(reasoning, message.content or "", finish, answer.usage.completion_tokens)


def test_models(server: Server, client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert server.name in names
    assert client.models.retrieve(server.name).id == server.name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_chat_streamed_and_plain_agree(server: Server, client: openai.OpenAI, thinking: str) -> None:
    options = {"extra_body": {"thinking": {"type": thinking}}}
    whole = plain(client, server.name, "Say something.", **options)
    assert whole == streamed(client, server.name, "Say something.", **options)
    assert whole.completion_tokens == 24
    assert whole.finish in ("length", "tool_calls")
    assert (whole.reasoning != "") == (thinking == "enabled")  # random weights hardly ever close the reasoning


def test_mode_by_model_alias(server: Server, client: openai.OpenAI) -> None:
    instant = plain(client, f"{server.name}-instant", "Say something.")
    assert instant == plain(
        client, server.name, "Say something.", extra_body={"chat_template_kwargs": {"thinking": False}}
    )
    thinking = plain(client, f"{server.name}-thinking", "Say something.")
    assert thinking.reasoning and not instant.reasoning


def scored(client: openai.OpenAI, model: str, ids: list[int], count: int = 5) -> Any:
    answer = client.completions.create(model=model, prompt=ids, max_tokens=0, echo=True, logprobs=count)
    assert answer.usage and answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 0
    return answer.choices[0].logprobs


def test_echoed_logprobs_equal_transformers(server: Server, client: openai.OpenAI, model_dir: Path) -> None:
    ids = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = hf.logprobs(hf.load(model_dir), ids)
    found = scored(client, server.name, ids)
    assert len(found.token_logprobs) == len(found.tokens) == len(found.text_offset) == len(ids)
    assert found.token_logprobs[0] is None
    differences = [abs(value - float(expected[t, ids[t + 1]])) for t, value in enumerate(found.token_logprobs[1:])]
    print(f" max_abs_logprob_difference={max(differences):.2e}", end="")
    assert max(differences) < 2e-3
    best = [max(top.values()) for top in found.top_logprobs[1:]]
    assert best == pytest.approx(expected[:-1].max(dim=-1).values.tolist(), abs=2e-3)


def test_echo_of_text_equals_echo_of_its_tokens(server: Server, client: openai.OpenAI) -> None:
    text = "The quick brown fox, 12345."
    tokens = post(client, "/tokenize", {"model": server.name, "prompt": text})["tokens"]
    options: dict[str, Any] = {"model": server.name, "max_tokens": 0, "echo": True, "logprobs": 1}
    by_text = client.completions.create(prompt=text, **options).choices[0]
    by_tokens = client.completions.create(prompt=tokens, **options).choices[0]
    assert by_text.text == by_tokens.text == text
    assert by_text.logprobs == by_tokens.logprobs


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A JSON route outside the client's own methods."""
    root = str(client.base_url).removesuffix("/v1/")
    answer: dict[str, Any] = client.post(root + path, body=body, cast_to=dict[str, Any])
    return answer


def test_tokenize_and_detokenize(server: Server, client: openai.OpenAI) -> None:
    text = "naïve <|im_end|> 😀"
    plainly = post(client, "/tokenize", {"prompt": text})
    assert plainly["count"] == len(plainly["tokens"]) == len(text.encode())  # one token for each byte here
    assert plainly["max_model_len"] > 0
    assert post(client, "/detokenize", {"tokens": plainly["tokens"]})["prompt"] == text
    special = post(client, "/tokenize", {"prompt": text, "parse_special": True})
    assert special["count"] == len(text.encode()) - len("<|im_end|>") + 1
    assert post(client, "/detokenize", {"tokens": special["tokens"]})["prompt"] == text


def test_tokenized_messages_are_the_rendered_chat(server: Server, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    rendered = post(client, "/tokenize", {"messages": messages, "chat_template_kwargs": {"thinking": False}})
    assert post(client, "/detokenize", {"tokens": rendered["tokens"]})["prompt"] == (
        "<|im_user|>user<|im_middle|>hi <|im_end|><|im_end|><|im_assistant|>assistant<|im_middle|><think></think>"
    )
    ends = post(client, "/tokenize", {"prompt": "<|im_end|>", "parse_special": True})["tokens"]
    assert rendered["tokens"].count(ends[0]) == 1  # the user's own marker stays text


def test_metrics_count_what_was_done(server: Server, client: openai.OpenAI) -> None:
    before = server.metrics()
    usage = ask(client, server.name, "Count me.", max_tokens=9).usage
    after = server.metrics()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == usage.completion_tokens == 9
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == usage.prompt_tokens
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[gauge] == 0


class ReadyProbe(threading.Thread):
    """Asks /readyz all the time and keeps each answer's status and seconds."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.done = threading.Event()
        self.answers: list[tuple[int, float]] = []

    def run(self) -> None:
        while not self.done.is_set():
            start = time.perf_counter()
            status, _ = self.server.get("/readyz")
            self.answers.append((status, time.perf_counter() - start))
            self.done.wait(0.02)


def settled(read: Callable[[], Any], wanted: Callable[[Any], bool], seconds: float = 10) -> Any:
    """The first reading that is as wanted, or the last one."""
    deadline = time.monotonic() + seconds
    while not wanted(value := read()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


def test_many_streams_at_once(server: Server) -> None:
    texts = [f"Request number {i}: " + "tell me more. " * (i % 5) for i in range(N_STREAMS)]
    with server.client() as client:
        alone = [plain(client, server.name, text) for text in texts]
        assert len({(a.reasoning, a.content) for a in alone}) > N_STREAMS // 2
        streamed(client, server.name, texts[0])
    before = settled(server.n_fds, lambda fds: False, 1)
    probe = ReadyProbe(server)
    probe.start()
    with server.client() as client, ThreadPoolExecutor(N_STREAMS) as pool:
        found = list(pool.map(lambda text: streamed(client, server.name, text), texts))
    probe.done.set()
    probe.join()
    worst = max(seconds for _, seconds in probe.answers)
    print(f" readyz_max_ms={worst * 1e3:.1f} of {len(probe.answers)}", end="")
    assert found == alone
    assert {status for status, _ in probe.answers} == {200}
    assert worst < 1  # the aim is 0.1 s; a busy test machine may take longer
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [settled(server.metrics, lambda m: not any(m[g] for g in gauges))[g] for g in gauges] == [0, 0, 0]
    after = settled(server.n_fds, lambda fds: fds == before)
    assert after == before


def test_disconnect_frees_the_request(server: Server, client: openai.OpenAI) -> None:
    before = server.metrics()["generation_tokens_total"]
    chunks = ask(client, server.name, "Go on.", max_tokens=4000, stream=True)
    next(iter(chunks))
    chunks.close()
    after = settled(server.metrics, lambda m: m["num_requests_running"] == 0 and m["kv_cache_usage_perc"] == 0)
    assert after["num_requests_running"] == 0 and after["kv_cache_usage_perc"] == 0
    assert after["generation_tokens_total"] - before < 4000


def test_key_is_asked_for_and_sigterm_lets_a_stream_finish(serve: Serve, model_dir: Path) -> None:
    with serve(model_dir, "--api-key", "secret", "--served-model-name", "org/tiny") as server:
        with server.client("wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert server.get("/v1/models")[0] == 401
        assert server.get("/livez")[0] == server.get("/readyz")[0] == 200
        children = server.tree()[1:]
        assert children, "the engine is to live in its own process"
        with server.client("secret") as client:
            assert client.models.retrieve("org/tiny").id == "org/tiny"
            chunks = ask(client, "org/tiny", "Go on.", max_tokens=100, stream=True)
            folded = Folded()
            folded.feed(next(iter(chunks)))
            status: list[int] = []
            stopper = threading.Thread(target=lambda: status.append(stop(server)))
            stopper.start()
            for chunk in chunks:
                folded.feed(chunk)
            stopper.join()
        assert folded.finish == "length"
        assert status == [0]
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in server.log.read_text()
