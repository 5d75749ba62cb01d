"""A training conversation, and its form as token ids in Kimi-K2.5's chat template.

Conversations are OpenAI-shaped, so that the same item that trains can be sent to a server and graded. The layout is
that of `server.template`, which this package may not import; a test renders every family with both. Called by
`hybrid.nano.data`, `hybrid.nano.train` and `hybrid.nano.evaluate`.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid.nano.vocabulary import SPECIAL, Vocabulary

Json = dict[str, Any]
COPIED = 2.0  # weight of the loss on tokens of a copied item and the one after it, and of a call's name: the decisions
GOES_ON = 4.0  # on the token that begins another call or line, or ends them


@dataclass(slots=True)
class Conversation:
    """Messages of one chat. `graded` maps the index of an assistant message to the name of its score."""

    thinking: bool
    tools: list[Json] = field(default_factory=list)
    messages: list[Json] = field(default_factory=list)
    graded: dict[int, str] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)  # items that the answers copy
    images: list[Any] = field(default_factory=list)  # `hybrid.nano.pictures.Picture`, in order

    def system(self, text: str) -> None:
        """A system message."""
        self.messages.append({"role": "system", "content": text})

    def user(self, text: str | Sequence[Json]) -> None:
        """A user message: text, or parts where it holds images."""
        self.messages.append({"role": "user", "content": text})

    def assistant(self, score: str, content: str = "", calls: Sequence[Json] = (), reasoning: str = "") -> None:
        """The answer that is taught, graded as `score`."""
        self.graded[len(self.messages)] = score
        message: Json = {"role": "assistant", "content": content}
        if self.thinking:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = list(calls)
        self.messages.append(message)

    def tool(self, call: Json, text: str) -> None:
        """The result of a call."""
        self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})


def tool_of(name: str, description: str, /, **parameters: str) -> Json:
    """An OpenAI tool whose parameters, name to description, are all required strings."""
    properties = {key: {"type": "string"} | ({"description": text} if text else {}) for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name} | ({"description": description} if description else {}) | {"parameters": schema}
    return {"type": "function", "function": function}


def call_of(index: int, name: str, /, **arguments: str) -> Json:
    """The call with number `index` of its conversation."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"functions.{name}:{index}", "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as ids. `weights[i]` is the loss weight of predicting `ids[i]`, 0 for what is given."""

    ids: list[int]
    weights: list[float]
    positions: list[int]
    turns: list[tuple[int, int, str]]  # taught spans of ids and their score names
    images: list[Any]

    def without(self, start: int, stop: int) -> "Encoded":
        """The same with ids start to stop left out; the others keep their positions, as if they were still there.

        Long documents are taught in such windows (positional skip-wise training, arXiv 2309.10400).
        """
        drop = stop - start

        def moved(at: int) -> int:
            return at if at <= start else max(start, at - drop)

        turns = [(moved(a), moved(b), name) for a, b, name in self.turns]
        ids, positions = self.ids[:start] + self.ids[stop:], self.positions[:start] + self.positions[stop:]
        return Encoded(ids, self.weights[:start] + self.weights[stop:], positions, turns, self.images)


def encode(conversation: Conversation, vocabulary: Vocabulary) -> Encoded:
    """The conversation up to the end of its last graded message."""
    writer = _Writer(vocabulary, conversation.copied)
    if conversation.tools:
        writer.given("<|im_system|>", "tool_declare", "<|im_middle|>", declaration(conversation.tools), "<|im_end|>")
    last = max(conversation.graded)
    # As the template does: reasoning is shown only after the last answer without calls that the prompt holds.
    answers = [
        i for i, m in enumerate(conversation.messages[:last]) if m["role"] == "assistant" and "tool_calls" not in m
    ]
    dropped = answers[-1] if answers and conversation.thinking else -1
    for i, message in enumerate(conversation.messages[: last + 1]):
        if message["role"] != "assistant":
            writer.given(*_given(conversation, message, writer))
            continue
        opening = ("<|im_assistant|>", "assistant", "<|im_middle|>", "<think>")
        thought = (message.get("reasoning_content", ""), "</think>")
        body = (message["content"], *_calls(message.get("tool_calls", ())), "<|im_end|>")
        reasons = conversation.thinking and i > dropped
        writer.given(*opening, *(() if reasons else ("</think>",)))
        body = (*thought, *body) if reasons else body
        if i in conversation.graded and i > dropped:
            writer.taught(conversation.graded[i], *body)
        else:
            writer.given(*body)
    return Encoded(writer.ids, writer.weights, list(range(len(writer.ids))), writer.turns, conversation.images)


def _given(conversation: Conversation, message: Json, writer: "_Writer") -> list[str]:
    """A message that is not the assistant's, as pieces."""
    role, content = message["role"], message["content"]
    pieces = ["<|im_user|>" if role == "user" else "<|im_system|>", role, "<|im_middle|>"]
    if role == "tool":
        pieces.append(f"## Return of {message['tool_call_id']}\n")
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            pieces.append(part["text"])
            continue
        pads = ["<|media_pad|>"] * conversation.images[writer.n_images].n_tokens
        writer.n_images += 1
        pieces += ["<|media_begin|>", "image", "<|media_content|>", *pads, "<|media_end|>", "\n"]
    return [*pieces, "<|im_end|>"]


def _calls(calls: Sequence[Json]) -> list[str]:
    if not calls:
        return []
    written = ["<|tool_calls_section_begin|>"]
    for call in calls:
        written += ["<|tool_call_begin|>", call["id"], "<|tool_call_argument_begin|>", call["function"]["arguments"]]
        written.append("<|tool_call_end|>")
    return [*written, "<|tool_calls_section_end|>"]


def declaration(tools: Iterable[Json]) -> str:
    """TypeScript of tools made by `tool_of`, as Kimi-K2.5 is told them."""
    lines = ["# Tools\n", "## functions\nnamespace functions {"]
    for tool in tools:
        function = tool["function"]
        properties: Mapping[str, Json] = function["parameters"]["properties"]
        if function.get("description"):
            lines.append(f"// {function['description']}")
        lines.append(f"type {function['name']} = (_: {{")
        written = []
        for key in sorted(properties):
            comment = properties[key].get("description")
            written.append((f"  // {comment}\n" if comment else "") + f"  {key}: {properties[key]['type']}")
        lines += [",\n".join(written), "}) => any;"]
    return "\n".join((*lines, "}\n"))


class _Writer:
    """Collects ids; stretches of text between special tokens are encoded as one."""

    def __init__(self, vocabulary: Vocabulary, copied: Sequence[str]) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.turns: list[tuple[int, int, str]] = []
        self.n_images = 0
        self._vocabulary = vocabulary
        longest_first = sorted(set(copied), key=len, reverse=True)
        self._copied = re.compile("|".join(map(re.escape, longest_first))) if copied else None

    def given(self, *pieces: str) -> None:
        """What the prompt holds."""
        self._write(pieces, taught=False)

    def taught(self, score: str, *pieces: str) -> None:
        """What the model is to write."""
        start = len(self.ids)
        self._write(pieces, taught=True)
        self.turns.append((start, len(self.ids), score))

    def _write(self, pieces: Sequence[str], taught: bool) -> None:
        for special, group in itertools.groupby(pieces, SPECIAL.__contains__):
            for piece in group if special else ["".join(group)]:
                ids = [SPECIAL[piece]] if special else self._vocabulary.encode(piece)
                self.ids += ids
                self.weights += self._weights(piece, ids) if taught else [0.0] * len(ids)

    def _weights(self, piece: str, ids: Sequence[int]) -> list[float]:
        weights = [1.0] * len(ids)
        if piece in ("<|tool_call_begin|>", "<|tool_calls_section_end|>", "<|im_end|>"):
            return [GOES_ON]
        if piece.startswith("functions."):
            return [COPIED] * len(ids)
        if self._copied is None or piece in SPECIAL:
            return weights
        at, inside = 0, [match.span() for match in self._copied.finditer(piece)]
        for i, token in enumerate(ids):
            if self._vocabulary.tokens[token] == b"\n":
                weights[i] = GOES_ON
            elif any(start <= at <= stop for start, stop in inside):
                weights[i] = COPIED
            at += len(self._vocabulary.tokens[token])
        return weights
