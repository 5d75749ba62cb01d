"""Predicted against measured: `python -m tests.bench.predict --json`.

Three random checkpoints of different shape, their experts far larger than the caches. The cost model predicts decoding
at batch 1, 4 and 16 and prompts of 256 and 2048 tokens from the machine's rates, with every expert as likely as any
other and with the routing that was recorded while the contexts were filled. Then real `Engine.step`s are timed.

A machine may be slow for minutes. So everything takes turns: a round measures the rates that `hybrid measure` takes
first and then times every figure, and medians over the rounds are compared. Visits while other processes had the
processors do not count. Ends with status 1 where the median error is above LIMIT. The last line of stdout is one JSON
document when --json is given.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.trial_steps import TrialSteps, pages_needed
from offload.bandwidth import ReadCeiling
from offload.config import PoolConfig
from placement import cost
from placement.measure import items_of, run_items, start
from placement.measure_timing import Effort, Sizes
from placement.probe import find_hardware
from placement.profile import Profile, read_profile
from placement.routing import Routing, read_routing, uniform, write_routing
from tests.bench import machine
from tests.bench.quiet import QUIET, Others
from tests.bench.stepping import PAGE_SIZE, cache_folder, checkpoint
from tests.families import deepseek_v3, kimi_k2_thinking

LIMIT = 0.15
CONTEXT = 256  # ids in the cache while decoding
BATCHES, PROMPTS = (1, 4, 16), (256, 2048)
CHUNK = 512  # the server's default of --max-batch-tokens
VISIT_SECONDS = 0.5  # of one figure in one round, at least
VISIT_STEPS = {"decode": 3, "prefill": 1}
EFFORT = Effort(seconds=1.0, rounds=1)  # of each table of rates in one round
N_ITEMS = 3  # of the rates, the most important first: int4 experts, memory, device
READ_BYTES = 1 << 28

Phase = Literal["decode", "prefill"]
_INT4 = kimi_k2_thinking()["quantization_config"]
SHAPES: dict[str, dict[str, Any]] = {
    "2048 x 1024, 8 of 64": kimi_k2_thinking() | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 1024, "num_hidden_layers": 7,
        "num_attention_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 32768, "max_position_embeddings": 8192,
    },
    "1024 x 512, 6 of 128 in groups": deepseek_v3() | {
        "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 512, "num_hidden_layers": 12,
        "num_attention_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 128, "num_experts_per_tok": 6,
        "n_group": 8, "topk_group": 4, "vocab_size": 16384, "max_position_embeddings": 8192,
        "quantization_config": _INT4,
    },
    "4096 x 1408, 4 of 32": kimi_k2_thinking() | {
        "hidden_size": 4096, "intermediate_size": 4096, "moe_intermediate_size": 1408, "num_hidden_layers": 5,
        "num_attention_heads": 16, "q_lora_rank": None, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 32, "num_experts_per_tok": 4,
        "vocab_size": 16384, "max_position_embeddings": 8192,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Visit:
    """What one round brought."""

    seconds: list[float]
    distinct: list[int]  # experts, summed over layers and the prompt's chunks
    read: list[float]  # bytes per second of the memory, just before
    others: float  # share of the processors that other processes had meanwhile


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model says of a cell."""

    seconds: float
    parts: dict[str, float]  # seconds by cause
    distinct: float  # experts


@dataclass(slots=True)
class Cell:
    """One figure of one model. Seconds are of a decode step, or until a prompt's first token."""

    shape: str
    phase: Phase
    size: int  # batch, or tokens of the prompt
    visits: list[Visit] = field(default_factory=list)
    predictions: dict[str, list[Prediction]] = field(default_factory=dict)  # by routing, from each profile

    @property
    def valid(self) -> list[Visit]:
        """Visits that had the machine to themselves; all, where none had."""
        return [visit for visit in self.visits if visit.others <= QUIET] or self.visits

    @property
    def seconds(self) -> list[float]:
        return sorted(second for visit in self.valid for second in visit.seconds)

    @property
    def measured(self) -> float:
        return statistics.median(self.seconds)

    def predicted(self, routing: str) -> float:
        return statistics.median(found.seconds for found in self.predictions[routing])

    def error(self, routing: str) -> float:
        """Predicted over measured, less one."""
        return self.predicted(routing) / self.measured - 1


@dataclass(slots=True)
class Subject:
    """One model, loaded, and its cells."""

    engine: Engine
    steps: TrialSteps
    routings: dict[str, Routing]
    cells: list[Cell]


def main() -> int:
    """Run the bench; returns the exit status."""
    given = _arguments()
    with ExitStack() as stack:
        ceiling = stack.enter_context(closing(ReadCeiling(machine.pinned_cpus(), READ_BYTES)))
        profiles = [read_profile(given.profile)] if given.profile else list[Profile]()
        others = Others()
        subjects = [open_subject(stack, given.cache, name) for name in SHAPES]
        for turn in range(given.rounds):
            print(f"round {turn + 1} of {given.rounds}", flush=True)
            if not given.profile:
                others.wait(given.wait)
                profiles.append(measured())
            for subject in subjects:
                for cell in subject.cells:
                    others.wait(given.wait)
                    cell.visits.append(visit(subject.steps, cell, ceiling, others))
        for profile in profiles:
            for subject in subjects:
                predict(subject, profile)
    cells = [cell for subject in subjects for cell in subject.cells]
    print(table(cells))
    errors = {name: statistics.median(abs(cell.error(name)) for cell in cells) for name in cells[0].predictions}
    print("median error: " + ", ".join(f"{error:.1%} ({name} routing)" for name, error in errors.items()))
    if given.json:
        print(json.dumps(report(cells, profiles, errors)))
    return int(max(errors.values()) > LIMIT)


def open_subject(stack: ExitStack, cache: Path, name: str) -> Subject:
    """The model of one shape with its contexts filled, and the routing that it showed meanwhile."""
    rows = max(BATCHES)
    pages = pages_needed(PAGE_SIZE, max(PROMPTS), CONTEXT, rows, rows)
    model = checkpoint(cache, SHAPES[name])
    config = EngineConfig(model, "cpu", "float32", "native", PoolConfig(), pages, PAGE_SIZE)
    engine = stack.enter_context(closing(Engine(config)))
    steps = TrialSteps(engine)
    steps.fill(CONTEXT, rows, CHUNK)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "routing.json"
        write_routing(record, *engine.choices())
        routings = {"uniform": uniform(engine.model), "recorded": read_routing(record, engine.model)}
    cells = [Cell(name, "decode", n) for n in BATCHES] + [Cell(name, "prefill", n) for n in PROMPTS]
    return Subject(engine, steps, routings, cells)


def predict(subject: Subject, profile: Profile) -> None:
    """Add what the cost model says of each cell from these rates."""
    model = subject.engine.model
    kernel = cost.default_kernel(profile, model.expert_format, "a8", None)
    for routing, shares in subject.routings.items():
        rates = cost.resolve(model, profile, cost.Setup("float32", kernel, overlaps=False), shares)
        for cell in subject.cells:
            costs = [cost.step_cost(rates, load) for load in loads(cell)]
            parts = {part: sum(step.parts[part] for step in costs) for part in costs[0].parts}
            found = Prediction(sum(step.seconds for step in costs), parts, sum(step.distinct for step in costs))
            cell.predictions.setdefault(routing, []).append(found)
            if cell.phase == "prefill":
                assert found.seconds == cost.prompt_seconds(rates, cell.size, CHUNK)


def loads(cell: Cell) -> Iterator[cost.Load]:
    """The steps of one cell."""
    if cell.phase == "decode":
        yield cost.Load.decode(cell.size, CONTEXT + 1)
        return
    for a in range(0, cell.size, CHUNK):
        yield cost.Load.prompt(min(CHUNK, cell.size - a), a, int(a + CHUNK >= cell.size))


def visit(steps: TrialSteps, cell: Cell, ceiling: ReadCeiling, others: Others) -> Visit:
    """Time a cell for a moment, after the memory and one step that is not timed."""
    others.look()
    read = ceiling.rates(len(machine.pinned_cpus()), 3)
    if cell.phase == "decode":
        steps.decode(cell.size)
    seconds, distinct = list[float](), list[int]()
    while len(seconds) < VISIT_STEPS[cell.phase] or sum(seconds) < VISIT_SECONDS:
        outputs = [steps.decode(cell.size)] if cell.phase == "decode" else steps.prompt(cell.size, CHUNK)
        seconds.append(sum(out.seconds for out in outputs))
        distinct.append(sum(out.distinct_experts for out in outputs))
    return Visit(seconds, distinct, read, others.look())


def table(cells: list[Cell]) -> str:
    """The figures as Markdown."""
    lines = [
        "| model | step | measured ms (p5 to p95) | uniform | error | recorded | error | GB/s read |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        low, high = spread(cell)
        predicted = " | ".join(
            f"{cell.predicted(name) * 1e3:.1f} | {cell.error(name):+.0%}" for name in cell.predictions
        )
        lines.append(
            f"| {cell.shape} | {cell.phase} {cell.size} | {cell.measured * 1e3:.1f} ({low * 1e3:.1f} to "
            f"{high * 1e3:.1f}) | {predicted} | {read_rate(cell) / 1e9:.1f} |"
        )
    return "\n".join(lines)


def spread(cell: Cell) -> tuple[float, float]:
    """Fifth and ninety-fifth percentile of a cell's seconds."""
    last = len(cell.seconds) - 1
    return cell.seconds[round(0.05 * last)], cell.seconds[round(0.95 * last)]


def read_rate(cell: Cell) -> float:
    """Bytes per second that the memory was read at beside a cell."""
    return statistics.median(rate for visit in cell.valid for rate in visit.read)


def report(cells: list[Cell], profiles: list[Profile], errors: dict[str, float]) -> dict[str, Any]:
    """The JSON document."""
    rows = [
        {
            "shape": cell.shape, "phase": cell.phase, "size": cell.size, "seconds": cell.measured,
            "spread": spread(cell), "samples": len(cell.seconds),
            "predicted": {name: cell.predicted(name) for name in cell.predictions},
            "error": {name: cell.error(name) for name in cell.predictions},
            "distinct": statistics.mean(n for visit in cell.valid for n in visit.distinct),
            "predictions": {name: [asdict(found) for found in all_] for name, all_ in cell.predictions.items()},
            "medians": [statistics.median(visit.seconds) for visit in cell.visits],
            "others": [round(visit.others, 3) for visit in cell.visits],
            "read": [statistics.median(visit.read) for visit in cell.visits],
        }
        for cell in cells
    ]  # fmt: skip
    read = [max(r.value for r in profile.memory.read.values()) for profile in profiles if profile.memory]
    about = {"torch": torch.__version__, "torch_threads": torch.get_num_threads(), "profiles_read": read}
    return {"bench": "predict", **machine.describe(), **about, "median_error": errors, "limit": LIMIT, "cells": rows}


def measured() -> Profile:
    """This machine's rates, those that a model with int4 experts needs, quickly."""
    hardware, sizes = find_hardware(), Sizes(effort=EFFORT)
    with tempfile.TemporaryDirectory() as folder:
        items = items_of(hardware, torch.device("cpu"), sizes, Path(folder), print)[:N_ITEMS]
        return run_items(items, start(hardware, None, "cpu"), math.inf, _ignore, _ignore, lambda line: None)


def _ignore(*news: object) -> None:
    """Nobody waits for it."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.predict", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON document")
    parser.add_argument("--profile", type=Path, help="rates of this machine (default: measured in every round)")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds to wait for other processes, each time")
    parser.add_argument("--rounds", type=int, default=5, help="visits of each figure")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where the checkpoints are kept")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
