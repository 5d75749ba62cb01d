"""Decoding with caches warmed by idle workers (offload/warming.py) against without: `python -m tests.bench.warm`.

Two measurements, each with the warming on and off in turns, with and without a gap in every layer in which the device
is busy and touches no memory of the CPU, as a GPU would be:

    engine    decode steps at batch 1 of a mid-size random checkpoint, the router's look-ahead, the CPU as device: its
              attention and shared expert go through the same caches
    experts   its layers' routed experts alone, named beforehand without error: the most that warming can bring

`ratio` is off over on. `named` is the share of the experts run that the look-ahead had named. The last line of stdout
is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.lanes import Block, Lane
from hybrid.moe import Moe
from hybrid.trial_steps import TrialSteps, pages_needed
from offload.config import PoolConfig
from offload.experts import Experts
from offload.warming import SHARE, shared_cache
from tests.bench import machine
from tests.bench.stepping import PAGE_SIZE, cache_folder, checkpoint, mid_size_config

TURNS = (False, True, True, False)
GAPS = (0.0, 0.3e-3, 1e-3)  # seconds


class Switched:
    """An engine whose warming can be switched, with a gap before every layer's experts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        experts = engine._experts
        assert isinstance(experts, Experts) and experts._warmer is not None
        self.experts, self._warmer = experts, experts._warmer
        self.gap, self._named, self._hits, self._wanted = 0.0, set[int](), 0, 0
        self._watch_look_ahead()

    def warm(self, on: bool) -> None:
        """From now on."""
        assert not self._warmer.running
        self.experts._warmer = self._warmer if on else None

    @property
    def named(self) -> float:
        """Share of the experts run that were named."""
        return self._hits / max(1, self._wanted)

    def watch(self, moe: Moe, x: torch.Tensor, ids: torch.Tensor) -> None:
        """Count the named among the experts of a layer."""
        if self._named:
            chosen = set(ids.flatten().tolist())
            self._hits += len(chosen & self._named)
            self._wanted += len(chosen)
            self._named = set()

    def _watch_look_ahead(self) -> None:
        expect, attend = self._warmer.expect, Lane.attend

        def noted(index: int, scores: torch.Tensor, k: int, elsewhere: Any = None) -> None:
            self._named = set(scores.topk(k, -1).indices.flatten().tolist())
            expect(index, scores, k, elsewhere)

        def longer(lane: Lane, block: Block) -> None:
            attend(lane, block)
            if self.gap:
                time.sleep(self.gap)

        self._warmer.expect = noted  # type: ignore[method-assign]
        Lane.attend = longer  # type: ignore[method-assign]


def main() -> int:
    """Run the bench; returns the exit status."""
    given = _arguments()
    torch.set_num_threads(1)
    model = given.model or checkpoint(given.cache, mid_size_config(given.experts_gb))
    n_pages = pages_needed(PAGE_SIZE, 128, 128, 1, 1)
    watchers: list[Switched] = []
    engine = Engine(
        EngineConfig(
            model, "cpu", "float32", "native", PoolConfig(threads=given.threads), n_pages, PAGE_SIZE, warm=True
        ),
        watch=lambda moe, x, ids: [watcher.watch(moe, x, ids) for watcher in watchers] and None,
    )
    try:
        switched = Switched(engine)
        watchers.append(switched)
        found = [engine_steps(switched, gap, given.steps) for gap in GAPS]
        found += [expert_layers(switched, gap, given.steps) for gap in GAPS]
    finally:
        engine.close()
    cache = shared_cache()
    size = engine.model.expert_geometry.expert_bytes(engine.model.expert_format)
    print(f"shared cache {cache / 2**20:.0f} MiB, {SHARE:.0%} of it warmed; an expert {size / 1e6:.2f} MB")
    for row in found:
        print(
            f"{row['what']:<8} gap {row['gap_ms']:.1f} ms: off {row['off_ms']:8.2f} ms, on {row['on_ms']:8.2f} ms, "
            f"ratio {row['ratio']:.3f}, {row['mb_a_layer']:.2f} MB read ahead for each layer"
        )
    print(f"named by the look-ahead: {switched.named:.2f}")
    extra = {"shared_cache": cache, "expert_bytes": size, "named": switched.named, "threads": given.threads}
    print(json.dumps({"bench": "warm", **machine.describe(), "torch": torch.__version__, **extra, "found": found}))
    return 0


def engine_steps(switched: Switched, gap: float, steps: int) -> dict[str, Any]:
    """Decode steps at batch 1."""
    trial = TrialSteps(switched.engine)
    trial.fill(128, 1, None)
    n_layers = len(switched.engine.model.moe_layers)
    return compare("engine", switched, gap, steps, n_layers, lambda: trial.decode(1).seconds)


def expert_layers(switched: Switched, gap: float, steps: int) -> dict[str, Any]:
    """All layers' experts for one token, without the gap's own time."""
    model, experts = switched.engine.model, switched.experts
    rng, k = np.random.default_rng(3), model.num_experts_per_tok
    x, weights = torch.randn(1, model.hidden_size), torch.full((1, k), 1 / k)

    def once() -> float:
        chosen = [rng.permutation(model.n_routed_experts)[:k] for _ in model.moe_layers]
        seconds = 0.0
        for i, layer in enumerate(model.moe_layers):
            began = time.perf_counter()
            pending = experts.submit(layer, x, torch.from_numpy(chosen[i])[None], weights)
            if experts.wants_hints and i + 1 < len(chosen):
                scores = torch.full((1, model.n_routed_experts), -1.0)
                scores[0, chosen[i + 1]] = 1.0
                experts.hint(model.moe_layers[i + 1], scores)
            pending.wait()
            seconds += time.perf_counter() - began
            if gap:
                time.sleep(gap)
        return seconds

    return compare("experts", switched, gap, steps, len(model.moe_layers), once)


def compare(what: str, switched: Switched, gap: float, steps: int, n_layers: int, once: Any) -> dict[str, Any]:
    """Medians of both ways, taken in turns."""
    switched.gap = gap if what == "engine" else 0.0
    seconds: dict[bool, list[float]] = {False: [], True: []}
    began = switched._warmer.stats().bytes_read
    for i in range(-len(TURNS), 2 * steps):
        on = TURNS[i % len(TURNS)]
        switched.warm(on)
        taken = once()
        if i >= 0:
            seconds[on].append(taken)
    off, on_ = (statistics.median(seconds[way]) * 1e3 for way in (False, True))
    read = (switched._warmer.stats().bytes_read - began) / (steps + len(TURNS) / 2) / n_layers / 1e6
    return {"what": what, "gap_ms": gap * 1e3, "off_ms": off, "on_ms": on_, "ratio": off / on_, "mb_a_layer": read}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.warm", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint to time (default: a random one)")
    parser.add_argument("--experts-gb", type=float, default=1.3, help="size of the random one's experts")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where it is kept")
    parser.add_argument("--threads", type=int, default=1, help="expert workers")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each way")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
