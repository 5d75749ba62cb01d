"""The conversations that nano is trained and graded on, generated from seeds.

Each family makes one `Conversation` from a `random.Random`; `held_out` gives unseen items in unseen phrasings. Answers
are the only right ones for their prompts, so that exact match is the score. Called by `hybrid.nano.train` and
`hybrid.nano.evaluate`; the swarm's families are in `hybrid.nano.swarm_data`, plain talk in `hybrid.nano.talk`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybrid.nano import words
from hybrid.nano.conversation import Conversation, Json, call_of, tool_of

_BEFORE = ["Hello! ", "OK. ", "Next: ", "Hi, ", "Please: ", "Now: "]
_ASKING = ["Can you ", "Could you "]
_POLITE = [*_ASKING, "Please ", "Now ", "I want you to "]  # before an order, in small letters
_ORDERS = words.table(
    "Calculate Call Compute Copy Find Get List Look Make Open Read Repeat Report Run Save Say Search Send Show Store "
    "Tell Try Use Write"
)
_AFTER = [" Thanks.", " Please.", " Thank you!", " Be quick."]
Make = Callable[[random.Random, bool], Conversation]


@dataclass(frozen=True, slots=True)
class Skill:
    """One known tool: how it is declared, asked for, answers and is reported."""

    tool: Json
    asked: Sequence[str]  # phrasings with the fields in braces; the last one is only for held-out conversations
    arguments: Callable[[random.Random, bool], dict[str, str]]  # fields of the phrasings, and of the call
    result: Callable[[random.Random, bool, dict[str, str]], str]
    report: str
    many: Sequence[str] = ()  # phrasings over several values of the first field
    called: Callable[[dict[str, str]], dict[str, str]] = dict  # from fields to the call's arguments


def _find(rng: random.Random, held_out: bool) -> dict[str, str]:
    return {"item": words.item(rng, held_out), "property": words.a_property(rng, held_out)}


def _sum(rng: random.Random, held_out: bool) -> dict[str, str]:
    return {"expression": f"{rng.randint(2, 9999)} {rng.choice('+-*/')} {rng.randint(2, 999)}"}


def _line(rng: random.Random, held_out: bool) -> str:
    return " ".join(words.distinct(lambda: words.thing(rng, held_out), rng.randint(1, 4)))


def _files(rng: random.Random, held_out: bool) -> str:
    return "\n".join(words.distinct(lambda: words.path(rng, held_out), rng.randint(1, 4)))


SEARCH = tool_of("search", "Search the web.", query="What to look for.")
READ_FILE = tool_of("read_file", "Read a text file of the workspace.", path="")
SKILLS = {
    "search": Skill(
        SEARCH,
        [
            "What is the {property} of {item}?",
            "Search for the {property} of {item}.",
            "Please look up the {property} of {item}.",
            "Tell me the {property} of {item}.",
            "I want to know the {property} of {item}.",
            "Search the web: {property} of {item}?",
            "Can you please tell me the {property} of {item}?",
        ],
        _find,
        lambda rng, held_out, fields: f"{fields['property']} of {fields['item']}: {words.value(rng, held_out)}",
        "The {property} of {item} is {result}.",
        called=lambda fields: {"query": f"{fields['property']} of {fields['item']}"},
    ),
    "read_file": Skill(
        READ_FILE,
        [
            "Read {path}.",
            "What is in {path}?",
            "Show me the file {path}.",
            "Open {path}.",
            "What does {path} say?",
            "Can you please show me the file {path}?",
        ],
        lambda rng, held_out: {"path": words.path(rng, held_out)},
        lambda rng, held_out, fields: _line(rng, held_out),
        "{path}: {result}",
        [
            "Read {path}.",
            "Show me the files {path}.",
            "What is in {path}?",
            "Open {path}.",
            "Can you please read {path}?",
        ],
    ),
    "write_file": Skill(
        tool_of("write_file", "Write a text file.", content="", path=""),
        [
            "Write {content} to {path}.",
            "Save {content} in {path}.",
            "Write a file {path} with {content}.",
            "Please save {content} as {path}.",
            "Store {content} in {path}.",
            "Can you please save {content} in {path}?",
        ],
        lambda rng, held_out: {"content": _line(rng, held_out), "path": words.path(rng, held_out)},
        lambda rng, held_out, fields: rng.choice(["ok", "written", f"{words.number(rng)} bytes"]),
        "I wrote {content} to {path}.",
    ),
    "list_files": Skill(
        tool_of("list_files", "List the files of a folder.", path=""),
        [
            "List the files in {path}.",
            "Which files are in {path}?",
            "List {path}.",
            "Show me the folder {path}.",
            "What is in the folder {path}?",
            "Can you please list {path}?",
        ],
        lambda rng, held_out: {"path": words.thing(rng, held_out)},
        lambda rng, held_out, fields: _files(rng, held_out),
        "{path} holds:\n{result}",
        [
            "List the files in {path}.",
            "Which files are in {path}?",
            "List {path}.",
            "Can you please list the files in {path}?",
        ],
    ),
    "calculator": Skill(
        tool_of("calculator", "Compute an arithmetic expression.", expression=""),
        [
            "What is {expression}?",
            "Compute {expression}.",
            "Calculate {expression}.",
            "{expression} = ?",
            "Can you please compute {expression}?",
        ],
        _sum,
        lambda rng, held_out, fields: words.number(rng),
        "{expression} = {result}",
        [
            "Compute {expression}.",
            "Calculate {expression}.",
            "What are {expression}?",
            "Can you please compute {expression}?",
        ],
    ),
    "python": Skill(
        tool_of("python", "Run Python code.", code="The code to run."),
        [
            "Run {code} in Python.",
            "What does {code} print in Python?",
            "Run this Python code: {code}",
            "Use Python to run {code}.",
            "Try {code} in Python.",
            "Can you please run {code} in Python?",
        ],
        lambda rng, held_out: {"code": _code(rng, held_out)},
        lambda rng, held_out, fields: words.value(rng, held_out),
        "The output is {result}.",
    ),
    "get_weather": Skill(
        tool_of("get_weather", "Current weather of a city.", city=""),
        [
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "Tell me the weather in {city}.",
            "Weather in {city}?",
            "Is the weather good in {city}?",
            "Can you please tell me the weather in {city}?",
        ],
        lambda rng, held_out: {"city": words.name(rng, held_out)},
        lambda rng, held_out, fields: f"{rng.randint(-9, 39)} C, {rng.choice(words.WEATHER)}",
        "{city}: {result}",
        [
            "What is the weather in {city}?",
            "Tell me the weather in {city}.",
            "Weather in {city}?",
            "Can you please tell me the weather in {city}?",
        ],
    ),
    "send_mail": Skill(
        tool_of("send_mail", "Send a mail.", text="", to=""),
        [
            "Send {to} a mail that says {text}.",
            "Mail {text} to {to}.",
            "Send {text} to {to}.",
            "Please mail {to}: {text}",
            "Send a mail to {to}: {text}",
            "Can you please send {to} a mail that says {text}?",
        ],
        lambda rng, held_out: {"text": _line(rng, held_out), "to": words.name(rng, held_out)},
        lambda rng, held_out, fields: rng.choice(["sent", "queued", "ok"]),
        "The mail to {to} is on its way.",
    ),
}


def _code(rng: random.Random, held_out: bool) -> str:
    a, b = rng.randint(2, 999), rng.randint(2, 99)
    word = words.thing(rng, held_out)
    return rng.choice([f"print({a} {rng.choice('+-*')} {b})", f"len('{word}')", f"max({a}, {b})", f"print('{word}')"])


def phrase(rng: random.Random, phrasings: Sequence[str], held_out: bool) -> str:
    """One way to ask. The last of several is kept for held-out conversations, which use it half of the time."""
    if held_out and rng.random() < 0.5:
        return phrasings[-1]
    asked = rng.choice(phrasings[:-1] or phrasings)
    if asked.split(" ")[0] in _ORDERS and rng.random() < 0.3:
        polite = rng.choice(_POLITE)
        asked = polite + asked[0].lower() + asked[1:]
        if polite in _ASKING and asked.endswith("."):
            asked = asked[:-1] + "?"
    before = rng.choice(_BEFORE) if rng.random() < 0.1 else ""
    after = rng.choice(_AFTER) if rng.random() < 0.1 else ""
    return before + asked + after


def tools_with(rng: random.Random, needed: Sequence[Json], extra: int = 3) -> list[Json]:
    """The needed tools among up to `extra` others, in any order, at times without descriptions."""
    names = {tool["function"]["name"] for tool in needed}
    others = [skill.tool for name, skill in SKILLS.items() if name not in names]
    tools = [*needed, *rng.sample(others, rng.choice((0, 0, *range(extra + 1))))]
    rng.shuffle(tools)
    return [undescribed(tool) for tool in tools] if rng.random() < 0.3 else tools


def undescribed(tool: Json) -> Json:
    """The tool with its names only."""
    function = tool["function"]
    return tool_of(function["name"], "", **dict.fromkeys(function["parameters"]["properties"], ""))


def known_tool(rng: random.Random, held_out: bool) -> Conversation:
    """One of the known tools among others: the call, and the answer from its result."""
    name = rng.choice(list(SKILLS))
    skill = SKILLS[name]
    talk = Conversation(rng.random() < 0.5, tools_with(rng, [skill.tool]))
    n = rng.randint(2, 5) if skill.many and rng.random() < 0.35 else 1
    all_fields = distinct_fields(rng, skill, held_out, n)
    if n == 1:
        talk.user(phrase(rng, skill.asked, held_out).format(**all_fields[0]))
    else:
        (key, *_) = all_fields[0]
        values = [fields[key] for fields in all_fields]
        talk.user(phrase(rng, skill.many, held_out).format(**{key: words.listed(rng, values)}))
    return _called(rng, talk, skill, name, all_fields, held_out)


def distinct_fields(rng: random.Random, skill: Skill, held_out: bool, n: int) -> list[dict[str, str]]:
    """Fields of `n` different calls."""
    found: list[dict[str, str]] = []
    while len(found) < n:
        fields = skill.arguments(rng, held_out)
        if fields not in found:
            found.append(fields)
    return found


def _called(
    rng: random.Random, talk: Conversation, skill: Skill, name: str, all_fields: list[dict[str, str]], held_out: bool
) -> Conversation:
    talk.copied += [value for fields in all_fields for value in fields.values()]
    calls = [call_of(i, name, **skill.called(fields)) for i, fields in enumerate(all_fields)]
    talk.assistant("tool" if len(calls) == 1 else "tools parallel", calls=calls, reasoning=f"Use {name}.")
    reports = []
    for call, fields in zip(calls, all_fields, strict=True):
        result = skill.result(rng, held_out, fields)
        talk.tool(call, result)
        shown = result.removeprefix(f"{fields['property']} of {fields['item']}: ") if name == "search" else result
        talk.copied.append(shown)
        reports.append(skill.report.format(result=shown, **fields))
    talk.assistant("tool answer", "\n".join(reports), reasoning="Answer from the result.")
    return talk


def unseen_tool(rng: random.Random, held_out: bool) -> Conversation:
    """A tool with a made-up name and parameter, copied from its declaration."""
    abouts = words.distinct(lambda: words.thing(rng, held_out), rng.randint(1, 3))
    tools = [_made_up_tool(rng, held_out, about) for about in abouts]
    tool, key, about = rng.choice(tools)
    name = tool["function"]["name"]
    value = words.item(rng, held_out)
    talk = Conversation(rng.random() < 0.5, [t for t, _, _ in tools])
    if rng.random() < 0.3:
        talk.tools = tools_with(rng, talk.tools, 2)
    asked = [
        "Use {name} with {key} {value}.",
        "Call {name} for {value}.",
        "Get the {about} of {value}.",
        "Try {name} with {value}.",
        "What is the {about} of {value}?",
        "Use the tool {name}: {value}",
        "Can you please call {name} for {value}?",
    ]
    talk.user(phrase(rng, asked, held_out).format(name=name, key=key, about=about, value=value))
    call = call_of(0, name, **{key: value})
    talk.copied += [name, key, value]
    talk.assistant("tool unseen", calls=[call], reasoning=f"Use {name}.")
    result = words.value(rng, held_out)
    talk.tool(call, result)
    talk.copied.append(result)
    talk.assistant("tool answer", f"{value}: {result}", reasoning="Answer from the result.")
    return talk


def _made_up_tool(rng: random.Random, held_out: bool, about: str) -> tuple[Json, str, str]:
    key = words.thing(rng, held_out)
    verb = rng.choice(["get", "find", "fetch", "query", "read"])
    return tool_of(f"{verb}_{about}", f"Get the {about} of a {key}.", **{key: ""}), key, about


def copy_list(rng: random.Random, held_out: bool, longest: int = 12) -> Conversation:
    """Repeat a list, or look something up in one."""
    talk = Conversation(rng.random() < 0.5)
    things = words.items(rng, rng.randint(1, longest), held_out)
    talk.copied += things
    if rng.random() < 0.4:
        asked = [
            "Repeat: {}",
            "Repeat this list: {}",
            "Say after me: {}",
            "Copy this: {}",
            "Write again: {}",
            "Can you please repeat this list: {}",
        ]
        talk.user(phrase(rng, asked, held_out).format(", ".join(things)))
        talk.assistant("copy", ", ".join(things), reasoning="Repeat it.")
    elif rng.random() < 0.6:
        asked = [
            "Make a list: {}",
            "Write as bullets: {}",
            "Bullet points: {}",
            "List these: {}",
            "As a list: {}",
            "Can you please list these: {}",
        ]
        talk.user(phrase(rng, asked, held_out).format(words.listed(rng, things)))
        talk.assistant("copy", "\n".join(f"- {thing}" for thing in things), reasoning="One line each.")
    else:
        values = [words.value(rng, held_out) for _ in things]
        at = rng.randrange(len(things))
        facts = [f"{thing} is {value}" for thing, value in zip(things, values, strict=True)]
        asked = [
            "{}. What is {}?",
            "{}. Which value has {}?",
            "{}. Tell me what {} is.",
            "{}. And {}?",
            "{}. Can you tell me what {} is?",
        ]
        talk.user(phrase(rng, asked, held_out).format("; ".join(facts), things[at]))
        talk.copied = values
        talk.assistant("lookup", values[at], reasoning=f"{things[at]} is {values[at]}.")
    return talk
