"""`hybrid tune`: times real engine steps around a plan on this machine and keeps what is faster.

    tuned = tune(model_dir, plan, profile, 300, save, progress, tell)

Candidates take turns, because a machine is slow for seconds at a time, and each is compared with the plan's own value
round by round: a difference within the noise changes nothing. Every finished comparison is kept in the plan, so that an
interrupted run goes on after it; at the end the plan's predictions stand beside measured figures. Called by the
`hybrid` command.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from hybrid.config import EngineConfig, ModelConfig
from hybrid.engine import Engine
from hybrid.trial_steps import TrialSteps
from offload.backends import Times, try_both
from offload.checkpoint import Checkpoint
from offload.config import PoolConfig
from offload.kt import Published, installed, refusal
from offload.pool import PoolError
from offload.sources import Target
from offload.stream_split import StreamRates
from offload.topology import find_topology
from placement.cost import CostError, Load, resolve, step_cost
from placement.forecast import first_token, human_seconds
from placement.plan import Choice, Plan, Point, Settings, Trial, engine_types
from placement.planner import setup_of
from placement.profile import Profile
from placement.routing import uniform
from placement.stream_rates import stream_rates_of

K = TypeVar("K")
Progress = Callable[[str, int, int], None]  # what is being timed, seconds gone, seconds in all
Tell = Callable[[str], None]
Setting = Literal["experts", "threads", "chunk"]
Call = Callable[[], float]  # runs something and answers its seconds

MARGIN = 0.03  # of the time: what is less than this faster counts as equal
ROUNDS = 5  # of a comparison, at least
SHARE = 0.25  # of the time given, for one comparison
PROMPT = 256  # tokens, where settings are compared
SMALLEST_CHUNK = 64


class TuneError(ValueError):
    """A plan that cannot be tuned here. One line with the remedy."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where one run's news go, and how long it may take; `until` is on the clock of time.monotonic."""

    save: Callable[[Plan], None]
    progress: Progress
    tell: Tell
    seconds: float
    until: float

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def compare(self, what: str, calls: Mapping[K, Call]) -> list[dict[K, float]]:
        """Seconds of every call, round by round, each round from another one on; calls once beforehand, untimed.

        No rounds where that shows that the time left is too short.
        """
        keys, rounds, began = list(calls), list[dict[K, float]](), time.monotonic()
        for call in calls.values():
            call()
        needed = ROUNDS * (time.monotonic() - began)
        if needed > self.left:
            self.tell(
                f"{what}: not timed: that takes {needed:.0f} s, and {max(self.left, 0):.0f} s are left; run again"
            )
            return rounds
        began, spare = time.monotonic(), min(SHARE * self.seconds, self.left)
        while len(rounds) < ROUNDS or time.monotonic() - began < spare:
            self.progress(what, int(self.seconds - self.left), int(self.seconds))
            turn = len(rounds) % len(keys)
            rounds.append({key: calls[key]() for key in keys[turn:] + keys[:turn]})
        return rounds


def tune(
    model_dir: Path,
    plan: Plan,
    profile: Profile,
    budget_seconds: float,
    save: Callable[[Plan], None],
    progress: Progress,
    tell: Tell,
) -> Plan:
    """The plan with what was found; `save` has it after every comparison. Loading comes on top of the time given.

    Raises TuneError for a plan that this engine cannot run, and what `Engine` raises.
    """
    if plan.lacking:
        lacking = ", ".join(plan.lacking)
        raise TuneError(f"the plan needs {lacking}, which this engine does not do; plan with --servable")
    model = ModelConfig.from_directory(model_dir)
    if not _tried(plan, "experts"):
        plan = _try_backends(model_dir, model, plan, save, tell)
    rates = stream_rates_of(model, profile, plan)
    with closing(Engine(_engine_config(model_dir, model, plan.settings, rates), progress, tell)) as engine:
        run = Run(save, progress, tell, budget_seconds, time.monotonic() + budget_seconds)
        steps = TrialSteps(engine)
        if not _tried(plan, "threads") and plan.settings.experts == "numba":
            plan = _try_threads(engine, steps, plan, run)
        if not _tried(plan, "chunk"):
            before = plan.settings.max_batch_tokens
            plan = _try_chunks(steps, plan, run)
            plan = _predicted_again(plan, before, model, profile, run)
        return _measure_points(steps, plan, run)


def text(plan: Plan) -> str:
    """What was tried, and predicted beside measured."""
    lines = ["what was tried, over the time of the plan's own value"]
    for trial in plan.trials:
        what = f"{trial.setting} {trial.value}"
        lines.append(f"  {what:<24}{trial.ratio:>6.2f}×{'  kept' if trial.kept else ''}")
    if plan.prediction is None:
        return "\n".join(lines)
    lines.append(f"{'predicted and measured':<26}{'predicted':>12}{'measured':>12}{'error':>8}")
    points = [("decode, batch", point) for point in plan.prediction.decode]
    points += [("prompt of", point) for point in plan.prediction.prefill]
    for name, point in points:
        shown = ("–", "") if point.measured is None else (human_seconds(point.measured), f"{error(point):+.0%}")
        lines.append(f"  {f'{name} {point.size}':<24}{human_seconds(point.seconds):>12}{shown[0]:>12}{shown[1]:>8}")
    errors = [abs(error(point)) for _, point in points if point.measured]
    if errors:
        lines.append(f"  median error {statistics.median(errors):.0%} of {len(errors)} figures")
    return "\n".join(lines)


def error(point: Point) -> float:
    """Predicted over measured, less one."""
    assert point.measured, "a point that was not measured"
    return point.seconds / point.measured - 1


def best(rounds: list[dict[K, float]], own: K) -> tuple[K, dict[K, float]]:
    """The fastest candidate, and each one's time over that of `own`, the median of the rounds' ratios.

    `own` stays unless another is faster by more than MARGIN, and faster at all in three rounds of four.
    """
    ratios = {key: sorted(turn[key] / turn[own] for turn in rounds) for key in rounds[0]}
    medians = {key: statistics.median(values) for key, values in ratios.items()}
    better = [key for key, values in ratios.items() if medians[key] < 1 - MARGIN and values[3 * len(values) // 4] < 1]
    return min(better, key=lambda key: medians[key], default=own), medians


def thread_candidates(planned: int) -> tuple[int, ...]:
    """The plan's number of workers, one more and one less, every core and half of them: those on the same memory nodes.

    Experts that are loaded lie on the nodes of the plan's workers.
    """
    cores = len(find_topology().places)
    wanted = {planned, planned - 1, planned + 1, cores, cores // 2} - {0}
    nodes = find_topology(planned).nodes
    return tuple(n for n in sorted(wanted) if find_topology(n).nodes == nodes)


def _try_backends(model_dir: Path, model: ModelConfig, plan: Plan, save: Callable[[Plan], None], tell: Tell) -> Plan:
    """Our kernels against kt-kernel on a layer of the model's own experts, where it is installed and can run them."""
    settings = plan.settings
    if not installed() or settings.expert_precision != "a8" or settings.isa is not None:
        return plan
    if any(settings.slots) or settings.ring:  # kt-kernel would run all experts by itself
        return plan
    with closing(Checkpoint(model_dir)) as checkpoint:
        published = Published(
            checkpoint, model.expert_name, model.expert_geometry, model.moe_layers, model.num_experts_per_tok
        )
        reason = refusal(published, _target(model, settings))
        if reason is not None:
            tell(f"kt-kernel was not tried: {reason}")
            return plan
        try:
            numba, kt = try_both(published, PoolConfig(settings.threads), find_topology(settings.threads))
        except PoolError as failure:
            tell(f"kt-kernel was not tried: {failure}")
            return plan
    plan = _with_backend(plan, {"numba": numba, "kt": kt})
    save(plan)
    return plan


def _with_backend(plan: Plan, times: dict[str, Times]) -> Plan:
    """The faster one at the batch that is nearer to the goal's."""
    batches = times["numba"][1]
    batch = min(batches, key=lambda n: abs(n - plan.goal.concurrency))
    own = plan.settings.experts
    seconds = {name: found[batch] for name, (_, found) in times.items()}
    kept, ratios = best([seconds], own)
    trials = tuple(
        Trial("experts", name, found[batch], ratios[name], name == kept) for name, (_, found) in times.items()
    )
    (other,) = (name for name in times if name != own)
    why = f"a layer of {batch} tokens takes {other} {ratios[other]:.2f} times as long as {own}"
    plan = replace(plan, trials=(*plan.trials, *trials))
    return _keep(plan, Choice("expert kernels", kept, f"tuned: {why}"), experts=kept)


def _try_threads(engine: Engine, steps: TrialSteps, plan: Plan, run: Run) -> Plan:
    """By the time that the goal's requests would take, half prompt and half answer."""
    goal, own = plan.goal, plan.settings.threads
    pool = engine.config.pool
    rows, prompt = _rows(plan), min(PROMPT, plan.settings.max_model_len)
    each = goal.context / 2
    _hold(steps, plan, goal.context // 2, rows)

    def call_with(threads: int) -> Call:
        def call() -> float:
            engine.use_pool(replace(pool, threads=threads))
            steps.decode(rows)  # new workers wake up, and find their buffers
            decode = min(steps.decode(rows).seconds for _ in range(2))
            read = sum(out.seconds for out in steps.prompt(prompt, plan.settings.max_batch_tokens))
            return each * decode + rows * each / prompt * read

        return call

    rounds = run.compare("threads", {n: call_with(n) for n in thread_candidates(own)})
    kept, ratios = best(rounds, own) if rounds else (own, {})
    engine.use_pool(replace(pool, threads=kept))
    if not rounds:
        return plan
    plan = _with_trials(plan, "threads", rounds, ratios, kept)
    others = ", ".join(f"{n} take {ratio:.2f} of the time" for n, ratio in ratios.items() if n != own)
    plan = _keep(plan, Choice("threads", str(kept), f"tuned at batch {rows}: {others or 'no other'}"), threads=kept)
    run.save(plan)
    return plan


def _try_chunks(steps: TrialSteps, plan: Plan, run: Run) -> Plan:
    """Halves of the plan's chunk: smaller ones let decoding requests wait less. Larger ones need more memory than the
    ledger has counted."""
    own = plan.settings.max_batch_tokens
    longest = min(plan.goal.context, plan.settings.max_model_len)
    sizes = [own, *(size for size in (own // 2, own // 4) if SMALLEST_CHUNK <= size <= longest)]
    prompt = min(longest, max(PROMPT, own))

    def call_with(size: int) -> Call:
        return lambda: sum(out.seconds for out in steps.prompt(prompt, size))

    rounds = run.compare("step sizes", {size: call_with(size) for size in sizes})
    if not rounds:
        return plan
    _, ratios = best(rounds, own)
    kept = min(size for size in sizes if ratios[size] <= 1 + MARGIN)
    plan = _with_trials(plan, "chunk", rounds, ratios, kept)
    others = ", ".join(f"{size} take {ratio:.2f} of the time" for size, ratio in ratios.items() if size != own)
    choice = Choice("step", f"at most {kept} tokens", f"tuned with a prompt of {prompt}: {others or 'no other'}")
    plan = _keep(plan, choice, max_batch_tokens=kept)
    run.save(plan)
    return plan


def _measure_points(steps: TrialSteps, plan: Plan, run: Run) -> Plan:
    """The plan's predicted figures that fit into the time left, measured in turns."""
    if plan.prediction is None:
        return plan
    waiting: list[tuple[str, Point]] = [("decode", point) for point in plan.prediction.decode]
    waiting += [("prefill", point) for point in plan.prediction.prefill]
    chosen, spent = [], 0.0
    for phase, point in sorted(waiting, key=lambda each: each[1].seconds):
        if point.measured is not None:
            continue
        spent += (ROUNDS + 1) * point.seconds
        if spent > run.left:
            run.tell(f"{phase} {point.size} was not measured: no time left; running again goes on there")
            continue
        chosen.append((phase, point.size))
    calls = {key: _point_call(steps, plan, *key) for key in chosen}
    rounds = run.compare("predicted figures", calls) if calls else []
    if not rounds:
        return plan
    found = {key: statistics.median(turn[key] for turn in rounds) for key in calls}
    prediction = replace(
        plan.prediction,
        decode=tuple(_with_measured(point, found.get(("decode", point.size))) for point in plan.prediction.decode),
        prefill=tuple(_with_measured(point, found.get(("prefill", point.size))) for point in plan.prediction.prefill),
    )
    plan = replace(plan, prediction=prediction)
    run.save(plan)
    return plan


def _point_call(steps: TrialSteps, plan: Plan, phase: str, size: int) -> Call:
    """One measurement of a predicted figure: a step at the goal's context, or a prompt until its first token."""
    if phase == "prefill":
        return lambda: sum(out.seconds for out in steps.prompt(size, plan.settings.max_batch_tokens))

    def call() -> float:
        _hold(steps, plan, plan.goal.context - 1, size)
        return steps.decode(size).seconds

    return call


def _with_measured(point: Point, seconds: float | None) -> Point:
    return point if seconds is None else replace(point, measured=seconds)


def _predicted_again(plan: Plan, before: int, model: ModelConfig, profile: Profile, run: Run) -> Plan:
    """Prompts under the chunk that was kept, `before` being the plan's own. The other figures do not depend on it.

    The plan may have been made from a record of routing, which is not here. So its figures are kept, and changed by
    what the chunk changes where all experts are chosen alike.
    """
    chunk, prediction = plan.settings.max_batch_tokens, plan.prediction
    if prediction is None or chunk == before:
        return plan
    try:
        rates = resolve(model, profile, setup_of(plan, profile), uniform(model))
    except CostError as error:
        line = f"prompts were predicted for steps of {before} tokens, and not again for {chunk}: {error}"
        run.tell(line)
        plan = replace(plan, notes=(*plan.notes, line))
    else:
        points = []
        for point in prediction.prefill:
            ratio = first_token(rates, point.size, chunk) / first_token(rates, point.size, before)
            binding = step_cost(rates, Load.prompt(min(point.size, chunk))).binding
            speed = point.tokens_per_second / ratio
            points.append(Point(point.size, point.seconds * ratio, speed, binding))
        plan = replace(plan, prediction=replace(prediction, prefill=tuple(points)))
    run.save(plan)
    return plan


def _hold(steps: TrialSteps, plan: Plan, context: int, rows: int) -> None:
    """Let decoding attend to so much, with as many contexts of their own as the pages hold. What they hold does not
    matter for the time."""
    settings = plan.settings
    each = max(1, context // settings.page_size)
    steps.fill(context, max(1, min(rows, (settings.pages_on_device - rows) // each)), None)


def _rows(plan: Plan) -> int:
    """The decode batch that the goal is about."""
    return min(plan.goal.concurrency, plan.settings.max_running)


def _tried(plan: Plan, setting: str) -> bool:
    return any(trial.setting == setting for trial in plan.trials)


def _with_trials(
    plan: Plan, setting: Setting, rounds: list[dict[int, float]], ratios: dict[int, float], kept: int
) -> Plan:
    trials = tuple(
        Trial(setting, str(key), statistics.median(turn[key] for turn in rounds), ratio, key == kept)
        for key, ratio in ratios.items()
    )
    return replace(plan, trials=(*plan.trials, *trials))


def _keep(plan: Plan, choice: Choice, **settings: object) -> Plan:
    """With these settings; the choice takes the place of the plan's own of that name."""
    others = tuple(each for each in plan.choices if each.what != choice.what)
    return replace(plan, settings=replace(plan.settings, **settings), choices=(*others, choice))  # type: ignore[arg-type]


def _engine_config(model_dir: Path, model: ModelConfig, settings: Settings, rates: StreamRates | None) -> EngineConfig:
    dtype, narrow = engine_types(settings.weights)
    pool = PoolConfig(settings.threads, settings.expert_precision, settings.isa)
    return EngineConfig(
        model_dir, settings.device, dtype, _target(model, settings), pool, settings.pages_on_device,
        settings.page_size, experts=settings.experts, narrow=narrow, kv_dtype=settings.kv_dtype,
        embedding_in_ram=settings.embedding_in_ram, vram_slots=settings.slots, ring_bytes=settings.ring,
        stream_rates=rates,
    )  # fmt: skip


def _target(model: ModelConfig, settings: Settings) -> Target:
    """What loading makes of the experts. Raises TuneError."""
    if settings.expert_format == model.expert_format:
        return "native"
    if settings.expert_format in ("int8", "int4"):
        return settings.expert_format
    raise TuneError(f"settings.expert_format: {settings.expert_format} experts cannot be made of {model.expert_format}")
