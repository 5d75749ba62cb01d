"""Times one layer of routed experts side by side with its peers: `python -m tests.bench.kernels`.

Ours, kt_kernel, llama.cpp and plain torch get the same weights, tokens and routes, take turns within every round, and
are stopped while it is another's turn; the memory's read bandwidth is measured in every round too. Peers that are not
installed are named and left out (docs/BENCHMARKS.md says how to install them). The last line is one JSON document.
"""

import argparse
import itertools
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import psutil

from offload.config import ExpertGeometry
from offload.isa import available, choose, cpu_flags
from offload.topology import find_topology
from tests.bench import figures, machine
from tests.bench.contest import Contest
from tests.bench.peers import inputs
from tests.bench.peers.child import Work
from tests.bench.peers.family import KINDS, not_installed
from tests.bench.peers.inputs import SHAPES, Shape

HERE = Path(sys.executable)
ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)
SHARE_OF_RAM = 0.6  # of what is free: the contestants' experts, all together
MUCH_LARGER = 8  # than the caches, so that experts come from memory
# Bytes that a family keeps for one weight: int4 and its bf16 scales, kt's float32 scales, two copies of kt's and
# llama.cpp's.
BYTES_PER_WEIGHT = {"hybrid": 0.5625, "kt": 1.25, "llama": 1.125, "torch": 2.0}
KT_AMX_BYTES_PER_WEIGHT = 1.6  # its int4 and int8 besides


def main() -> int:
    """Run the bench; returns the exit status."""
    given = _arguments()
    where = machine.describe()
    pythons = {"hybrid": HERE, "kt": given.kt_python, "llama": given.llama_python, "torch": HERE}
    absent = {name: why for name in given.peers if (why := not_installed(pythons[name], KINDS[name].package))}
    names = ["hybrid", *(name for name in given.peers if name not in absent)]
    shape = SHAPES[given.shape]
    n_experts = experts_that_fit(shape, given.memory_gb * 1e9, names)
    if n_experts < shape.top_k:
        print(
            f"--memory-gb {given.memory_gb:.1f}: holds {n_experts} experts, a token takes {shape.top_k}",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-kernels-") as scratch, ExitStack() as stack:
        work = _work(given, shape, n_experts, Path(scratch))
        expert_bytes = ExpertGeometry(n_experts, shape.hidden, shape.inner).expert_bytes("int4")
        inputs.write(work, given.rows, given.rounds)
        contest = Contest(work, expert_bytes)
        contest.absent |= absent
        for name in names:
            contest.start(name, pythons[name], stack)
        ours = [name for name in contest.about if name.startswith("hybrid")]
        if not ours:
            return 1
        print(f"{where['cpu']}, {len(work.cpus)} threads; {given.shape}, {n_experts} experts")
        if n_experts * expert_bytes < MUCH_LARGER * machine.cache_bytes():
            print(f"the caches hold {machine.cache_bytes() / 1e6:.0f} MB of them, so no figure here is the memory's")
        contest.check()
        ceiling = machine.ReadCeiling(work.cpus)
        stack.callback(ceiling.close)
        for turn, rows in itertools.product(range(given.rounds), given.rows):
            read = ceiling.measure()
            contest.round(turn, rows, read, given.call_limit)
            done = {name: turns[-1] for name, turns in contest.results.get(rows, {}).items()}
            times = ", ".join(f"{name} {last.median * 1e3:.2f}" for name, last in done.items())
            print(f"round {turn + 1}, {rows} rows, reads {read / 1e9:.1f} GB/s, ms: {times}", flush=True)
    report(contest, ours, given.markdown)
    setting = {
        "shape": given.shape,
        "n_experts": n_experts,
        "expert_bytes": expert_bytes,
        "threads": len(work.cpus),
        "rounds": given.rounds,
    }
    found = {"contestants": contest.about, "absent": contest.absent, "accuracy": contest.accuracy}
    print(json.dumps({"bench": "kernels", **where, **setting, **found, **figures.as_json(contest.results, ours)}))
    return 0


def report(contest: Contest, ours: list[str], with_markdown: bool) -> None:
    """For people."""
    for name, text in contest.about.items():
        print(f"{name}: {text}")
    for name, why in contest.absent.items():
        print(f"{name}: {why}")
    print(figures.table(contest.results, ours[0]))
    for name, errors in contest.accuracy.items():
        print(f"{name:<26} relative error " + ", ".join(f"{kind} {error:.5f}" for kind, error in errors.items()))
    if with_markdown:
        print("\n" + figures.markdown(contest.results, ours[0]) + "\n")


def experts_that_fit(shape: Shape, n_bytes: float, names: list[str]) -> int:
    """As many as the model has, or as all the families can hold at once."""
    each = sum(BYTES_PER_WEIGHT[name] for name in names)
    if "kt" in names and "amx_int8" in cpu_flags():
        each += KT_AMX_BYTES_PER_WEIGHT
    return min(shape.n_experts, int(n_bytes / (each * 3 * shape.hidden * shape.inner)))


def _work(given: argparse.Namespace, shape: Shape, n_experts: int, directory: Path) -> Work:
    return Work(
        directory=directory,
        n_experts=n_experts,
        hidden=shape.hidden,
        inner=shape.inner,
        top_k=shape.top_k,
        max_rows=max(*given.rows, inputs.CHECK_ROWS),
        cpus=machine.pinned_cpus(given.threads),
        nodes=find_topology(given.threads).nodes,
        tiers=given.tiers,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernels", description=__doc__)
    free = psutil.virtual_memory().available * SHARE_OF_RAM / 1e9
    parser.add_argument("--shape", choices=tuple(SHAPES), default="k25", help="whose layer")
    parser.add_argument("--rows", type=_numbers, default=ROWS, help="tokens of a call, as 1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory-gb", type=float, default=free, help="for all contestants together (default: %(default).0f)"
    )
    parser.add_argument("--threads", type=int, help="workers of each contestant (default: one for each physical core)")
    parser.add_argument(
        "--tiers", type=_words, default=(choose(),), help="of our kernels, as avx2,portable (default: as in serving)"
    )
    parser.add_argument("--peers", type=_words, default=("kt", "llama", "torch"), help="who else runs (default: all)")
    parser.add_argument("--kt-python", type=Path, default=HERE, help="interpreter that has kt_kernel")
    parser.add_argument("--llama-python", type=Path, default=HERE, help="interpreter that has llama_cpp")
    parser.add_argument("--call-limit", type=float, default=60.0, help="seconds; whoever would take longer sits out")
    parser.add_argument("--markdown", action="store_true", help="print the table for README too")
    given = parser.parse_args()
    for peer in given.peers:
        if peer not in KINDS or peer == "hybrid":
            parser.error(f"--peers: {peer!r} is none of kt, llama, torch")
    if not 1 <= (given.threads or 1) <= machine.physical_cores():
        parser.error(f"--threads: {given.threads} cannot each have a core, there are {machine.physical_cores()}")
    for tier in given.tiers:
        if tier not in available():
            parser.error(f"--tiers: {tier!r} cannot run here, choose from {', '.join(available())}")
    return given


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


if __name__ == "__main__":
    sys.exit(main())
