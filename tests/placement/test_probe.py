"""placement.probe: machines written as files under a simulated /sys and /proc, drivers written as scripts, and this
machine against what lscpu and psutil say of it."""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from offload.topology import allowed_cpus
from placement.document import from_plain, to_plain
from placement.hardware import Cache, Gpu, Hardware, Node, fingerprint
from placement.probe import find_hardware, machine_name

KIB, MIB, GIB = 2**10, 2**20, 2**30
XEON = "Intel(R) Xeon(R) Platinum 8480+"
NO_DRIVER: tuple[Path, ...] = ()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def cache(root: Path, cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
    folder = root / "devices" / "system" / "cpu" / f"cpu{cpu}" / "cache" / f"index{index}"
    for name, text in {"level": str(level), "type": kind, "size": size, "shared_cpu_list": shared}.items():
        write(folder / name, text)


def node(root: Path, number: int, cpus: str, kilobytes: int | None) -> None:
    folder = root / "devices" / "system" / "node" / f"node{number}"
    write(folder / "cpulist", cpus)
    if kilobytes is not None:
        write(folder / "meminfo", f"Node {number} MemTotal:       {kilobytes} kB\nNode {number} MemFree:        17 kB")


def two_sockets(root: Path) -> Path:
    """Two nodes of four cores, two threads each (a core's second thread is eight further), 64 and 32 GiB."""
    for cpu in range(16):
        core, socket = cpu % 8, "0-3,8-11" if cpu % 8 < 4 else "4-7,12-15"
        write(
            root / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list",
            f"{core},{core + 8}",
        )
        cache(root, cpu, 0, 1, "Data", "48K", f"{core},{core + 8}")
        cache(root, cpu, 1, 1, "Instruction", "32K", f"{core},{core + 8}")
        cache(root, cpu, 2, 2, "Unified", "2048K", f"{core},{core + 8}")
        cache(root, cpu, 3, 3, "Unified", "105M", socket)
    node(root, 0, "0-3,8-11", 64 * MIB)
    node(root, 1, "4-7,12-15", 32 * MIB)
    write(root / "kernel" / "mm" / "transparent_hugepage" / "enabled", "[always] madvise never")
    return root


def cpuinfo(root: Path, flags: str = "fpu avx2 fma", name: str = XEON) -> Path:
    write(root / "cpuinfo", f"processor\t: 0\nmodel name\t: {name}\nflags\t\t: {flags}\n\nprocessor\t: 1")
    return root / "cpuinfo"


def find(root: Path, allowed: set[int] | None = None, **other: object) -> Hardware:
    """The machine under `root`, without a GPU unless the test says otherwise."""
    given = {"nvidia_smi": str(root / "no-such-command"), "drivers": NO_DRIVER, "cpuinfo": root / "cpuinfo", **other}
    return find_hardware(
        root, system=root, process=root / "self", allowed=set(range(16)) if allowed is None else allowed, **given
    )  # type: ignore[arg-type]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def answers(tmp_path: Path, *lines: str) -> str:
    """An nvidia-smi that writes its arguments down and says this."""
    said = "\n".join(lines)
    return script(tmp_path / "smi", f"echo \"$@\" > {tmp_path / 'asked'}\ncat <<'END'\n{said}\nEND")


def test_two_sockets_with_two_threads_a_core(tmp_path: Path) -> None:
    found = find(two_sockets(tmp_path), cpuinfo=cpuinfo(tmp_path))
    assert (found.cpu, found.cores, found.threads_per_core, found.cpu_quota) == (XEON, 8, 2, None)
    assert found.nodes == (Node(0, 4, 64 * GIB), Node(1, 4, 32 * GIB))
    assert found.caches == (Cache(1, 48 * KIB, 8), Cache(2, 2 * MIB, 8), Cache(3, 105 * MIB, 2))
    assert found.huge_pages == "always"
    assert found.gpus == ()
    assert from_plain(Hardware, to_plain(found), "profile.yaml") == found


def test_only_what_the_process_may_use(tmp_path: Path) -> None:
    found = find(two_sockets(tmp_path), {5, 6, 13})
    assert (found.cores, found.threads_per_core) == (2, 2)
    assert found.nodes == (Node(1, 2, 32 * GIB),)
    assert [item.count for item in found.caches] == [2, 2, 1]


def test_control_groups_limit_time_and_memory(tmp_path: Path) -> None:
    root = two_sockets(tmp_path)
    write(root / "self" / "cgroup", "0::/box")
    group = root / "fs" / "cgroup" / "box"
    for name, text in {
        "cpu.max": "350000 100000",
        "memory.max": "1000000",
        "memory.current": "1",
        "memory.stat": "anon 5",
    }.items():
        write(group / name, text)
    found = find(root)
    assert (found.cpu_quota, found.ram) == (3.5, 1_000_000)
    assert found.ram_installed == psutil.virtual_memory().total
    assert found.cores == 8


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    found = find(tmp_path, {3, 7})
    installed = psutil.virtual_memory().total
    assert (found.cores, found.threads_per_core, found.cpu_quota) == (2, 1, None)
    assert found.nodes == (Node(0, 2, installed),)
    assert (found.caches, found.huge_pages, found.tiers) == ((), "unknown", ("portable",))
    assert found.cpu == os.uname().machine


def test_cores_of_two_kinds(tmp_path: Path) -> None:
    """Four threads on two large cores, two small cores that share their second level."""
    for cpu, siblings in {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5"}.items():
        write(tmp_path / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list", siblings)
        cache(tmp_path, cpu, 0, 1, "Data", "48K" if cpu < 4 else "32K", siblings)
        cache(tmp_path, cpu, 2, 2, "Unified", "2M" if cpu < 4 else "4M", siblings if cpu < 4 else "4-5")
        cache(tmp_path, cpu, 3, 3, "Unified", "1G", "0-5")
    found = find(tmp_path, set(range(6)))
    assert (found.cores, found.threads_per_core) == (4, 2)
    assert found.caches == (
        Cache(1, 32 * KIB, 2), Cache(1, 48 * KIB, 2), Cache(2, 2 * MIB, 2), Cache(2, 4 * MIB, 1), Cache(3, GIB, 1),
    )  # fmt: skip


def test_a_cache_whose_cores_are_not_said_is_one_for_each_core(tmp_path: Path) -> None:
    for cpu in range(3):
        cache(tmp_path, cpu, 0, 1, "Data", "32K", "")
    assert find(tmp_path, {0, 1, 2}).caches == (Cache(1, 32 * KIB, 3),)


@pytest.mark.parametrize(
    "wrong", [{"size": ""}, {"size": "many"}, {"level": ""}, {"type": ""}, {"type": "Instruction"}]
)
def test_a_cache_that_cannot_be_read_is_left_out(tmp_path: Path, wrong: dict[str, str]) -> None:
    cache(tmp_path, 0, 0, 1, "Data", "32K", "")
    cache(tmp_path, 0, 3, 3, "Unified", "8192K", "0")
    for name, text in wrong.items():
        write(tmp_path / "devices" / "system" / "cpu" / "cpu0" / "cache" / "index3" / name, text)
    assert find(tmp_path, {0}).caches == (Cache(1, 32 * KIB, 1),)


def test_nodes_share_equally_where_their_ram_is_not_said(tmp_path: Path) -> None:
    node(tmp_path, 0, "0-3", None)
    node(tmp_path, 1, "4-7", 32 * MIB)
    half = psutil.virtual_memory().total // 2
    assert find(tmp_path, set(range(8))).nodes == (Node(0, 4, half), Node(1, 4, 32 * GIB))


def test_many_nodes_taken_as_one_have_all_ram(tmp_path: Path) -> None:
    for number in range(9):
        node(tmp_path, number, str(number), 1 * MIB)
    installed = psutil.virtual_memory().total
    assert find(tmp_path, set(range(9))).nodes == (Node(0, 9, installed),)
    assert find(tmp_path, {4}).nodes == (Node(4, 1, GIB),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("always [madvise] never", "madvise"),
        ("always madvise [never]", "never"),
        ("always [inherit] never", "unknown"),
        ("always madvise never", "unknown"),
    ],
)
def test_huge_pages(tmp_path: Path, text: str, expected: str) -> None:
    write(tmp_path / "kernel" / "mm" / "transparent_hugepage" / "enabled", text)
    assert find(tmp_path).huge_pages == expected


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="flags are read on x86-64 only")
def test_tiers_are_those_of_the_flags(tmp_path: Path) -> None:
    flags = "avx2 fma avx512f avx512bw avx512vl avx512_vnni"
    assert find(tmp_path, cpuinfo=cpuinfo(tmp_path, flags)).tiers == ("avx512vnni", "avx512", "avx2", "portable")


def test_no_limit_of_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert find(tmp_path).memlock is None
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (65536, resource.RLIM_INFINITY))
    assert find(tmp_path).memlock == 65536


class TestDisk:
    def device(self, root: Path, name: str, rotational: str | None, partition: bool = False) -> None:
        """The device that `root` lies on, under another name."""
        disk = root / "devices" / "pci" / name.removesuffix("p1")
        (disk / "queue").mkdir(parents=True)
        if rotational is not None:
            write(disk / "queue" / "rotational", rotational)
        if partition:
            write(disk / name / "partition", "1")
        number = root.stat().st_dev
        (root / "dev" / "block").mkdir(parents=True)
        (root / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(
            disk / name if partition else disk
        )

    @pytest.mark.parametrize(
        ("name", "rotational", "partition", "expected"),
        [
            ("nvme0n1p1", "0", True, "nvme0n1 (solid state)"),
            ("nvme0n1", "0", False, "nvme0n1 (solid state)"),
            ("sda", "1", False, "sda (rotating)"),
            ("sda", None, False, "sda"),
        ],
    )
    def test_the_whole_disk_is_named(
        self, tmp_path: Path, name: str, rotational: str | None, partition: bool, expected: str
    ) -> None:
        self.device(tmp_path, name, rotational, partition)
        assert find(tmp_path).disk == expected

    def test_no_device_of_its_own(self, tmp_path: Path) -> None:
        assert find(tmp_path).disk == "unknown"

    def test_a_directory_that_is_not_there_yet(self, tmp_path: Path) -> None:
        self.device(tmp_path, "sda", "1")
        found = find_hardware(tmp_path / "cache" / "models", system=tmp_path, process=tmp_path, drivers=NO_DRIVER)
        assert found.disk == "sda (rotating)"


class TestGpus:
    def test_each_line_is_one(self, tmp_path: Path) -> None:
        smi = answers(
            tmp_path, "NVIDIA H200, 143771, 9.0, 5, 16", "NVIDIA GeForce RTX 4090, 24564, 8.9, [N/A], [N/A]", ""
        )
        told: list[str] = []
        found = find(tmp_path, nvidia_smi=smi, tell=told.append)
        assert found.gpus == (
            Gpu("NVIDIA H200", 143771 * MIB, "9.0", 5, 16),
            Gpu("NVIDIA GeForce RTX 4090", 24564 * MIB, "8.9", None, None),
        )
        assert told == []
        asked = (tmp_path / "asked").read_text()
        assert "name,memory.total,compute_cap,pcie.link.gen.max,pcie.link.width.max" in asked
        assert "csv,noheader,nounits" in asked

    def test_a_name_with_a_comma(self, tmp_path: Path) -> None:
        found = find(tmp_path, nvidia_smi=answers(tmp_path, "Graphics, Device, 1000, 8.9, 4, 8"))
        assert found.gpus == (Gpu("Graphics, Device", 1000 * MIB, "8.9", 4, 8),)

    @pytest.mark.parametrize(
        "line",
        ["NVIDIA GB10, [N/A], 12.1, 5, 16", "NVIDIA K80, 11441, [N/A], 3, 16", "Unable to determine the device handle"],
    )
    def test_one_without_memory_is_left_out_and_told(self, tmp_path: Path, line: str) -> None:
        told: list[str] = []
        smi = answers(tmp_path, line, "NVIDIA L40S, 46068, 8.9, 4, 16")
        assert [gpu.name for gpu in find(tmp_path, nvidia_smi=smi, tell=told.append).gpus] == ["NVIDIA L40S"]
        assert len(told) == 1
        assert line in told[0]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("echo No devices were found; exit 6", "nvidia-smi names no GPU: No devices were found"),
            ("echo broken >&2; echo driver >&2; exit 9", "nvidia-smi names no GPU: broken driver"),
            ("exec sleep 60", "nvidia-smi gave no answer: .*timed out after 0.5 seconds"),
        ],
    )
    def test_a_failure_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
    ) -> None:
        monkeypatch.setattr("placement.probe.PATIENCE", 0.5 if "sleep" in text else 20.0)
        told: list[str] = []
        assert find(tmp_path, nvidia_smi=script(tmp_path / "smi", text), tell=told.append).gpus == ()
        assert len(told) == 1
        assert re.fullmatch(expected, told[0])

    def fake_torch(self, monkeypatch: pytest.MonkeyPatch, *gpus: SimpleNamespace) -> None:
        cuda = SimpleNamespace(
            is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_properties=gpus.__getitem__
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))

    def test_torch_is_asked_where_only_the_driver_is_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fake_torch(monkeypatch, SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB, major=9, minor=0))
        driver = tmp_path / "nvidiactl"
        assert find(tmp_path, drivers=(driver,)).gpus == ()
        driver.touch()
        assert find(tmp_path, drivers=(driver,)).gpus == (Gpu("NVIDIA H100", 80 * GIB, "9.0"),)
        smi = answers(tmp_path, "NVIDIA L40S, 46068, 8.9, 4, 16")
        assert [gpu.name for gpu in find(tmp_path, drivers=(driver,), nvidia_smi=smi).gpus] == ["NVIDIA L40S"]

    def test_a_driver_that_torch_cannot_use_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake_torch(monkeypatch)
        told: list[str] = []
        assert find(tmp_path, drivers=(tmp_path,), tell=told.append).gpus == ()
        assert len(told) == 1
        assert "install a CUDA build of torch" in told[0]


def test_the_fingerprint_is_of_the_machine_and_what_of_its_cores_may_be_used(tmp_path: Path) -> None:
    found = find(two_sockets(tmp_path), cpuinfo=cpuinfo(tmp_path))
    limited = replace(found, ram=GIB, memlock=0, huge_pages="never", disk="sdb")
    assert fingerprint(limited) == fingerprint(found)
    others = [
        replace(found, cpu="another"),
        replace(found, ram_installed=found.ram_installed + GIB),
        replace(found, nodes=found.nodes[:1]),
        replace(found, gpus=(Gpu("NVIDIA L40S", 46068 * MIB, "8.9"),)),
        replace(found, gpus=(Gpu("NVIDIA L40S", 46068 * MIB, "8.9", 4, 8),)),
        replace(found, cores=found.cores - 1),
        replace(found, cpu_quota=1.0),
        replace(found, cpu_quota=2.0),
        replace(found, tiers=found.tiers[1:]),
    ]
    assert len({fingerprint(found), *map(fingerprint, others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("cpu", "cores", "gpus", "expected"),
    [
        ("AMD EPYC", 2, (), "AMD EPYC, 2 cores, 26 GB, no GPU"),
        ("AMD EPYC 7763 64-Core Processor", 1, (), "AMD EPYC 7763, 1 core, 26 GB, no GPU"),
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz", 14, ("A",), "Intel Xeon E5-2690 v4, 14 cores, 26 GB, A"),
        (XEON, 56, ("A", "B", "A"), "Intel Xeon Platinum 8480+, 56 cores, 26 GB, 2 × A + B"),
    ],
)
def test_a_name_for_people(tmp_path: Path, cpu: str, cores: int, gpus: tuple[str, ...], expected: str) -> None:
    found = replace(
        find(tmp_path), cpu=cpu, cores=cores, ram_installed=24 * GIB, gpus=tuple(Gpu(name, GIB, "9.0") for name in gpus)
    )
    assert machine_name(found) == expected


class TestThisMachine:
    def lscpu(self, *arguments: str) -> list[list[str]]:
        if shutil.which("lscpu") is None:
            pytest.skip("there is no lscpu here")
        done = subprocess.run(["lscpu", *arguments], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        if done.returncode != 0:
            pytest.skip(f"this lscpu does not know {arguments}")
        return [line.split(",") for line in done.stdout.splitlines() if line and not line.startswith("#")]

    def test_cores_agree_with_lscpu(self) -> None:
        cores = Counter(core for cpu, core in self.lscpu("-p=CPU,CORE") if int(cpu) in allowed_cpus())
        found = find_hardware(drivers=NO_DRIVER)
        assert found.cores == len(cores)
        assert found.threads_per_core >= max(cores.values())
        assert sum(item.cores for item in found.nodes) == found.cores

    def test_the_name_agrees_with_lscpu(self) -> None:
        names = [line[0].partition(":")[2].strip() for line in self.lscpu() if line[0].startswith("Model name:")]
        if not names or os.uname().machine != "x86_64":
            pytest.skip("lscpu has another source for the name here")
        assert find_hardware(drivers=NO_DRIVER).cpu == names[0]

    def test_caches_agree_with_lscpu(self) -> None:
        online = {int(cpu) for (cpu,) in self.lscpu("-p=CPU")}
        found = {item.level: item.size * item.count for item in find_hardware(drivers=NO_DRIVER).caches}
        rows = [line[0].split() for line in self.lscpu("-B", "-C=LEVEL,TYPE,ALL-SIZE")[1:]]
        if online != allowed_cpus() or not found:
            pytest.skip("this process may not use all CPUs, or the system names no caches")
        assert found == {int(level): int(size) for level, kind, size in rows if kind != "Instruction"}

    def test_memory_agrees_with_psutil(self) -> None:
        found = find_hardware(drivers=NO_DRIVER)
        assert found.ram_installed == psutil.virtual_memory().total
        assert 0 < found.ram <= found.ram_installed
        assert all(item.ram <= found.ram_installed * 1.01 for item in found.nodes)

    def test_it_loads_neither_torch_nor_numba(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from placement.probe import find_hardware, machine_name\n"
            "print(machine_name(find_hardware(Path(sys.argv[1]), nvidia_smi='no-such-command', drivers=())))\n"
            "print([name for name in ('torch', 'numba', 'llvmlite') if name in sys.modules])"
        )
        repo = Path(__file__).resolve().parents[2]
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=repo, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
        assert done.stdout.splitlines()[0].endswith("no GPU")
