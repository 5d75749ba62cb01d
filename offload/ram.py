"""How much RAM this process may use: the machine's, or less where a control group says so.

Knows nothing of experts. Called by whoever is about to allocate, and by placement.
"""

from pathlib import Path

import psutil

LIMITS, USED = ("memory.max", "memory.limit_in_bytes"), ("memory.current", "memory.usage_in_bytes")  # versions 2 and 1
FILES = ("active_file", "inactive_file")  # of a group and all in it; version 1 has `total_` before it


def ram(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, free) bytes of RAM this process may use; page cache counts as free."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for group in _groups(proc, root):
        limit, used = _first(group, LIMITS), _first(group, USED)
        if limit is not None and used is not None:
            total = min(total, limit)
            free = min(free, max(0, limit - used + _cached(group / "memory.stat")))
    return total, free


def _groups(proc: Path, root: Path) -> list[Path]:
    """This process's control groups and their parents, each of which may bound it: version 2's, and version 1's of
    memory, which lie in a folder of their own."""
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for number, controllers, name in (line for line in lines if len(line) == 3):
        if (number == "0" and not controllers) or "memory" in controllers.split(","):
            base = root / controllers
            group = base / name.lstrip("/")
            found += [group, *(parent for parent in group.parents if parent == base or base in parent.parents)]
    return found


def _first(group: Path, names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := _number(group / name)) is not None), None)


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
    values = {name: int(value) for name, value in pairs}
    return sum(values.get(f"total_{name}", values.get(name, 0)) for name in FILES)
