"""Times `Engine.step` on random ids: the prefill of one prompt, and decoding at a batch size.

Shared by `tests.bench.step` and `tests.gpu`. Ids are drawn anew for every step, so that the experts a step touches are
those of fresh tokens and not of a sequence that repeats itself.
"""

import hashlib
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid import random_checkpoint
from hybrid.batch import Batch, Row, Sampling, StepOutput
from hybrid.config import ModelConfig
from hybrid.engine import Engine

REPO = Path(__file__).resolve().parents[2]
PAGE_SIZE = 16
SEED = 7


@dataclass(frozen=True, slots=True)
class Timing:
    """One row of the table. Seconds are of a step; bytes and experts are means over the timed steps."""

    phase: str
    batch: int
    new_tokens: int
    context: int
    steps: int
    seconds: float  # median
    seconds_low: float  # fifth percentile
    seconds_high: float  # ninety-fifth
    tokens_per_second: float  # at the median
    expert_bytes: float
    distinct_experts: float
    expert_bytes_per_second: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Stepper:
    """Drives one engine. Pages of the request in slot i are the i-th stretch of the cache."""

    def __init__(self, engine: Engine, pages_each: int) -> None:
        self._engine = engine
        self._pages_each = pages_each
        self._random = np.random.default_rng(SEED)

    def prefill(self, n_tokens: int, steps: int) -> Timing:
        """One prompt of `n_tokens` new ids at a time."""
        rows = [self._row(0, n_tokens, 0)]
        self._step(rows)  # warm: kernels compiled, pages touched
        return self._timed("prefill", lambda: [self._row(0, n_tokens, 0)], steps, 0)

    def decode(self, batch: int, context: int, steps: int) -> Timing:
        """`batch` requests, each with `context` ids in the cache, one new id each for every step."""
        for slot in range(batch):
            self._step([self._row(slot, context, 0)])
        self._step([self._row(slot, 1, context) for slot in range(batch)])
        return self._timed("decode", lambda: [self._row(slot, 1, context) for slot in range(batch)], steps, context)

    def _timed(self, phase: str, rows: Any, steps: int, context: int) -> Timing:
        seconds, outputs = [], []
        batch: list[Row] = []
        for _ in range(steps):
            batch = rows()
            began = time.perf_counter()
            outputs.append(self._step(batch))
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds)
        n_tokens = sum(len(row.ids) for row in batch)
        low, high = np.percentile(seconds, [5, 95])
        touched = statistics.mean(out.expert_bytes for out in outputs)
        return Timing(
            phase, len(batch), n_tokens, context, steps, median, float(low), float(high), n_tokens / median,
            touched, statistics.mean(out.distinct_experts for out in outputs), touched / median,
        )  # fmt: skip

    def _step(self, rows: list[Row]) -> StepOutput:
        return self._engine.step(Batch(tuple(rows)))

    def _row(self, slot: int, n_new: int, position: int) -> Row:
        ids = self._random.integers(0, self._engine.model.vocab_size, n_new)
        first = slot * self._pages_each
        n_pages = math.ceil((position + n_new) / PAGE_SIZE)
        pages = tuple(range(first, first + n_pages))
        return Row(slot, tuple(int(i) for i in ids), position, pages, Sampling(temperature=1.0, seed=slot))


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens`."""
    return math.ceil(n_tokens / PAGE_SIZE)


def mid_size_config(expert_gb: float) -> dict[str, Any]:
    """A K2.5-shaped config.json with about `expert_gb` of INT4 experts: hidden 2048, experts of 1024, top-8."""
    raw: dict[str, Any] = json.loads((REPO / "server" / "default_model.json").read_text())
    text = raw["text_config"]
    text |= {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 1024, "num_hidden_layers": 7,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 256,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "num_experts_per_tok": 8,
        "n_routed_experts": 8,
    }  # fmt: skip
    model = ModelConfig.from_json(raw)
    of_eight = len(model.moe_layers) * 8 * model.expert_geometry.expert_bytes("int4")
    text["n_routed_experts"] = 8 * max(2, round(expert_gb * 1e9 / of_eight))
    return raw


def checkpoint(cache: Path, raw: dict[str, Any]) -> Path:
    """The random checkpoint of `raw`, written on first use: `cache` may be kept between runs."""
    writer = sorted(Path(random_checkpoint.__file__).parent.glob("random_*.py"))
    version = json.dumps(raw, sort_keys=True).encode() + b"".join(path.read_bytes() for path in writer)
    out = cache / hashlib.sha256(version).hexdigest()[:12]
    done = out.with_suffix(".done")  # written last: a run that was cut off leaves none
    if not done.is_file():
        print(f"writing a random checkpoint to {out}", flush=True)
        scratch = out.with_suffix(f".{time.time_ns()}")
        random_checkpoint.write_checkpoint(raw, scratch, SEED, None)
        scratch.rename(out)
        done.touch()
    return out
