"""The flags of the commands that decide before serving: measure, plan, tune, doctor, simulate, replay.

Only declares them; `planning.py` carries the commands out. Called by `args.py`.
"""

import argparse
import re
from pathlib import Path
from typing import get_args

from hybrid.config import KvDtype
from offload.config import Isa

GOALS = "latency, throughput or swarm:N"
_SWARM = re.compile(r"swarm:([1-9][0-9]*)")


# What a swarm draws for each agent: flag, default, meaning.
LENGTHS = (
    ("--private", "600", "prompt tokens of each agent"),
    ("--output", "1000", "tokens of an answer"),
    ("--turns", "1", "answers of an agent"),
    ("--tool-tokens", "0", "tokens that a tool adds between two turns"),
    ("--tool-wait", "0", "seconds that it takes"),
)


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the six parsers."""
    _add_measure(commands)
    _add_plan(commands)
    _add_tune(commands)
    _add_doctor(commands)
    _add_simulate(commands)
    _add_replay(commands)


def goal(text: str) -> tuple[str, int | None]:
    """ "latency", "throughput" or "swarm:N" as (kind, N)."""
    if text in ("latency", "throughput"):
        return text, None
    found = _SWARM.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected {GOALS}, found {text!r}")
    return "swarm", int(found[1])


def _add_measure(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    measure = commands.add_parser(
        "measure",
        help="measure this machine: profile.yaml",
        description="Measure this machine's memory, expert kernels, device and links, and write them to a profile. "
        "A run that was cut off or ran out of time goes on where it stopped.",
    )
    measure.add_argument("--out", type=Path, metavar="FILE", help="profile to write (default: this machine's own)")
    measure.add_argument("--seconds", type=positive, default=60, metavar="N", help="time box (default: %(default)s)")
    measure.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    measure.add_argument("--again", action="store_true", help="measure anew what the profile already holds")
    measure.add_argument("--json", action="store_true", help="print the profile as JSON")


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="what goes where, and what that brings, before anything loads",
        description="Settle what goes where for a model on a machine, and predict what that brings. Neither has to be "
        "here: a config.json and a profile are enough. Exit status 78 where nothing fits as asked.",
    )
    _add_model(plan)
    _add_planning(plan)
    plan.add_argument("--out", type=Path, metavar="FILE", help="write the plan, for `hybrid serve --plan`")
    plan.add_argument("--explain", action="store_true", help="print the reason for every choice")
    plan.add_argument("--compare", type=Path, metavar="FILE", help="print what differs from another plan")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")


def _add_planning(parser: argparse.ArgumentParser) -> None:
    """What a plan is made from."""
    parser.add_argument(
        "--profile",
        metavar="FILE|NAME",
        help="the machine: a profile, or the name of a shipped one (default: this machine's, of `hybrid measure`)",
    )
    parser.add_argument(
        "--goal", type=goal, default=("latency", None), metavar="GOAL", help=f"{GOALS} (default: latency)"
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens of a request (default: 8192, or the model's)"
    )
    parser.add_argument(
        "--concurrency", type=positive, metavar="N", help="requests at once (default: 1, 16 or the swarm's N, by goal)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "fp8", "int8"), help="of the device weights")
    parser.add_argument("--kv-dtype", choices=get_args(KvDtype), default="model", help="of KV pages, default: model")
    parser.add_argument("--expert-format", choices=("native", "int8", "int4"), default="native", help="default: native")
    parser.add_argument(
        "--routing",
        type=Path,
        metavar="FILE",
        help="record of `hybrid serve --record-routing`, or an .npz of single tokens (docs/ROUTING.md)",
    )
    parser.add_argument("--servable", action="store_true", help="only what this version's engine can do")


def _add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tune = commands.add_parser(
        "tune",
        help="time real steps around a plan and keep the best",
        description="Load the model, time real steps of the engine around a plan, keep the best settings and write "
        "them back, with predicted against measured. A run that was cut off goes on where it stopped.",
    )
    tune.add_argument("model", type=Path, metavar="MODEL", help="checkpoint directory (Hugging Face layout)")
    tune.add_argument("--plan", required=True, type=Path, metavar="FILE", help="the plan to tune; it is updated")
    tune.add_argument("--profile", metavar="FILE|NAME", help="default: this machine's, of `hybrid measure`")
    tune.add_argument("--seconds", type=positive, default=120, metavar="N", help="time box (default: %(default)s)")


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="is everything in order, and what would make it faster",
        description="Check kernels, instruction sets and permissions, run one real expert forward and one real step, "
        "and say what to change, in order of gain. Exit status: 0 fine, 3 slower than it could be, 4 something is "
        "broken.",
    )
    doctor.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory to look at (default: none)")
    doctor.add_argument("--threads", type=positive, metavar="N", help="worker threads, as for serve")
    doctor.add_argument("--isa", choices=get_args(Isa), help="kernel tier, as for serve")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    simulate = commands.add_parser(
        "simulate",
        help="a workload in simulated time, with the server's own scheduler",
        description="Run a workload through the server's own scheduler in simulated time: a swarm of agents, or a "
        "trace of requests. Lengths are tokens: 600, or 400..800, or 600~200 (mean ~ standard deviation).",
    )
    _add_model(simulate)
    _add_planning(simulate)
    simulate.set_defaults(goal=("swarm", 100))
    simulate.add_argument("--plan", type=Path, metavar="FILE", help="the plan (default: one made as by `hybrid plan`)")
    simulate.add_argument(
        "--trace", type=Path, metavar="FILE", help="JSON lines of timestamp, input_length, output_length"
    )
    simulate.add_argument(
        "--shared", type=_count, default=8192, metavar="N", help="prompt tokens all agents share (8192)"
    )
    for flag, default, help in LENGTHS:
        simulate.add_argument(flag, default=default, metavar="LENGTH", help=f"{help} (default: {default})")
    simulate.add_argument(
        "--users", type=_count, default=0, metavar="N", help="people who chat meanwhile, from a minute on (default: 0)"
    )
    simulate.add_argument(
        "--ablate", action="store_true", help="run it again without each scheduling policy, and compare"
    )
    simulate.add_argument("--seed", type=int, default=0, metavar="N", help="of the random lengths (default: 0)")
    simulate.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw a timeline (needs matplotlib)")
    simulate.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    replay = commands.add_parser(
        "replay",
        help="prefetch and cache policies over a routing record",
        description="Replay a routing record (docs/ROUTING.md): how well each predictor foresees the experts of a "
        "token, and what each policy would have held in VRAM slots, beside Belady's bound.",
    )
    replay.add_argument("record", type=Path, metavar="RECORD", help=".npz with every token's experts")
    replay.add_argument("--model", type=Path, metavar="DIR", help="its checkpoint or config.json, to count in bytes")
    replay.add_argument(
        "--batch", type=_counts, default=(1, 8), metavar="N,…", help="conversations decoded at once (default: 1,8)"
    )
    replay.add_argument(
        "--residency",
        type=_percents,
        default=(0.05, 0.15, 0.3),
        metavar="P,…",
        help="percent of a layer's experts in VRAM slots (default: 5,15,30)",
    )
    replay.add_argument(
        "--correction",
        type=Path,
        metavar="FILE",
        help="also write what corrects the look-ahead, learned from the record",
    )
    replay.add_argument("--json", action="store_true", help="print the figures as JSON")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _percents(text: str) -> tuple[float, ...]:
    found = _counts(text)
    if max(found) > 100:
        raise argparse.ArgumentTypeError(f"expected percents from 1 to 100, found {text!r}")
    return tuple(percent / 100 for percent in found)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint directory, or just a config.json")


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)
