"""Why a plan is as it is: every choice in one line with its number, the constraint that binds, and the notes.

Knows how choices were made and changes none. Called by the planner.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hybrid.widths import best_narrow
from placement.arrange import Arrangement, Task
from placement.cost import Load, step_cost
from placement.expert_cost import expert_cost
from placement.forecast import batch_run, cached_tokens, decode_step, human_seconds, request_tokens
from placement.hardware import Hardware
from placement.ledger import HOST_RESERVE, MAX_RUNNING, human, pack_command, page_bytes
from placement.plan import Choice, Prediction, Settings, WeightDtype, engine_types
from placement.tensor_bytes import ITEM_BYTES, weight_bytes


@dataclass(frozen=True, slots=True)
class Decision:
    """What was settled, and what was passed by on the way."""

    task: Task
    found: Arrangement
    passed: tuple[tuple[WeightDtype, str], ...]  # weights that did not fit, and why
    narrow: Arrangement | None  # with narrow weights, where it was not taken
    threads: tuple[int, str]
    hardware: Hardware | None

    @property
    def batch(self) -> int:
        """Requests of the goal that run at once."""
        return batch_run(self.task.goal, self.found.cache)

    def speed(self, **setup: object) -> float | None:
        """Tokens per second of the goal's batch, perhaps with another setup; None without rates."""
        if self.found.rates is None:
            return None
        rates = self.task.rates(replace(self.found.rates.setup, **setup))  # type: ignore[arg-type]
        assert rates is not None, "a task with rates has them for every setup"
        return self.batch / decode_step(rates, self.task.goal, self.found.cache, self.batch).seconds


def choices(decision: Decision, settings: Settings, prediction: Prediction | None) -> tuple[Choice, ...]:
    """Every choice with its reason, and last what binds."""
    return (
        _weights(decision),
        _experts(decision, settings),
        *_vram_experts(decision),
        _pages(decision, settings),
        *_embedding(decision),
        *_streaming(decision, settings),
        _chunk(decision, settings),
        _requests(decision, settings),
        Choice("threads", str(settings.threads), decision.threads[1]),
        *_nodes(decision),
        *_bound(decision, prediction),
    )


def notes(decision: Decision, prediction: Prediction | None) -> Iterator[str]:
    """What the operator should read."""
    task, found = decision.task, decision.found
    told = found.placement.notes
    if found.placement.from_disk and found.rates is not None:
        yield from _disk_note(decision)  # instead of the ledger's, which knows no speeds
        told = told[1:]
    yield from told
    if found.crowd is not None:
        yield f"{decision.batch} requests run at once, not {task.goal.concurrency}: the others wait, and all end sooner"
    elif decision.batch < task.goal.concurrency and task.wishes.max_running is None:
        yield (
            f"the pages hold {decision.batch} requests of {request_tokens(task.goal)} tokens at once, not "
            f"{task.goal.concurrency}: the others wait"
        )
    if prediction is not None and task.routing.uniform:
        yield "predicted as if every expert were equally likely, the worst case; record real routing to know better"
    if prediction is not None and task.profile is not None and task.profile.source == "datasheet":
        yield f"profile {task.profile.name} holds datasheet figures; `hybrid measure` on the machine replaces them"


def _disk_note(decision: Decision) -> Iterator[str]:
    found = decision.found
    missing = sum(entry.n_bytes for entry in found.placement.entries if entry.where == "disk")
    share = found.placement.from_disk
    text = f"RAM lacks {human(missing)}: {share:.0%} of the experts outside VRAM come from the disk in every step"
    here, all_in_ram = decision.speed(), decision.speed(from_disk=0.0)
    if here and all_in_ram:
        text += f"; {here:.3g} tok/s at batch {decision.batch}, {all_in_ram:.3g} with that much more RAM"
    yield text


def _weights(decision: Decision) -> Choice:
    task, dtype = decision.task, decision.found.layout.weights
    size = sum(_weight_sizes(decision, dtype).values())
    value = f"{dtype}, {human(size)}"
    if task.wishes.dtype is not None:
        return Choice("weights", value, "as asked")
    if decision.passed and decision.passed[0][0] != dtype:  # not those that were tried first
        other, why = [(other, why) for other, why in decision.passed if other != dtype][-1]
        return Choice("weights", value, f"{other}: {why}")
    if task.facts.device == "cpu":
        reason = "on the CPU, where products in float32 are the fast ones"
        return Choice("weights", value, reason if dtype == "float32" else "half the bytes of float32")
    other = best_narrow(task.model)
    saved = size - sum(_weight_sizes(decision, other).values())
    reason = f"as published; {other} would take {human(saved)} less"
    now, narrow, goal = decision.speed(), decision.narrow, task.goal
    if now and narrow is not None and narrow.rates is not None:
        batch = batch_run(goal, narrow.cache)
        then = batch / decode_step(narrow.rates, goal, narrow.cache, batch).seconds
        reason += f" and decode at batch {batch} with {then:.1f} tok/s instead of {now:.1f}"
        reason += f" at batch {decision.batch}" if batch != decision.batch else ""
    return Choice("weights", value, reason)


def _weight_sizes(decision: Decision, dtype: WeightDtype) -> Mapping[str, int]:
    return weight_bytes(decision.task.model, ITEM_BYTES[dtype], engine_types(dtype)[1])


def _experts(decision: Decision, settings: Settings) -> Choice:
    """Where the routed experts lie that are not in VRAM."""
    task = decision.task
    total = len(task.model.moe_layers) * task.model.n_routed_experts * task.expert
    free = max(0, task.facts.ram_free - HOST_RESERVE)
    kept = f"{settings.expert_format}, {human(total)} in all"
    if settings.experts_mapped:
        why = "a packed file lies beside the shards"
        if not task.wishes.packed:
            why = f"RAM has room for {human(free)}: run `{pack_command(task.wishes)}` first"
        return Choice("routed experts", f"{kept}, from the packed file", why)
    if settings.experts_leave_ram:
        gone = human(sum(settings.slots) * task.expert)
        why = f"RAM has room for {human(free)}; the {gone} in VRAM need no copy there"
        return Choice("routed experts", f"{kept}, RAM and VRAM add up", why)
    copies = " (with copies of those in VRAM)" if sum(settings.slots) else ""
    return Choice("routed experts", f"{kept}, in RAM{copies}", f"RAM has room for {human(free)}")


def _vram_experts(decision: Decision) -> Iterator[Choice]:
    task, found = decision.task, decision.found
    if not task.may_have_slots:
        return
    slots = found.layout.slots
    if not slots:
        why = "the KV takes what is left" if found.rates else "nothing is left beside weights and KV"
        yield Choice("experts in VRAM", "none", why)
        return
    low, high = min(slots), max(slots)
    value = f"{sum(slots)}, {low if low == high else f'{low} to {high}'} of {task.model.n_routed_experts} a layer"
    reason = "what KV for the goal leaves"
    now, without = decision.speed(), decision.speed(slots=())
    if now and without:
        gain = f"batch {decision.batch} decodes {now / without - 1:.1%} faster with them, {now:.1f} tok/s"
        reason = f"dealt to the layers by seconds saved: {gain}"
    yield Choice("experts in VRAM", value, reason)


def _pages(decision: Decision, settings: Settings) -> Choice:
    task, cache = decision.task, decision.found.cache
    page = page_bytes(task.model, decision.found.layout)
    value = f"{settings.pages_on_device} pages on the device, {human(settings.pages_on_device * page)}"
    if settings.pages_in_ram:
        value += f", and {settings.pages_in_ram} in RAM"
    needed = cached_tokens(task.goal, task.goal.concurrency)
    kept = f"; RAM keeps {settings.pages_kept}, {human(settings.pages_kept * page)}, for requests that wait"
    if not settings.pages_kept:
        kept = ""
    if task.wishes.kv_bytes is not None:
        return Choice("KV pages", value, f"as asked{kept}")
    reason = f"{cache.tokens} tokens; the goal needs {needed}"
    if settings.pages_in_ram:
        reason += f", and the link brings those in RAM layer by layer ({human(settings.pages_in_ram * page)} a step)"
    return Choice("KV pages", value, reason + kept)


def _embedding(decision: Decision) -> Iterator[Choice]:
    if decision.found.layout.embedding_in_ram:
        size = human(_weight_sizes(decision, decision.found.layout.weights)["embedding"])
        yield Choice("embedding", "in RAM", f"a token reads one row of it; {size} of VRAM are free for other things")


def _streaming(decision: Decision, settings: Settings) -> Iterator[Choice]:
    found = decision.found
    if found.streams and settings.stream_from_rows is not None:
        yield Choice(
            "prefill",
            f"experts stream through a ring of {found.layout.ring_experts}, {human(settings.ring)}",
            f"an expert with more than {settings.stream_from_rows:.0f} tokens is copied sooner than computed on the "
            "CPU; the split is settled by layer so that link and CPU end together",
        )


def _chunk(decision: Decision, settings: Settings) -> Choice:
    seconds, chunk = decision.found.chunks, settings.max_batch_tokens
    value = f"at most {chunk} tokens"
    if decision.task.wishes.max_batch_tokens is not None:
        return Choice("step", value, "as asked")
    if chunk not in seconds:
        return Choice("step", value, "the default; there are no rates to choose by")
    best = min(seconds, key=lambda size: seconds[size])
    reason = f"reads the goal's prompts in {human_seconds(seconds[chunk])} before any VRAM slots"
    rates = decision.found.rates
    if rates is not None and decision.task.goal.concurrency > 1:
        full = human_seconds(step_cost(rates, Load.prompt(chunk)).seconds)
        reason += f" (those that decode wait {full} for a full one)"
    if best != chunk:
        return Choice("step", value, f"{reason}; {best} tokens would in {human_seconds(seconds[best])}")
    return Choice("step", value, f"{reason}, the best of {min(seconds)} to {max(seconds)} tokens")


def _requests(decision: Decision, settings: Settings) -> Choice:
    goal = decision.task.goal
    tokens = request_tokens(goal)
    value = f"{settings.max_running} at once, up to {settings.max_model_len} tokens each"
    if decision.task.wishes.max_running is not None:
        return Choice("requests", value, "as asked")
    crowd, score = decision.found.crowd, decision.found.score
    if crowd is not None:
        then = f"{crowd[0]} would take {crowd[1] / score:.2f} times as long in all"
        return Choice("requests", value, f"{then}, since their KV leaves less room; {goal.concurrency} want to")
    if decision.batch < goal.concurrency:
        return Choice("requests", value, f"as many of {tokens} tokens as the pages hold; {goal.concurrency} want to")
    usual = f"{MAX_RUNNING} is the default, for shorter ones; " if settings.max_running > goal.concurrency else ""
    return Choice("requests", value, f"{usual}the pages hold the goal's {goal.concurrency} of {tokens} tokens")


def _nodes(decision: Decision) -> Iterator[Choice]:
    nodes = decision.hardware.nodes if decision.hardware else ()
    if len(nodes) > 1:
        cores = ", ".join(str(node.cores) for node in nodes)
        yield Choice(
            "memory nodes", str(len(nodes)), f"every expert is split over them by rows, beside {cores} cores: no copies"
        )


def _bound(decision: Decision, prediction: Prediction | None) -> Iterator[Choice]:
    """What a decode step of the goal's batch spends its time on."""
    if prediction is None or decision.found.rates is None:
        return
    step = decode_step(decision.found.rates, decision.task.goal, decision.found.cache, decision.batch)
    rates = decision.found.rates.experts
    what, moved = step.binding, step.moved
    reason = f"{human_seconds(step.parts[what])} of {human_seconds(step.seconds)} of a step of {decision.batch}"
    if what == "CPU experts":
        # A decode step streams none: what the CPU runs is what lies outside VRAM.
        read = expert_cost(rates, decision.found.rates.layers, decision.batch).cpu_bytes
        share = read / rates.ram_read / step.parts[what]
        what = "RAM bandwidth" if share > 0.7 else "CPU arithmetic"
        reason += f": {read / rates.expert_bytes:.0f} experts, {human(read)}"
        reason += f" at {rates.ram_read / 1e9:.0f} GB/s at best" if math.isfinite(rates.ram_read) else ""
    elif what == "link":
        reason += f": {human(moved['link'])}"
    elif what == "disk":
        reason += f": {human(moved['disk'])} at {rates.disk_read / 1e9:.3g} GB/s"
    yield Choice("bound by", what, reason)
