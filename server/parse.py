"""A model's output ids, one at a time, to reasoning, content and tool calls.

Works on ids: Kimi's markers are special tokens, so text that merely spells one is text, and no special token ever
shows. Text that was meant as a tool call but is none is given out as content, not dropped. Knows neither requests
nor wire formats; the service feeds it and sends, or folds, its deltas. `StopStrings` cuts text at stop strings.
"""

import re
from typing import Literal

from server.chat import Delta, ToolDelta
from server.tokenizer import Tokenizer

_Mark = Literal["think", "answer", "section", "call", "arguments", "end call", "end section", "stop"]
_State = Literal["reasoning", "content", "section", "id", "arguments", "ended"]

# Some revisions write the section's marks in the singular.
_MARKS: dict[str, _Mark] = {
    "<think>": "think",
    "</think>": "answer",
    "<|tool_calls_section_begin|>": "section",
    "<|tool_call_section_begin|>": "section",
    "<|tool_call_begin|>": "call",
    "<|tool_call_argument_begin|>": "arguments",
    "<|tool_call_end|>": "end call",
    "<|tool_calls_section_end|>": "end section",
    "<|tool_call_section_end|>": "end section",
}
_CALL_ID = re.compile(r"(?:functions\.)?(?P<name>\S+):\d+")


class OutputParser:
    """Parses one answer. `in_reasoning`: the prompt ends in an open `<think>`. Without `tools`, calls are content."""

    def __init__(self, tokenizer: Tokenizer, in_reasoning: bool, tools: bool) -> None:
        self.saw_tool_calls = False  # complete ones
        self._is_special = tokenizer.is_special
        self._decoder = tokenizer.detokenizer()
        self._marks: dict[int, _Mark] = dict.fromkeys(tokenizer.stop_ids, "stop")
        for name, mark in _MARKS.items():
            token = tokenizer.special_id(name)
            if token is not None:
                self._marks[token] = mark
        self._spelled = tokenizer.special_id("</think>") is None  # then the marks of reasoning are plain text
        self._tools = tools
        self._state: _State = "reasoning" if in_reasoning else "content"
        self._held = ""  # text of the current state that may still turn out to be a mark, or white space to drop
        self._content_begun = False  # since the reasoning, or since the last section of calls
        self._n_calls = 0
        self._call_id = ""
        self._valid = False  # the current call has an id that names a function
        self._arguments_begun = False

    def feed(self, token: int) -> list[Delta]:
        """What this id makes visible."""
        if self._state == "ended":
            return []
        mark = self._marks.get(token)
        if mark is None and not self._is_special(token):
            return self._text(self._decoder.feed(token))
        out = self._text(self._decoder.flush())  # a special token ends a character that is incomplete
        return out if mark is None else out + self._marked(mark)

    def finish(self) -> list[Delta]:
        """What was held back, once no more ids come. A call that is still open stays incomplete."""
        if self._state == "ended":
            return []
        out = self._text(self._decoder.flush()) + self._leave(complete=False)
        self._state = "ended"
        return out

    def _marked(self, mark: _Mark) -> list[Delta]:
        if mark == "stop":
            return self.finish()
        if mark == "arguments":
            return self._begin_arguments() if self._state == "id" else []
        if mark == "end call":
            return self._enter("section") if self._state in ("id", "arguments") else []
        if mark == "think":
            return self._enter("reasoning") if self._state == "content" else []
        if self._state == "reasoning" and (mark == "answer" or not self._tools):
            return self._enter("content")  # a section of calls ends the reasoning even where `</think>` is missing
        if mark == "answer" or not self._tools:
            return []
        if mark == "end section":
            return self._enter("content") if self._state not in ("content", "reasoning") else []
        return self._enter("id" if mark == "call" else "section")

    def _enter(self, state: _State) -> list[Delta]:
        out = self._leave(complete=True)
        self._state = state
        self._content_begun = False
        self._call_id = ""
        return out

    def _leave(self, complete: bool) -> list[Delta]:
        """End the current state: what it still owes."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return _reasoning(_without_half_mark(held, "</think>") if self._spelled else held)
        if self._state == "content":
            # White space alone, beside a tool call, is layout.
            return [] if self._n_calls or (complete and not held.strip()) else _content(self._half_open(held))
        if self._state == "id":
            if not complete or not self._call_id.strip():
                return _content(self._call_id if self._call_id.strip() else "")
            out = self._begin_arguments()  # an id and no arguments
            return out + self._end_arguments() if self._valid else out
        return self._end_arguments() if self._state == "arguments" and complete else []

    def _text(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._state == "reasoning":
            return self._reason(text) if self._spelled else _reasoning(text)
        if self._state == "id":
            self._call_id += text
            return []
        if self._state == "arguments":
            return self._argue(text)
        return self._say(text)  # between calls too: what is not white space there was said

    def _reason(self, text: str) -> list[Delta]:
        """Reasoning where `</think>` is plain text."""
        before, mark, after = (self._held + text).partition("</think>")
        if mark:
            self._held = ""
            self._state = "content"
            return _reasoning(before) + self._text(after)
        n_held = _overlap(before, "</think>")
        self._held = before[len(before) - n_held :]
        return _reasoning(before[: len(before) - n_held])

    def _say(self, text: str) -> list[Delta]:
        """Content; white space in front of it is held back until more comes."""
        if self._content_begun:
            return _content(text)
        text = self._held + text
        start = text.lstrip()
        may_think = self._spelled and self._state == "content"
        if may_think and start.startswith("<think>"):
            self._held, self._state = "", "reasoning"
            return self._text(start.removeprefix("<think>"))
        if not start or (may_think and "<think>".startswith(start)):
            self._held = text
            return []
        self._held, self._content_begun = "", True
        return _content(text)

    def _begin_arguments(self) -> list[Delta]:
        self._state, self._held, self._arguments_begun = "arguments", "", False
        match = _CALL_ID.fullmatch(self._call_id.strip())
        self._valid = match is not None
        if match is None:
            return _content(self._call_id)
        self._n_calls += 1
        return [Delta(tool=ToolDelta(self._n_calls - 1, self._call_id.strip(), match["name"]))]

    def _argue(self, text: str) -> list[Delta]:
        """Arguments, without the white space around them."""
        if not self._valid:
            return _content(text)
        text = self._held + text if self._arguments_begun else text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._arguments_begun = self._arguments_begun or bool(shown)
        return self._piece(shown)

    def _end_arguments(self) -> list[Delta]:
        if not self._valid:
            return []
        self.saw_tool_calls = True
        return [] if self._arguments_begun else self._piece("{}")

    def _piece(self, arguments: str) -> list[Delta]:
        return [Delta(tool=ToolDelta(self._n_calls - 1, arguments=arguments))] if arguments else []

    def _half_open(self, held: str) -> str:
        return _without_half_mark(held, "<think>") if self._spelled else held


class StopStrings:
    """Cuts text at the first of several stop strings, holding back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._pattern = re.compile("|".join(re.escape(stop) for stop in self._stops) or r"(?!)")
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met; nothing after it is shown)."""
        text = self._held + text
        match = self._pattern.search(text)
        if match:
            self._held = ""
            return text[: match.start()], True
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """The text held back, once no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`, short of all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _without_half_mark(held: str, mark: str) -> str:
    """A cut-off answer ends in no half of a mark; a lone `<` may be anything."""
    n_half = _overlap(held, mark)
    return held[: len(held) - n_half] if n_half > 1 else held


def _reasoning(text: str) -> list[Delta]:
    return [Delta(reasoning=text)] if text else []


def _content(text: str) -> list[Delta]:
    return [Delta(content=text)] if text else []
