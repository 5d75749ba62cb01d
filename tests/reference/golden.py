"""Reads the golden vectors beside the checkout; their README describes the format."""

import json
from pathlib import Path
from typing import Any

from server.chat import Chat, Delta, Message, ToolCall

Case = dict[str, Any]


def cases(kimi_dir: Path, name: str, key: str = "cases") -> list[Case]:
    """The cases of one file."""
    content = json.loads((kimi_dir / "golden" / f"{name}.json").read_text("utf-8"))
    assert content["format"] == 1
    found: list[Case] = content[key]
    assert len(found) > 10
    return found


def text_of(value: Any) -> str:
    """A text, long ones unfolded."""
    if isinstance(value, str):
        return value
    if "repeat" in value:
        text, times = value["repeat"]
        return text_of(text) * int(times)
    return "".join(text_of(part) for part in value["concat"])


def ids_of(value: Any) -> list[int]:
    """A list of ids, long ones unfolded."""
    return value if isinstance(value, list) else [i for run, times in value["runs"] for i in run * times]


def chat_of(case: Case) -> Chat:
    """A template case as the server's own conversation."""
    return Chat(
        messages=tuple(message_of(message) for message in case["messages"]),
        tools=tuple(case["tools"] or ()),
        thinking=case["thinking"],
        preserve_thinking=case["preserve_thinking"],
        add_generation_prompt=case["add_generation_prompt"],
        continue_final_message=case["continue_final_message"],
    )


def message_of(message: Case) -> Message:
    """An OpenAI message as the server's own."""
    content = message.get("content")
    calls = (
        ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()
    )
    return Message(
        role=message["role"],
        content=tuple(content) if isinstance(content, list) else content,
        reasoning=message.get("reasoning_content"),
        tool_calls=tuple(calls),
        tool_call_id=message.get("tool_call_id"),
        name=message.get("name"),
    )


def fold(deltas: list[Delta]) -> tuple[str, str, list[dict[str, str]]]:
    """(reasoning, content, tool calls) as a client that joins the pieces sees them, checking the streaming rules."""
    reasoning = "".join(d.reasoning for d in deltas)
    content = "".join(d.content for d in deltas)
    calls: list[dict[str, str]] = []
    for tool in (d.tool for d in deltas if d.tool is not None):
        if tool.name is not None:
            assert tool.index == len(calls) and tool.id, "calls are numbered from 0, and named once"
            calls.append({"id": tool.id, "name": tool.name, "arguments": ""})
        assert tool.index == len(calls) - 1, "calls never interleave"
        calls[-1]["arguments"] += tool.arguments
    assert all(bool(d.reasoning) + bool(d.content) + (d.tool is not None) == 1 for d in deltas)
    return reasoning, content, calls
