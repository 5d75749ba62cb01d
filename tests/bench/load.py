"""Times how experts come into memory and into a packed file: `python -m tests.bench.load`.

Against what the machine does at best with as many bytes, in the same round and state: reading the same shards from
end to end, copying in memory (into fresh pages, which loading needs too), writing a file and waiting for the disk.
Cold means that the shards have been dropped from the system's cache. The last line of stdout is one JSON document.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hybrid.config import ModelConfig
from offload.checkpoint import Checkpoint
from offload.numa import address_of, huge_memory
from offload.sources import packed_path
from offload.store import open_store, pack_store
from tests.bench import machine
from tests.bench.stepping import REPO, checkpoint

PIECE = 1 << 20  # bytes read or written at a time: fits a core's cache
COPIED = 1 << 24  # bytes copied at a time


def config(experts_gb: float) -> dict[str, Any]:
    """Experts of Kimi-K2.5's size, in two layers; everything else small."""
    raw: dict[str, Any] = json.loads((REPO / "tests" / "reference" / "small_model.json").read_text())
    raw["text_config"] |= {"hidden_size": 7168, "moe_intermediate_size": 2048, "num_hidden_layers": 3}
    raw["text_config"] |= {"intermediate_size": 2048, "n_routed_experts": 16}
    expert = ModelConfig.from_json(raw).expert_geometry.expert_bytes("int4")
    raw["text_config"]["n_routed_experts"] = 8 * max(1, round(experts_gb * 1e9 / expert / 2 / 8))
    return raw


class Bench:
    """The things to time; each method runs one once and returns its seconds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = ModelConfig.from_directory(directory)
        self.checkpoint = Checkpoint(directory)
        self.shards = sorted({i.path for n, i in self.checkpoint.tensors.items() if ".mlp.experts." in n})
        model, geometry = self.model, self.model.expert_geometry
        self.n_bytes = len(model.moe_layers) * geometry.n_experts * geometry.expert_bytes(model.expert_format)
        self.shard_bytes = sum(path.stat().st_size for path in self.shards)
        self.packed = packed_path(directory, model.expert_format)

    def drop(self, path: Path) -> None:
        """Out of the system's cache."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self) -> float:
        buffer = bytearray(PIECE)
        began = time.perf_counter()
        for path in self.shards:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - began

    def copy(self) -> float:
        source = huge_memory(COPIED)
        source[:] = bytes(COPIED)
        began = time.perf_counter()
        target = huge_memory(self.n_bytes)
        to, origin = address_of(target), address_of(source)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            steps = range(0, self.n_bytes, COPIED)
            list(pool.map(lambda at: ctypes.memmove(to + at, origin, min(COPIED, self.n_bytes - at)), steps))
        return time.perf_counter() - began

    def write(self) -> float:
        path = self.directory / "bench.tmp"
        piece = os.urandom(PIECE)
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(0, self.n_bytes, PIECE):
                file.write(piece)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        path.unlink()
        return seconds

    def load(self) -> float:
        """Open the store: from the packed file where there is one, else from the shards."""
        began = time.perf_counter()
        store = open_store(self.checkpoint, *self._experts(), lambda *report: None)
        seconds = time.perf_counter() - began
        store.close()
        return seconds

    def pack(self) -> float:
        self.packed.unlink(missing_ok=True)
        began = time.perf_counter()
        pack_store(self.checkpoint, *self._experts(), lambda *report: None)
        return time.perf_counter() - began

    def _experts(self) -> tuple[Any, ...]:
        return self.model.expert_name, self.model.expert_geometry, self.model.moe_layers, "native"


def one_round(bench: Bench) -> dict[str, float]:
    """GB/s of the experts' packed bytes (read: of the shards) for everything, once."""
    rates: dict[str, float] = {}

    def timed(name: str, what: Callable[[], float], n_bytes: int = bench.n_bytes) -> None:
        rates[name] = n_bytes / what() / 1e9

    def cold() -> None:
        for path in bench.shards:
            bench.drop(path)

    bench.packed.unlink(missing_ok=True)
    cold()
    timed("read cold", bench.read, bench.shard_bytes)
    cold()
    timed("load cold", bench.load)
    timed("read warm", bench.read, bench.shard_bytes)
    timed("copy", bench.copy)
    timed("load warm", bench.load)
    timed("write", bench.write)
    timed("pack", bench.pack)
    bench.drop(bench.packed)
    timed("map cold", bench.load)
    timed("map warm", bench.load)
    bench.packed.unlink()
    return rates


def shares(rates: dict[str, float]) -> dict[str, float]:
    """Each figure against the slower of what it cannot do without."""
    ceilings = {
        "load cold": min(rates["read cold"], rates["copy"]),
        "load warm": min(rates["read warm"], rates["copy"]),
        "pack": rates["write"],
        "map cold": rates["read cold"],
    }
    return {name: rates[name] / ceiling for name, ceiling in ceilings.items()}


def main() -> int:
    """Run the bench; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--experts-gb", type=float, default=0.4, help="bytes of experts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=home / "hybrid" / "bench", help="where the checkpoint is kept")
    given = parser.parse_args()
    bench = Bench(checkpoint(given.cache, config(given.experts_gb)))
    where = machine.describe()
    bench.load()  # compiles
    rounds = [one_round(bench) for _ in range(given.rounds)]
    ratios = [shares(rates) for rates in rounds]
    print(
        f"{where['cpu']}, {where['cores']} cores; {bench.n_bytes / 1e9:.2f} GB of int4 experts, {given.rounds} rounds"
    )
    print(f"{'':<12}{'GB/s':>8}{'least':>8}{'most':>8}{'share of what binds':>22}")
    report: dict[str, Any] = {}
    for name in rounds[0]:
        found = [rates[name] for rates in rounds]
        share = statistics.median(ratio[name] for ratio in ratios) if name in ratios[0] else None
        shown = "" if share is None else f"{share:.0%}"
        print(f"{name:<12}{statistics.median(found):>8.2f}{min(found):>8.2f}{max(found):>8.2f}{shown:>22}")
        report[name] = {"gb_per_s": statistics.median(found), "all": found, "share": share}
    print(json.dumps({"bench": "load", **where, "n_bytes": bench.n_bytes, "figures": report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
