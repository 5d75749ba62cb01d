"""server.chat_client against a scripted server on loopback."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from server.chat_client import ChatClient, printable
from server.upstream import Upstream, UpstreamError, server_url


class Scripted:
    """Answers every chat with the same events and records what was asked."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.refusal: web.Response | None = None
        self.gone = asyncio.Event()
        self.hang = False

    def say(self, **delta: Any) -> None:
        self.events.append(b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n")

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "kimi"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        if self.refusal is not None:
            return self.refusal
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for byte in b": ping\n\n" + b"".join(self.events):
                await response.write(bytes([byte]))  # the worst way to cut it
            while self.hang:
                await asyncio.sleep(0.01)
                await response.write(b": ping\n\n")
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.gone.set()
        return response


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Scripted, str]]:
    script = Scripted()
    app = web.Application()
    app.add_routes([web.get("/v1/models", script.models), web.post("/v1/chat/completions", script.chat)])
    server = TestServer(app)
    await server.start_server()
    yield script, str(server.make_url("")).rstrip("/")
    script.hang = False
    await server.close()


async def test_the_answer_and_reasoning_part_ways(
    scripted: tuple[Scripted, str], capsys: pytest.CaptureFixture[str]
) -> None:
    script, url = scripted
    script.say(role="assistant", content="")
    script.say(reasoning_content="let me ")
    script.say(reasoning_content="think [bold]")
    script.say(content="Grüß ")
    script.say(content="dich 🙂")
    client = ChatClient(Upstream(url, api_key="secret"), thinking=False, max_tokens=5)
    await client.ask("hello")
    captured = capsys.readouterr()
    assert captured.out == "Grüß dich 🙂\n"
    assert captured.err.strip() == "let me think [bold]"
    assert script.asked == [
        {
            "model": "kimi",
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "thinking": {"type": "disabled"},
            "max_tokens": 5,
        }
    ]
    assert script.keys == ["Bearer secret"]
    await client.ask("again")
    assert [message["content"] for message in script.asked[1]["messages"]] == ["hello", "Grüß dich 🙂", "again"]


async def test_the_mode_is_the_servers_unless_asked(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    await ChatClient(Upstream(url, "m")).ask("x")
    assert script.asked[0] == {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}


async def test_a_refusal_is_one_line_and_leaves_no_turn(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    script.refusal = web.json_response({"error": {"message": "model not found", "code": "x"}}, status=404)
    client = ChatClient(Upstream(url, "m"))
    with pytest.raises(UpstreamError, match=r"^the server answered 404: model not found$"):
        await client.ask("x")
    assert client.messages == []


async def test_an_error_event_keeps_what_came(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    script.say(content="half")
    script.events.append(b'data: {"error": {"message": "the engine stopped"}}\n\n')
    client = ChatClient(Upstream(url, "m"))
    with pytest.raises(UpstreamError, match="the engine stopped"):
        await client.ask("x")
    assert client.messages[-1] == {"role": "assistant", "content": "half"}


async def test_cancelling_hangs_up(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    script.say(content="on and on")
    script.hang = True
    client = ChatClient(Upstream(url, "m"))
    task = asyncio.create_task(client.ask("x"))
    while not script.asked:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(script.gone.wait(), 5)
    assert client.messages[-1]["content"] == "on and on"


async def test_a_stranger_on_the_port(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    script.events.append(b"data: hello\n\n")
    with pytest.raises(UpstreamError, match="no OpenAI-compatible server"):
        await ChatClient(Upstream(url, "m")).ask("x")


@pytest.mark.parametrize("text", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1", "h:1/v1"])
def test_the_server_is_found_however_it_is_written(text: str) -> None:
    assert server_url(text) == "http://h:1"


def test_printable() -> None:
    assert printable("a\x1b[31mb\x07\x9b\r\n\tü") == "a�[31mb���\n\tü"
