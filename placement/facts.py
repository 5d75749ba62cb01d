"""What this machine has free: the facts the ledger is drawn from.

Reads RAM from the operating system and the control group that bounds this process, device memory from torch (imported
only where a CUDA device is in question). Measures no speeds. The engine process calls `read_facts` once, at start.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Device = Literal["cpu", "cuda"]


class DeviceError(ValueError):
    """The device that was asked for is not there."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Bytes. Where the device is the CPU, device and RAM are one memory and the figures are equal."""

    device: Device
    device_name: str
    device_total: int
    device_free: int
    ram_total: int
    ram_free: int


def read_facts(device: Literal["auto", "cpu", "cuda"]) -> Facts:
    """Facts of this machine. "auto" takes CUDA where there is one. Raises DeviceError for a missing CUDA device."""
    total, free = ram()
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            device_free, device_total = torch.cuda.mem_get_info()
            name = torch.cuda.get_device_name()
            return Facts("cuda", name, int(device_total), int(device_free), total, free)
        if device == "cuda":
            raise DeviceError(
                "--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build"
            )
    return Facts("cpu", "CPU", total, free, total, free)


def ram(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, free) bytes of RAM this process may use; page cache counts as free."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for group in _groups(proc, root):
        limit = _number(group / "memory.max")
        used = _number(group / "memory.current")
        if limit is not None and used is not None:
            total = min(total, limit)
            free = min(free, max(0, limit - used + _cached(group / "memory.stat")))
    return total, free


def _groups(proc: Path, root: Path) -> list[Path]:
    """This process's control group (version 2) and its parents: each may bound it."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    if name is None:
        return []
    group = root / name.lstrip("/")
    return [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]


def _number(path: Path) -> int | None:
    """None where the file is absent or says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(path: Path) -> int:
    """File pages charged to a group: the kernel drops them before it kills."""
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(value) for name, value in pairs if name in ("active_file", "inactive_file"))
