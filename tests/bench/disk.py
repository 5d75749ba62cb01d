"""Decoding with experts larger than memory: `python -m tests.bench.disk`.

Nano's model on its own conversations, each of its experts widened to the size of one of Kimi-K2.5's (widened.py), so
that routing is that of a trained model and bytes are those that matter. Four ways (disk_child.py), each in a process of
its own in a memory control group, the file out of the page cache before each, in turns. The budget is what slots
take; the group allows so much and OTHERS for the rest of the process, of which mapped pages may take what is over. The
ceiling is the same file read in the same round, experts in random order past the page cache. Linux, version 1 groups,
and the right to make one. The last line of stdout is one JSON document.
"""

import argparse
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid.config import ModelConfig
from offload.config import ExpertGeometry
from offload.disk import DiskReader, blocks
from offload.sources import packed_path
from tests.bench import machine, widened
from tests.bench.disk_child import WAYS
from tests.bench.stepping import REPO, cache_folder

GROUPS = Path("/sys/fs/cgroup/memory")
OTHERS = 448 << 20  # bytes for interpreter, torch, kernels and nano's own weights, which take 270 MB
CEILING_BYTES = 500_000_000


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group that allows so many bytes, page cache included."""
    group = GROUPS / f"hybrid-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:  # the last process is still leaving
                time.sleep(0.1)


def drop(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_ahead_kb(path: Path) -> int | None:
    """What the system reads around a page that a mapping lacks: much of what plain mapping costs or gains."""
    device = path.stat().st_dev
    setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    return int(setting.read_text()) if setting.exists() else None


def ceiling(path: Path, expert: int, start: int) -> float:
    """Bytes per second of whole experts in random order, eight asked for at a time."""
    reader = DiskReader(path)
    n_all = (path.stat().st_size - start) // expert
    chosen = random.Random(3).sample(range(n_all), max(8, min(n_all, CEILING_BYTES // expert)))
    memory = memoryview(mmap.mmap(-1, 8 * (expert + 8192)))
    began = time.perf_counter()
    for first in range(0, len(chosen), 8):
        reads = []
        for place, number in enumerate(chosen[first : first + 8]):
            at, n_bytes = blocks(start + number * expert, expert)
            into = memory[place * (expert + 8192) :][:n_bytes]
            reads.append(reader.read(at, into, start + (number + 1) * expert - at, urgent=True))
        reader.wait(reads)
    seconds = time.perf_counter() - began
    reader.close()
    return len(chosen) * expert / seconds


def run(way: str, wide: Path, inner: int, budget: int, given: argparse.Namespace) -> dict[str, Any]:
    """One way, once."""
    child = [sys.executable, "-m", "tests.bench.disk_child", way, str(wide), str(inner), str(budget)]
    with memory_group(budget + OTHERS) as group:
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, "sh", *child, str(given.prompts), str(given.tokens)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rounds: list[dict[str, dict[str, Any]]], ceilings: list[float]) -> str:
    """The figures for people: medians over the rounds."""
    heads = ("tok/s", "x mapped", "GB read", "of wanted", "hits", "useful", "recall", "waited s", "CPU s")
    lines = [f"{'way':<16}" + "".join(f"{head:>10}" for head in heads)]
    for way in rounds[0]:
        runs = [one[way] for one in rounds]
        ratios = [one[way]["tokens_per_second"] / one["mapped"]["tokens_per_second"] for one in rounds]
        values = [
            [run["tokens_per_second"] for run in runs],
            ratios,
            [run["bytes_read"] / 1e9 for run in runs],
            [run["bytes_read"] / run["bytes_wanted"] for run in runs],
            *([run.get(key) for run in runs] for key in ("hit_rate", "useful", "mean_recall", "waited", "cpu_seconds")),
        ]
        cells = ["" if None in column else f"{statistics.median(column):.2f}" for column in values]
        lines.append(f"{way:<16}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(f"the disk reads experts at {', '.join(f'{rate / 1e9:.2f}' for rate in ceilings)} GB/s")
    return "\n".join(lines)


def main() -> int:
    """Run the bench; returns the exit status."""
    given = _arguments()
    model = ModelConfig.from_directory(widened.NANO)
    inner = widened.inner_of(model, given.expert_mb)
    geometry = ExpertGeometry(model.n_routed_experts, model.hidden_size, inner)
    wide = given.cache / f"widened-nano-{inner}"
    path = packed_path(wide, "int4")
    if not path.exists():
        print(f"writing {wide}", flush=True)
        widened.write(wide, inner)
    expert = geometry.expert_bytes("int4")
    total = expert * geometry.n_experts * len(model.moe_layers)
    budget = int(given.share * total)
    ways = [WAYS[0], *(way for way in WAYS[1:] if not given.ways or way in given.ways)]
    where = machine.describe()
    rounds, ceilings = [], []
    for number in range(given.rounds):
        ceilings.append(ceiling(path, expert, path.stat().st_size - total))
        found = {}
        for way in ways if number % 2 == 0 else ways[::-1]:
            drop(path)
            found[way] = run(way, wide, inner, budget, given)
            print(f"round {number}: {way}: {json.dumps(found[way])}", flush=True)
        said = {one["said"] for one in found.values()}
        assert len(said) == 1, f"tokens or logprobs differ: {found}"
        rounds.append({way: found[way] for way in ways})
    sizes = f"experts of {expert / 1e6:.2f} MB, {total / 1e9:.2f} GB of them, {given.share:.0%} fit"
    print(f"{where['cpu']}, {where['cores']} cores; {sizes}")
    print(table(rounds, ceilings))
    ratio = statistics.median(one[ways[-1]]["tokens_per_second"] / one["mapped"]["tokens_per_second"] for one in rounds)
    document = {"bench": "disk", **where, "expert_bytes": expert, "total_bytes": total, "share": given.share}
    document["read_ahead_kb"] = read_ahead_kb(path)
    print(json.dumps({**document, "disk_bytes_per_second": ceilings, "rounds": rounds, "ratio": ratio, "target": 1.5}))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.disk", description=__doc__)
    parser.add_argument("--expert-mb", type=float, default=24.77, help="size of an expert")
    parser.add_argument("--share", type=float, default=0.3, help="of the experts, that fit the budget")
    parser.add_argument("--prompts", type=int, default=4, help="conversations")
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", choices=WAYS, help="beside `mapped` (default: all)")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where the experts are kept")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
