"""Chat templates that come with a checkpoint as Jinja text.

They run in Jinja's immutable sandbox with the variables that transformers gives them. What a client wrote must not
turn into special tokens: the first character of every special string is swapped, in all of the client's strings,
for a stand-in before rendering, and put back when the result has been cut at the special strings, all of which then
are the template's own. A template that tests content for such a string (`'</think>' in content`) does not find it.

Bounds: `range` (the sandbox's 100,000), sums, products and powers, length of the output, and time between two
pieces of output. Not covered: a loop that prints nothing, and a single expression that is slow or large by itself
(padding filters, `~` in a loop, format widths). Templates are the operator's files, rendered in a worker thread.
`template.py` calls this.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.chat import Chat, Json, Message
from server.tokenizer import Piece, Tokenizer, special_pattern

MAX_CHARS = 16_000_000
MAX_SECONDS = 10.0

# Noncharacters (U+FDD0..U+FDEF): Unicode keeps them for a program's own use, they mean nothing in text.
_STAND_INS = [chr(0xFDD0 + i) for i in range(31)]
_END = "\ufdef"  # marks where a message that is to be continued ends

_FAULTS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class TemplateError(ValueError):
    """The conversation cannot be rendered. One line that names what is wrong with it or with the template."""


class JinjaTemplate:
    """A compiled template. `variables` are the tokenizer's named tokens (`bos_token` and the like)."""

    def __init__(self, source: str, tokenizer: Tokenizer, variables: Json) -> None:
        # Marks that open with a letter stay text: to hide them, letters would have to be swapped everywhere.
        names = {name for name in tokenizer.specials if not name[0].isalnum()}
        firsts = sorted({name[0] for name in names})[: len(_STAND_INS)]
        self._ids = {name: tokenizer.specials[name] for name in names if name[0] in firsts}
        self._pattern = special_pattern(self._ids)
        self._hide = str.maketrans(dict(zip(firsts, _STAND_INS, strict=False)))
        self._show = str.maketrans({**dict(zip(_STAND_INS, firsts, strict=False)), _END: None})
        self._variables = variables
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
        self._arguments_as_text = self._prints_arguments()
        self._content_as_parts = self._reads_parts()
        # A template that does not know OpenAI's newer name for the system role would leave the message out.
        self._knows_developer = "probe" in self._probe({"role": "developer", "content": "probe"})

    def pieces(self, chat: Chat) -> list[Piece]:
        """The rendered conversation as text and special ids. TemplateError if the template refuses it."""
        try:
            return self._split(self._conversation(chat))
        except TemplateError:
            raise
        except _FAULTS as error:
            raise TemplateError(f"the chat template failed on this conversation: {error}") from error

    def _conversation(self, chat: Chat) -> str:
        messages = [self._message(i, message) for i, message in enumerate(chat.messages)]
        if chat.continue_final_message:
            _mark_end(messages)
        text = self._render(
            messages,
            self._hidden(list(chat.tools)) or None,
            chat.add_generation_prompt and not chat.continue_final_message,
            {"thinking": chat.thinking, "enable_thinking": chat.thinking, **self._hidden(chat.template_kwargs)},
        )
        if chat.continue_final_message:
            text, end, _ = text.rpartition(_END)
            if not end:
                raise TemplateError("continue_final_message: the chat template does not print the last message")
        return text

    def _split(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        begin = 0
        for match in self._pattern.finditer(text):
            pieces += [text[begin : match.start()].translate(self._show), self._ids[match[0]]]
            begin = match.end()
        return [*pieces, text[begin:].translate(self._show)]

    def _hidden(self, value: Any) -> Any:
        """The same JSON value with the first character of every special string swapped."""
        if isinstance(value, str):
            return value.translate(self._hide)
        if isinstance(value, dict):
            return {self._hidden(key): self._hidden(item) for key, item in value.items()}
        return [self._hidden(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _message(self, index: int, message: Message) -> Json:
        """A message as transformers passes it: only the keys that are set."""
        # Templates take a missing text as the sign of a call, or add strings to it.
        content = self._content(index, message.content)
        role = "system" if message.role == "developer" and not self._knows_developer else message.role
        result: Json = {"role": role, "content": "" if content is None and not message.tool_calls else content}
        for key, value in (
            ("reasoning_content", message.reasoning),
            ("tool_call_id", message.tool_call_id),
            ("name", message.name),
        ):
            if value is not None:
                result[key] = value
        if message.tool_calls:
            result["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": self._arguments(c.arguments)},
                }
                for c in message.tool_calls
            ]
        hidden: Json = self._hidden(result)
        return hidden

    def _arguments(self, arguments: str | Json) -> Any:
        if self._arguments_as_text:
            return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        try:
            return json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            return arguments

    def _content(self, index: int, content: str | Sequence[Json] | None) -> Any:
        if content is None or isinstance(content, str):
            return content
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise TemplateError(f"messages[{index}].content: this model takes text only, not {part.get('type')!r}")
        return list(content) if self._content_as_parts else "\n".join(part["text"] for part in content)

    def _render(self, messages: list[Json], tools: Any, add_generation_prompt: bool, further: Json) -> str:
        conversation = {"messages": messages, "tools": tools, "documents": None}
        stream = self._template.generate(
            {**self._variables, **further, **conversation, "add_generation_prompt": add_generation_prompt}
        )
        parts, length, deadline = [], 0, time.monotonic() + MAX_SECONDS
        for part in stream:
            parts.append(part)
            length += len(part)
            if length > MAX_CHARS or time.monotonic() > deadline:
                raise TemplateError(f"the chat template ran past {MAX_CHARS} characters or {MAX_SECONDS:.0f} s")
        return "".join(parts)

    def _prints_arguments(self) -> bool:
        """Whether the template prints a call's arguments as they are, or expects an object and encodes it itself."""
        text = '{"probe": 1}'
        call = {"id": "functions.probe:0", "type": "function", "function": {"name": "probe", "arguments": text}}
        return text in self._probe({"role": "assistant", "content": "", "tool_calls": [call]})

    def _reads_parts(self) -> bool:
        """Whether the template takes content as a list of parts; else text parts are joined by line breaks."""
        text = self._probe({"role": "user", "content": [{"type": "text", "text": "probe"}]})
        return "probe" in text and not re.search(r"""["']type""", text)  # a list printed as it is shows its keys

    def _probe(self, message: Json) -> str:
        messages = [message] if message["role"] == "user" else [{"role": "user", "content": "x"}, message]
        try:
            return self._render(messages, None, False, {})
        except _FAULTS:
            return ""  # it cannot take this form, which is what was asked


def _mark_end(messages: list[Json]) -> None:
    """Append the end mark to the last message's text."""
    last = messages[-1] if messages else {"tool_calls": []}
    if "tool_calls" in last:
        raise TemplateError("continue_final_message: the last message must be one without tool calls")
    if isinstance(last["content"], list) and last["content"]:
        last["content"][-1]["text"] += _END
    else:
        last["content"] = (last["content"] or "") + _END


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products and sums of sequences bounded."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, unless the result would be huge."""
        if _result_size(operator, left, right) > MAX_CHARS:
            raise TemplateError(f"the chat template builds a value of more than {MAX_CHARS} elements")
        return super().call_binop(context, operator, left, right)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """Elements of a sequence, bytes of an integer; 0 for what cannot grow."""
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right // 8
    if operator == "*" and isinstance(left, int) != isinstance(right, int):
        count, sequence = (left, right) if isinstance(left, int) else (right, left)
        return count * _size(sequence)
    return _size(left) + _size(right)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length() // 8
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _environment() -> _Environment:
    """Filters, functions and white-space rules that published templates are written for."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(functions)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes for HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for char in (*_STAND_INS, _END) if ensure_ascii else ():
        text = text.replace(f"\\u{ord(char):04x}", char)  # a stand-in must stay one character to be put back
    return text


def _refuse(message: str) -> str:
    raise TemplateError(f"the chat template refuses this conversation: {message}")


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)
