"""What this machine is made of, asked of Linux and of the GPU's driver: a `Hardware`, no rates.

Every source can be another (`system`, `process`, …), so that a machine can be written as files. What Linux does not
say is the plain case: one node, one thread a core, no cache, unknown. Imports neither torch nor numba; torch is loaded
only where a GPU's driver is here and nvidia-smi is not. Knows no models and no rates. Called by `hybrid measure`,
`plan`, `doctor` and `serve`.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from offload.isa import CPUINFO, available, cpu_flags
from offload.ram import ram
from offload.topology import (
    PROCESS,
    SYSTEM,
    allowed_cpus,
    cores_by_node,
    cpu_quota,
    parse_list,
    physical_cores,
    read_text,
)
from placement.hardware import Cache, Gpu, Hardware, HugePages, Node

Tell = Callable[[str], None]

NVIDIA_SMI = "nvidia-smi"
FIELDS = ("name", "memory.total", "compute_cap", "pcie.link.gen.max", "pcie.link.width.max")
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))  # one of them is there where a GPU can be used
PATIENCE = 20.0  # seconds for nvidia-smi, which may have to wake every GPU first
MIB = 2**20
CACHE_SIZE = re.compile(r"(\d+)([KMG]?)")
HUGE_PAGES: dict[str, HugePages] = {"always": "always", "madvise": "madvise", "never": "never"}


def find_hardware(
    disk: Path | None = None,
    *,
    system: Path = SYSTEM,
    process: Path = PROCESS,
    cpuinfo: Path = CPUINFO,
    allowed: set[int] | None = None,
    nvidia_smi: str = NVIDIA_SMI,
    drivers: tuple[Path, ...] = DRIVERS,
    tell: Tell | None = None,
) -> Hardware:
    """Facts of this machine. Cores, nodes and caches are those that this process may use.

    `disk` is a directory on the disk in question, which need not be there yet; None is the current one. `tell` gets a
    line for each GPU that had to be left out, and why.
    """
    cores = physical_cores(allowed_cpus() if allowed is None else allowed, system)
    installed = int(psutil.virtual_memory().total)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Hardware(
        cpu=_cpu_name(cpuinfo),
        cores=len(cores),
        threads_per_core=_threads_per_core(cores, system),
        cpu_quota=cpu_quota(system, process),
        nodes=_nodes(cores, installed, system, process),
        caches=_caches(cores, system),
        tiers=available(cpu_flags(cpuinfo)),
        ram=ram(process / "cgroup", system / "fs" / "cgroup")[0],
        ram_installed=installed,
        huge_pages=_huge_pages(system),
        memlock=None if limit == resource.RLIM_INFINITY else limit,
        gpus=_gpus(nvidia_smi, drivers, tell or _nobody),
        disk=_disk(Path() if disk is None else disk, system),
    )


def machine_name(hardware: Hardware) -> str:
    """One line for people, such as `AMD EPYC 7763, 64 cores, 540 GB, 2 × NVIDIA L40S`."""
    cpu = re.sub(r"\((R|TM)\)|\bCPU\b|@.*|\b\d+-Core Processor\b", "", hardware.cpu)
    counts = Counter(gpu.name for gpu in hardware.gpus)
    gpus = " + ".join(name if count == 1 else f"{count} × {name}" for name, count in counts.items())
    cores = f"{hardware.cores} core{'s' * (hardware.cores != 1)}"
    return f"{' '.join(cpu.split())}, {cores}, {hardware.ram_installed / 1e9:.0f} GB, {gpus or 'no GPU'}"


def _nobody(_line: str) -> None:
    """For who does not want to be told."""


def _cpu_name(cpuinfo: Path) -> str:
    """As /proc/cpuinfo says; the architecture where it names no model, as on ARM."""
    pairs = [line.partition(":") for line in read_text(cpuinfo).splitlines()]
    name = next((value.strip() for key, _, value in pairs if key.strip() == "model name"), "")
    return name or platform.machine() or "unknown"


def _cpu(number: int, system: Path) -> Path:
    return system / "devices" / "system" / "cpu" / f"cpu{number}"


def _threads_per_core(cores: tuple[int, ...], system: Path) -> int:
    """Of the core with the most: a processor may have cores of two kinds."""
    lists = (parse_list(read_text(_cpu(core, system) / "topology" / "thread_siblings_list")) for core in cores)
    return max((len(siblings) for siblings in lists if siblings), default=1)


def _nodes(cores: tuple[int, ...], installed: int, system: Path, process: Path) -> tuple[Node, ...]:
    """The memory nodes that the workers are dealt over, with their RAM; an equal share where Linux does not say."""
    found = cores_by_node(cores, system, process)
    folder = system / "devices" / "system" / "node"
    if len(found) == 1:
        [(number, members)] = found.items()
        # Cores of others as well: several nodes are taken as one, or there are none. All RAM is then theirs.
        if not parse_list(read_text(folder / f"node{number}" / "cpulist")).issuperset(members):
            return (Node(number, len(members), installed),)
    share = installed // len(found)
    return tuple(Node(node, len(found[node]), _node_ram(folder, node) or share) for node in sorted(found))


def _node_ram(folder: Path, node: int) -> int | None:
    match = re.search(r"MemTotal:\s*(\d+) kB", read_text(folder / f"node{node}" / "meminfo"))
    return int(match[1]) * 1024 if match else None


def _caches(cores: tuple[int, ...], system: Path) -> tuple[Cache, ...]:
    """Data and unified caches by level; cores of two kinds give two sizes of a level."""
    seen: set[tuple[int, int, frozenset[int]]] = set()
    for core in cores:
        for index in (_cpu(core, system) / "cache").glob("index[0-9]*"):
            level, kind, size, shared = (
                read_text(index / name).strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
            match = CACHE_SIZE.fullmatch(size)
            if match and level.isdigit() and kind in ("Data", "Unified"):
                n_bytes = int(match[1]) * 1024 ** " KMG".index(match[2] or " ")
                seen.add((int(level), n_bytes, frozenset(parse_list(shared) or {core})))
    counts = Counter((level, size) for level, size, _ in seen)
    return tuple(Cache(level, size, count) for (level, size), count in sorted(counts.items()))


def _huge_pages(system: Path) -> HugePages:
    """The setting in brackets, as in `always [madvise] never`."""
    match = re.search(r"\[(\w+)\]", read_text(system / "kernel" / "mm" / "transparent_hugepage" / "enabled"))
    return HUGE_PAGES.get(match[1], "unknown") if match else "unknown"


def _disk(directory: Path, system: Path) -> str:
    """The block device under a directory; none of its own (overlay, network, several disks) is "unknown"."""
    directory = directory.absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    number = there.stat().st_dev
    device = (system / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}").resolve()
    if (device / "partition").exists():  # the queue is that of the whole disk
        device = device.parent
    if not (device / "queue").is_dir():
        return "unknown"
    kind = {"0": " (solid state)", "1": " (rotating)"}.get(read_text(device / "queue" / "rotational").strip(), "")
    return device.name + kind


def _gpus(nvidia_smi: str, drivers: tuple[Path, ...], tell: Tell) -> tuple[Gpu, ...]:
    """From nvidia-smi, which answers without torch's two seconds and knows PCIe; else from torch."""
    command = shutil.which(nvidia_smi)
    found = _ask_nvidia_smi(command, tell) if command else ()
    if found or not any(driver.exists() for driver in drivers):
        return found
    return _ask_torch(tell)


def _ask_nvidia_smi(command: str, tell: Tell) -> tuple[Gpu, ...]:
    question = [command, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(question, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        tell(f"nvidia-smi gave no answer: {error}")
        return ()
    if done.returncode != 0:
        tell(f"nvidia-smi names no GPU: {' '.join((done.stdout + done.stderr).split())}")
        return ()
    return tuple(gpu for line in done.stdout.splitlines() if line.strip() for gpu in _parse_gpu(line, tell))


def _parse_gpu(line: str, tell: Tell) -> list[Gpu]:
    """One line of nvidia-smi, where it is of use. What is not known is `[N/A]` or `[Not Supported]` there."""
    words = [word.strip() for word in line.rsplit(",", len(FIELDS) - 1)]
    if len(words) != len(FIELDS) or not words[1].isdigit() or not re.fullmatch(r"\d+\.\d+", words[2]):
        tell(f"nvidia-smi names a GPU without its memory or compute capability, left out: {line.strip()}")
        return []
    name, memory, capability, generation, width = words
    return [Gpu(name, int(memory) * MIB, capability, _positive(generation), _positive(width))]


def _positive(word: str) -> int | None:
    """Link figures are 0 or a word where there is no PCIe link, or none that the driver knows."""
    return int(word) if word.isdigit() and int(word) > 0 else None


def _ask_torch(tell: Tell) -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        tell("a GPU's driver is here, but neither nvidia-smi nor torch finds a GPU; install a CUDA build of torch")
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(gpu.name, int(gpu.total_memory), f"{gpu.major}.{gpu.minor}") for gpu in properties)
