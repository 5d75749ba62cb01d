"""The neutral vocabulary between the wire formats, the template and the output parser.

`openai.py` decodes JSON into these; `template.py` renders them; `parse.py` yields `Delta`s. Nothing here knows a
wire format, a tokenizer or the engine.
"""

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant made earlier. `arguments` is the JSON text as it was sent, or the decoded object."""

    id: str
    name: str
    arguments: str | Json


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is text or parts in OpenAI's shape: {"type": "text", "text": …}, {"type": "image_url", …}."""

    role: str
    content: str | tuple[Json, ...] | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation to be rendered. `tools` are OpenAI tool objects, as sent."""

    messages: tuple[Message, ...]
    tools: tuple[Json, ...] = ()
    thinking: bool = True
    preserve_thinking: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Json = field(default_factory=dict)  # any further chat_template_kwargs, for Jinja templates


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of a tool call. `id` and `name` come once, with the first piece of call `index`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer; exactly one of the three is set."""

    reasoning: str = ""
    content: str = ""
    tool: ToolDelta | None = None
