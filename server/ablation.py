"""One workload under every policy with one idea switched off: what each brings, as a table and a picture.

The picture is matplotlib's, which is optional. Called by the `simulate` command for `--ablate`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.batch import Batch
from placement.cost import StepCost
from server.policy import FIRST_COME
from server.scheduler import SchedulerConfig
from server.simulate import Refused, Report, simulate
from server.simulate_report import percentiles, refusal_lines, to_json
from server.timeline import ANSWERING, READING, drawn
from server.workload import Workload

FEW = 4  # places of the server that knows nothing of offloading
ALONE = "the users alone"
HEADING = (
    f"{'':<33}{'makespan':>11}{'':>7}{'last TTFT':>11}{'prompt tok':>12}{'preempted':>11}"
    f"{'user TTFT p95':>17}{'token p50':>12}{'p95':>12}"
)
WIDE = 85  # what comes before the users' columns


@dataclass(frozen=True, slots=True)
class Variant:
    """What happened under one set of policies."""

    name: str
    report: Report

    @property
    def swarm(self) -> Report:
        """The patient requests; all, where nobody else is there."""
        return self.report.lanes.get("swarm", self.report)

    @property
    def swarm_seconds(self) -> float:
        """Until the last agent of the swarm has answered, whoever talks on."""
        return max(request.finished for request in self.swarm.served)

    @property
    def last_first_token(self) -> float:
        """Seconds from the start to the last agent's first token."""
        return max(request.first_token for request in self.swarm.served)

    @property
    def users(self) -> Report | None:
        """The users' requests that came while the swarm ran."""
        lane = self.report.lanes.get("users")
        during = [request for request in lane.served if request.arrived < self.swarm_seconds] if lane else []
        return replace(self.report, served=tuple(during)) if during else None


@dataclass(frozen=True, slots=True)
class Ablation:
    """Every variant, the plainest last, and the users without the swarm."""

    variants: tuple[Variant, ...]
    alone: Report | None
    refused: tuple[Refused, ...]  # by the first variant


def variants(config: SchedulerConfig) -> dict[str, SchedulerConfig]:
    """All policies, each without one, and none, by name."""
    policy = config.policy
    without = {
        "without the prefill bus": replace(policy, bus=False),
        "without reading a prefix once": replace(policy, prefix_once=False),
        "without the express lane": replace(policy, express=False),
        "without fair groups": replace(policy, fair_groups=False),
        "without longest first": replace(policy, longest_first=False),
        "first come, first served": FIRST_COME,
    }
    found = {"all policies": config} | {name: replace(config, policy=other) for name, other in without.items()}
    few = replace(config, policy=FIRST_COME, max_running=min(FEW, config.max_running))
    return found | {f"first come, {few.max_running} at once": few}


def ablate(
    workload: Workload,
    config: SchedulerConfig,
    cost: Callable[[Batch], StepCost],
    max_model_len: int | None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Ablation:
    """Run the workload under every variant; some seconds each."""

    def run(name: str, work: Workload, changed: SchedulerConfig) -> Report:
        return simulate(work, changed, cost, max_model_len, lambda _, done, total: progress(name, done, total))

    def ran(report: Report) -> bool:  # its swarm was not refused as a whole
        return any(request.patient for request in report.served) or (bool(report.served) and not swarm)

    swarm = any(agent.patient for agent in workload.agents)
    reports = {name: run(name, workload, changed) for name, changed in variants(config).items()}
    users = Workload(tuple(agent for agent in workload.agents if not agent.patient))
    mixed = 0 < len(users.agents) < len(workload.agents)
    return Ablation(
        tuple(Variant(name, report) for name, report in reports.items() if ran(report)),
        run(ALONE, users, config) if mixed else None,
        next(iter(reports.values())).refused,
    )


def text(found: Ablation) -> str:
    """The table, and what was refused. Factors are of the last variant's makespan."""
    if not found.variants:
        return "\n".join(refusal_lines(found.refused))
    lines = [_line(variant, found.variants[-1].swarm_seconds) for variant in found.variants]
    alone = [f"{ALONE:<{WIDE}}{_user(found.alone)}"] if found.alone else []
    return "\n".join([HEADING if alone else HEADING[:WIDE], *lines, *alone, *refusal_lines(found.refused)])


def _line(variant: Variant, worst: float) -> str:
    return (
        f"{variant.name:<33}{variant.swarm_seconds:>9,.0f} s{worst / variant.swarm_seconds:>6.2f}x"
        f"{variant.last_first_token:>9,.0f} s{variant.report.prefilled:>12,}{variant.report.preemptions:>11,}"
        f"{_user(variant.users)}"
    )


def _user(report: Report | None) -> str:
    if report is None:
        return ""
    return f"{percentiles(report.ttft)['p95']:>15,.1f} s" + "".join(
        f"{percentiles(report.tpot).get(p, 0.0):>10,.3f} s" for p in ("p50", "p95")
    )


def to_plain(found: Ablation) -> dict[str, object]:
    """The same as plain values, with each report's figures. Times are seconds."""
    variants = [
        {
            "policies": variant.name,
            "swarm_seconds": variant.swarm_seconds,
            "last_first_token": variant.last_first_token,
            "users": _plain(variant.users),
            "report": to_json(variant.report),
        }
        for variant in found.variants
    ]
    return {"variants": variants, "users_alone": _plain(found.alone)}


def _plain(users: Report | None) -> dict[str, object] | None:
    if users is None:
        return None
    return {"ttft_seconds": percentiles(users.ttft), "tpot_seconds": percentiles(users.tpot)}


def plot(found: Ablation, path: Path) -> None:
    """Bars into an SVG file. Raises TimelineError where matplotlib is missing or the file cannot be written."""
    drawn(lambda figures: _bars(found, figures), path)


def _bars(found: Ablation, figures: Any) -> Any:
    columns = [
        ("makespan of the swarm, s", ANSWERING, [variant.swarm_seconds for variant in found.variants]),
        ("first token of the last agent, s", READING, [variant.last_first_token for variant in found.variants]),
    ]
    if found.alone:
        tokens = [percentiles(variant.users.tpot).get("p95", 0.0) if variant.users else 0 for variant in found.variants]
        alone = percentiles(found.alone.tpot)["p95"]
        columns.append((f"seconds a token for a user, p95 (alone {alone:.3g})", ANSWERING, tokens))
    figure = figures.Figure(figsize=(11.0, 0.8 + 0.4 * len(found.variants)), layout="constrained")
    for axes, (title, colour, values) in zip(figure.subplots(1, len(columns), sharey=True), columns, strict=True):
        bars = axes.barh([variant.name for variant in found.variants], values, color=colour)
        axes.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=8)
        axes.set_title(title, loc="left", fontsize=9)
        axes.margins(x=0.2)
    figure.axes[0].invert_yaxis()
    return figure
