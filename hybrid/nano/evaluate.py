"""Grade nano through the server, on held-out items: `python -m hybrid.nano.evaluate`.

Every graded turn is asked for with the right conversation before it, greedily, and must be right as a whole, as the
server's parser reads it: the reasoning, the content, the calls with their ids, names, order and argument text. In
swarms the model decides every turn (`hybrid.nano.swarm_run`). Without --url a server is started for the time of the
run, as a process of its own. Knows nothing of what is behind the URL. Called from the command line and by the system
tests.
"""

import argparse
import asyncio
import functools
import json
import math
import operator
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hybrid.nano.conversation import Conversation, Json
from hybrid.nano.data import Make, copy_list, known_tool, phrase, unseen_tool
from hybrid.nano.mixture import named, numbered
from hybrid.nano.sums import arithmetic
from hybrid.nano.swarm_data import sub_agent
from hybrid.nano.swarm_run import Ask, Refused, run_swarm, swarm_of
from hybrid.nano.talk import talk

SEED = 30_000  # the training's own probes have another
ITEMS = 200  # of a row
SWARMS = 50  # of a number of items
SWARM_SIZES = ((4, False), (10, False), (30, True))  # items, whether they are numbered
_AT_ONCE = 16  # requests
_DRAWS = 300  # conversations drawn at most for each turn wanted of a row
_MOST_TOKENS = 4200  # of a turn; the calls of a fan-out over 100 are about 3400
_MISSES = 3  # kept of a row, for the report
_TRAINED_TALKS = 8000  # drawn to know every question that training asks
_START_SECONDS = 300
_REQUEST_SECONDS = 900


class EvaluationError(RuntimeError):
    """The server cannot be started, reached or understood. One line for the user."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn to grade: the chat before it, and its one right answer."""

    row: str
    thinking: bool
    tools: list[Json]
    before: list[Json]
    right: Json

    @property
    def key(self) -> str:
        """What is asked, so that nothing counts twice."""
        return json.dumps([self.thinking, self.tools, self.before])

    @property
    def max_tokens(self) -> int:
        """No less than the right answer needs: a token for each character, and the marks around calls."""
        reasoning, content, calls = parts(self.right)
        n_characters = len(reasoning) + len(content) + sum(len(identity) + len(text) for identity, _, text in calls)
        return min(n_characters + 6 * len(calls) + 8, _MOST_TOKENS)


@dataclass(slots=True)
class Row:
    """One line of the result. `misses`: some wrong turns, or why swarms failed and how often."""

    name: str
    n: int = 0
    right: int = 0
    misses: list[Json] = field(default_factory=list)

    def line(self) -> str:
        """The row as text."""
        low, high = wilson(self.right, self.n)
        return f"{self.name:<24}{self.n:>6}{self.right:>7}{self.right / self.n:>8.3f}   {low:.3f} to {high:.3f}"

    def report(self) -> Json:
        """The row as JSON."""
        low, high = wilson(self.right, self.n)
        share = {"share": self.right / self.n, "low": low, "high": high}
        return {"row": self.name, "n": self.n, "exact": self.right, **share, "misses": self.misses}


HEADING = f"{'':<24}{'n':>6}{'exact':>7}{'share':>8}   95 % (Wilson)"


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22). `n` is at least 1."""
    z, share = 1.959964, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def parts(message: Json) -> tuple[str, str, list[tuple[str, str, str]]]:
    """Reasoning, content and calls (id, name, argument text) of an assistant message: all that is compared."""
    calls = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
    return message.get("reasoning_content") or "", message.get("content") or "", calls


def two_digits(rng: random.Random, held_out: bool) -> Conversation:
    """Arithmetic over two numbers of two digits."""
    while True:
        made = arithmetic(rng, held_out)
        if all(len(number) == 2 for number in re.findall(r"\d+", made.messages[0]["content"])):
            return made


def split_talk() -> Make:
    """Talk whose turns count as "chat" where the question is new, as "chat, trained" where training asks it too."""
    rng = random.Random(SEED)
    around = {phrase(rng, ["{}"], False) for _ in range(_TRAINED_TALKS)}  # such as "{} Thanks."
    drawn = [message for _ in range(_TRAINED_TALKS) for message in talk(rng, False).messages]
    asked = {message["content"] for message in drawn if message["role"] == "user"}
    trained = {form.format(question) for form in around for question in asked}

    def make(rng: random.Random, held_out: bool) -> Conversation:
        made = talk(rng, held_out)
        for at in made.graded:
            made.graded[at] = "chat, trained" if made.messages[at - 1]["content"] in trained else "chat"
        return made

    return make


def families(items: int) -> list[tuple[Make, tuple[str, ...], int]]:
    """What is drawn from, the rows that its turns go to, and how many turns each row gets: few of the very long."""
    few = max(1, items // 4)
    kinds = [f"{kind} {mode}" for kind in ("sum", "difference", "word problem") for mode in ("think", "direct")]
    return [
        (known_tool, ("tool", "tools parallel", "tool answer"), items),
        (unseen_tool, ("tool unseen",), items),
        (sub_agent, ("sub-agent call", "sub-agent message"), items),
        (named(2, 12), ("create",), items),
        *((named(n, n), (f"fan-out {n}", f"merge {n}"), items) for n in (2, 3, 4, 6, 8, 10, 12)),
        (numbered(30, 30), ("fan-out numbered 30", "merge numbered 30"), few),
        (numbered(100, 100), ("fan-out numbered 100",), few),
        (two_digits, tuple(kinds), items),
        (split_talk(), ("chat", "chat, trained"), items),
        (copy_list, ("copy", "lookup"), items),
    ]


def turns_of(make: Make, rows: Sequence[str], n: int) -> list[Turn]:
    """`n` different held-out turns for each of these rows, always the same; fewer where the family has no more."""
    rng = random.Random(f"{SEED} {' '.join(rows)}")
    found: dict[str, dict[str, Turn]] = {row: {} for row in rows}
    for _ in range(n * _DRAWS):
        if all(len(turns) == n for turns in found.values()):
            break
        made = make(rng, True)
        for at, row in made.graded.items():
            if len(found.get(row, ())) < n and row in found:
                turn = Turn(row, made.thinking, made.tools, made.messages[:at], made.messages[at])
                found[row].setdefault(turn.key, turn)
    return [turn for turns in found.values() for turn in turns.values()]


async def grade(ask: Ask, turns: Sequence[Turn]) -> list[Row]:
    """Ask for every turn, several at a time. Rows in the order of the turns."""
    choices = await asyncio.gather(*(ask(t.thinking, t.tools, t.before, t.max_tokens) for t in turns))
    rows: dict[str, Row] = {}
    for turn, choice in zip(turns, choices, strict=True):
        row = rows.setdefault(turn.row, Row(turn.row))
        row.n += 1
        if choice["finish_reason"] != "length" and parts(choice["message"]) == parts(turn.right):
            row.right += 1
        elif len(row.misses) < _MISSES:
            row.misses.append({"before": turn.before, "right": turn.right, "answered": choice["message"]})
    return list(rows.values())


async def grade_swarms(ask: Ask, n_items: int, numbered: bool, n: int) -> Row:
    """Run `n` swarms over as many items each, half of them thinking."""
    swarms = [swarm_of(SEED + i, n_items, numbered, thinking=i % 2 == 0) for i in range(n)]
    ended = Counter(await asyncio.gather(*(run_swarm(swarm, ask) for swarm in swarms)))
    misses: list[Json] = [{"why": why, "count": count} for why, count in ended.most_common() if why is not None]
    return Row(f"swarm {'numbered ' if numbered else ''}{n_items}", n, ended[None], misses)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[str, Ask]]:
    """The name of the model behind `url` (which ends in /v1), and a way to ask it.

    Both raise EvaluationError where the server cannot answer, and asking raises Refused where it will not.
    """
    slots = asyncio.Semaphore(_AT_ONCE)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_REQUEST_SECONDS)) as session:
        model = str(await _asked(session, "GET", f"{url}/models", None, "data", 0, "id"))

        async def ask(thinking: bool, tools: list[Json], messages: list[Json], max_tokens: int) -> Json:
            body: Json = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
            body |= {"chat_template_kwargs": {"thinking": thinking}} | ({"tools": tools} if tools else {})
            async with slots:
                choice: Json = await _asked(session, "POST", f"{url}/chat/completions", body, "choices", 0)
            return choice

        yield model, ask


async def _asked(session: aiohttp.ClientSession, method: str, url: str, body: Json | None, *keys: str | int) -> Any:
    """What stands at `keys` in the answer."""
    try:
        async with session.request(method, url, json=body) as response:
            if response.status == 200:
                return functools.reduce(operator.getitem, keys, await response.json())
            said = " ".join((await response.text()).split())[:300]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EvaluationError(f"{url}: {error or 'no answer'}; is the server running?") from None
    except (LookupError, TypeError, ValueError):
        raise EvaluationError(f"{url}: what answers there is no OpenAI-compatible server") from None
    refusal = f"{url}: the server answered {response.status}: {said}"
    raise Refused(refusal) if response.status == 400 else EvaluationError(refusal)


@contextmanager
def serving(model: Path | None) -> Iterator[str]:
    """The URL of a server of this installation that runs until the end of the block; `model` None: its default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += [] if model is None else ["--model", str(model)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_ready(process, f"http://127.0.0.1:{port}/readyz")
            yield f"http://127.0.0.1:{port}/v1"
        except EvaluationError as error:
            log.seek(0)
            said = log.read().decode(errors="replace").strip()[-1000:]
            raise EvaluationError(f"{error}\nthe server's log ends with:\n{said}") from None
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):  # not listening yet, or loading: 503
            time.sleep(0.2)
    raise EvaluationError(f"the server is not ready (exit status {process.poll()})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # nothing happens where it has ended
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def evaluated(ask: Ask, items: int, swarms: int) -> AsyncIterator[Row]:
    """Every row, as it is done."""
    for make, names, n in families(items):
        for row in await grade(ask, turns_of(make, names, n)):
            yield row
    for n_items, is_numbered in SWARM_SIZES if swarms else ():
        yield await grade_swarms(ask, n_items, is_numbered, swarms)


async def _run(url: str, items: int, swarms: int, out: Path | None) -> None:
    """Print every row as it is done, and write the report so far."""
    rows: list[Json] = []
    async with connected(url) as (model, ask):
        report = {"model": model, "seed": SEED, "items": items, "swarms": swarms, "rows": rows}
        print(HEADING)
        async for row in evaluated(ask, items, swarms):
            print(row.line(), flush=True)
            for miss in row.misses:
                if "why" in miss:
                    print(f"  {miss['count']} x {miss['why']}", flush=True)
            rows.append(row.report())
            if out:
                out.write_text(json.dumps(report, indent=1))


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.nano.evaluate", description=__doc__)
    parser.add_argument("--url", help="of a running server, http://127.0.0.1:8000/v1 (default: one is started)")
    parser.add_argument("--model", type=Path, help="checkpoint for the server that is started (default: its default)")
    parser.add_argument("--items", type=int, default=ITEMS, help="turns of a row (default: %(default)s)")
    parser.add_argument("--swarms", type=int, default=SWARMS, help="of each number of items (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    options = parser.parse_args(arguments)
    if options.url and options.model:
        parser.error("--model: is for the server that is started here; leave it out with --url")
    if options.items < 1 or options.swarms < 0:
        parser.error("--items must be at least 1, --swarms at least 0")
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"--out {options.out}: name a file in a folder that exists")
    try:
        with nullcontext(options.url) if options.url else serving(options.model) as url:
            asyncio.run(_run(url.rstrip("/"), options.items, options.swarms, options.out))
    except (EvaluationError, Refused) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
