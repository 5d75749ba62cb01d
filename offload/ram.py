"""How much RAM this process may use: the machine's, or less where a control group says so.

Knows nothing of experts. Called by whoever is about to allocate, and by placement.
"""

from pathlib import Path

import psutil


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
