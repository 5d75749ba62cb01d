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
from placement.forecast import Cache, batch_held, batch_run, best_chunk, cached_tokens, score
from placement.ledger import (
    MAX_BATCH_TOKENS,
    MAX_RUNNING,
    Layout,
    Placement,
    PlacementError,
    Wishes,
    fit,
    host_buffer_bytes,
    human,
    kv_buffer_bytes,
    page_bytes,
    room,
    workspace_bytes,
)
from placement.plan import Goal, GoalKind
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
SAME_WITH_MORE = 1.01  # likewise all of the goal's requests at once, unless fewer are faster
HALVINGS: dict[GoalKind, int] = {"latency": 0, "throughput": 7, "swarm": 3}  # of that number, that are tried
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
    may_stream: bool = True

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
        return Setup(
            layout.weights, self.kernel or "", layout.slots, streams=streams, from_disk=from_disk, kv=layout.kv_dtype
        )

    @cached_property
    def has_link(self) -> bool:
        return self.facts.device == "cuda" and self.profile is not None and self.profile.link is not None

    @property
    def may_have_slots(self) -> bool:
        """Whether experts may lie in VRAM. A server without rates could not say that it pays."""
        known = self.profile is not None or not self.servable
        return self.facts.device == "cuda" and self.wishes.experts == "numba" and known

    @property
    def kv_may_leave(self) -> bool:
        """Whether pages may lie in RAM. Two layers of them need buffers on the device."""
        return self.has_link and not self.servable and self.model.num_hidden_layers > 2

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
    crowd: tuple[int, float] | None = None  # requests at once of the best arrangement for more of them, and its score


def arrange(task: Task, base: Layout) -> Arrangement:
    """The best arrangement with the weights and the experts' home of `base`. Raises PlacementError.

    Sought with all layers alike; `exact` then deals the slots to the layers as they are.
    """
    task = task.coarse
    base = replace(base, max_running=_running(task, base))
    steps = _steps(task, base)
    try:
        return _with_steps(task, base, *steps)
    except PlacementError:  # the ring and its larger steps may be what is too much
        if not steps[0]:
            raise
        return _with_steps(task, base, *_steps(replace(task, may_stream=False), base))


def _with_steps(task: Task, base: Layout, streams: bool, chunk: int, chunks: dict[int, float]) -> Arrangement:
    """The best arrangement with this size of step. Raises PlacementError."""
    layout = replace(base, max_batch_tokens=chunk, ring_experts=RING_EXPERTS if streams else 0)
    most, *fewer = [
        _best(task, replace(layout, max_running=running), streams, chunks) for running in _batches(task, layout)
    ]
    best = min((most, *fewer), key=lambda one: one.score)
    if most.score <= SAME_WITH_MORE * best.score:
        return most
    return replace(best, crowd=(batch_run(task.goal, most.cache), most.score))


def _running(task: Task, base: Layout) -> int:
    """Requests at once: as asked, or as many as the goal wants and there could be pages for. The others wait, and
    need no workspace."""
    if task.wishes.max_running is not None:
        return task.wishes.max_running
    low, high = MAX_RUNNING, max(MAX_RUNNING, task.goal.concurrency)
    while low < high:
        middle = (low + high + 1) // 2
        spare, ram_left = room(task.model, task.facts, replace(base, max_running=middle))
        in_ram = _most_in_ram(task, base, spare, ram_left)
        left = spare - kv_buffer_bytes(task.model, in_ram) + in_ram
        tokens = max(0, left) // page_bytes(task.model, base) * base.page_size
        low, high = (middle, high) if batch_held(task.goal, tokens) >= middle else (low, middle - 1)
    return low


def _batches(task: Task, layout: Layout) -> list[int]:
    """Requests at once that are worth pricing, the most first: with fewer, the KV may stay in faster memory."""
    most = min(task.goal.concurrency, layout.max_running)
    if task.profile is None or task.wishes.max_running is not None:
        return [layout.max_running]
    halves = [2**power for power in reversed(range(most.bit_length())) if 2**power < most]
    return [layout.max_running, *halves[: HALVINGS[task.goal.kind]]]


def _best(task: Task, layout: Layout, streams: bool, chunks: dict[int, float]) -> Arrangement:
    """The best arrangement of one layout. Raises PlacementError."""
    if not task.may_have_slots:
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
    return replace(_priced(task, layout, found.streams, found.chunks), crowd=found.crowd)


def _steps(task: Task, base: Layout) -> tuple[bool, int, dict[int, float]]:
    """Whether prefill streams experts, the most tokens of a step, and the seconds of each size that was tried."""
    wished = task.wishes.max_batch_tokens
    from_disk = fit(task.model, task.facts, base).from_disk if base.mapped and task.profile else 0.0
    slow = task.rates(task.setup(base, False, from_disk))
    if slow is None:
        return False, wished or MAX_BATCH_TOKENS, {}
    chunk, chunks = best_chunk(slow, task.goal, _sizes(task, base), CHUNK_WITHIN)
    # Experts on the disk would have to come to RAM first: the engine streams only what lies there.
    may_stream = task.may_stream and task.has_link and not from_disk and task.wishes.experts == "numba"
    fast = task.rates(task.setup(base, True)) if may_stream else None
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
    small = replace(layout, max_batch_tokens=MAX_BATCH_TOKENS)
    spare, ram_left = room(task.model, task.facts, small)
    least = _pages(task, layout, 1) * page_bytes(task.model, layout)  # of KV, which must have room beside it
    device_most = WORKSPACE_SHARE * spare
    if not task.kv_may_leave or layout.mapped:
        device_most = min(device_most, spare - least)
    ram_most = max(0, ram_left - _beyond(task, layout, int(least + device_most - spare)))
    if not task.servable and not layout.mapped:  # experts may leave RAM for it
        ram_most += int(WORKSPACE_SHARE * max(0, spare + min(0, ram_left)))

    def fits(size: int) -> bool:
        large = replace(layout, max_batch_tokens=size)
        device = workspace_bytes(task.model, large) - workspace_bytes(task.model, small)
        ram = host_buffer_bytes(task.model, large) - host_buffer_bytes(task.model, small)
        if task.facts.device == "cpu":
            return device + ram <= device_most
        return device <= device_most and ram <= ram_most

    return tuple(size for size in CHUNKS if size <= MAX_BATCH_TOKENS or fits(size))


def _market(task: Task, layout: Layout, streams: bool) -> SlotMarket:
    """Slots by value at the goal's batch; by the experts' shares alone where there are no rates."""
    rates = task.rates(task.setup(replace(layout, slots=()), streams))
    if rates is None:
        return SlotMarket(np.sort(task.routing.shares, axis=1)[:, ::-1])
    return SlotMarket(slot_values(rates, min(task.goal.concurrency, layout.max_running)))


def _splits(task: Task, layout: Layout, market: SlotMarket) -> Iterator[Layout]:
    """Layouts that divide the device's room between experts and KV, from none of the one to none of the other."""
    spare, ram_left = room(task.model, task.facts, layout)
    page = page_bytes(task.model, layout)
    least, want = (_pages(task, layout, n) * page for n in (1, min(task.goal.concurrency, layout.max_running)))
    longest = layout.max_model_len or task.model.max_position_embeddings
    useful = -(-longest // layout.page_size) * layout.max_running * page  # more pages could never be in use
    decoding = workspace_bytes(task.model, replace(layout, slots=(1,))) - workspace_bytes(task.model, layout)
    for n in _slot_counts(task, layout, spare - decoding, ram_left, want, market.worth):
        slots = market.deal(n)
        taken = n * task.expert + (decoding if n else 0)
        left = layout.kv_bytes if layout.kv_bytes is not None else spare - taken
        short = _beyond(task, layout, want - left)
        leave = bool(slots) and not layout.mapped and not task.servable and ram_left < short
        ram = ram_left + (sum(slots) * task.expert if leave else 0)
        beside = spare - taken - (page if layout.kv_bytes is None else layout.kv_bytes)
        in_ram = min(-(-short // page) * page, _most_in_ram(task, layout, beside, ram) // page * page)
        if layout.kv_bytes is None:
            left = min(left - kv_buffer_bytes(task.model, in_ram), useful)
        kv = left // page * page
        if ram >= 0 and kv >= page and kv + in_ram >= least:
            yield replace(layout, slots=slots, experts_leave_ram=leave, kv_bytes=kv, kv_in_ram=in_ram)


def _beyond(task: Task, layout: Layout, missing: int) -> int:
    """Bytes of KV that have to lie in RAM where the device misses so many: their buffers take device memory too."""
    n_layers = task.model.num_hidden_layers
    if missing <= 0 or not task.kv_may_leave or layout.mapped:
        return 0
    return -(-missing * n_layers // (n_layers - 2))


def _most_in_ram(task: Task, layout: Layout, spare: int, ram_left: int) -> int:
    """Bytes of KV that there is room for in RAM, and for their buffers on the device."""
    if not task.kv_may_leave or layout.mapped:
        return 0
    return max(0, min(ram_left, spare * task.model.num_hidden_layers // 2))


def _slot_counts(task: Task, layout: Layout, spare: int, ram_left: int, want: int, worth: int) -> list[int]:
    """Numbers of slots worth pricing: even steps, all that the goal's KV leaves, what RAM lacks, all `worth` having."""
    most = min(max(0, spare) // task.expert, task.routing.shares.size)
    if layout.kv_bytes is not None:
        buffers = kv_buffer_bytes(task.model, _beyond(task, layout, want - layout.kv_bytes))
        return [min(most, max(0, spare - layout.kv_bytes - buffers) // task.expert)]
    beside_kv = min(most, max(0, spare - want) // task.expert)
    lacking = min(most, max(0, -(ram_left // task.expert)))
    if task.profile is None:
        return [max(beside_kv, lacking)]
    buffers = kv_buffer_bytes(task.model, _beyond(task, layout, want))
    most = min(most, max(0, spare - buffers - page_bytes(task.model, layout)) // task.expert)
    even = {round(most * step / SPLITS) for step in range(SPLITS + 1)}
    return sorted(even | {beside_kv, lacking, min(most, worth)})


def _pages(task: Task, layout: Layout, requests: int) -> int:
    """Pages that hold so many requests of the goal, and one of its context."""
    return -(-max(task.goal.context, cached_tokens(task.goal, requests)) // layout.page_size)


def _priced(task: Task, layout: Layout, streams: bool, chunks: dict[int, float]) -> Arrangement:
    placement = fit(task.model, task.facts, layout)
    cache = Cache(placement.n_pages * layout.page_size, placement.pages_in_ram * layout.page_size, layout.max_running)
    if not batch_held(task.goal, cache.tokens):
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
