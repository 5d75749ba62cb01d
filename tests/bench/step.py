"""Times one engine step against the memory's read bandwidth: `python -m tests.bench.step --json`.

Prefill of one prompt and decoding at some batch sizes, on a mid-size random checkpoint (cached between runs). Every
figure is a median with its spread; the ceiling is measured in the same run. The last line of stdout is one JSON
document when --json is given.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.trial_steps import pages_needed
from offload.config import PoolConfig
from tests.bench import machine
from tests.bench.stepping import PAGE_SIZE, Stepper, Timing, cache_folder, checkpoint, mid_size_config


def main() -> int:
    """Run the bench; returns the exit status."""
    given = _arguments()
    ceiling = machine.read_bandwidth()
    model = given.model or checkpoint(given.cache, mid_size_config(given.experts_gb))
    engine = Engine(
        EngineConfig(
            model=model,
            device=given.device,
            dtype=given.dtype,
            expert_format=given.expert_format,
            pool=PoolConfig(threads=given.threads, precision=given.expert_precision),
            n_pages=pages_needed(PAGE_SIZE, given.prefill, given.context, max(given.batches), max(given.batches)),
            page_size=PAGE_SIZE,
        )
    )
    try:
        stepper = Stepper(engine)
        timings = [stepper.prefill(given.prefill, given.prefill_steps)]
        timings += [stepper.decode(batch, given.context, given.steps) for batch in given.batches]
    finally:
        engine.close()
    where = machine.describe()
    print(f"{where['cpu']}, {where['cores']} cores, reads {ceiling / 1e9:.1f} GB/s; {given.dtype}, {describe(given)}")
    print(table(timings, ceiling))
    if given.json:
        print(json.dumps(report(given, timings, ceiling, where)))
    return 0


def table(timings: list[Timing], ceiling: float) -> str:
    """The figures for people."""
    head = f"{'step':<16}{'tok/s':>9}{'ms':>10}{'p5':>10}{'p95':>10}{'experts':>9}{'MB':>9}{'GB/s':>8}{'of read':>9}"
    lines = [head]
    for t in timings:
        name = f"{t.phase} {t.new_tokens if t.phase == 'prefill' else t.batch}"
        lines.append(
            f"{name:<16}{t.tokens_per_second:>9.1f}{t.seconds * 1e3:>10.2f}{t.seconds_low * 1e3:>10.2f}"
            f"{t.seconds_high * 1e3:>10.2f}{t.distinct_experts:>9.0f}{t.expert_bytes / 1e6:>9.1f}"
            f"{t.expert_bytes_per_second / 1e9:>8.2f}{t.expert_bytes_per_second / ceiling:>9.0%}"
        )
    return "\n".join(lines)


def report(given: argparse.Namespace, timings: list[Timing], ceiling: float, where: dict[str, Any]) -> dict[str, Any]:
    """The JSON document."""
    steps = [{**t.as_json(), "share_of_read": t.expert_bytes_per_second / ceiling} for t in timings]
    settings = {"dtype": given.dtype, "precision": given.expert_precision, "format": given.expert_format}
    return {"bench": "step", **where, "torch": torch.__version__, **settings, "read_bandwidth": ceiling, "steps": steps}


def describe(given: argparse.Namespace) -> str:
    """The experts' settings in words."""
    return f"experts {given.expert_format} {given.expert_precision}, context {given.context}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.step", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON document")
    parser.add_argument("--model", type=Path, help="checkpoint to time (default: a random one)")
    parser.add_argument("--experts-gb", type=float, default=1.3, help="size of the random one's experts")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where it is kept")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--expert-format", choices=("native", "int8", "int4"), default="native")
    parser.add_argument("--expert-precision", choices=("a8", "a16"), default="a8")
    parser.add_argument("--threads", type=int, help="expert workers (default: one for each physical core)")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--prefill-steps", type=int, default=5)
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache while decoding")
    parser.add_argument("--batches", type=_numbers, default=(1, 8, 32), help="batch sizes, as 1,8,32")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each batch size")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
