"""Times `Engine.step` on random ids: the prefill of one prompt, and decoding at a batch size.

Shared by `tests.bench.step` and `tests.gpu`, with the checkpoints that benches run on. The steps themselves are
`hybrid.trial_steps`.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid import random_checkpoint
from hybrid.batch import StepOutput
from hybrid.config import ModelConfig
from hybrid.engine import Engine
from hybrid.trial_steps import TrialSteps

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
    """Times one engine's steps."""

    def __init__(self, engine: Engine) -> None:
        self._steps = TrialSteps(engine)

    def prefill(self, n_tokens: int, steps: int) -> Timing:
        """One prompt of `n_tokens` new ids at a time."""
        self._steps.prompt(n_tokens)  # warm: kernels compiled, pages touched
        return _timing("prefill", 1, n_tokens, 0, [self._steps.prompt(n_tokens)[0] for _ in range(steps)])

    def decode(self, batch: int, context: int, steps: int) -> Timing:
        """`batch` requests, each with `context` ids in the cache, one new id each for every step."""
        self._steps.fill(context, batch, context)
        self._steps.decode(batch)
        return _timing("decode", batch, batch, context, [self._steps.decode(batch) for _ in range(steps)])


def _timing(phase: str, batch: int, n_tokens: int, context: int, outputs: Sequence[StepOutput]) -> Timing:
    seconds = [out.seconds for out in outputs]
    median = statistics.median(seconds)
    low, high = np.percentile(seconds, [5, 95])
    touched = statistics.mean(out.expert_bytes for out in outputs)
    return Timing(
        phase, batch, n_tokens, context, len(outputs), median, float(low), float(high), n_tokens / median,
        touched, statistics.mean(out.distinct_experts for out in outputs), touched / median,
    )  # fmt: skip


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens`."""
    return math.ceil(n_tokens / PAGE_SIZE)


def mid_size_config(expert_gb: float) -> dict[str, Any]:
    """A K2.5-shaped config.json with about `expert_gb` of INT4 experts: hidden 2048, experts of 1024, top-8."""
    raw: dict[str, Any] = json.loads((REPO / "tests" / "reference" / "small_model.json").read_text())
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


def cache_folder() -> Path:
    """Where benches keep checkpoints between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid" / "bench"


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
