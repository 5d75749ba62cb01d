"""A plan as text for people: the ledger and what it will bring, the reasons, two plans side by side.

Decides nothing and prints nothing. Called by the commands and by the engine process at its start.
"""

from collections.abc import Iterable, Iterator

from placement.forecast import human_seconds
from placement.ledger import human
from placement.plan import Plan, Point
from placement.planner import UNUSED

WIDTH = 34  # of a column in a comparison


def table(plan: Plan) -> str:
    """Model, machine and goal, the ledger of bytes, predictions, notes."""
    goal = plan.goal
    what = f"{goal.kind}, {goal.concurrency} at once, {goal.context} tokens of context"
    head = [f"plan for {plan.model} on {plan.machine}: {what}"]
    lacking = [f"this version's engine does not do: {', '.join(plan.lacking)}"] if plan.lacking else []
    notes = [f"  note: {note}" for note in (*plan.notes, *lacking)]
    return "\n".join([*head, ledger(plan), *_prediction(plan), *notes])


def ledger(plan: Plan) -> str:
    """Where the bytes go, every line and the sums against what was free."""
    shown = [line for line in plan.ledger if line.what != UNUSED]
    lines = [f"  {line.where:<7}{line.what:<52}{human(line.size):>11}" for line in shown]
    return "\n".join(["where the bytes go", *lines, *_sums(plan)])


def _sums(plan: Plan) -> Iterator[str]:
    used = {"device": 0, "RAM": 0, "disk": 0}
    left = dict(used)
    for line in plan.ledger:
        sums = left if line.what == UNUSED else used
        sums[line.where] += line.size
    if plan.settings.device == "cpu":  # one memory plays both parts
        both = used["device"] + used["RAM"]
        yield _sum_line("device + RAM: memory", both, both + left["RAM"])
    else:
        yield _sum_line("device", used["device"], used["device"] + left["device"])
        yield _sum_line("RAM", used["RAM"], used["RAM"] + left["RAM"])


def _prediction(plan: Plan) -> Iterator[str]:
    found = plan.prediction
    if found is None:
        return
    yield f"what it will bring (predicted from {plan.profile} rates)"
    for point in found.decode:
        speed = f"{_number(point.tokens_per_second)} tok/s, {human_seconds(point.seconds)} a step"
        yield f"  decode, batch {point.size:<12}{speed:<40}  {point.binding}{_measured(point)}"
    for point in found.prefill:
        speed = f"{human_seconds(point.seconds)} to the first token, {_number(point.tokens_per_second)} tok/s"
        yield f"  prompt of {point.size:<17}{speed:<40}  {point.binding}{_measured(point)}"
    swarm = found.swarm
    if swarm is not None:
        yield (
            f"  swarm of {swarm.agents}: {human_seconds(swarm.seconds)} for {swarm.shared_tokens} shared + "
            f"{swarm.private_tokens} own tokens of prompt and {swarm.answer_tokens} of answer each"
        )


def explain(plan: Plan) -> str:
    """Every choice, its value and its reason, a line each."""
    width = max((len(choice.what) for choice in plan.choices), default=0)
    lines = [f"  {choice.what:<{width}}  {choice.value}: {choice.reason}" for choice in plan.choices]
    return "\n".join(["why", *lines])


def compare(a: Plan, b: Plan) -> str:
    """What differs between two plans: choices, sums and predictions, `a` left and `b` right."""
    rows = [("", f"{a.model} on {a.machine}", f"{b.model} on {b.machine}")]
    rows += [row for row in _rows(_values(a), _values(b)) if row[1] != row[2]]
    rows += list(_rows(_figures(a), _figures(b), ratio=True))
    first = max(len(row[0]) for row in rows)
    second = max(WIDTH, *(len(row[1]) for row in rows))
    return "\n".join(f"  {what:<{first}}  {left:<{second}}  {right}".rstrip() for what, left, right in rows)


def _values(plan: Plan) -> dict[str, str]:
    goal = f"{plan.goal.kind}, {plan.goal.concurrency} at once, {plan.goal.context} tokens"
    return {"goal": goal, **{choice.what: choice.value for choice in plan.choices}}


def _figures(plan: Plan) -> dict[str, float]:
    """Predicted figures by name; larger is better but for seconds."""
    found = plan.prediction
    if found is None:
        return {}
    figures = {f"decode tok/s, batch {point.size}": point.tokens_per_second for point in found.decode}
    figures |= {f"seconds to the first token, {point.size}": point.seconds for point in found.prefill}
    return figures | ({f"seconds of a swarm of {found.swarm.agents}": found.swarm.seconds} if found.swarm else {})


def _rows(
    a: dict[str, str] | dict[str, float], b: dict[str, str] | dict[str, float], ratio: bool = False
) -> Iterable[tuple[str, str, str]]:
    """Rows of all names of both, in the first one's order."""
    for what in dict.fromkeys((*a, *b)):
        left, right = a.get(what), b.get(what)
        shown = [
            "–" if value is None else value if isinstance(value, str) else _number(value) for value in (left, right)
        ]
        if ratio and isinstance(left, float) and isinstance(right, float) and left:
            shown[1] += f" ({right / left:.2f}×)"
        yield what, shown[0], shown[1]


def _measured(point: Point) -> str:
    if point.measured is None:
        return ""
    return f"; measured {human_seconds(point.measured)} ({point.seconds / point.measured - 1:+.0%} predicted)"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _sum_line(what: str, used: int, free: int) -> str:
    """A sum of the ledger against what is free."""
    return f"  = {what:<57}{human(used):>11} of {human(free)} free"
