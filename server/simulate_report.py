"""A simulation's report as text and as JSON. Called by the `simulate` command and by `ablation.py`."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict

from placement.ledger import human
from server.simulate import Refused, Report

PERCENTILES = (50, 90, 95, 99)
SHOWN_REFUSALS = 3  # of many, by `text`


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95 and p99, between two values by straight line; nothing of nothing."""
    if not values:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return {f"p{p}": cuts[p - 1] for p in PERCENTILES}


def to_json(report: Report) -> dict[str, object]:
    """The figures of `text` and each refusal, as plain values. Times are seconds."""
    rate = 1 / report.makespan if report.makespan else 0.0
    return {
        "agents": report.agents,
        "requests_served": len(report.served),
        "requests_refused": [asdict(refused) for refused in report.refused],
        "makespan_seconds": report.makespan,
        "busy_seconds": report.busy,
        "ttft_seconds": percentiles(report.ttft),
        "tpot_seconds": percentiles(report.tpot),
        "queue_seconds": percentiles(report.queued),
        "lanes": {
            name: {"ttft_seconds": percentiles(lane.ttft), "tpot_seconds": percentiles(lane.tpot)}
            for name, lane in report.lanes.items()
        },
        "generated_tokens": report.generated,
        "generated_tokens_per_second": report.generated * rate,
        "prefilled_tokens": report.prefilled,
        "prefilled_tokens_per_second": report.prefilled * rate,
        "cached_prompt_tokens": report.cached,
        "steps": len(report.steps),
        "preemptions": report.preemptions,
        "moved_bytes": report.moved,
        "utilisation": report.utilisation,
        "bound_by_seconds": report.binding,
    }


def text(report: Report) -> str:
    """The report for people."""
    span = report.makespan
    rate = 1 / span if span else 0.0
    lines = [
        f"{report.agents} agents, {len(report.served)} requests answered in {span:,.1f} s",
        *_percentile_lines(report),
        *(line for name, lane in report.lanes.items() for line in (f"  of the {name}", *_percentile_lines(lane))),
        f"  generated   {report.generated:,} tokens, {report.generated * rate:.1f} tok/s",
        f"  prefilled   {report.prefilled:,} tokens, {report.prefilled * rate:.1f} tok/s; "
        f"{report.cached:,} more came from shared pages",
        f"  steps       {len(report.steps):,}, busy {_share(report.busy * rate)} of the time; "
        f"{report.preemptions:,} preemptions",
        f"  moved       {_listed(report.moved, human)}",
        f"  at work     {_shares(report.utilisation)} of the time",
        f"  bound by    {_shares({name: s * rate for name, s in report.binding.items()})} of the time",
        *refusal_lines(report.refused),
    ]
    return "\n".join(lines)


def _percentile_lines(report: Report) -> list[str]:
    rows = (
        ("TTFT", report.ttft, "from arrival to the first token"),
        ("TPOT", report.tpot, "between two tokens of an answer"),
        ("queue", report.queued, "from arrival to the first step"),
    )
    return [
        f"  {name:<12}" + "  ".join(f"{p} {_duration(s):>9}" for p, s in percentiles(values).items()) + f"  {what}"
        for name, values, what in rows
        if values
    ]


def refusal_lines(refused: Sequence[Refused]) -> list[str]:
    """What was refused and why; nothing of nothing."""
    if not refused:
        return []
    lost = sum(one.turns_lost for one in refused)
    shown = [f"    agent {one.agent}, turn {one.turn}: {one.reason}" for one in refused[:SHOWN_REFUSALS]]
    more = [f"    and {len(refused) - SHOWN_REFUSALS} more"] if len(refused) > SHOWN_REFUSALS else []
    return [
        f"  refused     {len(refused):,} requests, and with them {lost:,} turns are not in these figures",
        *shown,
        *more,
    ]


def _listed(values: dict[str, float], shown: Callable[[float], str]) -> str:
    """Largest first, without those that are nothing."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {shown(value)}" for name, value in ordered if value > 0) or "nothing"


def _shares(values: dict[str, float]) -> str:
    """Those that round to a percent or more."""
    return _listed({name: value for name, value in values.items() if value >= 0.005}, _share)


def _share(share: float) -> str:
    return f"{share:.0%}"


def _duration(seconds: float) -> str:
    """Three digits or more."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.1f} s"
