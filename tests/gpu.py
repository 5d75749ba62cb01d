"""Checks and times the engine on a CUDA device: `python -m tests.gpu`. Says so and exits 0 where there is none.

Parity: on tiny random checkpoints of two families in float32 the prompt's logprobs on cuda must be those of the cpu,
and the greedy tokens equal; products of narrow weights and narrow cache entries likewise. Then prefill and decode on a
mid-size checkpoint. Needs torch, numba, numpy and psutil, nothing of the server and no pytest. The last line of stdout
is one JSON document.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hybrid.batch import Batch, Row, Sampling
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.random_checkpoint import write_checkpoint
from hybrid.trial_steps import pages_needed
from offload.config import PoolConfig
from tests import families, gpu_overlap
from tests.bench import machine
from tests.bench.step import table
from tests.bench.stepping import PAGE_SIZE, Stepper, checkpoint, mid_size_config, pages_for
from tests.gpu_narrow import narrow_checks

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]

FAMILIES = {"Kimi-K2.5": families.kimi_k25, "DeepSeek-V3": families.deepseek_v3}
PROMPT, ANSWER = 96, 16  # tokens
# Both sides sum in float32 but in another order. The bound is the one the CPU path holds against transformers.
TOLERANCE = 2e-3
BATCHES = (1, 8, 32)


def main() -> int:
    """Run everything; 1 where parity fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--experts-gb", type=float, default=4.0, help="experts of the timed checkpoint")
    parser.add_argument("--against", choices=("cpu", "cuda"), default="cuda", help="cpu tries this script itself")
    given = parser.parse_args()
    if given.against == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing checked, nothing timed")
        print(json.dumps({"bench": "gpu", "device": None, **machine.describe()}))
        return 0
    name = torch.cuda.get_device_name() if given.against == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        parity = [_parity(Path(scratch), family, given.against) for family in FAMILIES]
        narrow = narrow_checks(torch.device(given.against))
        overlapped = gpu_overlap.parity(Path(scratch) / "Kimi-K2.5", given.against)
        steps = _timings(Path(scratch), given)
        mid_size = checkpoint(Path(scratch), mid_size_config(given.experts_gb))
        ways = gpu_overlap.times(mid_size, given.against, "bfloat16" if given.against == "cuda" else "float32")
    checked = {"parity": parity, "narrow": narrow, "overlapped": overlapped, "steps": steps, "ways": ways}
    print(json.dumps({"bench": "gpu", "device": name, **machine.describe(), **checked}))
    return 0 if all(result["passed"] for result in (*parity, *narrow, *overlapped.values())) else 1


def _parity(scratch: Path, family: str, device: Device) -> dict[str, Any]:
    out = scratch / family
    write_checkpoint(FAMILIES[family](), out, 3, None)
    base_logprobs, base_tokens = _answer(out, "cpu", "float32")
    logprobs, tokens = _answer(out, device, "float32")
    halved, _ = _answer(out, device, "bfloat16")
    difference = float(np.abs(logprobs - base_logprobs).max())
    result = {
        "family": family,
        "max_abs_difference": difference,
        "greedy_equal": tokens == base_tokens,
        "passed": difference < TOLERANCE and tokens == base_tokens,
        "bfloat16_max_abs_difference": float(np.abs(halved - base_logprobs).max()),
    }
    verdict = "passed" if result["passed"] else "FAILED"
    print(
        f"{verdict}: {family}: prompt logprobs differ by {difference:.2e} (limit {TOLERANCE:.0e}), "
        f"greedy tokens {'equal' if tokens == base_tokens else 'DIFFER'}; bfloat16 differs by "
        f"{result['bfloat16_max_abs_difference']:.2e}",
        flush=True,
    )
    return result


def _answer(model: Path, device: Device, dtype: Dtype) -> tuple[np.ndarray, list[int]]:
    """The logprobs of a fixed random prompt, and the greedy tokens that follow it."""
    engine = _engine(model, device, dtype, "a16", pages_for(PROMPT + ANSWER))
    try:
        prompt = tuple(int(i) for i in np.random.default_rng(5).integers(0, 256, PROMPT))
        greedy = Sampling(temperature=0.0)
        row = Row(0, prompt, 0, _pages(PROMPT), greedy, targets=prompt[1:])
        out = engine.step(Batch((row,))).rows[0]
        logprobs = np.array([scored.logprob for scored in out.scored])
        tokens = [_token(out.token)]
        for i in range(ANSWER - 1):
            position = PROMPT + i
            row = Row(0, (tokens[-1],), position, _pages(position + 1), greedy, n_sampled=i + 1)
            tokens.append(_token(engine.step(Batch((row,))).rows[0].token))
        return logprobs, tokens
    finally:
        engine.close()


def _timings(scratch: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    ceiling = machine.read_bandwidth()
    model = checkpoint(scratch, mid_size_config(given.experts_gb))
    n_pages = pages_needed(PAGE_SIZE, 1024, 512, max(BATCHES), max(BATCHES))
    dtype: Dtype = "bfloat16" if given.against == "cuda" else "float32"
    engine = _engine(model, given.against, dtype, "a8", n_pages)
    try:
        stepper = Stepper(engine)
        timings = [stepper.prefill(n_tokens, 5) for n_tokens in (512, 1024)]
        timings += [stepper.decode(batch, 512, 30) for batch in BATCHES]
    finally:
        engine.close()
    print(f"mid-size model, {dtype}, experts int4 a8; this machine reads {ceiling / 1e9:.1f} GB/s")
    print(table(timings, ceiling))
    return [{**t.as_json(), "share_of_read": t.expert_bytes_per_second / ceiling} for t in timings]


def _engine(model: Path, device: Device, dtype: Dtype, precision: Literal["a8", "a16"], n_pages: int) -> Engine:
    pool = PoolConfig(precision=precision)
    return Engine(EngineConfig(model, device, dtype, "native", pool, n_pages, PAGE_SIZE))


def _pages(n_tokens: int) -> tuple[int, ...]:
    return tuple(range(pages_for(n_tokens)))


def _token(token: int | None) -> int:
    assert token is not None
    return token


if __name__ == "__main__":
    sys.exit(main())
