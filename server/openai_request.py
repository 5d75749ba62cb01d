"""OpenAI request bodies to neutral values: the model's name and mode, sampling options, messages and tools.

Every refusal names the field. Fields that nobody reads are collected and told to the client in a header, never
dropped in silence; fields we understand but cannot honour are refused. Knows no engine; the endpoints in
`openai_chat.py`, `openai_completions.py` and `openai.py` call it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid.batch import Sampling
from server.chat import Chat, Json, Message, ToolCall
from server.errors import ApiError, invalid, unsupported
from server.service import Options
from server.validation import Fields, as_fields

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_TOKENS = 1 << 31
MAX_LOGPROBS = 20
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MEDIA = ("image", "image_url", "video", "video_url", "input_audio", "input_image", "file")
TIERS = ("auto", "default", "flex", "scale", "priority")
# Bookkeeping of other services: no effect on the answer, so nothing to warn about.
HARMLESS = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prediction",
    "verbosity",
)
# Ignoring these would change what the answer may look like.
REFUSED = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar", "json_schema"),
    *("functions", "function_call", "audio", "web_search_options", "use_beam_search", "min_tokens"),
)


@dataclass(frozen=True, slots=True)
class Mode:
    """Instant (`thinking` False) or Thinking. `preserve`: keep the reasoning of all earlier turns."""

    thinking: bool
    preserve: bool


def read_model(fields: Fields, served: str) -> tuple[str, bool | None]:
    """(the name to answer under, the mode its alias asks for). Absent means the one model there is."""
    name = fields.text("model")
    aliases = {served: None, f"{served}-instant": False, f"{served}-thinking": True}
    if name is None:
        return served, None
    if name not in aliases:
        message = f"model: {name[:200]!r} is not served here; this server has {', '.join(aliases)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return name, aliases[name]


def read_mode(fields: Fields, alias: bool | None) -> tuple[Mode, Json]:
    """The mode and the remaining chat_template_kwargs.

    Fields of the body beat the model's alias; fields that contradict each other are refused.
    """
    said: dict[str, bool] = {}
    thinking = fields.fields("thinking")
    keep = None
    if thinking is not None:
        kind = thinking.choice("type", ("enabled", "disabled"))
        if kind is None:
            raise invalid(thinking.path("type"), "is missing; it must be enabled or disabled")
        said["thinking"] = kind == "enabled"
        keep = thinking.choice("keep", ("all",))
    kwargs = fields.raw("chat_template_kwargs") or {}
    template = as_fields(kwargs, "chat_template_kwargs")
    if template.raw("thinking") is not None:
        said["chat_template_kwargs.thinking"] = template.boolean("thinking")
    effort = fields.choice("reasoning_effort", EFFORTS)
    if effort is not None:
        said["reasoning_effort"] = effort not in ("none", "minimal")
    if len(set(said.values())) > 1:
        names = " and ".join(said)
        raise invalid(list(said)[-1], f"{names} contradict each other; send one of them")
    preserve = template.boolean("preserve_thinking", keep == "all")
    default = True if alias is None else alias
    rest = {key: value for key, value in kwargs.items() if key not in ("thinking", "preserve_thinking")}
    return Mode(next(iter(said.values()), default), preserve), rest


def read_options(fields: Fields, defaults: Sampling, n_vocab: int) -> Options:
    """Everything that chat and completions have in common; lengths and logprobs are left to the endpoint."""
    for name in REFUSED:
        if fields.raw(name):
            raise unsupported(fields.path(name), f"{name} is")
    fields.ignore(*HARMLESS)
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of not in (None, n):
        raise unsupported(fields.path("best_of"), "best_of other than n is")
    seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
    return Options(
        sampling=replace(read_sampling(fields, defaults), logit_bias=_logit_bias(fields, n_vocab)),
        seed=seed,
        n=n,
        stop=_stops(fields),
        stop_token_ids=frozenset(read_ids(fields.items("stop_token_ids") or [], "stop_token_ids", n_vocab)),
        ignore_eos=fields.boolean("ignore_eos"),
        group=_digest(fields.text("prompt_cache_key")),
        patient=fields.choice("service_tier", TIERS) == "flex",
    )


def _digest(key: str | None) -> str:
    """A group's name of fixed length, whatever a client sends."""
    return hashlib.blake2b(key.encode(errors="replace"), digest_size=16).hexdigest() if key else ""


def read_sampling(fields: Fields, defaults: Sampling) -> Sampling:
    """How tokens are drawn, but for logit_bias; `defaults` where a field is absent. 0 and -1 switch top_k off."""
    temperature = fields.number("temperature", 0.0, 100.0)
    top_p = fields.number("top_p", 0.0, 1.0)
    if top_p == 0:
        raise invalid(fields.path("top_p"), "must be above 0; for the most probable token send temperature 0")
    top_k = fields.integer("top_k", -1, MAX_TOKENS)
    min_p = fields.number("min_p", 0.0, 1.0)
    repetition = fields.number("repetition_penalty", 0.01, 100.0)
    return Sampling(
        temperature=defaults.temperature if temperature is None else temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        top_k=defaults.top_k if top_k is None else top_k if top_k > 0 else None,
        min_p=defaults.min_p if min_p is None else min_p or None,
        presence_penalty=fields.number("presence_penalty", -2.0, 2.0) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2.0, 2.0) or 0.0,
        repetition_penalty=defaults.repetition_penalty if repetition is None else repetition,
    )


def _logit_bias(fields: Fields, n_vocab: int) -> tuple[tuple[int, float], ...]:
    bias = fields.fields("logit_bias")
    if bias is None:
        return ()
    pairs = []
    for key in bias.unknown():
        if not re.fullmatch(r"\d{1,9}", key) or int(key) >= n_vocab:
            raise invalid(bias.path(key[:40]), f"keys must be token ids below {n_vocab}")
        value = bias.number(key, -1e9, 1e9)
        pairs.append((int(key), max(-100.0, min(100.0, value or 0.0))))
    return tuple(pairs)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [] if value is None else value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS:
        raise invalid(fields.path("stop"), f"at most {MAX_STOPS} strings, not {len(stops)}")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise invalid(fields.path("stop"), "must be a string or an array of strings, none of them empty")
    return tuple(stops)


def read_ids(values: Sequence[Any], path: str, n_vocab: int) -> tuple[int, ...]:
    """Token ids below `n_vocab`."""
    if not all(type(value) is int and 0 <= value < n_vocab for value in values):
        bad = next(i for i, value in enumerate(values) if type(value) is not int or not 0 <= value < n_vocab)
        raise invalid(f"{path}[{bad}]", f"must be a token id from 0 to {n_vocab - 1}")
    return tuple(values)


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """(stream, whether to end with a usage chunk)."""
    stream = fields.boolean("stream")
    options = fields.fields("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise invalid("stream_options", "needs stream to be true")
    return stream, options.boolean("include_usage")


def read_messages(fields: Fields, *, media: bool = False) -> tuple[Message, ...]:
    """The conversation. `media` lets picture and video parts through, for a rendering without pixels."""
    items = fields.items("messages")
    if not items:
        raise invalid("messages", "must be an array of at least one message")
    return tuple(_message(as_fields(item, f"messages[{i}]"), media) for i, item in enumerate(items))


def _message(fields: Fields, media: bool) -> Message:
    role = fields.choice("role", ROLES)
    if role is None:
        raise invalid(fields.path("role"), f"is missing; it must be one of {', '.join(ROLES)}")
    reasoning = fields.text("reasoning_content")
    return Message(
        role=role,
        content=_content(fields, media),
        reasoning=fields.text("reasoning") if reasoning is None else reasoning,
        tool_calls=_tool_calls(fields) if role == "assistant" else (),
        tool_call_id=fields.text("tool_call_id"),
        name=fields.text("name"),
    )


def _content(fields: Fields, media: bool) -> str | tuple[Json, ...] | None:
    value = fields.raw("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(fields.path("content"), "must be a string, an array of parts, or null")
    parts = []
    for i, item in enumerate(value):
        path = f"{fields.path('content')}[{i}]"
        part = as_fields({"type": "text", "text": item} if isinstance(item, str) else item, path)
        kind = part.text("type")
        if kind in MEDIA and not media:
            what = "images are" if "image" in kind else f"parts of type {kind} are"
            raise unsupported(path, what)
        if kind == "text" and part.text("text") is None:
            raise invalid(part.path("text"), "is missing")
        if kind != "text" and kind not in MEDIA:
            raise invalid(part.path("type"), f"must be text, not {str(kind)[:40]!r}")
        parts.append({"type": "text", "text": part.text("text")} if kind == "text" else item)
    return tuple(parts)


def _tool_calls(fields: Fields) -> tuple[ToolCall, ...]:
    calls = []
    for i, item in enumerate(fields.items("tool_calls") or []):
        call = as_fields(item, f"{fields.path('tool_calls')}[{i}]")
        function = call.fields("function")
        name = None if function is None else function.text("name")
        if function is None or not name:
            raise invalid(call.path("function.name"), "is missing")
        arguments = function.raw("arguments")
        if not isinstance(arguments, str | dict | None):
            raise invalid(function.path("arguments"), "must be JSON as a string")
        calls.append(ToolCall(call.text("id") or "", name, "{}" if arguments is None else arguments))
    return tuple(calls)


def check_tool_results(messages: Sequence[Message]) -> None:
    """Every tool message must answer a call made before it; a model cannot place any other."""
    known: set[str] = set()
    for i, message in enumerate(messages):
        known.update(call.id for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id not in known:
            path = f"messages[{i}].tool_call_id"
            if message.tool_call_id is None:
                raise invalid(path, "is missing")
            raise invalid(path, f"{message.tool_call_id[:200]!r} is not the id of an earlier tool call")


def read_tools(fields: Fields) -> tuple[Json, ...]:
    """Tool declarations, as sent."""
    tools = fields.items("tools") or []
    names: set[str] = set()
    for i, item in enumerate(tools):
        tool = as_fields(item, f"tools[{i}]")
        if tool.text("type") not in ("function", "builtin_function"):
            raise invalid(tool.path("type"), "must be function or builtin_function")
        function = tool.fields("function")
        name = None if function is None else function.text("name")
        if function is None or name is None or not re.fullmatch(r"[\w$][\w.$-]{0,255}", name):
            raise invalid(tool.path("function.name"), "must be letters, digits, underscores, dots or dashes")
        if name in names:
            raise invalid(function.path("name"), f"{name!r} is declared twice")
        names.add(name)
        function.text("description")
        function.fields("parameters")
    return tuple(tools)


def read_chat(fields: Fields, mode: Mode, rest: Json, *, render_only: bool = False) -> Chat:
    """Messages and tools in one `Chat`; `partial: true` on the last message continues it, as in Moonshot's API.

    `render_only` takes everything that a template can render, answerable or not.
    """
    messages = read_messages(fields, media=render_only)
    last = as_fields((fields.raw("messages") or [{}])[-1], f"messages[{len(messages) - 1}]")
    prefill = last.boolean("partial") or fields.boolean("continue_final_message")
    if not render_only:
        check_tool_results(messages)
    if prefill and messages[-1].role != "assistant" and not render_only:
        raise invalid(f"messages[{len(messages) - 1}].role", "only an assistant message can be continued")
    return Chat(
        messages=messages,
        tools=read_tools(fields),
        thinking=mode.thinking,
        preserve_thinking=mode.preserve,
        add_generation_prompt=fields.boolean("add_generation_prompt", True) and not prefill,
        continue_final_message=prefill,
        template_kwargs=rest,
    )


def ignored_header(fields: Fields) -> dict[str, str]:
    """A header that names the fields nobody read; names are the client's, so only plain ones are repeated."""
    names = [name for name in fields.unknown() if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)][:20]
    return {"x-hybrid-ignored-fields": ", ".join(names)} if names else {}
