"""Finds the plan: weights, VRAM slots, KV pages, buffers, threads and step sizes for a model, a machine and a goal.

    plan = make_plan(model, facts_from(profile), profile, Goal("swarm", 8192, 100), Wishes(), uniform(model), False)

The same inputs give the same plan; only the number of threads is asked of this machine, where nobody says which
hardware is meant. With `servable` it keeps to what this version's engine does. Not fitting is an answer: DoesNotFit
says what is short and carries the nearest plan that fits.
Called by `hybrid plan`, by the engine process at its start, and by the simulator.
"""

from dataclasses import replace
from pathlib import Path

from hybrid.config import ModelConfig
from offload.topology import find_topology
from placement.arrange import Task
from placement.cost import Setup, stream_from_rows
from placement.facts import Facts
from placement.forecast import Cache, batch_held, batch_run, predict, request_tokens, share_in_ram, swarm_of
from placement.hardware import Hardware, fingerprint
from placement.ledger import HOST_RESERVE, ROUTED, Placement, PlacementError, Wishes, pack_command
from placement.plan import Goal, Line, Plan, Settings, model_fingerprint
from placement.profile import Profile
from placement.reasons import Decision, choices, notes
from placement.routing import Routing
from placement.search import kernel_of, search, task_of

UNUSED = "unused"  # the ledger's last line of each memory: its lines sum up to what is free
# Of a GPU's memory, gone before a process has allocated anything: its driver's part and the process's context, 0.5 to
# 1 GB on today's cards. A server asks what is free after that, so a plan made without a look at the GPU must not count
# on it.
DEVICE_CONTEXT = 2**30
RAM_OF_OTHERS = 0.02  # of a machine that is not this one: the system and its services
SHORTEST_CONTEXT = 256  # tokens; a nearest plan is not sought below
SAME_BANDWIDTH = 0.98  # of the best read rate, that a number of threads must reach to count as good


class DoesNotFit(PlacementError):
    """No plan for what was asked. `nearest` fits with the fewest changes; its first note names them."""

    def __init__(self, why: str, nearest: Plan | None) -> None:
        super().__init__(why)
        self.nearest = nearest


def shipped_profiles() -> dict[str, Path]:
    """The reference boxes' profiles by name: datasheet figures, for machines that nobody has measured."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "profiles").glob("*.yaml"))}


def facts_from(profile: Profile) -> Facts:
    """Facts of a machine that only its profile describes: all its memory is free but what a system takes."""
    hardware = profile.hardware
    ram = hardware.ram
    free = int((1 - RAM_OF_OTHERS) * ram)
    if not hardware.gpus or (profile.device is not None and profile.device.kind == "cpu"):
        return Facts("cpu", "CPU", ram, free, ram, free)
    gpu = hardware.gpus[0]
    return Facts("cuda", gpu.name, gpu.memory, max(0, gpu.memory - DEVICE_CONTEXT), ram, free)


def setup_of(plan: Plan, profile: Profile) -> Setup:
    """What `cost.resolve` needs to price steps under a plan. Raises CostError for figures that the profile lacks.

    The KV that crosses the link is that of the goal's batch, as in the plan's own figure for it.
    """
    settings, goal = plan.settings, plan.goal
    sizes = {line.where: line.size for line in plan.ledger if line.what.startswith(ROUTED) and line.size}
    on_disk, outside = sizes.get("disk", 0), sizes.get("disk", 0) + sizes.get("RAM", 0)
    on_device, in_ram = (n * settings.page_size for n in (settings.pages_on_device, settings.pages_in_ram))
    cache = Cache(on_device, in_ram, settings.max_running)
    return Setup(
        weights=settings.weights,
        kernel=kernel_of(profile, settings.experts, settings.expert_format, settings.expert_precision, settings.isa),
        slots=settings.slots,
        streams=settings.ring > 0,
        kv_in_ram=share_in_ram(goal, cache, batch_run(goal, cache), request_tokens(goal)),
        from_disk=on_disk / outside if outside else 0.0,
        kv=settings.kv_dtype,
    )


def make_plan(
    model: ModelConfig,
    facts: Facts,
    profile: Profile | None,
    goal: Goal,
    wishes: Wishes,
    routing: Routing,
    servable: bool,
    *,
    hardware: Hardware | None = None,
    name: str = "",
) -> Plan:
    """The best plan for the goal. Raises DoesNotFit: one line with what is short, and the nearest plan.

    `hardware` is the machine's where there is no profile; `name` what people call the model. Without a profile, or
    with one that lacks a rate (a note says which), choices follow rules and nothing is predicted.
    """
    try:
        return _plan(model, facts, profile, goal, wishes, routing, servable, hardware, name)
    except PlacementError as error:
        nearest = nearest_plan(model, facts, profile, goal, wishes, routing, servable, hardware=hardware, name=name)
        raise DoesNotFit(str(error), nearest) from None


def _plan(
    model: ModelConfig,
    facts: Facts,
    profile: Profile | None,
    goal: Goal,
    wishes: Wishes,
    routing: Routing,
    servable: bool,
    hardware: Hardware | None,
    name: str,
) -> Plan:
    """Raises PlacementError."""
    goal, told = _within(model, goal, wishes)
    asked, lacking = task_of(model, facts, profile, goal, wishes, routing, servable)
    result = search(asked)
    task, found = result.task, result.arrangement
    machine = profile.hardware if profile else hardware
    decision = Decision(task, found, result.passed, result.narrow, _threads(task, machine), machine)
    prediction = None
    if found.rates is not None:
        prediction = predict(found.rates, goal, found.cache, found.layout.max_batch_tokens)
    settings = _settings(decision)
    return Plan(
        model=name or f"{model.model_type} of {model.num_hidden_layers} layers",
        model_fingerprint=model_fingerprint(model),
        machine=profile.name if profile else machine.cpu if machine else facts.device_name,
        machine_fingerprint=fingerprint(machine) if machine else "",
        profile=profile.source if profile and prediction else "none",
        goal=goal,
        settings=settings,
        ledger=ledger_lines(facts, found.placement),
        choices=choices(decision, settings, prediction),
        prediction=prediction,
        notes=(*told, *lacking, *result.notes, *notes(decision, prediction)),
    )


def nearest_plan(
    model: ModelConfig,
    facts: Facts,
    profile: Profile | None,
    goal: Goal,
    wishes: Wishes,
    routing: Routing,
    servable: bool,
    *,
    hardware: Hardware | None = None,
    name: str = "",
) -> Plan | None:
    """For what does not fit: the plan with the fewest changes, told in its first note; None where nothing helps.

    Tried in turn: experts mapped from the disk, other weights, a shorter context (the longest that fits), and those
    together.
    """

    def attempt(changed_goal: Goal, changed: Wishes, rates: Profile | None) -> Plan | None:
        try:
            machine = rates.hardware if rates else profile.hardware if profile else hardware
            return _plan(model, facts, rates, changed_goal, changed, routing, servable, machine, name)
        except PlacementError:
            return None

    for what, changed in _changes(wishes):
        if (plan := attempt(goal, changed, profile)) is not None:
            return replace(plan, notes=(f"the nearest plan that fits: {what}", *plan.notes))
    for what, changed in [("", wishes), *_changes(wishes)]:
        free = replace(changed, max_model_len=None)
        low, high = 0, goal.context
        while high - low > SHORTEST_CONTEXT:  # fits at `low`, does not at `high`
            middle = (low + high) // 2
            fits = attempt(replace(goal, context=middle), free, None) is not None
            low, high = (middle, high) if fits else (low, middle)
        if low >= SHORTEST_CONTEXT and (plan := attempt(replace(goal, context=low), free, profile)) is not None:
            told = f"a context of {plan.goal.context} tokens instead of {goal.context}" + (f", {what}" if what else "")
            return replace(plan, notes=(f"the nearest plan that fits: {told}", *plan.notes))
    return None


def _changes(wishes: Wishes) -> list[tuple[str, Wishes]]:
    """What an operator may change, nearest first."""
    found: list[tuple[str, Wishes]] = []
    mapped = replace(wishes, packed=True)
    if not wishes.packed:
        found.append((f"experts mapped from the file of `{pack_command(wishes)}`", mapped))
    if wishes.kv_bytes is not None:
        found.append(("no --kv-memory", replace(wishes, kv_bytes=None)))
    if wishes.kv_ram:
        found.append(("no --kv-ram", replace(wishes, kv_ram=None)))
    if wishes.dtype is not None:
        found.append((f"other weights than {wishes.dtype}", replace(wishes, dtype=None)))
        found.append((f"experts mapped and other weights than {wishes.dtype}", replace(mapped, dtype=None)))
    return found


def _within(model: ModelConfig, goal: Goal, wishes: Wishes) -> tuple[Goal, tuple[str, ...]]:
    """The goal with a context that a swarm's agents need and the model allows, and a note where it was cut."""
    limit = min(model.max_position_embeddings, wishes.max_model_len or model.max_position_embeddings)
    context = goal.context
    if goal.kind == "swarm":
        agent = swarm_of(1, limit)
        context = max(context, agent.shared_tokens + agent.private_tokens + agent.answer_tokens)
    if context <= limit:
        longer = f"planned for {context} tokens of context, which the swarm's agents need"
        return replace(goal, context=context), (longer,) if context > goal.context else ()
    return replace(goal, context=limit), (f"planned for {limit} tokens of context, the most there can be",)


def _threads(task: Task, hardware: Hardware | None) -> tuple[int, str]:
    """Worker threads and the reason. As many as read at the best rate: fewer would multiply more slowly."""
    if task.wishes.threads is not None:
        return task.wishes.threads, "as asked"
    memory = task.profile.memory if task.profile else None
    if memory is not None and len(memory.read) > 1:
        best = max(memory.read.values(), key=lambda rate: rate.value)
        least = SAME_BANDWIDTH * (best.low or best.value)  # slower, but within the spread of both, says nothing
        most = max(threads for threads, rate in memory.read.items() if (rate.high or rate.value) >= least)
        return most, f"the most that read RAM as fast as any, {memory.read[most].value / 1e9:.1f} GB/s"
    if hardware is None:
        return len(find_topology().places), "one for each physical core of this machine"
    granted = hardware.cores if hardware.cpu_quota is None else min(hardware.cores, max(1, int(hardware.cpu_quota)))
    return granted, "one for each physical core" + ("" if granted == hardware.cores else ", up to the CPU quota")


def _settings(decision: Decision) -> Settings:
    task, found = decision.task, decision.found
    layout, placement, wishes = found.layout, found.placement, task.wishes
    held = batch_held(task.goal, found.cache.tokens)
    crowded = held < task.goal.concurrency and wishes.max_running is None
    return Settings(
        device=task.facts.device,
        weights=layout.weights,
        expert_format=layout.expert_format,
        expert_precision=wishes.precision,
        experts=wishes.experts,
        isa=wishes.isa,
        threads=decision.threads[0],
        slots=layout.slots,
        experts_leave_ram=layout.experts_leave_ram,
        experts_mapped=layout.mapped,
        embedding_in_ram=layout.embedding_in_ram,
        ring=layout.ring_experts * task.expert,
        stream_from_rows=stream_from_rows(found.rates) if found.streams and found.rates else None,
        page_size=layout.page_size,
        pages_on_device=placement.n_pages,
        pages_in_ram=placement.pages_in_ram,
        max_batch_tokens=layout.max_batch_tokens,
        max_running=min(held, layout.max_running) if crowded else layout.max_running,
        max_model_len=placement.max_model_len,
        pages_kept=placement.pages_kept,
        kv_dtype=layout.kv_dtype,
    )


def ledger_lines(facts: Facts, placement: Placement) -> tuple[Line, ...]:
    """The ledger, with what is left at its end: the lines of a memory sum up to what was free."""
    lines = [Line(entry.where, entry.what, entry.n_bytes) for entry in placement.entries]
    device, ram = placement.n_bytes("device"), placement.n_bytes("RAM")
    if facts.device == "cpu":  # one memory plays both parts
        return *lines, Line("RAM", UNUSED, max(0, facts.ram_free - device - ram))
    reserve = min(HOST_RESERVE, facts.ram_free - ram)
    in_memory = [line for line in lines if line.where != "disk"]
    return (
        *in_memory,
        Line("RAM", "reserve", reserve),
        *lines[len(in_memory) :],
        Line("device", UNUSED, facts.device_free - device),
        Line("RAM", UNUSED, facts.ram_free - ram - reserve),
    )
