"""What arrives in a simulation: a swarm drawn from distributions, or requests replayed from a trace file.

A workload is agents, and an agent is turns: a request, its answer, a wait (a tool runs), the next request, whose
prompt is the whole conversation so far and what was added. Ids stand for content: equal ids mean equal text, and
nothing else is known of it. Knows no scheduler and no clock. Called by the `simulate` command and `simulate.py`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from random import Random
from typing import Any, Literal

USER_TURNS = 10
HASHED_TOKENS = 512  # tokens that one entry of a trace's hash_ids stands for
MOST_TOKENS = 10_000_000  # in one number of a trace or a distribution: beyond every context length there is
GRAMMAR = (
    "write 600 (always), 400..800 (evenly between) or 600~200 (log-normal with that mean and standard deviation), "
    f"numbers up to {MOST_TOKENS}"
)
_LATEST = 1e18  # far beyond any clock; integers in JSON may be too large for a float
_NUMBER = r"(\d+(?:\.\d+)?)"
_DISTRIBUTION = re.compile(rf"{_NUMBER}(?:(\.\.|~){_NUMBER})?", re.ASCII)
_TRACE_KEYS = ("timestamp", "timestamp_s", "input_length", "output_length", "hash_ids")

Span = tuple[int, int]  # (id, tokens): that id so many times


class WorkloadError(ValueError):
    """A distribution or a trace that cannot be read. One line; for a trace with the file and the line's number."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Where a number is drawn from. `first` is the value, the lower end or the mean; `second` the upper end or the
    standard deviation."""

    shape: Literal["fixed", "uniform", "lognormal"]
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str, flag: str = "") -> "Distribution":
        """`600`, `400..800` or `600~200`. Raises WorkloadError, which says so and names the flag."""
        match, said = _DISTRIBUTION.fullmatch(text.strip()), f"{flag} {text!r}".strip()
        if match is None:
            raise WorkloadError(f"{said} is no distribution: {GRAMMAR}")
        first, second = float(match[1]), float(match[3] or 0.0)
        if max(first, second) > MOST_TOKENS or (match[2] == ".." and first > second):
            raise WorkloadError(f"{said} is out of range: {GRAMMAR}")
        if match[2] is None:
            return cls("fixed", first)
        return cls("uniform" if match[2] == ".." else "lognormal", first, second)

    def draw(self, random: Random) -> float:
        """One number."""
        if self.shape == "uniform":
            return random.uniform(self.first, self.second)
        if self.shape == "fixed" or self.first == 0:
            return self.first
        # Of a log-normal with mean m and standard deviation s: sigma² = ln(1 + s²/m²), mu = ln m - sigma²/2.
        variance = math.log1p((self.second / self.first) ** 2)
        return random.lognormvariate(math.log(self.first) - variance / 2, math.sqrt(variance))

    def count(self, random: Random, least: int) -> int:
        """One whole number, at least `least`; between its ends an even one hits each as often."""
        if self.shape == "uniform":
            return max(least, min(int(random.uniform(self.first, self.second + 1)), int(self.second)))
        return max(least, min(round(self.draw(random)), MOST_TOKENS))


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of an agent and the answer it gets."""

    added: tuple[Span, ...]  # what the prompt has beyond the conversation so far
    output: int  # tokens of the answer, at least 1
    wait: float = 0.0  # seconds from the end of the agent's turn before; of the first turn: from the start of time


@dataclass(frozen=True, slots=True)
class Agent:
    """Turns one after the other. `own_id` stands for all that nobody else has, its answers among it."""

    own_id: int
    turns: tuple[Turn, ...]
    group: str = ""  # as `server.request.Request` has it
    patient: bool = False

    def prompt(self, turn: int) -> tuple[int, ...]:
        """Ids of the prompt of turn number `turn` (from 0): the conversation before it and what it adds."""
        return tuple(chain.from_iterable(repeat(token, n) for token, n in self._spans(turn)))

    def prompt_tokens(self, turn: int) -> int:
        """Their number."""
        return sum(n for _, n in self._spans(turn))

    def _spans(self, turn: int) -> Iterator[Span]:
        for before in self.turns[:turn]:
            yield from before.added
            yield self.own_id, before.output
        yield from self.turns[turn].added


@dataclass(frozen=True, slots=True)
class Workload:
    """All that will arrive."""

    agents: tuple[Agent, ...]

    @property
    def n_requests(self) -> int:
        """Turns of all agents."""
        return sum(len(agent.turns) for agent in self.agents)


def swarm(
    agents: int,
    shared_tokens: int,
    private: Distribution,
    output: Distribution,
    turns: Distribution = Distribution("fixed", 1),
    tool_tokens: Distribution = Distribution("fixed", 0),
    tool_wait: Distribution = Distribution("fixed", 0),
    seed: int = 0,
) -> Workload:
    """`agents` that start at once: one prompt for all, then each its own; answers, tool results and waits are drawn.

    Lengths are tokens, `tool_wait` seconds, `turns` requests of an agent. An agent is a function of the seed and its
    number, so a larger swarm begins with the same agents. Raises WorkloadError where there is nobody or nothing to ask.
    """
    if agents < 1 or not 0 <= shared_tokens <= MOST_TOKENS:
        raise WorkloadError(
            f"{agents} agents and {shared_tokens} shared tokens: a swarm has 1 agent or more, and 0 tokens or more"
        )
    needed = {"--output": output, "--turns": turns} | ({} if shared_tokens else {"--private": private})
    for flag, drawn in needed.items():
        if drawn.first < 1:
            why = " where nothing is shared" if flag == "--private" else ""
            raise WorkloadError(f"{flag}: expected 1 or more{why}, found {drawn.first:g}")

    def agent(i: int) -> Agent:
        random, own_id = Random(f"{seed} {i}"), -1 - i
        own = private.count(random, 0 if shared_tokens else 1)
        first = Turn(((0, shared_tokens), (own_id, own)), output.count(random, 1))
        later = (
            Turn(((own_id, tool_tokens.count(random, 0)),), output.count(random, 1), tool_wait.draw(random))
            for _ in range(turns.count(random, 1) - 1)
        )
        return Agent(own_id, (first, *later), "swarm", patient=True)

    return Workload(tuple(map(agent, range(agents))))


def with_users(workload: Workload, users: int, start: float, seed: int = 0) -> Workload:
    """The same and `users` people who come `start` seconds later, each with a conversation of its own: turns of 100 to
    500 new tokens, answers of 50 to 350, and 5 to 25 seconds to read and type."""

    def user(i: int) -> Agent:
        random, own_id = Random(f"{seed} user {i}"), -1 - len(workload.agents) - i
        turns = (
            Turn(((own_id, random.randint(100, 500)),), random.randint(50, 350), random.uniform(5, 25))
            for _ in range(USER_TURNS)
        )
        first, *later = turns
        return Agent(own_id, (replace(first, wait=start + first.wait), *later))

    return Workload((*workload.agents, *map(user, range(users))))


def read_trace(path: Path) -> Workload:
    """Requests from a JSONL file in the format of Mooncake's published traces, one JSON object a line:

        {"timestamp": 3000, "input_length": 915, "output_length": 355, "hash_ids": [0, 462]}

    `timestamp` is the arrival in milliseconds (or `timestamp_s`, in seconds); the earliest one becomes second 0.
    Lengths are tokens. `hash_ids`, optional, has one id for each 512 tokens of the prompt, begun ones too: prompts
    whose ids begin alike begin alike. Without it a prompt is its request's own. Raises WorkloadError.
    """
    try:
        with path.open("rb") as file:
            numbered = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}; name a trace of one JSON object a line") from None
    if not numbered:
        raise WorkloadError(f"{path}: no requests; expected one JSON object a line")
    agents = [_traced(f"{path}:{n}", i, line) for i, (n, line) in enumerate(numbered)]
    start = min(agent.turns[0].wait for agent in agents)
    return Workload(
        tuple(
            Agent(agent.own_id, (Turn(turn.added, turn.output, turn.wait - start),))
            for agent in agents
            for turn in agent.turns
        )
    )


def _traced(where: str, i: int, line: bytes) -> Agent:
    """The request of one line, its arrival as written."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise WorkloadError(f"{where}: not JSON") from None
    if not isinstance(fields, dict):
        raise WorkloadError(f"{where}: not a JSON object")
    unknown = sorted(set(fields) - set(_TRACE_KEYS))
    if unknown:
        raise WorkloadError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_TRACE_KEYS)}")
    prompt, output = (_length(where, fields, key) for key in ("input_length", "output_length"))
    blocks = _blocks(where, fields.get("hash_ids"), prompt)
    own_id = -1 - i
    return Agent(own_id, (Turn(blocks or ((own_id, prompt),), output, _arrival(where, fields)),))


def _arrival(where: str, fields: dict[str, Any]) -> float:
    """Seconds."""
    given = [key for key in ("timestamp", "timestamp_s") if key in fields]
    if len(given) != 1:
        raise WorkloadError(f"{where}: needs either timestamp (milliseconds) or timestamp_s (seconds)")
    value = fields[given[0]]
    if type(value) not in (int, float) or not 0 <= value < _LATEST:
        raise WorkloadError(f"{where}: {given[0]} must be a number from 0, not {_shown(value)}")
    return float(value / 1000 if given[0] == "timestamp" else value)


def _length(where: str, fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise WorkloadError(f"{where}: {key} must be a whole number of tokens from 1, not {_shown(value)}")
    return value


def _blocks(where: str, ids: Any, prompt: int) -> tuple[Span, ...]:
    """A prompt as spans of 512 tokens, the last one shorter; none where the line has no hash_ids."""
    if ids is None:
        return ()
    if not isinstance(ids, list) or not all(type(value) is int and 0 <= value < 2**63 for value in ids):
        raise WorkloadError(f"{where}: hash_ids must be a list of whole numbers from 0")
    expected = -(-prompt // HASHED_TOKENS)
    if len(ids) != expected:
        raise WorkloadError(
            f"{where}: {len(ids)} hash_ids for {prompt} tokens; at {HASHED_TOKENS} tokens each there must be {expected}"
        )
    return tuple((block, min(HASHED_TOKENS, prompt - i * HASHED_TOKENS)) for i, block in enumerate(ids))


def _shown(value: object) -> str:
    return "nothing" if value is None else json.dumps(value)[:40]
