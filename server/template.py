"""A conversation to prompt ids: Kimi-K2.5's own template, or the one a checkpoint brings.

`Template` is what the service uses; where it comes from is decided once, in `load_template`. Special ids are put in
as ids, and all text is encoded as plain text, so that nothing a client writes can open or close a turn. Knows nothing
about the wire format or the engine. Pictures and videos are rendered as their placeholders, without pixels.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from server.chat import Chat, Json, Message, ToolCall
from server.jinja_template import JinjaTemplate, TemplateError
from server.tokenizer import Piece, Tokenizer
from server.tool_types import SchemaError, declare

__all__ = ["Template", "TemplateError", "canonical_ids", "kimi_pieces", "load_template"]

_TURNS = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>", "<think>", "</think>")
_VIDEO = "<|kimi_k25_video_placeholder|>"  # not in the vocabulary: the video's chunks take its place before encoding
_MAX_DEPTH = 100  # of a tool's schema


@dataclass(frozen=True, slots=True)
class Template:
    """Renders chats for one tokenizer. `kind` "none": the checkpoint has no template, every chat is refused."""

    kind: Literal["kimi", "jinja", "none"]
    tokenizer: Tokenizer
    pieces: Callable[[Chat], list[Piece]]

    def render(self, chat: Chat) -> list[int]:
        """The prompt. TemplateError names what cannot be rendered."""
        return self.tokenizer.encode_pieces(self.pieces(chat))

    def render_text(self, chat: Chat) -> str:
        """The prompt as text, specials by name."""
        return self._text(self.pieces(chat))

    def starts_in_reasoning(self, chat: Chat) -> bool:
        """Whether the prompt ends in an open `<think>`, so that the answer begins with reasoning."""
        return self._text(self.pieces(chat)[-4:]).rstrip().endswith("<think>")

    @property
    def names_calls_by_id(self) -> bool:
        """Whether a call's id is all the model sees of its name: historical ids must go through `canonical_ids`."""
        return self.tokenizer.special_id("<|tool_call_begin|>") is not None

    def _text(self, pieces: Sequence[Piece]) -> str:
        return "".join(self.tokenizer.decode([p]) if isinstance(p, int) else p for p in pieces)


def load_template(directory: Path, tokenizer: Tokenizer) -> Template:
    """Kimi-K2.5 gets our own template. Others get theirs; one that has none gets Kimi's if its tokenizer can."""
    source, variables = _published(directory)
    speaks_kimi = all(tokenizer.special_id(name) is not None for name in _TURNS)
    if speaks_kimi and (source is None or _model_type(directory) == "kimi_k25"):
        return Template("kimi", tokenizer, lambda chat: kimi_pieces(tokenizer, chat))
    if source is not None:
        return Template("jinja", tokenizer, JinjaTemplate(source, tokenizer, variables).pieces)
    return Template("none", tokenizer, _no_template)


def kimi_pieces(tokenizer: Tokenizer, chat: Chat) -> list[Piece]:
    """The conversation in Kimi-K2.5's layout, as text and special ids."""
    writer = _KimiWriter(tokenizer)
    if chat.tools:
        writer.turn("<|im_system|>", "tool_declare", lambda: writer.text(_tool_text(chat.tools)))
    # Reasoning is kept inside the current tool loop only: after the last answer that made no call.
    plain = [i for i, m in enumerate(chat.messages) if m.role == "assistant" and not m.tool_calls]
    dropped = plain[-1] if plain and not chat.preserve_thinking else -1
    for i, message in enumerate(chat.messages):
        last = chat.continue_final_message and i == len(chat.messages) - 1
        writer.message(i, message, chat.thinking and i > dropped, is_open=last)
    if chat.continue_final_message and not chat.messages:
        raise TemplateError("continue_final_message: there is no message to continue")
    if chat.add_generation_prompt and not chat.continue_final_message:
        writer.marks("<|im_assistant|>", text="assistant")
        writer.marks("<|im_middle|>", "<think>")
        if not chat.thinking:
            writer.marks("</think>")
    return writer.pieces


def canonical_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with call ids as `functions.NAME:IDX`, IDX counting the calls of the whole conversation.

    Ids of that form that fit (right name, rising IDX) are kept. Each result gets the new id of the call it answers:
    the nearest one before it of that id, or the next of them where a client gave one turn's calls the same id.
    """
    index = 0
    answers: dict[str, list[str]] = {}
    result = []
    for message in messages:
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                kept = re.fullmatch(re.escape(f"functions.{call.name}:") + r"(\d{1,9})", call.id)
                index = int(kept[1]) if kept and int(kept[1]) >= index else index
                calls.append(replace(call, id=f"functions.{call.name}:{index}"))
                index += 1
            answers |= {call.id: [] for call in message.tool_calls}
            for old, new in zip(message.tool_calls, calls, strict=True):
                answers[old.id].append(new.id)
            message = replace(message, tool_calls=tuple(calls))
        elif message.role == "tool" and message.tool_call_id in answers:
            ids = answers[message.tool_call_id]
            message = replace(message, tool_call_id=ids.pop(0) if len(ids) > 1 else ids[0])
        result.append(message)
    return tuple(result)


class _KimiWriter:
    """Collects the pieces of one rendering."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pieces: list[Piece] = []
        self._tokenizer = tokenizer

    def marks(self, *names: str, text: str = "") -> None:
        """Special tokens, then text."""
        for name in names:
            token = self._tokenizer.special_id(name)
            if token is None:
                raise TemplateError(f"this checkpoint's tokenizer has no {name}, which this conversation needs")
            self.pieces.append(token)
        self.text(text)

    def text(self, text: str) -> None:
        """Plain text, whatever it spells."""
        if text:
            self.pieces.append(text)

    def turn(self, opening: str, name: str, body: Callable[[], None], is_open: bool = False) -> None:
        """One turn; an open one has no end mark, the model goes on with it."""
        self.marks(opening, text=name)
        self.marks("<|im_middle|>")
        body()
        if not is_open:
            self.marks("<|im_end|>")

    def message(self, index: int, message: Message, keep_reasoning: bool, is_open: bool) -> None:
        if is_open and message.tool_calls:
            raise TemplateError("continue_final_message: the last message must be one without tool calls")
        opening = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(message.role, "<|im_system|>")

        def body() -> None:
            if message.role == "assistant":
                self.marks("<think>", text=(message.reasoning or "") if keep_reasoning else "")
                self.marks("</think>")
            elif message.role == "tool":
                self.text(f"## Return of {message.tool_call_id or ''}\n")
            self._content(index, message.content)
            if message.role == "assistant" and message.tool_calls:
                self._calls(message.tool_calls)

        self.turn(opening, message.name or message.role, body, is_open)

    def _calls(self, calls: Sequence[ToolCall]) -> None:
        self.marks("<|tool_calls_section_begin|>")
        for call in calls:
            self.marks("<|tool_call_begin|>", text=call.id)
            self.marks("<|tool_call_argument_begin|>", text=_argument_text(call.arguments))
            self.marks("<|tool_call_end|>")
        self.marks("<|tool_calls_section_end|>")

    def _content(self, index: int, content: str | Sequence[Json] | None) -> None:
        for part in (
            [{"type": "text", "text": content or ""}] if content is None or isinstance(content, str) else content
        ):
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                self.text(part["text"])
            elif kind in ("image", "image_url"):
                self.marks("<|media_begin|>", text="image")
                self.marks("<|media_content|>", "<|media_pad|>", "<|media_end|>", text="\n")
            elif kind in ("video", "video_url"):
                self.text(_VIDEO + "\n")
            else:
                raise TemplateError(f"messages[{index}].content: a part of type {kind!r} that cannot be rendered")


def _argument_text(arguments: str | Json) -> str:
    try:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    except RecursionError as error:
        raise TemplateError("messages: a tool call's arguments are nested too deeply") from error


def _tool_text(tools: Sequence[Json]) -> str:
    """TypeScript, or JSON where a schema has no such form or nothing is a plain function."""
    ordered = [_sorted_keys(tool, 0) for tool in tools]
    try:
        declaration = declare(ordered)
    except SchemaError:
        declaration = ""
    return declaration or json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


def _sorted_keys(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise TemplateError(f"tools: nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {key: _sorted_keys(value[key], depth + 1) for key in sorted(value)}
    return [_sorted_keys(item, depth + 1) for item in value] if isinstance(value, list) else value


def _no_template(chat: Chat) -> list[Piece]:
    raise TemplateError(
        "this checkpoint has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
        "use /v1/completions, or add the published file"
    )


def _published(directory: Path) -> tuple[str | None, Json]:
    """The checkpoint's own template text and the named tokens it may print."""
    config = _json(directory / "tokenizer_config.json")
    tokens: Json = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8"), tokens
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source, tokens


def _model_type(directory: Path) -> str:
    return str(_json(directory / "config.json").get("model_type"))


def _json(file: Path) -> Json:
    content: Json = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return content
