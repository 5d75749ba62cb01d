"""Times the KV cache's second tier: `python -m tests.bench.kv`. Without CUDA both tiers are RAM: the logic, not a link.

Copies: pages of K2.5's shape out to RAM and back in, scattered places on both sides, against one plain copy of as many
bytes between the same memories. Return: until the first token of a prompt that was read before and lost its device
pages, once brought back from RAM and once computed again, with the default model unless one is named. The ways take
turns, and each ratio is a median over rounds. The last line of stdout is one JSON document.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from hybrid.batch import Batch, Moves, Row, Sampling
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.kv_ram import RamTier
from hybrid.pages import Holding, PageTable
from offload.config import PoolConfig
from tests.bench import machine

LAYERS, PAGE_TOKENS, LATENT = 61, 16, 576  # of K2.5
PAGES = 128  # 144 MB
CHUNK = 512  # tokens of a step


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kv", description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the model that ships with hybrid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    given = parser.parse_args()
    model = given.model or Path(__file__).resolve().parents[2] / "hybrid" / "nano" / "model"
    found = {
        "copies": copies(given.device, given.rounds),
        "return": returns(model, given.device, given.prompt, given.rounds),
    }
    for way, rates in found["copies"].items():
        speed, peer = rates["GB_per_s"], rates["plain_GB_per_s"]
        print(f"{way:8} {speed:6.2f} GB/s, plain copy {peer:6.2f}: {rates['ratio']:.2f} of it", flush=True)
    back = found["return"]
    print(
        f"prompt of {given.prompt} tokens comes back: {back['promoted_s'] * 1e3:.1f} ms to its first token, "
        f"{back['computed_s'] * 1e3:.1f} ms when computed again: {back['ratio']:.1f} times sooner"
    )
    print(json.dumps({"bench": "kv", "device": given.device, **machine.describe(), **found}))


def copies(device: Literal["cpu", "cuda"], rounds: int = 7, pages: int = PAGES) -> dict[str, dict[str, float]]:
    """Rates of moving `pages` pages out and in, each against a plain copy of the same bytes."""
    cache = torch.ones((LAYERS, 2 * pages, PAGE_TOKENS, LATENT), dtype=torch.bfloat16, device=device)
    tier = RamTier([cache], 2 * pages)
    with closing(tier):
        (host,) = tier._host
        host.zero_()
        flat = torch.zeros(pages * tier.page_bytes, dtype=torch.uint8, device=device)
        there = host[:pages].view(torch.uint8).flatten()
        ways = {
            "demote": (lambda moves: tier.move(Moves(demoted=moves)), lambda: there.copy_(flat)),
            "promote": (lambda moves: tier.move(Moves(promoted=moves)), lambda: flat.copy_(there)),
        }
        return {name: _rates(*way, pages, tier.page_bytes, rounds) for name, way in ways.items()}


def _rates(
    move: Callable[[tuple[tuple[int, int], ...]], None],
    plain: Callable[[], object],
    pages: int,
    page_bytes: int,
    rounds: int,
) -> dict[str, float]:
    draw, times = random.Random(pages), []
    for i in range(rounds + 1):
        # As a table deals them: places in RAM one after another, those on the device anywhere.
        moves = tuple(zip(draw.sample(range(pages), pages), draw.sample(range(pages), pages), strict=True))
        run: dict[str, Callable[[], object]] = {"moved": lambda moves=moves: move(moves), "plain": plain}
        seconds = {name: _timed(run[name]) for name in (sorted(run) if i % 2 else sorted(run, reverse=True))}
        times.append((seconds["moved"], seconds["plain"]))
    moved, plainly = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {
        "GB_per_s": pages * page_bytes / moved / 1e9,
        "plain_GB_per_s": pages * page_bytes / plainly / 1e9,
        "ratio": statistics.median(b / a for a, b in times[1:]),
    }


def returns(model: Path, device: Literal["cpu", "cuda"], prompt: int = 2048, rounds: int = 7) -> dict[str, float]:
    """Seconds to the first token of a prompt that comes back, promoted and computed again."""
    pages = -(-prompt // PAGE_TOKENS) + 2
    config = EngineConfig(
        model, device, "float32" if device == "cpu" else "bfloat16", "native", PoolConfig(None), pages, PAGE_TOKENS
    )
    times: list[tuple[float, float]] = []
    with closing(Engine(replace(config, n_ram_pages=2 * pages))) as engine:
        for i in range(rounds + 1):
            draw = random.Random(i)
            ids = [draw.randrange(300, 2000) for _ in range(prompt)]
            seconds = {n_ram: _return(engine, ids, n_ram) for n_ram in ((0, 2 * pages) if i % 2 else (2 * pages, 0))}
            times.append((seconds[2 * pages], seconds[0]))
    promoted, computed = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ratio = statistics.median(b / a for a, b in times[1:])
    return {"promoted_s": promoted, "computed_s": computed, "ratio": ratio}


def _return(engine: Engine, ids: list[int], n_ram_pages: int) -> float:
    """Seconds of the second reading of a prompt whose pages another one has taken meanwhile."""
    table = PageTable(engine.config.n_pages, PAGE_TOKENS, n_ram_pages)
    _read(engine, table, Holding(ids))
    _read(engine, table, Holding([i + 1 for i in ids]))
    seconds = _timed(lambda: _read(engine, table, Holding(ids)))
    assert (table.ram.n_promoted > 0) == (n_ram_pages > 0), "the prompt did not come from where it should"
    return seconds


def _read(engine: Engine, table: PageTable, holding: Holding) -> None:
    """Until the first token: what is known is taken, the rest computed in chunks."""
    table.share(holding)
    done = table.fetch(holding)
    assert table.grow(holding, len(holding.ids))
    while done < len(holding.ids):
        new = tuple(holding.ids[done : done + CHUNK])
        last = done + len(new) == len(holding.ids)
        pages = tuple(holding.pages[: table.pages_for(done + len(new))])
        row = Row(1, new, done, pages, Sampling(temperature=0.0) if last else None)
        engine.step(Batch((row,), table.take_moves()))
        done += len(new)
    table.publish(holding, done)
    table.release(holding)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
