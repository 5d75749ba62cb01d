"""From what was asked to the arrangement that a plan is made of: which rates can be used, and which weights.

As published while that fits and leaves room to work in, all experts in memory while that is possible. Knows no text
of a plan. Called by the planner.
"""

from dataclasses import dataclass, replace

from hybrid.config import ModelConfig
from hybrid.widths import best_narrow
from offload.config import ExpertFormat, Isa, Precision
from placement.arrange import Arrangement, Task, arrange, exact
from placement.cost import CostError, default_kernel
from placement.facts import Facts
from placement.forecast import human_seconds
from placement.ledger import Layout, PlacementError, Wishes, layout_of, place, weight_choices
from placement.plan import Goal, WeightDtype
from placement.profile import Profile
from placement.routing import Routing

NARROW_GAIN = 1.5  # that narrow weights must bring, to be taken where bfloat16 fits: they change the answers a little


def task_of(
    model: ModelConfig,
    facts: Facts,
    profile: Profile | None,
    goal: Goal,
    wishes: Wishes,
    routing: Routing,
    servable: bool,
) -> tuple[Task, tuple[str, ...]]:
    """The task, with rates only where the profile has those that this model needs on this device."""
    bare = Task(model, facts, goal, wishes, routing, None, None, servable)
    if profile is None or (profile.device is None and not profile.kernels):
        return bare, ("no profile of this machine: run `hybrid measure` for predictions and choices by them",)
    if profile.device is not None and profile.device.kind != facts.device:
        return bare, (f"no prediction: profile {profile.name} has rates of {profile.device.kind}, not {facts.device}",)
    layout = layout_of(model, facts, wishes)
    try:
        kernel = kernel_of(profile, wishes.experts, layout.expert_format, wishes.precision, wishes.isa)
        task = replace(bare, profile=profile, kernel=kernel)
        task.rates(task.setup(layout, False, from_disk=0.0))
    except CostError as error:
        return bare, (f"no prediction: {error}",)
    return task, ()


def kernel_of(profile: Profile, backend: str, fmt: ExpertFormat, precision: Precision, isa: Isa | None) -> str:
    """Name of the figures in the profile. Raises CostError."""
    if backend == "numba":
        return default_kernel(profile, fmt, precision, isa)
    for kernel in profile.kernels:
        parts = kernel.name.split("/")
        if (parts[0], parts[2]) == (backend, fmt):
            return kernel.name
    raise CostError(f"profile {profile.name} has no figures of kt-kernel for {fmt}; run `hybrid measure` there")


@dataclass(frozen=True, slots=True)
class Found:
    """What a search settled."""

    task: Task  # with the rates that could be used
    arrangement: Arrangement
    passed: tuple[tuple[WeightDtype, str], ...] = ()  # weights that were not taken, and why
    narrow: Arrangement | None = None  # with narrow weights instead of bfloat16
    notes: tuple[str, ...] = ()


def search(task: Task) -> Found:
    """Raises PlacementError: why even the smallest weights do not fit."""
    plain = layout_of(task.model, task.facts, task.wishes)
    if task.servable:
        return _servable(task, plain)
    plain = replace(plain, embedding_in_ram=task.facts.device == "cuda" and not task.model.tie_word_embeddings)
    passed: tuple[tuple[WeightDtype, str], ...] = ()
    for mapped in (True,) if task.wishes.packed else (False, True):
        for weights in _weights(task):
            layout = replace(plain, weights=weights, mapped=mapped)
            try:
                found = _attempt(task, layout)
            except PlacementError as error:
                passed = (*passed, (weights, str(error)))
                continue
            narrow, why = _narrower(found, layout)
            if narrow is not None and why:
                return replace(found, arrangement=narrow, passed=(*passed, (weights, why)))
            return replace(found, passed=passed, narrow=narrow)
    weights, why = passed[-1]  # of the smallest weights, with mapped experts: what stands in the way even then
    raise PlacementError(f"{why}, with weights in {weights}")


def _servable(task: Task, plain: Layout) -> Found:
    """What this version's engine does, with the first weights that fit. Raises PlacementError."""
    place(task.model, task.facts, task.wishes)  # says what is lacking, and the remedy
    passed: tuple[tuple[WeightDtype, str], ...] = ()
    for weights in weight_choices(task.model, task.facts, task.wishes):
        try:
            return replace(_attempt(task, replace(plain, weights=weights)), passed=passed)
        except PlacementError as error:
            passed = (*passed, (weights, str(error)))
    raise PlacementError(passed[-1][1])


def _attempt(task: Task, layout: Layout) -> Found:
    """The best arrangement of one layout, by rules where the profile did not time what it needs."""
    try:
        return Found(task, exact(task, arrange(task, layout)))
    except CostError as error:
        bare = replace(task, profile=None, kernel=None)
        return Found(bare, arrange(bare, layout), notes=(f"no prediction: {error}",))


def _weights(task: Task) -> tuple[WeightDtype, ...]:
    """Weights to try, the best first."""
    if task.wishes.dtype is not None:
        return (task.wishes.dtype,)
    return ("bfloat16", best_narrow(task.model)) if task.facts.device == "cuda" else ("float32", "bfloat16")


def _narrower(found: Found, layout: Layout) -> tuple[Arrangement | None, str]:
    """The arrangement with narrow weights instead of bfloat16, and why it is to be taken: "" where it is not."""
    task, now = found.task, found.arrangement
    if layout.weights != "bfloat16" or task.wishes.dtype is not None or task.facts.device != "cuda":
        return None, ""
    try:
        then = exact(task, arrange(task, replace(layout, weights=best_narrow(task.model))))
    except (PlacementError, CostError):
        return None, ""
    if now.rates is None:
        return then, ""
    slow, fast = (one.chunks[one.layout.max_batch_tokens] for one in (now, then))
    if slow > NARROW_GAIN * fast:
        return then, f"leaves so little that prompts take {human_seconds(slow)} instead of {human_seconds(fast)}"
    if now.score > NARROW_GAIN * then.score:
        return then, f"leaves so little that the goal takes {now.score / then.score:.1f} times as long"
    return then, ""
