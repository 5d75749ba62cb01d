"""The contestant's side of the pipe: reads one request a line, times forwards, answers one line.

Imported by every contestant in whichever interpreter has its package, so it needs NumPy and nothing else. The clock
runs around the forward only: converting inputs, building graphs and reading files happen before it starts. Knows
nothing about who is compared with whom; `family.py` is the other end.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

PR_SET_PDEATHSIG = 1
MATRICES = ("gate", "up", "down")
WARM_ROWS = 8  # up to here every turn starts with a whole call that is not timed, above only the first turn does
TURN_SECONDS = 1.0  # no call is started after so long


class Job(NamedTuple):
    """One forward: `run` is what is timed, `result` brings float32 (T, D)."""

    run: Callable[[], object]
    result: Callable[[], np.ndarray]


Variant = Callable[[np.ndarray, np.ndarray, np.ndarray], Job]  # x float32 (T, D), ids int64 (T, K), weights float32


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What all contestants are given alike. Expert e holds the weights of template e % n_templates."""

    directory: Path  # templates and inputs, as .npy
    n_experts: int
    hidden: int
    inner: int
    top_k: int
    max_rows: int
    cpus: tuple[int, ...]  # one thread on each
    nodes: tuple[int, ...]  # memory nodes of the system that these are on
    tiers: tuple[str, ...]  # of our own kernels

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Work":
        """From JSON, which has lists and no paths."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**values | {"directory": Path(given["directory"])})

    def template(self, matrix: str) -> tuple[np.ndarray, np.ndarray]:
        """int4 words (n, out, in/8) and bf16 scales (n, out, in/32) of all templates."""
        return tuple(self.array(f"{matrix}-{part}") for part in ("data", "scales"))  # type: ignore[return-value]

    def array(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.directory / f"{name}.npy", mmap_mode="r"))


def serve(build: Callable[[Work], dict[str, tuple[Variant, str]]]) -> None:
    """Answer requests until the pipe closes. `build` makes the variants: name -> (variant, what it is in words)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped child cannot see its parent go
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints must not land between the answers
    requests = (json.loads(line) for line in sys.stdin)
    work = Work.of(next(requests))
    try:
        variants = build(work)
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        _answer(answers, {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    _answer(answers, {"variants": {name: about for name, (_, about) in variants.items()}, "huge_bytes": _huge_bytes()})
    for request in requests:
        variant = variants[request["variant"]][0]
        _answer(answers, _timed(work, variant, **request["time"]) if "time" in request else _checked(work, variant))


def _timed(work: Work, variant: Variant, rows: int, turn: int) -> dict[str, Any]:
    """Seconds of each call of one turn."""
    x = np.array(work.array(f"x-{rows}"))
    ids, weights = np.array(work.array(f"ids-{rows}")[turn]), np.array(work.array(f"weights-{rows}")[turn])
    warm = rows if rows <= WARM_ROWS or turn == 0 else 1  # a first call also grows buffers
    variant(x[:warm], ids[0, :warm], weights[0, :warm]).run()
    seconds: list[float] = []
    for call in range(1, len(ids)):
        if sum(seconds) > TURN_SECONDS:
            break
        job = variant(x, ids[call], weights[call])
        began = time.perf_counter()
        job.run()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds}


def _checked(work: Work, variant: Variant) -> dict[str, Any]:
    """Relative errors by kind of input."""
    errors = {}
    for name, x, reference in _checks(work):
        job = variant(x, np.array(work.array("check-ids")), np.array(work.array("check-weights")))
        job.run()
        difference = job.result().astype(np.float64) - reference
        errors[name] = float(np.linalg.norm(difference) / np.linalg.norm(reference))
    return {"errors": errors}


def _checks(work: Work) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for path in sorted(work.directory.glob("check-x-*.npy")):
        name = path.stem.removeprefix("check-x-")
        yield name, np.load(path), np.load(work.directory / f"check-y-{name}.npy")


def _huge_bytes() -> int:
    """Bytes of this process on huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def _answer(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()
