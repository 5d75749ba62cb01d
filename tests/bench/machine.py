"""What a bench must say about where it ran, and the ceiling it is measured against."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from offload.bandwidth import READ_BYTES, ReadCeiling
from offload.topology import find_topology

REPO = Path(__file__).resolve().parents[2]


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
    return len(pinned_cpus())


def pinned_cpus(threads: int | None = None) -> tuple[int, ...]:
    """The CPUs that so many expert workers are pinned to."""
    places = find_topology(threads).places
    cpus = [place.cpu for place in places if place.cpu is not None]
    return tuple(cpus or sorted(os.sched_getaffinity(0))[: len(places)])


def cache_bytes() -> int:
    """All last-level caches together; 0 where the system does not say."""
    found = {}
    for level in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        found[(level / "shared_cpu_list").read_text()] = (
            int((level / "size").read_text().strip().removesuffix("K")) << 10
        )
    return sum(found.values())


def read_bandwidth(n_bytes: int = READ_BYTES) -> float:
    """Bytes per second that all cores together read from memory: the best of some passes."""
    ceiling = ReadCeiling(pinned_cpus(), n_bytes)
    try:
        return max(ceiling.measure() for _ in range(2))
    finally:
        ceiling.close()


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
