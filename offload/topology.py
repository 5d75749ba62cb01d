"""Where the expert workers run: physical cores, memory nodes (NUMA), and how many CPUs the control group grants.

One worker for each physical core, dealt over the memory nodes. Reads what Linux says under /sys and /proc and takes
the plain case (every CPU a core, one node, no quota) where it says nothing. Knows nothing about what workers do.
Called by hybrid before it opens the expert store; pool.py starts workers at these places.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offload.config import MAX_NODES

MOST_THREADS = 1024
SYSTEM, PROCESS = Path("/sys"), Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs."""

    cpu: int | None  # None: not pinned
    node: int  # index into Topology.nodes


@dataclass(frozen=True, slots=True)
class Topology:
    """The workers' places and the memory nodes that they use."""

    nodes: tuple[int, ...]  # numbers that the system gives them, at least one: 0 where it does not say
    places: tuple[Place, ...]  # one for each worker, the nodes in turn


def find_topology(
    threads: int | None = None, system: Path = SYSTEM, process: Path = PROCESS, allowed: set[int] | None = None
) -> Topology:
    """Places for `threads` workers; None: one for each physical core, no more than the CPU quota.

    `allowed` are the CPUs to choose from, None those of this process. Raises ValueError for `threads` below 1.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads: expected 1 to {MOST_THREADS} workers, got {threads}; leave it out for one a core")
    cores = physical_cores(allowed_cpus() if allowed is None else allowed, system)
    quota = cpu_quota(system, process)
    granted = len(cores) if quota is None else min(len(cores), max(1, int(quota)))
    return deal(threads or granted, cores_by_node(cores, system, process))


def deal(workers: int, cores: dict[int, list[int]]) -> Topology:
    """So many workers over the nodes' cores, a node's turn after the other's."""
    nodes = tuple(sorted(cores))[:workers]
    turns = itertools.zip_longest(*(cores[node] for node in nodes))
    places = [Place(cpu, node) for turn in turns for node, cpu in enumerate(turn) if cpu is not None]
    # Without a core of its own a worker may share one with another worker for whole scheduler ticks (8 ms
    # measured against 1 us). With more workers than cores the scheduler has to move them about, and one alone has
    # nobody to share with: no pinning then.
    if not 1 < workers <= len(places):
        places = [Place(None, worker % len(nodes)) for worker in range(workers)]
    return Topology(nodes, tuple(places[:workers]))


def allowed_cpus() -> set[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores(allowed: set[int], system: Path = SYSTEM) -> tuple[int, ...]:
    """The first allowed CPU of each physical core; every CPU counts as a core where the system does not say."""
    taken: set[int] = set()
    first = []
    for cpu in sorted(allowed):
        if cpu not in taken:
            first.append(cpu)
            topology = system / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
            taken |= parse_list(read_text(topology / "thread_siblings_list")) | {cpu}
    return tuple(first)


def cores_by_node(cores: tuple[int, ...], system: Path = SYSTEM, process: Path = PROCESS) -> dict[int, list[int]]:
    """The cores of each memory node that has some and has memory this process may use.

    A core of no such node counts for the one with the fewest. More nodes than the workers' task counters have room
    for are taken as one: their memory is then interleaved by nobody, but everything works.
    """
    folder = system / "devices" / "system" / "node"
    usable = parse_list(read_text(folder / "has_memory")) or None
    status = read_text(process / "status").splitlines()
    granted = next((parse_list(line.split(":")[1]) for line in status if line.startswith("Mems_allowed_list:")), None)
    found: dict[int, list[int]] = {}
    for path in folder.glob("node[0-9]*"):
        node = int(path.name.removeprefix("node"))
        members = parse_list(read_text(path / "cpulist")).intersection(cores)
        if members and all(node in some for some in (usable, granted) if some):
            found[node] = sorted(members)
    if not found or len(found) > MAX_NODES:
        return {min(found, default=0): list(cores)}
    for cpu in sorted(set(cores).difference(*found.values())):
        min(found.values(), key=len).append(cpu)
    return found


def cpu_quota(system: Path = SYSTEM, process: Path = PROCESS) -> float | None:
    """How many CPUs' worth of time the control groups grant, None: no limit. The smallest of all parents counts."""
    lines = read_text(process / "cgroup").splitlines()
    return min((quota for line in lines for quota in _quotas(line, system)), default=None)


def _quotas(line: str, system: Path) -> Iterator[float]:
    """Quotas along one line of /proc/self/cgroup: `0::/path` (version 2) or `4:cpu,cpuacct:/path` (version 1)."""
    number, controllers, name = [*line.split(":", 2), "", ""][:3]
    is_second = number == "0" and not controllers
    if not is_second and "cpu" not in controllers.split(","):
        return
    root = system / "fs" / "cgroup" / ("" if is_second else "cpu")
    group = root / name.strip("/")
    # In a container the path may be the host's, and only its root is there: absent files say nothing.
    for folder in (group, *group.parents):
        if is_second:
            words = read_text(folder / "cpu.max").split()
        else:
            words = [read_text(folder / f"cpu.cfs_{word}_us") for word in ("quota", "period")]
        with contextlib.suppress(ValueError, ZeroDivisionError):  # `max` or nothing
            quota, period = (int(word) for word in words)
            if quota > 0:  # -1: no limit
                yield quota / period
        if folder == root:
            return


def parse_list(text: str) -> set[int]:
    """CPU or node numbers of a list such as `0,64` or `0-1`."""
    ranges = [part.split("-") for part in text.strip().split(",") if part.strip()]
    return {number for bounds in ranges for number in range(int(bounds[0]), int(bounds[-1]) + 1)}


def read_text(path: Path) -> str:
    """What the system says there; nothing where it has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
