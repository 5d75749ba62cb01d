"""A served model and a search, against scripted servers on loopback."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from server.agents import model as model_module
from server.agents.model import ServedModel, TooLong, Usage
from server.agents.search import Search
from server.agents.tools import ToolError
from server.upstream import Upstream, UpstreamError


class Scripted:
    """Each request takes the next reply: events of a stream, or a status with a message and headers."""

    def __init__(self) -> None:
        self.replies: list[list[dict[str, Any]] | tuple[int, str, dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        self.found: Any = {"results": []}

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        reply = self.replies.pop(0)
        if isinstance(reply, tuple):
            status, message, headers = reply
            return web.json_response({"error": {"message": message}}, status=status, headers=headers)
        response = web.StreamResponse()
        await response.prepare(request)
        for event in reply:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def search(self, request: web.Request) -> web.Response:
        self.asked.append(dict(request.query))
        if isinstance(self.found, int):
            return web.Response(status=self.found)
        return web.Response(body=self.found if isinstance(self.found, bytes) else json.dumps(self.found))


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Scripted, str]]:
    script = Scripted()
    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", script.chat), web.get("/search", script.search)])
    server = TestServer(app)
    await server.start_server()
    yield script, str(server.make_url("")).rstrip("/")
    await server.close()


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None}


def tool(index: int, **function: str) -> dict[str, Any]:
    started = {"id": f"functions.{function['name']}:{index}", "type": "function"} if "name" in function else {}
    return {"index": index, **started, "function": function}


USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}
ANSWER = [chunk(content="ok"), chunk("stop")]


def served(url: str) -> ServedModel:
    return ServedModel(Upstream(url, "m"), {"max_tokens": 7, "prompt_cache_key": "run-1"})


async def test_a_turn_is_put_together(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    script.replies.append(
        [
            chunk(role="assistant", content=""),
            chunk(reasoning_content="two "),
            chunk(reasoning_content="calls"),
            chunk(tool_calls=[tool(0, name="a", arguments="")]),
            chunk(tool_calls=[tool(0, arguments='{"x"')]),
            chunk(tool_calls=[tool(0, arguments=': "1"}')]),
            chunk(tool_calls=[tool(1, name="b", arguments="{}")]),
            chunk("tool_calls"),
            {"choices": [], "usage": USAGE},
        ]
    )
    told: list[int] = []
    tools = [{"type": "function", "function": {"name": "a"}}]
    turn = await served(url).ask([{"role": "user", "content": "x"}], tools, True, told.append)
    assert turn.message == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "two calls",
        "tool_calls": [
            {"id": "functions.a:0", "type": "function", "function": {"name": "a", "arguments": '{"x": "1"}'}},
            {"id": "functions.b:1", "type": "function", "function": {"name": "b", "arguments": "{}"}},
        ],
    }
    assert (turn.finish, turn.usage, sum(told)) == ("tool_calls", Usage(9, 3, 4), 6)
    (asked,) = script.asked
    assert asked["tools"] == tools and asked["service_tier"] == "flex" and asked["stream"] is True
    assert (asked["max_tokens"], asked["prompt_cache_key"], asked["model"]) == (7, "run-1", "m")


async def test_a_busy_server_is_asked_again(scripted: tuple[Scripted, str], monkeypatch: pytest.MonkeyPatch) -> None:
    script, url = scripted
    waits: list[float] = []
    sleep = asyncio.sleep
    monkeypatch.setattr(model_module.asyncio, "sleep", lambda seconds: (waits.append(seconds), sleep(0))[1])
    script.replies += [(429, "full", {"Retry-After": "3"}), (503, "loading", {}), ANSWER]
    turn = await served(url).ask([], [], False, lambda n: None)
    assert turn.message["content"] == "ok"
    assert 3 <= waits[0] <= 4.5 and 2 <= waits[1] <= 3
    assert "tools" not in script.asked[0] and "service_tier" not in script.asked[0]
    script.replies += [(429, "full", {})] * model_module.PATIENCE
    with pytest.raises(UpstreamError, match="the server answered 429: full"):
        await served(url).ask([], [], False, lambda n: None)


async def test_what_ends_a_turn(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    script.replies.append((400, "this model's maximum context length is 10 tokens", {}))
    with pytest.raises(TooLong):
        await served(url).ask([], [], False, lambda n: None)
    script.replies.append((401, "no key", {}))
    with pytest.raises(UpstreamError, match="401: no key"):
        await served(url).ask([], [], False, lambda n: None)
    script.replies.append([chunk(content="half")])
    with pytest.raises(UpstreamError, match="broke off"):
        await served(url).ask([], [], False, lambda n: None)
    script.replies.append([chunk(content="half"), {"error": {"message": "the engine stopped"}}])
    with pytest.raises(UpstreamError, match="the engine stopped"):
        await served(url).ask([], [], False, lambda n: None)


async def test_search(scripted: tuple[Scripted, str]) -> None:
    script, url = scripted
    search = Search(f"{url}/")
    assert await search.run({"query": "a b"}) == "Nothing found."
    assert script.asked[-1] == {"q": "a b", "format": "json"}
    script.found = {"results": [{"title": f"T{i}", "url": f"http://x/{i}", "content": "text"} for i in range(20)]}
    assert (await search.run({"query": "x"})).startswith("T0 (http://x/0)\ntext\n\nT1 (http://x/1)\ntext")
    assert "T8" not in await search.run({"query": "x"})
    for found, error in (
        (503, "the search answered 503"),
        (b"<html>", "no SearXNG"),
        ({"results": 3}, "no SearXNG"),
        (b"x" * (3 << 20), "too much"),
    ):
        script.found = found
        with pytest.raises(ToolError, match=error):
            await search.run({"query": "x"})
    with pytest.raises(ToolError, match="cannot be reached"):
        await Search("http://127.0.0.1:9").run({"query": "x"})


@pytest.mark.parametrize(
    "event",
    [
        [],
        {"choices": [None]},
        {"choices": 3},
        chunk(tool_calls=[None]),
        chunk(tool_calls=[{"index": -1, "function": {}}]),
        chunk(tool_calls=[{"index": 2_000_000, "function": {}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": {}}}]),
        chunk(content=["x"]),
        {"choices": [], "usage": {"prompt_tokens": "many"}},
    ],
)
async def test_odd_chunks_are_one_line(scripted: tuple[Scripted, str], event: Any) -> None:
    script, url = scripted
    script.replies.append([event, *ANSWER])
    with pytest.raises(UpstreamError, match="what answers there is no OpenAI-compatible server"):
        await served(url).ask([], [], False, lambda n: None)


async def test_what_servers_leave_out(scripted: tuple[Scripted, str]) -> None:
    """No index, no ids, one index for all, half an emoji, usage with nothing in it, an error that is null."""
    script, url = scripted
    call = {"function": {"name": "a", "arguments": "{}"}}
    script.replies.append(
        [
            {"error": None, **chunk(content="a\ud800b")},
            chunk(tool_calls=[call]),
            chunk(tool_calls=[{"index": 1, "id": "x", **call}]),
            chunk(tool_calls=[{"index": 1, "id": "y", **call}]),
            chunk("tool_calls"),
            {"choices": None, "usage": {}},
        ]
    )
    turn = await served(url).ask([], [], False, lambda n: None)
    assert turn.message["content"].encode().startswith(b"a") and turn.message["content"].endswith("b")
    ids = [one["id"] for one in turn.message["tool_calls"]]
    assert len(set(ids)) == 3 and all(ids) and ids[1:] == ["x", "y"]
    assert [one["function"]["arguments"] for one in turn.message["tool_calls"]] == ["{}"] * 3
    assert turn.usage.completion == 4
