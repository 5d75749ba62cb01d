"""What a bench must say about where it ran, and the ceiling it is measured against."""

import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import psutil

REPO = Path(__file__).resolve().parents[2]
READ_BYTES = 1 << 30
READS = 5


def describe() -> dict[str, Any]:
    """The machine, the commit and the command, for the JSON line."""
    return {
        "cpu": _cpu_name(),
        "cores": physical_cores(),
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],  # before the run: above 0 other work shares the cores
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "command": " ".join(["python", "-m", _main_module(), *sys.argv[1:]]),
    }


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def read_bandwidth(n_bytes: int = READ_BYTES) -> float:
    """Bytes per second that all cores together read from memory: the best of some passes, one stream each core."""
    array = np.arange(n_bytes // 8, dtype=np.int64)  # written, so that every page is real memory
    parts = np.array_split(array, physical_cores())
    _sum_of(parts[0][:64])  # compile
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(READS):
            began = time.perf_counter()
            list(pool.map(_sum_of, parts))
            best = max(best, array.nbytes / (time.perf_counter() - began))
    return best


@numba.njit(nogil=True, cache=False)
def _sum_of(values: np.ndarray) -> int:  # vectorised by LLVM: bound by memory, not by the additions
    total = 0
    for i in range(values.size):
        total += values[i]
    return total


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _main_module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
