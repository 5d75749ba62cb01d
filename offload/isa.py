"""Which tier of expert kernels this machine may run.

The answer decides correctness, not speed: a tier that the processor or the operating system lacks would end in an
illegal instruction. Knows nothing about kernels, formats or threads. Called by experts.py and kt_worker.py at
start-up.
"""

import ctypes
import platform
from pathlib import Path
from typing import get_args

from offload.config import Isa

# Linux lists a vector extension in /proc/cpuinfo only where the kernel also saves its registers, so one file answers
# both for CPUID and for the operating system.
CPUINFO = Path("/proc/cpuinfo")

AVX2 = frozenset({"avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl"}  # dword and word operations
# Best first, except that amx must be asked for: its speed is not measured yet on a machine that has it.
REQUIRED: dict[Isa, frozenset[str]] = {
    "amx": AVX512 | {"avx512_vnni", "amx_tile", "amx_bf16"},
    "avx512vnni": AVX512 | {"avx512_vnni"},
    "avx512": AVX512,
    "avxvnni": AVX2 | {"avx_vnni"},
    "avx2": AVX2,
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
        return next(tier for tier in tiers if tier != "amx")
    if requested not in REQUIRED:
        raise ValueError(f"--isa: {requested!r} is not a kernel tier, choose one of {', '.join(get_args(Isa))}")
    if requested not in tiers:
        missing = ", ".join(sorted(REQUIRED[requested] - have))
        raise ValueError(f"--isa: {requested} cannot run on this machine (no {missing}), choose {' or '.join(tiers)}")
    if requested == "amx" and not permit_amx():
        raise ValueError(f"--isa: the operating system does not permit amx, choose {' or '.join(tiers[1:])}")
    return requested


def permit_amx() -> bool:
    """Ask Linux (5.16 and later) for the tile registers, for all threads of this process."""
    system_call, ask_for_feature, tile_data = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return int(ctypes.CDLL(None).syscall(system_call, ask_for_feature, tile_data)) == 0
