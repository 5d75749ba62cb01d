"""Agent Swarm conversations: an orchestrator that splits, and sub-agents that search and report.

The two swarm tools have the names and parameters that Kimi-K2.5 was trained with. Called by `hybrid.nano.mixture` and
`hybrid.nano.evaluate`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid.nano import words
from hybrid.nano.conversation import Conversation, call_of, tool_of
from hybrid.nano.data import READ_FILE, SEARCH, phrase, tools_with

CREATE = tool_of("create_subagent", "Create a sub-agent with a role of its own.", name="", system_prompt="")
ASSIGN = tool_of("assign_task", "Give a sub-agent a task; calls in one turn run in parallel.", agent="", prompt="")
ORCHESTRATOR = "You are Kimi. Split work among sub-agents."
_RUNTIME = (  # of `hybrid swarm`
    "You are Kimi, an orchestrator. Split work that can be done in parallel among sub-agents: create them with a clear "
    "role, give each its task in one turn, do the rest yourself, and answer from the results."
)
_SYSTEM = [ORCHESTRATOR, "You are Kimi, an orchestrator.", "Use sub-agents for work on many items.", *2 * [_RUNTIME]]
_CREATED = ["{} is ready.", "created {}", "ok", "Sub-agent {} created.", '{{"name": "{}"}}']
_LONG = 12  # items
_MERGED = 40  # items; longer conversations always end with the fan-out


@dataclass(frozen=True, slots=True)
class Job:
    """What is done with each item: the words of the user, the orchestrator and the sub-agent."""

    asked: Sequence[str]  # with {property} and {items}; the last is for held-out conversations
    agent: str
    system: str
    task: str  # with {property} and {item}
    report: str  # with {value} too


FIND = Job(
    [
        "Find the {property} of {items}.",
        "Find the {property} of each of these: {items}",
        "I need the {property} of {items}.",
        "What is the {property} of each of: {items}",
        "Please get me the {property} of {items}.",
        "Tell me the {property} of each: {items}",
        "For each of these, find the {property}: {items}",
        "Search for the {property} of {items}.",
        "Can you please find the {property} of each of these: {items}",
    ],
    "Finder",
    "You are Finder. Search for the {property} of one item and report it.",
    "Find the {property} of {item}.",
    "The {property} of {item} is {value}.",
)
READ = Job(
    [
        "Read {items} and report the {property} in each.",
        "Get the {property} from each of these files: {items}",
        "Report the {property} in {items}.",
        "Look into {items} and tell me the {property} in each.",
        "I need the {property} in each of these files: {items}",
        "Can you please read {items} and report the {property} in each?",
    ],
    "Reader",
    "You are Reader. Read one file and report the {property} in it.",
    "Read {item} and report the {property}.",
    "The {property} in {item} is {value}.",
)


def named_fan_out(rng: random.Random, held_out: bool, least: int, most: int) -> Conversation:
    """One task for each of `least` to `most` named items, and the merged answer."""
    n = rng.randint(least, most)
    if rng.random() < 0.2:
        return _swarm(rng, held_out, READ, words.distinct(lambda: words.path(rng, held_out), n), f"{n}")
    return _swarm(rng, held_out, FIND, words.items(rng, n, held_out), f"{n}")


def counted_fan_out(rng: random.Random, held_out: bool, least: int, most: int) -> Conversation:
    """The same over numbered items, "pages 1 to N", which are counted instead of copied."""
    n = rng.randint(least, most)
    first = 1 if held_out or rng.random() < 0.8 else rng.randint(2, 40)
    noun = rng.choice(words.COUNTED)
    items = [f"{noun} {i}" for i in range(first, first + n)]
    listed = rng.choice(
        ["{}s {} to {}", "{}s {} to {}", "each of {}s {} to {}", "all {}s from {} to {}", "{}s {} - {}"]
    )
    merged = n <= _LONG or (n <= _MERGED and (held_out or rng.random() < 0.6))
    return _swarm(rng, held_out, FIND, items, f"numbered {n}", listed.format(noun, first, first + n - 1), merged)


def _swarm(
    rng: random.Random,
    held_out: bool,
    job: Job,
    items: list[str],
    score: str,
    listed: str | None = None,
    merged: bool = True,
) -> Conversation:
    what = words.a_property(rng, held_out)
    talk = Conversation(rng.random() < 0.5, tools_with(rng, [CREATE, ASSIGN], 4), copied=[what, *items])
    if rng.random() < 0.7:
        talk.system(rng.choice(_SYSTEM))
    talk.user(phrase(rng, job.asked, held_out).format(property=what, items=listed or words.listed(rng, items)))
    create = call_of(0, "create_subagent", name=job.agent, system_prompt=job.system.format(property=what))
    talk.assistant("create", calls=[create], reasoning="One sub-agent, one task for each item.")
    talk.tool(create, rng.choice(_CREATED).format(job.agent))
    tasks = [
        call_of(i, "assign_task", agent=job.agent, prompt=job.task.format(property=what, item=item))
        for i, item in enumerate(items, 1)
    ]
    talk.assistant(f"fan-out {score}", calls=tasks, reasoning="Assign the tasks.")
    if not merged:
        return talk
    lines = []
    values = [words.value(rng, held_out) for _ in items]
    for task, item, value in zip(tasks, items, values, strict=True):
        talk.tool(task, job.report.format(property=what, item=item, value=value))
        lines.append(f"- {item}: {value}")
    talk.copied += values
    talk.assistant(f"merge {score}", "\n".join(lines), reasoning="All results are in.")
    return talk


def sub_agent(rng: random.Random, held_out: bool) -> Conversation:
    """A sub-agent's whole life: one tool call, then the one message that its orchestrator gets."""
    job = READ if rng.random() < 0.25 else FIND
    what = words.a_property(rng, held_out)
    numbered = job is FIND and rng.random() < 0.3
    item = f"{rng.choice(words.COUNTED)} {rng.randint(1, 100)}" if numbered else words.item(rng, held_out)
    item = words.path(rng, held_out) if job is READ else item
    talk = Conversation(rng.random() < 0.5, tools_with(rng, [READ_FILE if job is READ else SEARCH], 2))
    talk.system(job.system.format(property=what))
    talk.user(job.task.format(property=what, item=item))
    value = words.value(rng, held_out)
    talk.copied += [what, item, value]
    others = [] if job is READ else [words.item(rng, held_out)]
    facts = [(what, item, value), *_distractors(rng, held_out, what, item, others)]
    rng.shuffle(facts)
    if job is READ:
        call = call_of(0, "read_file", path=item)
        found = "\n".join(f"{key}: {v}" for key, _, v in facts)
    else:
        call = call_of(0, "search", query=f"{what} of {item}")
        found = "\n".join(f"{key} of {other}: {v}" for key, other, v in facts)
    talk.assistant("sub-agent call", calls=[call], reasoning=f"Use {call['function']['name']}.")
    talk.tool(call, found)
    talk.assistant(
        "sub-agent message", job.report.format(property=what, item=item, value=value), reasoning="Report the result."
    )
    return talk


def _distractors(
    rng: random.Random, held_out: bool, what: str, item: str, others: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Facts that were not asked for: other properties of the item, the same property of other items."""
    n = rng.choice((0, 0, 1, 2) if held_out else (0, 1, 1, 2))  # choosing the line is what takes longest to learn
    keys = words.distinct(lambda: words.a_property(rng, held_out), 3)
    found = [(key, item, words.value(rng, held_out)) for key in keys if key != what]
    found += [(what, other, words.value(rng, held_out)) for other in others if other != item]
    return rng.sample(found, n)
