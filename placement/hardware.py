"""What a machine is made of: processors, memory, devices. Facts only; `measure.py` adds the rates.

Part of every profile, so that a plan can be made for a machine that is not this one, and so that a profile or plan of
other hardware is noticed (`fingerprint`). Reads what Linux says and takes the plain case where it says nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from offload.config import Isa
from placement.document import Bytes, Count, Positive, to_plain

HugePages = Literal["always", "madvise", "never", "unknown"]


@dataclass(frozen=True, slots=True)
class Node:
    """One memory node (NUMA) and the physical cores beside it."""

    number: int
    cores: Count
    ram: Bytes


@dataclass(frozen=True, slots=True)
class Cache:
    """One level of data or unified cache."""

    level: int
    size: Bytes  # of one
    count: Count


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator. PCIe figures are None where the driver does not say."""

    name: str
    memory: Bytes
    capability: str  # compute capability, as 9.0
    pcie_generation: int | None = None
    pcie_width: int | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine. `ram` is what this process may use: the control group's limit where that is smaller."""

    cpu: str
    cores: Count  # physical, that this process may use
    threads_per_core: Count
    cpu_quota: Positive | None  # CPUs' worth of time that the control group grants
    nodes: tuple[Node, ...]
    caches: tuple[Cache, ...]
    tiers: tuple[Isa, ...]  # kernel tiers that may run, best first
    ram: Bytes
    ram_installed: Bytes
    huge_pages: HugePages  # /sys/kernel/mm/transparent_hugepage/enabled
    memlock: Bytes | None  # limit of pinned memory, None for no limit
    gpus: tuple[Gpu, ...]
    disk: str  # device and kind under the model cache, as "nvme0n1 (solid state)"


def fingerprint(hardware: Hardware) -> str:
    """Twelve hex digits of what rates and plans depend on, with the cores, the CPU time and the kernel tiers that this
    process gets. Limits of memory are not in it: what fits is settled whenever a model is loaded."""
    ram = round(hardware.ram_installed / 2**30)  # another kernel may keep some more MB for itself
    gpus = [to_plain(gpu) for gpu in hardware.gpus]
    allowed = [hardware.cores, hardware.cpu_quota, hardware.tiers]
    what = [hardware.cpu, ram, gpus, len(hardware.nodes), allowed]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
