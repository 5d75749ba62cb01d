"""Which tier of expert kernels this machine may run.

The answer decides correctness, not speed: a tier that the processor or the operating system lacks would end in an
illegal instruction. Knows nothing about kernels, formats or threads. Called by the expert pool at start-up and by
placement's hardware probe.
"""

import platform
from pathlib import Path
from typing import get_args

from offload.config import Isa

# Linux lists a vector extension in /proc/cpuinfo only where the kernel also saves its registers, so one file answers
# both for CPUID and for the operating system.
CPUINFO = Path("/proc/cpuinfo")

# Best first. The avx512vnni kernels use dword and word operations (f, bw) and the int8 dot product (vnni).
REQUIRED: dict[Isa, frozenset[str]] = {
    "avx512vnni": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx2", "fma"}),
    "avx2": frozenset({"avx2", "fma"}),
    "portable": frozenset(),
}


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The processor's feature flags as Linux lists them; empty where there is no such list or it is not x86-64."""
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def available(flags: frozenset[str] | None = None) -> tuple[Isa, ...]:
    """The tiers that may run here, best first; `portable` always may."""
    have = cpu_flags() if flags is None else flags
    return tuple(isa for isa, needed in REQUIRED.items() if needed <= have)


def choose(requested: Isa | None = None, flags: frozenset[str] | None = None) -> Isa:
    """The requested tier, or the best one. Raises ValueError when the request is unknown or cannot run here."""
    have = cpu_flags() if flags is None else flags
    tiers = available(have)
    if requested is None:
        return tiers[0]
    if requested not in REQUIRED:
        raise ValueError(f"isa: {requested!r} is not a kernel tier, choose one of {', '.join(get_args(Isa))}")
    if requested not in tiers:
        missing = ", ".join(sorted(REQUIRED[requested] - have))
        raise ValueError(f"isa: {requested} cannot run on this machine (no {missing}), choose {' or '.join(tiers)}")
    return requested
