"""Times a swarm through the real server against the same work done otherwise: `python -m tests.bench.swarm`.

A hundred sub-agents with one shared prompt and each its own: all at once as a patient group; by one agent, one after
another; and as independent requests, each with a prompt of its own, to a server with four places (first come, first
served). Prompts differ from round to round, so that nothing is found in pages of another run. The model is the default
one unless named; answers have a fixed length. The last line of stdout is one JSON document.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

from server import default_model
from tests.bench import machine
from tests.system.serving import Server, serving

FEW = 4  # places
TIMEOUT = aiohttp.ClientTimeout(total=1800)


def prompts(given: argparse.Namespace, salt: str, shared: bool) -> list[list[int]]:
    """Token ids of every agent's prompt; `shared`: all begin alike."""
    common = random.Random(salt)

    def ids(rng: random.Random, n: int) -> list[int]:
        return [rng.randrange(300, 2000) for _ in range(n)]

    beginning = ids(common, given.shared)
    own = [random.Random(f"{salt} {i}") for i in range(given.agents)]
    return [(beginning if shared else ids(rng, given.shared)) + ids(rng, given.private) for rng in own]


async def _run(server: Server, asked: list[list[int]], given: argparse.Namespace, at_once: int, **more: str) -> float:
    """Seconds until the last answer."""
    places = asyncio.Semaphore(at_once)

    async def ask(session: aiohttp.ClientSession, prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": given.output, "temperature": 0, "ignore_eos": True, **more}
        async with places, session.post(f"{server.url}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            assert answer["usage"]["completion_tokens"] == given.output

    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(ask(session, prompt) for prompt in asked))
        return time.perf_counter() - began


def _computed(server: Server) -> int:
    """Prompt tokens computed since the server's start."""
    found = server.metrics()
    return int(found["prefix_cache_queries_total"] - found["prefix_cache_hits_total"])


def one_round(swarm: Server, few: Server, given: argparse.Namespace, n: int) -> dict[str, tuple[float, int]]:
    """Seconds and prompt tokens computed of each way, once."""
    cases: dict[str, tuple[Server, bool, int, dict[str, str]]] = {
        "swarm": (swarm, True, given.agents, {"prompt_cache_key": f"round {n}", "service_tier": "flex"}),
        "one after another": (swarm, True, 1, {}),
        f"independent, {FEW} places": (few, False, given.agents, {}),
    }
    found = {}
    for name, (server, shared, at_once, more) in cases.items():
        before = _computed(server)
        seconds = asyncio.run(_run(server, prompts(given, f"{n} {name}", shared), given, at_once, **more))
        found[name] = seconds, _computed(server) - before
    return found


def main() -> int:
    """Run the bench; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.swarm", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model.directory(), help="checkpoint directory")
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--shared", type=int, default=1024, help="prompt tokens that all share")
    parser.add_argument("--private", type=int, default=64, help="prompt tokens of each agent")
    parser.add_argument("--output", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    where = machine.describe()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        swarm = stack.enter_context(serving(given.model, folder / "swarm", "--max-running", str(given.agents)))
        few = stack.enter_context(serving(given.model, folder / "few", "--max-running", str(FEW)))
        rounds = [one_round(swarm, few, given, n) for n in range(given.rounds)]
    print(f"{where['cpu']}, {where['cores']} cores; {given.agents} agents, {given.rounds} rounds")
    report: dict[str, Any] = {}
    for name in rounds[0]:
        seconds = [found[name][0] for found in rounds]
        ratios = [found[name][0] / found["swarm"][0] for found in rounds]
        tokens = rounds[0][name][1]
        report[name] = {"seconds": seconds, "over_swarm": statistics.median(ratios), "prompt_tokens_computed": tokens}
        print(
            f"{name:<24}{statistics.median(seconds):>9.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
            f"{statistics.median(ratios):>8.2f} x the swarm{tokens:>10,} prompt tokens computed"
        )
    sizes = {name: getattr(given, name) for name in ("agents", "shared", "private", "output")}
    print(json.dumps({"bench": "swarm", **where, **sizes, "figures": report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
