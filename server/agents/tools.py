"""What agents can call. A tool's failure is a result that the model reads, never the end of a run.

`create_subagent` and `assign_task` have the names and parameters that Kimi-K2.5 was trained with; `run.py` carries
them out. Tools that do something in the world implement `Tool`.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol

Json = dict[str, Any]


class ToolError(Exception):
    """The call cannot be carried out. One line for the model: what is wrong, and what would be right."""


class Tool(Protocol):
    """One thing that an agent can do."""

    @property
    def declaration(self) -> Json:
        """OpenAI tool object."""

    async def run(self, arguments: dict[str, str]) -> str:
        """The result as text. Raises ToolError. Cancelling it stops all that it started."""


def declared(name: str, description: str, /, **parameters: str) -> Json:
    """A tool object whose parameters, all required, are texts; "" for one that needs no description."""
    properties = {key: {"type": "string"} | ({"description": text} if text else {}) for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


# The words of these and of the base tools are those that the default model was trained with.
CREATE = declared("create_subagent", "Create a sub-agent with a role of its own.", name="", system_prompt="")
ASSIGN = declared("assign_task", "Give a sub-agent a task; calls in one turn run in parallel.", agent="", prompt="")


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of a turn, decoded."""

    id: str
    name: str
    arguments: dict[str, str]


def read_call(call: Json, tools: list[Json]) -> Call:
    """The call with exactly the arguments that its tool declares. Raises ToolError."""
    name, text = call["function"]["name"], call["function"]["arguments"]
    known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if name not in known:
        raise ToolError(f"there is no tool {name!r}; there are {', '.join(known)}")
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{name}: the arguments are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ToolError(f"{name}: the arguments are no object")
    wanted = known[name]["properties"]
    for key in known[name].get("required", ()):
        if not isinstance(arguments.get(key), str):
            raise ToolError(f"{name}: {key} must be a text")
    for key in arguments:
        if key not in wanted:
            raise ToolError(f"{name}: there is no parameter {key!r}; there are {', '.join(wanted)}")
    return Call(call["id"], name, {key: clean(text) for key, text in arguments.items()})


def clean(text: str) -> str:
    """Without lone surrogates, half an emoji, which no file and no log can hold."""
    return text.encode(errors="replace").decode()


def shortened(text: str, most_bytes: int) -> str:
    """At most so many bytes of a result, its beginning and its end."""
    raw = text.encode(errors="replace")
    if len(raw) <= most_bytes:
        return raw.decode()
    half = most_bytes // 2
    start, end = raw[:half].decode(errors="ignore"), raw[-half:].decode(errors="ignore")
    return f"{start}\n[{len(raw) - 2 * half:,} bytes left out]\n{end}"
