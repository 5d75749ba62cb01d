"""The OpenAI endpoints as the official client sees them."""

import asyncio
import json
from typing import Any

import openai
import pytest

from hybrid.batch import Sampling
from server import openai_completions
from server.openai_request import read_options
from server.validation import as_fields
from tests.reference.fake_server import FakeServer

TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '%0267%0269functions.get_weather:0%0270{"city": "Rome"}%0271%0268'
CHAT = "/v1/chat/completions"
DONE = "data: [DONE]"


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def frames(server: FakeServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoded frames of a stream; the terminal one must be there."""
    answer = server.ask("POST", path, {**body, "stream": True})
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache" and answer.headers["X-Accel-Buffering"] == "no"
    lines = [line for line in answer.body.decode().split("\n\n") if line]
    assert lines.pop() == DONE
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_instant_chat(server: FakeServer) -> None:
    with server.client() as client:
        got = client.chat.completions.create(model="tiny-instant", messages=user("script:Grüße, Ænigma €;"))
    choice = got.choices[0]
    assert choice.message.content == "Grüße, Ænigma €" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert got.object == "chat.completion" and got.model == "tiny-instant" and got.id.startswith("chatcmpl-")
    assert got.usage is not None
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.usage.completion_tokens == len("Grüße, Ænigma €".encode()) + 1


def test_thinking_chat(server: FakeServer) -> None:
    with server.client() as client:
        got = client.chat.completions.create(model="tiny", messages=user("script:hm, well%0279Yes.;"))
    message = got.choices[0].message
    assert message.content == "Yes." and message.reasoning_content == "hm, well"  # type: ignore[attr-defined]
    assert got.usage is not None and got.usage.completion_tokens_details is not None
    assert got.usage.completion_tokens_details.reasoning_tokens == 8


@pytest.mark.parametrize("text", ["script:why?%0279Because €.;", "script:why?%0279" + CALL + ";", "no script"])
def test_stream_and_plain_reply_are_the_same(server: FakeServer, text: str) -> None:
    body = {
        "messages": user(text),
        "max_tokens": 80,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 1,
        "tools": [TOOL],
    }
    plain = server.ask("POST", CHAT, body).body
    chunks = frames(server, CHAT, {**body, "stream_options": {"include_usage": True}})
    choice = plain["choices"][0]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    for field in ("content", "reasoning_content"):
        assert "".join(delta.get(field) or "" for delta in deltas) == (choice["message"].get(field) or "")
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"]]
    for field in ("content", "reasoning_content"):
        streamed = [entry for one in logprobs if one for entry in one.get(field, [])]
        assert streamed == choice["logprobs"].get(field, [])
        assert "".join(entry["token"] for entry in streamed) == (choice["message"].get(field) or "")
        assert all(len(entry["top_logprobs"]) == 1 for entry in streamed)
    assert chunks[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    # The second prompt is found in shared pages, so only that part of the usage may differ.
    assert chunks[-1]["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


def test_shape_of_the_stream(server: FakeServer) -> None:
    body = {"model": "tiny-instant", "messages": user("script:ab;")}
    chunks = frames(server, CHAT, body)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    with_usage = frames(server, CHAT, {**body, "stream_options": {"include_usage": True}})
    assert with_usage[-1]["choices"] == [] and with_usage[-1]["usage"]["completion_tokens"] == 3
    assert [chunk["usage"] for chunk in with_usage[:-1]] == [None] * 4


def test_tool_call(server: FakeServer) -> None:
    with server.client() as client:
        got = client.chat.completions.create(
            model="tiny-instant", messages=user(f"script:{CALL};"), tools=[TOOL], tool_choice="auto"
        )
    choice = got.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.id == "functions.get_weather:0"
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Rome"}


def test_streamed_tool_call_through_the_clients_accumulator(server: FakeServer) -> None:
    second = '%0269functions.get_weather:1%0270{"city": "Oslo"}%0271'
    script = CALL.removesuffix("%0268") + second + "%0268"
    with server.client() as client:
        with client.chat.completions.stream(
            model="tiny-instant", messages=user(f"script:{script};"), tools=[TOOL]
        ) as stream:
            got = stream.get_final_completion()
    choice = got.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    assert [call.id for call in choice.message.tool_calls] == ["functions.get_weather:0", "functions.get_weather:1"]
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * 2
    assert [json.loads(c.function.arguments)["city"] for c in choice.message.tool_calls] == ["Rome", "Oslo"]


def test_tool_deltas_name_their_call_once(server: FakeServer) -> None:
    body = {"model": "tiny-instant", "messages": user(f"script:{CALL};"), "tools": [TOOL]}
    deltas = [chunk["choices"][0]["delta"] for chunk in frames(server, CHAT, body)]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    function = {"name": "get_weather", "arguments": ""}
    assert calls[0] == {"index": 0, "id": "functions.get_weather:0", "type": "function", "function": function}
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:])


def test_a_truncated_call_is_no_tool_calls(server: FakeServer) -> None:
    with server.client() as client:
        got = client.chat.completions.create(
            model="tiny-instant", messages=user(f"script:{CALL};"), tools=[TOOL], max_tokens=30
        )
    assert got.choices[0].finish_reason == "length"


def test_tool_choice_none_does_not_declare_the_tools(server: FakeServer) -> None:
    body = {"model": "tiny-instant", "messages": user("script:x;")}
    plain = server.ask("POST", CHAT, body).body["usage"]["prompt_tokens"]
    none = {**body, "tools": [TOOL], "tool_choice": "none"}
    assert server.ask("POST", CHAT, none).body["usage"]["prompt_tokens"] == plain
    declared = {**body, "tools": [TOOL]}
    assert server.ask("POST", CHAT, declared).body["usage"]["prompt_tokens"] > plain


def test_stop_n_and_max_completion_tokens(server: FakeServer) -> None:
    with server.client() as client:
        cut = client.chat.completions.create(
            model="tiny-instant", messages=user("script:one two three;"), stop=[" thr", "zzz"]
        )
        several = client.chat.completions.create(
            model="tiny-instant", messages=user("anything"), n=3, max_completion_tokens=6, seed=1
        )
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one two", "stop")
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) == 3
    assert {choice.finish_reason for choice in several.choices} == {"length"}
    assert several.usage is not None and several.usage.completion_tokens == 18


def test_streamed_choices_fold_to_the_plain_ones(server: FakeServer) -> None:
    body = {"model": "tiny-instant", "messages": user("anything"), "n": 3, "max_tokens": 6, "seed": 1}
    plain = server.ask("POST", CHAT, body).body
    chunks = frames(server, CHAT, body)
    for choice in plain["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant" and all("role" not in c["delta"] for c in mine[1:])
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]


def test_a_partial_answer_is_continued(server: FakeServer) -> None:
    messages = [*user("script:%0065;"), {"role": "assistant", "content": "The answer", "partial": True}]
    tokens = server.ask("POST", "/tokenize", {"messages": messages, "model": "tiny-instant"}).body["tokens"]
    assert bytes(tokens[-10:]) == b"The answer"
    with server.client() as client:
        got = client.chat.completions.create(model="tiny-instant", messages=messages)
    assert got.choices[0].message.content == "A"


@pytest.mark.parametrize(
    ("extra", "thinking"),
    [
        ({}, True),
        ({"model": "tiny-instant"}, False),
        ({"model": "tiny-thinking"}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"model": "tiny-instant", "thinking": {"type": "enabled"}}, True),
        ({"model": "tiny-thinking", "reasoning_effort": "none"}, False),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": False}}, False),
    ],
)
def test_modes(server: FakeServer, extra: dict[str, Any], thinking: bool) -> None:
    body = {"messages": user("script:abc;"), **extra}
    message = server.ask("POST", CHAT, body).body["choices"][0]["message"]
    assert message.get("reasoning_content") == ("abc" if thinking else None)
    assert message["content"] == ("" if thinking else "abc")


def test_preserved_thinking_reaches_the_template(server: FakeServer) -> None:
    old = {"role": "assistant", "content": "B", "reasoning_content": "because"}
    messages = [*user("A"), old, *user("C")]
    switches = {"chat_template_kwargs": {"preserve_thinking": True}, "thinking": {"type": "enabled", "keep": "all"}}
    for name, value in switches.items():
        kept = server.ask("POST", "/tokenize", {"messages": messages, name: value}).body["tokens"]
        assert b"because" in bytes(i for i in kept if i < 256)
    dropped = server.ask("POST", "/tokenize", {"messages": messages}).body["tokens"]
    assert b"because" not in bytes(i for i in dropped if i < 256)


def test_completions_echo_and_score(server: FakeServer) -> None:
    ids = [*"né".encode(), 300, 511, 97]
    with server.client() as client:
        got = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=2, max_tokens=0)
    choice = got.choices[0]
    assert choice.logprobs is not None and choice.finish_reason == "length"
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert tokens is not None and offsets is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.top_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(tokens) == len(offsets) == len(ids)
    assert choice.logprobs.token_logprobs[0] is None and None not in choice.logprobs.token_logprobs[1:]
    assert "".join(tokens) == choice.text and tokens[:3] == ["n", "", "é"]
    assert all(choice.text[at:].startswith(token) for token, at in zip(tokens, offsets, strict=True))
    for token, logprob, top in zip(
        tokens[1:], choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], strict=True
    ):
        assert top is not None and top[token] == logprob and len(top) == 3
    assert got.usage is not None and (got.usage.prompt_tokens, got.usage.completion_tokens) == (6, 0)


def test_a_long_scored_prompt_leaves_the_event_loop_alone(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop: list[bool] = []
    score = openai_completions._Logprobs.add

    def spy(self: Any, *args: Any) -> None:
        on_loop.append(asyncio._get_running_loop() is not None)
        score(self, *args)

    monkeypatch.setattr(openai_completions._Logprobs, "add", spy)
    body = {"prompt": [7, 8, 9], "echo": True, "logprobs": 20, "max_tokens": 0}
    assert server.ask("POST", "/v1/completions", body).status == 200
    assert frames(server, "/v1/completions", body)
    assert on_loop == [False] * 6


def test_completions_echo_and_go_on(server: FakeServer) -> None:
    body = {"prompt": "script:cd;", "echo": True, "logprobs": 0, "max_tokens": 8, "temperature": 0}
    choice = server.ask("POST", "/v1/completions", body).body["choices"][0]
    assert choice["text"] == "script:cd;cd" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == [*"script:cd;", "c", "d", ""]  # the end is a token without text
    assert choice["logprobs"]["text_offset"] == [*range(13)]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * 12
    chunks = frames(server, "/v1/completions", body)
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"][field]]
        assert streamed == choice["logprobs"][field]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"


def test_completions_take_several_prompts(server: FakeServer) -> None:
    with server.client() as client:
        got = client.completions.create(model="tiny", prompt=["script:a;", "script:b;"], n=2)
        mixed = client.completions.create(model="tiny", prompt=[[*b"script:c;"], [*b"script:d;"]])
        streamed = list(client.completions.create(model="tiny", prompt="script:ef;", stream=True))
    assert [choice.text for choice in got.choices] == ["a", "a", "b", "b"]
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in mixed.choices] == ["c", "d"]
    assert "".join(chunk.choices[0].text for chunk in streamed) == "ef"
    assert got.id.startswith("cmpl-") and got.object == "text_completion"


def test_special_tokens_in_completions(server: FakeServer) -> None:
    body = {"prompt": "script:a%0279b;<think>"}
    ask = server.ask
    assert ask("POST", "/v1/completions", body).body["choices"][0]["text"] == "ab"
    shown = {**body, "skip_special_tokens": False}
    assert ask("POST", "/v1/completions", shown).body["choices"][0]["text"] == "a</think>b"
    parsed = {**body, "parse_special": True}
    n = [ask("POST", "/v1/completions", one).body["usage"]["prompt_tokens"] for one in (body, parsed)]
    assert n[0] - n[1] == len("<think>") - 1


def test_sampling_defaults(server: FakeServer) -> None:
    # The fake's greedy tokens depend on nothing but the prompt; a sampled answer depends on the seed.
    for body, path in (({"messages": user("x")}, CHAT), ({"prompt": "x"}, "/v1/completions")):
        seeds = [server.ask("POST", path, {**body, "max_tokens": 8, "seed": s}).body["choices"] for s in (1, 2)]
        greedy = [
            server.ask("POST", path, {**body, "max_tokens": 8, "seed": s, "temperature": 0}).body["choices"]
            for s in (1, 2)
        ]
        assert seeds[0] != seeds[1] and greedy[0] == greedy[1]


def test_ignore_eos_goes_on(server: FakeServer) -> None:
    body = {"prompt": "script:ab;", "ignore_eos": True, "max_tokens": 7}
    got = server.ask("POST", "/v1/completions", body).body
    assert got["usage"]["completion_tokens"] == 7 and got["choices"][0]["finish_reason"] == "length"


def test_models(server: FakeServer) -> None:
    with server.client() as client:
        names = [model.id for model in client.models.list()]
        assert names == ["tiny", "tiny-instant", "tiny-thinking"]
        assert client.models.retrieve("tiny").owned_by == "hybrid"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/other")


def test_tokenize_and_detokenize(server: FakeServer) -> None:
    def tokens(**body: Any) -> list[int]:
        got = server.ask("POST", "/tokenize", body).body
        assert got["count"] == len(got["tokens"]) and got["max_model_len"] == 2048
        return list(got["tokens"])

    assert tokens(prompt="é<think>") == [*"é<think>".encode()]
    assert tokens(prompt="é<think>", parse_special=True) == [*"é".encode(), 278]
    rendered = tokens(messages=user("Hi"), chat_template_kwargs={"thinking": False})
    assert rendered == [259, *b"user", 273, *b"Hi", 258, 260, *b"assistant", 273, 278, 279]
    assert tokens(messages=user("Hi"), add_generation_prompt=False) == rendered[:9]
    assert len(tokens(messages=user("Hi"), tools=[TOOL])) > len(rendered)
    assert server.ask("POST", "/detokenize", {"tokens": rendered[:9]}).body == {
        "prompt": "<|im_user|>user<|im_middle|>Hi<|im_end|>"
    }
    assert server.ask("POST", "/tokenize", {"prompt": "ab", "return_token_strs": True}).body["token_strs"] == ["a", "b"]


def call_once(call_id: str) -> dict[str, Any]:
    """A conversation with one tool call."""
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "function": CALLED}]},
        {"role": "tool", "tool_call_id": call_id, "content": "sunny"},
    ]
    return {"messages": messages, "tools": [TOOL]}


def test_tokenize_renders_as_written_and_a_chat_rewrites_foreign_call_ids(server: FakeServer) -> None:
    ours, foreign = call_once("functions.get_weather:0"), call_once("call_1")
    count = server.ask("POST", "/tokenize", ours).body["count"]
    written = bytes(i for i in server.ask("POST", "/tokenize", foreign).body["tokens"] if i < 256)
    assert written.count(b"call_1") == 2 and b"functions.get_weather:0" not in written
    for body in (ours, foreign):
        assert server.ask("POST", CHAT, {**body, "max_tokens": 1}).body["usage"]["prompt_tokens"] == count


CALLED = {"name": "get_weather", "arguments": '{"city": "Rome"}'}


def test_unread_fields_are_named_in_a_header(server: FakeServer) -> None:
    body = {"prompt": "a", "max_tokens": 1, "user": "me", "frobnicate": 1, "x\r\ny": 2, "typical_p": 0.5}
    answer = server.ask("POST", "/v1/completions", body)
    assert answer.status == 200 and answer.headers["x-hybrid-ignored-fields"] == "frobnicate, typical_p"
    assert "x-hybrid-ignored-fields" not in server.ask("POST", "/v1/completions", {"prompt": "a"}).headers


def test_client_errors_have_their_class_and_fields(server: FakeServer) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="tiny", messages=user("x"), temperature=-1)
        assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4", messages=user("x"))
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="tiny", messages=user("x" * 3000))
        assert long.value.code == "context_length_exceeded" and "2048" in long.value.message


def test_a_quiet_stream_is_kept_alive(slow_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("openai_chat", "openai_completions"):
        monkeypatch.setattr(f"server.{module}.PING_SECONDS", 0.01)
    for path, body in (("/v1/completions", {"prompt": "script:ab;"}), (CHAT, {"messages": user("script:ab;")})):
        raw = slow_server.ask("POST", path, {**body, "stream": True}).body
        assert raw.startswith(b": ping\n\n") and raw.count(b": ping\n\n") > 3 and raw.endswith(b"[DONE]\n\n")
    with slow_server.client() as client:
        chunks = list(client.chat.completions.create(model="tiny", messages=user("script:ab;"), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""  # it was reasoning
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_sixty_four_streams_at_once(server: FakeServer) -> None:
    texts = [f"Answer number {i}: " + "abcdef"[i % 6] * (i % 17) for i in range(64)]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def one(text: str) -> tuple[str, str | None]:
            stream = await client.chat.completions.create(
                model="tiny-instant", messages=user(f"script:{text};"), stream=True
            )
            chunks = [chunk async for chunk in stream]
            pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
            return "".join(pieces), chunks[-1].choices[0].finish_reason

        assert await asyncio.gather(*map(one, texts)) == [(text, "stop") for text in texts]
    server.wait_empty()


def test_a_sub_agents_request_says_so() -> None:
    body = {"messages": user("hi"), "prompt_cache_key": "run 7", "service_tier": "flex"}
    options = read_options(as_fields(body, ""), Sampling(), 300)
    assert options.patient
    other = read_options(as_fields({**body, "prompt_cache_key": "x" * 100_000}, ""), Sampling(), 300)
    assert len(options.group) == len(other.group) == 32 and options.group != other.group
    plain = read_options(as_fields({"service_tier": "auto"}, ""), Sampling(), 300)
    assert (plain.group, plain.patient) == ("", False)
