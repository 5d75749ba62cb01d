"""What `hybrid doctor` answers: what ran at what share of its ceiling, and what was found. As text and as JSON.

Knows no way to find it out; `doctor.py` does. The command shows it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from offload.config import Isa
from placement import checks
from placement.checks import Finding
from placement.document import to_plain
from placement.forecast import human_seconds
from placement.hardware import Hardware
from placement.ledger import human
from placement.probe import machine_name

EXPLAINED = 0.5  # of the time: below that no ceiling is what binds
WAITING = "hand-offs and waiting"
TINY = "tiny random model"


@dataclass(frozen=True, slots=True)
class Phase:
    """Something that ran for real. `ceilings`: the seconds that each resource alone would take for it."""

    name: str
    seconds: float
    ceilings: Mapping[str, float]

    @property
    def roofline(self) -> float:
        """Seconds; no faster than the resource that is needed longest."""
        return max(self.ceilings.values())

    @property
    def share(self) -> float:
        """Of the roofline's speed that was reached."""
        return self.roofline / self.seconds

    @property
    def binding(self) -> str:
        """The resource that takes most of the time."""
        if self.share < EXPLAINED:
            return WAITING
        return max(self.ceilings, key=lambda name: self.ceilings[name])


@dataclass(frozen=True, slots=True)
class Report:
    """What was found: the worst first, then in order of gain."""

    machine: Hardware
    workers: int
    isa: Isa
    read: float | None  # bytes of RAM per second, all cores; None where it was not measured
    phases: tuple[Phase, ...]
    findings: tuple[Finding, ...]

    @property
    def status(self) -> int:
        """Exit status: 4 something is broken, 3 something is slow, 0 neither."""
        return checks.exit_status(self.findings)


def text(report: Report) -> str:
    """For people."""
    machine = report.machine
    of_ram = "" if machine.ram >= machine.ram_installed else f", {human(machine.ram)} of RAM allowed"
    node_count = f"{len(machine.nodes)} memory node{'s' if len(machine.nodes) > 1 else ''}"
    read = "" if report.read is None else f", reads RAM at {report.read / 1e9:.1f} GB/s"
    lines = [
        f"{machine_name(machine)}{of_ram}",
        f"{report.workers} worker{'s' if report.workers > 1 else ''}, {report.isa} of {', '.join(machine.tiers)}, "
        f"{node_count}, huge pages {machine.huge_pages}{read}",
    ]
    if report.phases:
        lines += ["", f"{'phase':<48}{'takes':>10}{'roofline':>11}{'share':>8}  bound by"]
        lines += [
            f"{phase.name:<48}{human_seconds(phase.seconds):>10}{human_seconds(phase.roofline):>11}{phase.share:>8.0%}"
            f"  {phase.binding}"
            for phase in report.phases
        ]
    if any(TINY in phase.name for phase in report.phases):
        lines.append(f"(a {TINY} shows that steps run; for shares that mean something give --model)")
    lines += ["", *(line for finding in report.findings for line in _show(finding))]
    if report.status == 0:
        lines.append("nothing is broken, and nothing is slow that a setting could change")
    return "\n".join(lines)


def to_json(report: Report) -> str:
    """For programs: one document."""
    phases = [
        {
            "name": phase.name, "seconds": phase.seconds, "roofline": phase.roofline, "share": phase.share,
            "binding": phase.binding, "ceilings": dict(phase.ceilings),
        }
        for phase in report.phases
    ]  # fmt: skip
    return json.dumps(
        {
            "document": "doctor",
            "status": report.status,
            "machine": to_plain(report.machine),
            "workers": report.workers,
            "isa": report.isa,
            "read_bytes_per_second": report.read,
            "phases": phases,
            "findings": [asdict(finding) for finding in report.findings],
        }
    )


def _show(finding: Finding) -> Iterator[str]:
    gain = "" if finding.gain is None else f" ({finding.gain:.3g} times as fast without)"
    yield f"{finding.severity:<8}{finding.what}{gain}"
    yield f"        why: {finding.why}"
    yield f"        do:  {finding.remedy}"
