"""What is out of order on a machine: pure functions from facts to findings.

Each check gets what was read or measured and yields a `Finding` where something is wrong, with the reason and the
remedy. Reads no files and runs nothing: `doctor.py` collects the facts, calls these and shows what they found.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from offload.config import ExpertFormat, Isa
from placement.forecast import human_seconds
from placement.hardware import HugePages
from placement.ledger import HOST_RESERVE, human

Severity = Literal["broken", "slow", "note"]
Compared = Mapping[int, tuple[float, float]]  # rows of a layer to seconds as it is now and as it could be

STATUS: dict[Severity, int] = {"broken": 4, "slow": 3, "note": 0}
SEVERITIES: tuple[Severity, ...] = ("broken", "slow", "note")
WORTH = 1.05  # a gain below this is within the noise of the measurement: a note, not a fault
# Relative error of the kernels against plain arithmetic: rounding activations to int8 costs 0.013 in the check, the
# smallest slip, one of its 128 inputs lost, 0.07.
TOLERANCE = 0.03
# Without huge pages an expert layer took 1.02 to 1.07 times as long on two cores of a Zen 3 (median and best of 16 at
# one row, 2026-11-22); plain reads of memory lost 1.2 on a Sapphire Rapids.
HUGE_PAGES_GAIN = 1.07
BACKED = 0.9  # share of an arena in huge pages that counts as all: its ends may lack one
BUSY = 0.25  # other processes' load for each core that falsifies measurements


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to change, or to know. `gain`: how many times faster it could be; None where that is not known."""

    severity: Severity
    what: str
    why: str
    remedy: str
    gain: float | None = None


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The broken first, then the slow, then notes, each by gain.

    Something slow without a figure is not in use at all (a GPU, RAM for the experts), and leads; such a note follows.
    """
    unknown = {"broken": 0.0, "slow": math.inf, "note": 0.0}

    def rank(finding: Finding) -> tuple[int, float]:
        gain = unknown[finding.severity] if finding.gain is None else finding.gain
        return SEVERITIES.index(finding.severity), -gain

    return tuple(sorted(findings, key=rank))


def exit_status(findings: Iterable[Finding]) -> int:
    """Of the worst finding: 4 something is broken, 3 something is slow, 0 neither."""
    return max((STATUS[finding.severity] for finding in findings), default=0)


def tiers(available: tuple[Isa, ...], best: Isa, used: Isa, compared: Compared) -> Iterator[Finding]:
    """Instructions that are not used, or not there. `available` best first; `best` is what is used when nobody asks.

    `compared` are the seconds with `used` and with `best`.
    """
    if used != "amx" and available.index(used) > available.index(best):
        gain, shown = _gain(compared)
        yield Finding(
            _severity(gain),
            f"--isa {used} leaves {best} unused",
            f"this processor has {best}; {shown}",
            f"leave --isa out, or --isa {best}",
            gain,
        )
    if not best.startswith("avx512"):
        yield Finding(
            "note",
            "this processor has no AVX-512",
            f"its best kernels are those of {best}; prompts and large batches are bound by arithmetic sooner",
            "nothing to set: the processor has none",
        )


def amx(available: tuple[Isa, ...], used: Isa, permitted: bool) -> Iterator[Finding]:
    """Tile instructions that are there."""
    if "amx" not in available or used == "amx":
        return
    if not permitted:
        yield Finding(
            "note",
            "the processor has AMX and the operating system does not permit it",
            "asking for the tile registers was refused (arch_prctl ARCH_REQ_XCOMP_PERM)",
            "Linux 5.16 or newer, and a container or seccomp profile that lets arch_prctl through",
        )
        return
    yield Finding(
        "note",
        f"AMX is there and {used} is used",
        "AMX must be asked for; it helps experts with 16 rows and more, which is prompts",
        "--isa amx; `hybrid tune` times it",
    )


def kernels(errors: Mapping[tuple[Isa, ExpertFormat], float]) -> Iterator[Finding]:
    """`errors`: relative error of each tier and format against plain arithmetic."""
    for (isa, fmt), error in errors.items():
        if not error <= TOLERANCE:  # NaN too
            yield Finding(
                "broken",
                f"the {isa} kernels give wrong answers",
                f"relative error {error:.3g} of a small {fmt} layer against plain arithmetic; {TOLERANCE} is allowed",
                "choose another tier with --isa; remove the kernel cache (~/.cache/hybrid/kernels) and try again",
            )


def threads(asked: int | None, default: int, cores: int, quota: float | None, compared: Compared) -> Iterator[Finding]:
    """A number of workers that was asked for, against one for each core. `compared`: seconds with either."""
    if quota is not None and quota < cores:
        yield Finding(
            "note",
            f"the control group grants {quota:g} of {cores} cores",
            f"so {default} worker{'s' if default > 1 else ''} run where {cores} could",
            "raise cpu.max (docker: --cpus) if the machine is yours",
        )
    if asked is None or asked == default:
        return
    gain, shown = _gain(compared)
    if gain is not None and asked < default:
        gain = min(gain, default / asked)  # more is noise
    over = f"{asked} workers share {default} cores" if asked > default else f"{asked} of {default} cores work"
    yield Finding(
        _severity(gain),
        f"--threads {asked}: {over}",
        f"one worker for each core is the default; {shown}",
        f"leave --threads out, or --threads {default}",
        gain,
    )


def huge_pages(setting: HugePages, backed: float | None) -> Iterator[Finding]:
    """`backed`: the share of a test arena that lay in huge pages, None where the system does not say."""
    file = "/sys/kernel/mm/transparent_hugepage/enabled"
    if setting == "never":
        yield Finding(
            "slow",
            "huge pages are switched off",
            f"{file} says never: experts are read through 4 kB pages, and load slower",
            f"as root: echo madvise > {file}",
            HUGE_PAGES_GAIN,
        )
    elif backed is not None and backed < BACKED:
        gain = 1 + (HUGE_PAGES_GAIN - 1) * (1 - backed)
        yield Finding(
            _severity(gain),
            f"only {backed:.0%} of a test arena lay in huge pages",
            f"{file} says {setting}, but the system found too little unbroken memory",
            "as root: echo 1 > /proc/sys/vm/compact_memory; or restart the machine before a large model is loaded",
            gain,
        )


def pinning(failure: str | None, size: int, memlock: int | None) -> Iterator[Finding]:
    """`failure`: why the device's staging buffers of `size` bytes could not be pinned."""
    if failure is not None:
        limit = "no limit" if memlock is None else human(memlock)
        yield Finding(
            "broken",
            f"{human(size)} of memory cannot be pinned for copies to the device",
            f"{failure}; the memlock limit is {limit}",
            "ulimit -l unlimited (docker: --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)",
        )


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: what a model wants of RAM, and what there is. `allowed` is the control group's limit where it is lower."""

    model: str
    experts: int
    weights: int  # everything else, 0 where that lies on a device of its own
    packed: bool  # the file of `hybrid pack` is there, so the experts need not fit
    installed: int
    allowed: int
    free: int

    @property
    def needed(self) -> int:
        return self.experts + self.weights + HOST_RESERVE


def room(asked: Room) -> Iterator[Finding]:
    """Whether the model's experts fit into RAM, and who is in their way if not."""
    needed = asked.needed
    if needed <= asked.free:
        return
    if asked.allowed < min(needed, asked.installed):
        what = f"the control group allows {human(asked.allowed)} of RAM and {asked.model} needs {human(needed)}"
        larger = "raise memory.max (docker: --memory)"
    elif asked.installed < needed:
        what = f"the machine has {human(asked.installed)} of RAM and {asked.model} needs {human(needed)}"
        larger = "more RAM"
    else:
        what = f"{human(asked.free)} of RAM are free and {asked.model} needs {human(needed)}"
        larger = "end other programs"
    why = f"its experts alone take {human(asked.experts)}"
    others = asked.weights + HOST_RESERVE
    if others > asked.free:
        yield Finding("broken", what, f"{why}, everything else {human(others)}", larger)
    elif asked.packed:
        yield Finding("slow", what, f"{why}: what does not fit is read from the disk again and again", larger)
    else:
        remedy = (
            f"{larger}; or `hybrid pack {asked.model}` writes them to a file that is read as they are needed (slowly)"
        )
        yield Finding("broken", what, why, remedy)


def nodes(failures: Iterable[str]) -> Iterator[Finding]:
    """`failures`: why memory could not be placed, by node."""
    for failure in failures:
        yield Finding(
            "slow",
            f"experts cannot be placed on their memory node: {failure}",
            "workers then read memory of other nodes, through the link between the sockets",
            "a container or seccomp profile that lets mbind through (docker: --cap-add SYS_NICE)",
        )


def load(average: float | None, cores: int) -> Iterator[Finding]:
    """`average`: runnable processes of the last minute, before anything was measured."""
    if average is not None and average >= BUSY * cores:
        yield Finding(
            "note",
            f"other programs were running: load average {average:.2f} on {cores} core{'s' if cores > 1 else ''}",
            "workers wait for each other, so one busy core slows all; figures here may be too low",
            "end them and run doctor again",
        )


def governor(name: str | None, driver: str | None) -> Iterator[Finding]:
    """The processor's clock. Under the two drivers that choose by themselves, powersave is the usual name."""
    chooses = driver in ("intel_pstate", "amd-pstate-epp")
    if name == "powersave" and not chooses:
        yield Finding(
            "note",
            "the processor is held at its lowest clock",
            f"the frequency governor is powersave (driver {driver or 'unknown'})",
            "as root: cpupower frequency-set -g performance",
        )


def cuda(gpus: tuple[str, ...], torch_sees: bool, torch_build: str) -> Iterator[Finding]:
    """`gpus`: names that the driver gives."""
    if gpus and not torch_sees:
        yield Finding(
            "slow",
            f"{gpus[0]} is there and torch does not use it",
            f"torch {torch_build} finds no CUDA device: everything runs on the processor",
            "install a CUDA build of torch that suits the driver (nvidia-smi shows its CUDA version)",
        )


def sandboxes(clone: str | None, most: str | None, restricted: str | None, bwrap: bool) -> Iterator[Finding]:
    """What stands in the way of sandboxes for tools: three settings as Linux shows them, None where it has no such."""
    settings = (
        (clone == "0", "kernel.unprivileged_userns_clone is 0", "sysctl kernel.unprivileged_userns_clone=1"),
        (most == "0", "user.max_user_namespaces is 0", "sysctl user.max_user_namespaces=15000"),
        (
            restricted == "1",
            "kernel.apparmor_restrict_unprivileged_userns is 1",
            "an AppArmor profile for bwrap, or sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    )
    for wrong, why, remedy in settings:
        if wrong:
            yield Finding("note", "tools cannot be sandboxed: no user namespaces", why, f"as root: {remedy}")
    if not bwrap:
        yield Finding(
            "note",
            "bwrap is not installed",
            "tools that run code are isolated with it; the model itself does not need it",
            "install bubblewrap",
        )


def _severity(gain: float | None) -> Severity:
    return "slow" if gain is None or gain >= WORTH else "note"


def _gain(compared: Compared) -> tuple[float | None, str]:
    """The largest gain of all row numbers, never below 1, and the figures that it comes from."""
    ratios = {rows: now / could for rows, (now, could) in compared.items() if could > 0 and math.isfinite(now)}
    if not ratios:
        return None, "what that costs was not measured"
    rows = max(ratios, key=lambda n: ratios[n])
    now, could = compared[rows]
    shown = (
        f"a layer of {rows} row{'s' if rows > 1 else ''} takes {human_seconds(now)} instead of {human_seconds(could)}"
    )
    return max(1.0, ratios[rows]), shown
