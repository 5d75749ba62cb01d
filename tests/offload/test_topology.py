"""Machines written as files under a simulated /sys and /proc: cores, memory nodes, quotas, and who works where."""

import os
from pathlib import Path

import pytest

from offload.config import MAX_NODES
from offload.topology import Place, Topology, allowed_cpus, cores_by_node, cpu_quota, find_topology, physical_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def machine(root: Path, siblings: dict[int, str], nodes: dict[int, str], with_memory: str | None = None) -> Path:
    """A /sys with these lists of threads by CPU and of CPUs by node."""
    for cpu, text in siblings.items():
        write(root / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list", text)
    for node, text in nodes.items():
        write(root / "devices" / "system" / "node" / f"node{node}" / "cpulist", text)
    if with_memory is not None:
        write(root / "devices" / "system" / "node" / "has_memory", with_memory)
    return root


def two_sockets(root: Path) -> Path:
    """Two nodes of four cores, two threads each: 0 to 3 and 4 to 7, their second threads from 8 on."""
    siblings = {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)}
    return machine(root, siblings, {0: "0-3,8-11", 1: "4-7,12-15"}, "0-1")


def find(root: Path, threads: int | None = None, allowed: set[int] | None = None) -> Topology:
    return find_topology(threads, root, root / "self", set(range(16)) if allowed is None else allowed)


def cpus(found: Topology) -> list[int | None]:
    return [place.cpu for place in found.places]


@pytest.mark.parametrize(
    ("lists", "allowed", "cores"),
    [
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, {0, 1, 4, 5}, (0, 1)),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {0, 1, 2, 3}, (0, 2)),
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, {4, 1, 5}, (1, 4)),
        ({0: "0", 1: "1,5", 5: "1,5"}, {0, 1, 5}, (0, 1)),  # 4 is offline
        ({}, {3, 7}, (3, 7)),
    ],
)
def test_one_worker_for_each_physical_core(
    tmp_path: Path, lists: dict[int, str], allowed: set[int], cores: tuple[int, ...]
) -> None:
    assert physical_cores(allowed, machine(tmp_path, lists, {})) == cores


def test_workers_are_dealt_over_the_nodes(tmp_path: Path) -> None:
    found = find(two_sockets(tmp_path))
    assert found.nodes == (0, 1)
    assert cpus(found) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert [place.node for place in found.places] == [0, 1] * 4


def test_without_sysfs_every_cpu_is_a_core_of_one_node(tmp_path: Path) -> None:
    assert find(tmp_path, allowed={2, 5}) == Topology((0,), (Place(2, 0), Place(5, 0)))


@pytest.mark.parametrize(
    ("threads", "nodes", "expected"),
    [
        (1, (0,), [None]),  # one worker may run anywhere
        (2, (0, 1), [0, 4]),
        (3, (0, 1), [0, 4, 1]),
        (8, (0, 1), [0, 4, 1, 5, 2, 6, 3, 7]),
        (9, (0, 1), [None] * 9),  # more than cores: the scheduler moves them about
    ],
)
def test_a_given_number_of_threads_is_respected(
    tmp_path: Path, threads: int, nodes: tuple[int, ...], expected: list[int | None]
) -> None:
    write(tmp_path / "self" / "cgroup", "0::/")
    write(tmp_path / "fs" / "cgroup" / "cpu.max", "150000 100000")
    found = find(two_sockets(tmp_path), threads)
    assert found.nodes == nodes
    assert cpus(found) == expected
    assert [place.node for place in found.places] == [i % len(nodes) for i in range(threads)]


def test_fewer_workers_than_nodes_use_so_many_nodes(tmp_path: Path) -> None:
    root = machine(tmp_path, {}, {0: "0-3", 2: "4-7", 5: "8-11", 9: "12-15"})
    found = find(root, 3)
    assert found.nodes == (0, 2, 5)
    assert found.places == (Place(0, 0), Place(4, 1), Place(8, 2))


def test_a_small_node_is_full_before_a_large_one(tmp_path: Path) -> None:
    found = find(machine(tmp_path, {}, {0: "0-3", 1: "4"}), 4, set(range(5)))
    assert found.places == (Place(0, 0), Place(4, 1), Place(1, 0), Place(2, 0))


def test_only_allowed_cpus_and_their_nodes(tmp_path: Path) -> None:
    found = find(two_sockets(tmp_path), allowed={5, 6, 13, 14})
    assert found == Topology((1,), (Place(5, 0), Place(6, 0)))


def test_lists_with_holes(tmp_path: Path) -> None:
    root = machine(tmp_path, {}, {0: "0,2-3,8-9,15", 1: "1,4-7", 2: ""}, "0-2")
    allowed = {0, 1, 2, 4, 7, 9, 15}
    assert cores_by_node(tuple(sorted(allowed)), root, root / "self") == {0: [0, 2, 9, 15], 1: [1, 4, 7]}


def test_cores_of_a_node_without_memory_count_for_another(tmp_path: Path) -> None:
    root = machine(tmp_path, {}, {0: "0-3", 1: "4-7", 2: "8-9"}, "0,2")
    found = cores_by_node(tuple(range(11)), root, root / "self")
    assert sorted(found) == [0, 2]
    assert sorted(found[0] + found[2]) == list(range(11))
    assert abs(len(found[0]) - len(found[2])) == 1


def test_a_node_whose_memory_is_not_granted_is_not_used(tmp_path: Path) -> None:
    write(tmp_path / "self" / "status", "Name:\tx\nMems_allowed:\t00000002\nMems_allowed_list:\t1")
    found = find(two_sockets(tmp_path))
    assert found.nodes == (1,)
    assert len(found.places) == 8


def test_more_nodes_than_counters_are_taken_as_one(tmp_path: Path) -> None:
    root = machine(tmp_path, {}, {node: str(node) for node in range(MAX_NODES + 1)})
    found = find(root, allowed=set(range(MAX_NODES + 1)))
    assert found.nodes == (0,)
    assert cpus(found) == list(range(MAX_NODES + 1))


@pytest.mark.parametrize(
    ("limit", "workers"),
    [("max 100000", 8), ("150000 100000", 1), ("300000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8)],
)
def test_a_quota_bounds_the_default(tmp_path: Path, limit: str, workers: int) -> None:
    write(tmp_path / "self" / "cgroup", "0::/user/job")
    write(tmp_path / "fs" / "cgroup" / "user" / "job" / "cpu.max", limit)
    found = find(two_sockets(tmp_path))
    assert cpus(found) == ([0, 4, 1, 5, 2, 6, 3, 7][:workers] if workers > 1 else [None])


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ("", {}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b", {"cpu.max": "50000 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 0.5),
        ("0::/host/only", {"cpu.max": "300000 100000"}, 3),
        ("0::/../other", {"cpu.max": "300000 100000"}, 3),
        ("0::/", {"cpu.max": ""}, None),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("4:cpu:/x:y\n0::/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2),
        ("3:cpuset:/a\n2:cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"}, None),
        ("nonsense", {"cpu.max": "100000 100000"}, None),
    ],
)
def test_the_smallest_quota_of_all_parents(
    tmp_path: Path, lines: str, files: dict[str, str], quota: float | None
) -> None:
    write(tmp_path / "self" / "cgroup", lines)
    write(tmp_path / "cpu.max", "1 100000")  # above the root: not ours
    for name, text in files.items():
        write(tmp_path / "fs" / "cgroup" / name, text)
    assert cpu_quota(tmp_path, tmp_path / "self") == quota


def test_no_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="threads: expected 1 to 1024 workers, got 0"):
        find_topology(0)


def test_this_machine() -> None:
    found = find_topology()
    assert 1 <= len(found.places) <= len(allowed_cpus())
    assert {place.node for place in found.places} == set(range(len(found.nodes)))
    pinned = [place.cpu for place in found.places if place.cpu is not None]
    assert len(set(pinned)) == len(pinned)
    assert set(pinned) <= allowed_cpus()


def test_without_affinity_every_cpu_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert allowed_cpus() == set(range(os.cpu_count() or 1))
