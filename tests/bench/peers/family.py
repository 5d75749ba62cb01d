"""The bench's side of the pipe: contestants that share a process, stopped whenever it is not their turn.

`child.py` is the other end. Stopping, rather than trusting, because some wait by spinning: with two cores that would
halve whoever is being timed. Knows which environment each kind of process needs, and nothing about figures.
"""

import dataclasses
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.bench.machine import REPO
from tests.bench.peers.child import Work

TURN_LIMIT = 900.0  # seconds until a contestant that does not answer is given up


class FamilyError(RuntimeError):
    """A contestant cannot take part, or no longer; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What one process runs."""

    module: str  # of tests.bench.peers
    package: str  # that its interpreter must have
    openmp: bool  # pinned and spinning within its turn, as its own users run it


KINDS = {
    "hybrid": Kind("ours", "offload", False),
    "kt": Kind("kt", "kt_kernel", False),  # pins its own workers, and two OpenMP runtimes that pin disagree
    "llama": Kind("llama", "llama_cpp", True),
    "torch": Kind("naive", "torch", True),
}


class Family:
    """One running child."""

    def __init__(self, name: str, python: Path, work: Work) -> None:
        """Starts it and waits for its experts. Raises FamilyError where it cannot run."""
        kind = KINDS[name]
        self._errors = (work.directory / f"{name}.stderr").open("w+")
        self._process = subprocess.Popen(
            [python, "-m", f"tests.bench.peers.{kind.module}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1,
            cwd=REPO, env=environment(kind, work.cpus),
        )  # fmt: skip
        try:
            answer = self._ask(dataclasses.asdict(work) | {"directory": str(work.directory)})
        except FamilyError:
            self.close()
            raise
        self.variants: dict[str, str] = answer["variants"]
        self.huge_bytes: int = answer["huge_bytes"]
        self._stop()

    def time(self, variant: str, rows: int, turn: int) -> list[float]:
        """Seconds of each forward of a turn."""
        return list(self._turn({"variant": variant, "time": {"rows": rows, "turn": turn}})["seconds"])

    def errors(self, variant: str) -> dict[str, float]:
        """Relative error by kind of input."""
        return dict(self._turn({"variant": variant})["errors"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _turn(self, request: dict[str, Any]) -> dict[str, Any]:
        os.kill(self._process.pid, signal.SIGCONT)
        try:
            return self._ask(request)
        finally:
            self._stop()

    def _stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        # Until all its threads lie still, or it has ended; WNOWAIT leaves that end for Popen to see.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
        except BrokenPipeError:
            raise FamilyError(self._last_words()) from None
        ready, _, _ = select.select([self._process.stdout], [], [], TURN_LIMIT)
        if not ready:
            raise FamilyError(f"no answer within {TURN_LIMIT:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise FamilyError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FamilyError(answer["error"])
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"ended with status {status}" + (f": {lines[-1]}" if lines else "")


def not_installed(python: Path, package: str) -> str | None:
    """Why that interpreter cannot import the package, None where it has it."""
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    try:
        found = subprocess.run([python, "-c", probe], cwd=REPO, check=False).returncode == 0
    except OSError as error:
        return f"{python}: {error.strerror}"
    return None if found else f"{package} is not installed in {python}"


def environment(kind: Kind, cpus: tuple[int, ...]) -> dict[str, str]:
    """Variables for a child. All of them get huge pages, which malloc asks for when told so."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    kept["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if kind.openmp:
        kept |= {
            "OMP_NUM_THREADS": str(len(cpus)),
            "OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in cpus),
            "OMP_PROC_BIND": "true",
            "OMP_WAIT_POLICY": "ACTIVE",
        }
    return kept
