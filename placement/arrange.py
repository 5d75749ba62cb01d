"""The ways to divide memory between experts, KV pages and buffers, and the best of them for a goal.

Experts in VRAM are worth most in small batches, KV pages in large ones, so a few dozen splits of the VRAM that is left
are priced with `cost.py` instead of following a rule. Where no rates are known a rule has to do: KV for the goal, the
rest to experts. Knows no text for people; `planner.py` asks and explains.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import numpy as np

from hybrid.config import ModelConfig
from placement.cost import Rates, Setup, resolve, slot_values
from placement.facts import Facts
from placement.forecast import Cache, batch_held, best_chunk, cached_tokens, score
from placement.ledger import (
    MAX_BATCH_TOKENS,
    Layout,
    Placement,
    PlacementError,
    Wishes,
    fit,
    human,
    kv_buffer_bytes,
    page_bytes,
    room,
    workspace_bytes,
)
from placement.plan import Goal
from placement.profile import Profile
from placement.routing import Routing
from placement.slots import SlotMarket

SPLITS = 16  # steps in which VRAM moves from KV to experts
CHUNKS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
CHUNK_WITHIN = 1.05  # of the best prefill: smaller steps hold up those that decode for less long
WORKSPACE_SHARE = 0.25  # of what is left on the device, that a larger chunk may take
# Scores that are as good: KV stays on the device unless more is gained than predictions can tell apart, and a slot
# that brings next to nothing is left to the KV.
SAME_WITHOUT_LINK, SAME_WITHOUT_SLOT = 1.02, 1.005
STREAM_GAIN = 1.02  # least gain in prefill for which a ring is kept
RING_EXPERTS = 4


@dataclass(frozen=True)
class Task:
    """What a plan is made from. `kernel` is a name in the profile; both are None where there are no rates."""

    model: ModelConfig
    facts: Facts
    goal: Goal
    wishes: Wishes
    routing: Routing
    profile: Profile | None
    kernel: str | None
    servable: bool  # only what this version's engine does

    def rates(self, setup: Setup) -> Rates | None:
        return None if self.profile is None else resolve(self.model, self.profile, setup, self.routing)

    @cached_property
    def coarse(self) -> "Task":
        """The same with layers that are all like their mean: a record of 60 layers takes 60 times as long to price."""
        if self.routing.uniform:
            return self
        mean = np.sort(self.routing.shares, axis=1).mean(axis=0)
        return replace(self, routing=Routing(np.tile(mean, (len(self.routing.shares), 1)), self.routing.tokens))

    def setup(self, layout: Layout, streams: bool, from_disk: float = 0.0) -> Setup:
        return Setup(layout.weights, self.kernel or "", layout.slots, streams=streams, from_disk=from_disk)

    @cached_property
    def has_link(self) -> bool:
        return self.facts.device == "cuda" and self.profile is not None and self.profile.link is not None

    @cached_property
    def expert(self) -> int:
        """Bytes of one."""
        fmt = self.model.expert_format if self.wishes.expert_target == "native" else self.wishes.expert_target
        return self.model.expert_geometry.expert_bytes(fmt)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One way to divide memory that fits, and what it brings."""

    layout: Layout
    placement: Placement
    streams: bool
    rates: Rates | None
    cache: Cache
    score: float  # seconds, less is better; 0 without rates
    chunks: dict[int, float]  # seconds of the goal's prompts by the sizes of a step that were tried


def arrange(task: Task, base: Layout) -> Arrangement:
    """The best arrangement with the weights and the experts' home of `base`. Raises PlacementError.

    Sought with all layers alike; `exact` then deals the slots to the layers as they are.
    """
    task = task.coarse
    streams, chunk, chunks = _steps(task, base)
    layout = replace(base, max_batch_tokens=chunk, ring_experts=RING_EXPERTS if streams else 0)
    if task.servable or task.facts.device == "cpu":
        found = [_priced(task, layout, streams, chunks)]
    else:
        market = _market(task, layout, streams)
        splits = list(_splits(task, layout, market))
        found = [_priced(task, split, streams, chunks) for split in splits]
        if not found:
            _refuse(task, layout)
    good = _within(found, SAME_WITHOUT_LINK)
    fewest = min(one.placement.pages_in_ram for one in good)
    good = _within([one for one in good if one.placement.pages_in_ram == fewest], SAME_WITHOUT_SLOT)
    return min(good, key=lambda one: sum(one.layout.slots))


def _within(found: list[Arrangement], factor: float) -> list[Arrangement]:
    least = min(one.score for one in found)
    return [one for one in found if one.score <= factor * least]


def exact(task: Task, found: Arrangement) -> Arrangement:
    """The same arrangement with slots and rates of every layer's own routing."""
    if task.routing.uniform:
        return found
    layout = replace(found.layout, slots=_market(task, found.layout, found.streams).deal(sum(found.layout.slots)))
    return _priced(task, layout, found.streams, found.chunks)


def _steps(task: Task, base: Layout) -> tuple[bool, int, dict[int, float]]:
    """Whether prefill streams experts, the most tokens of a step, and the seconds of each size that was tried."""
    wished = task.wishes.max_batch_tokens
    from_disk = fit(task.model, task.facts, base).from_disk if base.mapped and task.profile else 0.0
    slow = task.rates(task.setup(base, False, from_disk))
    if slow is None:
        return False, wished or MAX_BATCH_TOKENS, {}
    chunk, chunks = best_chunk(slow, task.goal, _sizes(task, base), CHUNK_WITHIN)
    fast = task.rates(task.setup(base, True, from_disk)) if task.has_link and not task.servable else None
    if fast is None:
        return False, chunk, chunks
    ring = replace(base, ring_experts=RING_EXPERTS)
    streamed, seconds = best_chunk(fast, task.goal, _sizes(task, ring), CHUNK_WITHIN)
    if seconds[streamed] * STREAM_GAIN > chunks[chunk]:
        return False, chunk, chunks
    return True, streamed, seconds


def _sizes(task: Task, layout: Layout) -> tuple[int, ...]:
    """Chunk sizes whose workspace leaves the device room; only the wished one where there is a wish."""
    if task.wishes.max_batch_tokens:
        return (task.wishes.max_batch_tokens,)
    spare, _ = room(task.model, task.facts, replace(layout, max_batch_tokens=MAX_BATCH_TOKENS))
    least = workspace_bytes(task.model, replace(layout, max_batch_tokens=MAX_BATCH_TOKENS))
    return tuple(
        size
        for size in CHUNKS
        if size <= MAX_BATCH_TOKENS
        or workspace_bytes(task.model, replace(layout, max_batch_tokens=size)) - least <= WORKSPACE_SHARE * spare
    )


def _market(task: Task, layout: Layout, streams: bool) -> SlotMarket:
    """Slots by value at the goal's batch; by the experts' shares alone where there are no rates."""
    rates = task.rates(task.setup(replace(layout, slots=()), streams))
    if rates is None:
        return SlotMarket(np.sort(task.routing.shares, axis=1)[:, ::-1])
    return SlotMarket(slot_values(rates, task.goal.concurrency))


def _splits(task: Task, layout: Layout, market: SlotMarket) -> Iterator[Layout]:
    """Layouts that divide the device's room between experts and KV, from none of the one to none of the other."""
    spare, ram_left = room(task.model, task.facts, layout)
    page = page_bytes(task.model, layout)
    least, want = (_pages(task, layout, n) * page for n in (1, task.goal.concurrency))
    longest = layout.max_model_len or task.model.max_position_embeddings
    useful = -(-longest // layout.page_size) * layout.max_running * page  # more pages could never be in use
    for n in _slot_counts(task, layout, spare, ram_left, want):
        slots = market.deal(n)
        left = layout.kv_bytes if layout.kv_bytes is not None else spare - n * task.expert
        short = _beyond(task, layout, want - left)
        leave = bool(slots) and not layout.mapped and ram_left < short
        ram = ram_left + (sum(slots) * task.expert if leave else 0)
        in_ram = max(0, min(-(-short // page) * page, ram // page * page))
        if layout.kv_bytes is None:
            left = min(left - kv_buffer_bytes(task.model, in_ram), useful)
        kv = left // page * page
        if ram >= 0 and kv >= 0 and kv + in_ram >= least:
            yield replace(layout, slots=slots, experts_leave_ram=leave, kv_bytes=kv, kv_in_ram=in_ram)


def _beyond(task: Task, layout: Layout, missing: int) -> int:
    """Bytes of KV that have to lie in RAM where the device misses so many: their buffers take device memory too."""
    n_layers = task.model.num_hidden_layers
    if missing <= 0 or not task.has_link or layout.mapped or n_layers < 3:
        return 0
    return -(-missing * n_layers // (n_layers - 2))


def _slot_counts(task: Task, layout: Layout, spare: int, ram_left: int, want: int) -> list[int]:
    """Numbers of slots worth pricing: even steps, all that the goal's KV leaves, and what RAM lacks."""
    most = min(max(0, spare) // task.expert, task.routing.shares.size)
    if layout.kv_bytes is not None:
        return [min(most, max(0, spare - layout.kv_bytes) // task.expert)]
    beside_kv = min(most, max(0, spare - want) // task.expert)
    lacking = min(most, max(0, -(ram_left // task.expert)))
    if task.profile is None:
        return [max(beside_kv, lacking)]
    buffers = kv_buffer_bytes(task.model, _beyond(task, layout, want))
    most = min(most, max(0, spare - buffers - page_bytes(task.model, layout)) // task.expert)
    even = {round(most * step / SPLITS) for step in range(SPLITS + 1)}
    return sorted(even | {beside_kv, lacking})


def _pages(task: Task, layout: Layout, requests: int) -> int:
    """Pages that hold so many requests of the goal, and one of its context."""
    return -(-max(task.goal.context, cached_tokens(task.goal, requests)) // layout.page_size)


def _priced(task: Task, layout: Layout, streams: bool, chunks: dict[int, float]) -> Arrangement:
    placement = fit(task.model, task.facts, layout)
    cache = Cache(placement.n_pages * layout.page_size, placement.pages_in_ram * layout.page_size)
    if not task.servable and not batch_held(task.goal, cache.tokens):
        _refuse(task, layout)
    rates = task.rates(task.setup(layout, streams, placement.from_disk))
    value = 0.0 if rates is None else score(rates, task.goal, cache, layout.max_batch_tokens)
    return Arrangement(layout, placement, streams, rates, cache, value, chunks)


def _refuse(task: Task, layout: Layout) -> NoReturn:
    """Raises the PlacementError that says why there is no arrangement."""
    plain = replace(layout, slots=(), experts_leave_ram=False, kv_bytes=task.wishes.kv_bytes, kv_in_ram=0)
    placement = fit(task.model, task.facts, plain)
    page, needed = page_bytes(task.model, layout), _pages(task, layout, 1)
    raise PlacementError(
        f"one request of {task.goal.context} tokens needs {human(needed * page)} of KV pages and "
        f"{human(placement.n_pages * page)} are left"
    )
