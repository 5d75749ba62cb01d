"""The ledger of bytes: what goes on the device and what into RAM, settled before a tensor is read.

The device holds everything but the routed experts, RAM holds those, and the KV pages take what is left; beyond that a
`Layout` may put experts into VRAM slots, and the embedding and KV pages into RAM. `place` and `fit` are pure functions
of the model's config, what is asked and the facts, so they also answer for a model that is not on the disk and a
machine that is not this one; `read_facts` is the only part that looks around.
Knows no speeds and no requests. The engine process and the planner call it.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hybrid.config import KEY_BLOCK, LOGIT_ROWS, PIECE_TOKENS, QUERY_BLOCK, ModelConfig, is_router
from offload.config import GROUP, ExpertFormat, Isa, Precision
from placement.facts import Facts
from placement.plan import WeightDtype

ExpertTarget = Literal["native", "int8", "int4"]
Where = Literal["device", "RAM", "disk"]

# The first part found in a tensor's name tells its group.
GROUPS = (
    ("embed_tokens", "embedding"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp.gate.", "router (float32)"),
    ("shared_experts", "shared experts"),
    ("mlp.", "dense MLP"),
    ("lm_head", "output head"),
)
NARROW_GROUPS = ("attention", "shared experts", "dense MLP")  # what fp8 and int8 make smaller; the rest stays bf16
ITEM_BYTES: dict[WeightDtype, int] = {"float32": 4, "bfloat16": 2, "fp8": 2, "int8": 2}  # but for the narrow groups
DEVICE_RESERVE = 0.05  # of the device's memory: libraries, allocator gaps
HOST_RESERVE = 512 * 2**20  # interpreter, torch, compiled kernels, the REST process
CPU_KV_SHARE = 0.5  # of what is left beside weights and experts: the rest of the machine lives there too
CROWDED_KV_SHARE = 0.1  # likewise, where the mapped experts overflow RAM as it is
ROUTED = "routed experts"  # how their lines begin, in every memory
MAX_RUNNING, MAX_BATCH_TOKENS = 64, 512  # where nobody asks for others


class PlacementError(ValueError):
    """The model does not fit. One line: what is short, by how much, and the nearest remedy."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator asked for. None leaves the choice to `place`, or to the planner."""

    dtype: WeightDtype | None = None
    expert_target: ExpertTarget = "native"
    max_model_len: int | None = None  # tokens of the longest request
    max_running: int | None = None
    max_batch_tokens: int | None = None
    kv_bytes: int | None = None
    page_size: int = 16  # tokens
    packed: bool = False  # a packed file of the experts in this format lies beside the shards
    precision: Precision = "a8"
    experts: Literal["numba", "kt"] = "numba"
    isa: Isa | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that takes memory, settled but for the pages: they get what is left. Sizes are bytes."""

    weights: WeightDtype
    expert_format: ExpertFormat
    max_model_len: int | None  # None: as long as the pages allow
    max_running: int = MAX_RUNNING
    max_batch_tokens: int = MAX_BATCH_TOKENS
    kv_bytes: int | None = None  # of pages on the device, None for what is left
    page_size: int = 16
    mapped: bool = False  # experts come from the packed file, which may exceed RAM
    slots: tuple[int, ...] = ()  # experts in VRAM by MoE layer
    experts_leave_ram: bool = False  # those in VRAM
    embedding_in_ram: bool = False
    ring_experts: int = 0  # buffers for experts on their way to the device
    kv_in_ram: int = 0  # room for pages in RAM
    amx: bool = False  # the CPU's tier, which keeps copies of its inputs


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger."""

    where: Where
    what: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """A placement that fits. `notes` are lines the operator should read."""

    facts: Facts
    entries: tuple[Entry, ...]
    n_pages: int  # on the device
    page_size: int
    max_model_len: int
    notes: tuple[str, ...] = ()
    pages_in_ram: int = 0
    from_disk: float = 0.0  # share of the experts outside VRAM that RAM does not hold

    def n_bytes(self, where: Where) -> int:
        """Sum of the entries of one place."""
        return sum(entry.n_bytes for entry in self.entries if entry.where == where)


def place(model: ModelConfig, facts: Facts, wishes: Wishes) -> Placement:
    """Settle pages and context length. Raises PlacementError with the numbers and the nearest remedy."""
    if wishes.max_model_len is not None and wishes.max_model_len > model.max_position_embeddings:
        limit = model.max_position_embeddings
        raise PlacementError(f"--max-model-len {wishes.max_model_len}: the model allows at most {limit} tokens")
    try:
        return fit(model, facts, layout_of(model, facts, wishes))
    except PlacementError as error:
        raise PlacementError(f"{error}; {_remedy(model, facts, wishes)}") from None


def layout_of(model: ModelConfig, facts: Facts, wishes: Wishes) -> Layout:
    """The plain layout for these wishes: all experts in RAM or mapped, everything else on the device."""
    return Layout(
        weights=wishes.dtype or ("bfloat16" if facts.device == "cuda" else "float32"),
        expert_format=model.expert_format if wishes.expert_target == "native" else wishes.expert_target,
        max_model_len=wishes.max_model_len,
        max_running=wishes.max_running or MAX_RUNNING,
        max_batch_tokens=wishes.max_batch_tokens or MAX_BATCH_TOKENS,
        kv_bytes=wishes.kv_bytes,
        page_size=wishes.page_size,
        mapped=wishes.packed,
        amx=wishes.isa == "amx",
    )


def fit(model: ModelConfig, facts: Facts, layout: Layout) -> Placement:
    """Draw the ledger and settle the pages. Raises PlacementError that says what is short."""
    spare, ram_left = room(model, facts, layout)
    experts = _host_experts(model, layout)
    _check_ram(facts, layout, experts, ram_left)
    if spare < 0:
        needed = human(facts.device_free - spare)
        raise PlacementError(f"{_device_name(facts)} has {human(facts.device_free)} free and {needed} are needed")
    mapped = experts if layout.mapped else 0
    n_pages, in_ram, max_model_len = _pages(model, layout, spare, _kv_room(facts, spare, mapped))
    page = page_bytes(model, layout)
    page_cache = spare - n_pages * page if facts.device == "cpu" else ram_left + layout.kv_in_ram - in_ram * page
    held = min(experts, max(page_cache, 0)) if layout.mapped else experts
    notes = (*_overflow_note(mapped, page_cache), *_length_note(model, layout, max_model_len))
    entries = tuple(_entries(model, facts, layout, n_pages, in_ram, held))
    from_disk = 1 - held / experts if experts else 0.0
    return Placement(facts, entries, n_pages, layout.page_size, max_model_len, notes, in_ram, from_disk)


def room(model: ModelConfig, facts: Facts, layout: Layout) -> tuple[int, int]:
    """Bytes left for pages on the device, and in RAM: below 0 where something is short. On the CPU both are one."""
    reserve = HOST_RESERVE if facts.device == "cpu" else int(DEVICE_RESERVE * facts.device_total)
    weights = _weights(model, layout)
    experts = 0 if layout.mapped else _host_experts(model, layout)
    expert = model.expert_geometry.expert_bytes(layout.expert_format)
    moved = weights["embedding"] if layout.embedding_in_ram else 0
    device = sum(weights.values()) - moved + (sum(layout.slots) + layout.ring_experts) * expert
    device += kv_buffer_bytes(model, layout.kv_in_ram)
    spare = facts.device_free - reserve - workspace_bytes(model, layout) - device
    buffers = host_buffer_bytes(model, layout)
    if facts.device == "cpu":
        spare -= experts + buffers
        return spare, spare
    return spare, facts.ram_free - HOST_RESERVE - experts - buffers - moved - layout.kv_in_ram


def group_of(name: str) -> str:
    """The group of a tensor outside the routed experts, by its published name."""
    return next(group for part, group in GROUPS if part in name)


def page_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes of one page over all layers."""
    return layout.page_size * model.kv_bytes_per_token(ITEM_BYTES[layout.weights])


def weight_bytes(model: ModelConfig, itemsize: int, narrow: int | None = None) -> dict[str, int]:
    """Bytes of everything but the routed experts, by tensor group. The router stays float32.

    `narrow` is the size of a value in the groups that fp8 and int8 make smaller; their scales are a 4,000th more.
    """
    groups: dict[str, int] = {}
    for group, router, count in _weight_counts(model):
        size = narrow if narrow is not None and group in NARROW_GROUPS else itemsize
        groups[group] = groups.get(group, 0) + count * (4 if router else size)
    return groups


@functools.lru_cache(maxsize=4)
def _weight_counts(model: ModelConfig) -> tuple[tuple[str, bool, int], ...]:
    """(group, whether it is the router, values) in the order of the tensors; a planner asks a hundred times."""
    counts: dict[tuple[str, bool], int] = {}
    for name, shape in model.tensor_shapes().items():
        key = (group_of(name), is_router(name))
        counts[key] = counts.get(key, 0) + math.prod(shape)
    return tuple((*key, count) for key, count in counts.items())


def expert_bytes(model: ModelConfig, fmt: ExpertFormat) -> int:
    """Bytes of all routed experts in `fmt`."""
    return len(model.moe_layers) * model.n_routed_experts * model.expert_geometry.expert_bytes(fmt)


def workspace_bytes(model: ModelConfig, layout: Layout) -> int:
    """Estimate of what one step needs beside weights and pages: activations, attention blocks, logits.

    The largest tensors of each part times the copies that live at once; the blocks are those of `hybrid.mla`. A large
    step goes through a layer in pieces: of all its tokens there are the residual stream, the routed experts' input and
    sum (float32, so it counts twice), the shared expert's answer, and one that is being made.
    """
    item, heads = ITEM_BYTES[layout.weights], model.num_attention_heads
    head = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    inner = max(model.intermediate_size, model.moe_intermediate_size * model.n_shared_experts)
    at_once = min(layout.max_batch_tokens, PIECE_TOKENS)
    activations = at_once * (4 * model.hidden_size + 3 * inner + 3 * heads * head) * item
    waiting = (layout.max_batch_tokens - at_once) * 6 * model.hidden_size * item
    keys = KEY_BLOCK * max(2 * heads * head, layout.max_running * model.latent_size) * item
    scores = 3 * 4 * max(QUERY_BLOCK, layout.max_running) * heads * KEY_BLOCK
    return activations + waiting + keys + scores + 3 * 4 * LOGIT_ROWS * model.vocab_size


def host_buffer_bytes(model: ModelConfig, layout: Layout) -> int:
    """What the routed experts need in RAM for the tokens of one step, as `offload.experts` allocates it (estimate).

    Input and result of every token in float32, pinned beside a device of its own; the quantised record of every input,
    and of every pair of a token and an expert: 16-bit values with a scale and a sum for 32 of them, the larger of the
    two precisions, or float32 for experts in floats. AMX lays every pair's bfloat16 input out in a row as well.
    """
    pairs = layout.max_batch_tokens * model.num_experts_per_tok
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    record = 2 + 8 / GROUP if layout.expert_format in ("int4", "int8") else 4.0
    of_pair = record * inner + (2 * (hidden + inner) if layout.amx else 0)
    return int(layout.max_batch_tokens * (2 * 4 + record) * hidden + pairs * of_pair)


def pack_command(wishes: Wishes) -> str:
    """What makes the packed file of the experts in the format that is wished for."""
    target = wishes.expert_target
    return "hybrid pack MODEL" + (f" --expert-format {target}" if target != "native" else "")


def human(n_bytes: float) -> str:
    """Bytes for people, decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"


def kv_buffer_bytes(model: ModelConfig, kv_in_ram: int) -> int:
    """What the device needs for pages in RAM: two layers of them, one on its way while the other is read."""
    return 2 * kv_in_ram // model.num_hidden_layers


def _weights(model: ModelConfig, layout: Layout) -> dict[str, int]:
    narrow = 1 if layout.weights in ("fp8", "int8") else None
    return weight_bytes(model, ITEM_BYTES[layout.weights], narrow)


def _host_experts(model: ModelConfig, layout: Layout) -> int:
    """Bytes of the experts that RAM holds, or reads from the file: nobody reads there those that are in VRAM."""
    gone = sum(layout.slots) if layout.experts_leave_ram or layout.mapped else 0
    one = model.expert_geometry.expert_bytes(layout.expert_format)
    return expert_bytes(model, layout.expert_format) - gone * one


def _check_ram(facts: Facts, layout: Layout, experts: int, ram_left: int) -> None:
    """Experts from the shards must lie in RAM as a whole; a packed file's may overflow it (slowly, and with a note)."""
    if not layout.mapped and experts + HOST_RESERVE > facts.ram_free:
        needed = human(experts + HOST_RESERVE)
        raise PlacementError(f"RAM has {human(facts.ram_free)} free and {needed} are needed for the experts")
    if facts.device == "cuda" and ram_left < 0:
        raise PlacementError(f"RAM has {human(facts.ram_free)} free and {human(facts.ram_free - ram_left)} are needed")


def _entries(model: ModelConfig, facts: Facts, layout: Layout, n_pages: int, in_ram: int, held: int) -> Iterator[Entry]:
    weights, page = _weights(model, layout), page_bytes(model, layout)
    expert = model.expert_geometry.expert_bytes(layout.expert_format)
    experts, slots = _host_experts(model, layout), sum(layout.slots)
    for what, n_bytes in weights.items():
        if not (layout.embedding_in_ram and what == "embedding"):
            yield Entry("device", what, n_bytes)
    if slots:
        yield Entry("device", f"{ROUTED}, {layout.expert_format}: {slots} in VRAM slots", slots * expert)
    yield Entry("device", f"KV: {n_pages} pages of {layout.page_size} tokens", n_pages * page)
    if layout.kv_in_ram:
        yield Entry("device", "buffers for KV from RAM: two layers", kv_buffer_bytes(model, layout.kv_in_ram))
    if layout.ring_experts:
        yield Entry("device", f"ring for streaming: {layout.ring_experts} experts", layout.ring_experts * expert)
    workspace = workspace_bytes(model, layout)
    yield Entry("device", f"workspace for {layout.max_batch_tokens} tokens (estimate)", workspace)
    reserve = HOST_RESERVE if facts.device == "cpu" else int(DEVICE_RESERVE * facts.device_total)
    yield Entry("device", "reserve", reserve)
    source = "from the packed file" if layout.mapped else "packed"
    yield Entry("RAM", f"{ROUTED}, {layout.expert_format}, {source}", held)
    buffers = f"experts' buffers for {layout.max_batch_tokens} tokens (estimate)"
    yield Entry("RAM", buffers, host_buffer_bytes(model, layout))
    if layout.embedding_in_ram:
        yield Entry("RAM", "embedding", weights["embedding"])
    if in_ram:
        yield Entry("RAM", f"KV: {in_ram} pages of {layout.page_size} tokens", in_ram * page)
    if held < experts:
        yield Entry("disk", f"{ROUTED} that RAM has no room for", experts - held)


def _kv_room(facts: Facts, spare: int, mapped: int) -> int:
    """Bytes that pages may take beyond one longest request.

    On the CPU they share RAM with the experts of a packed file, and must leave them room.
    """
    if facts.device != "cpu":
        return spare
    return int(CPU_KV_SHARE * (spare - mapped)) if mapped < spare else int(CROWDED_KV_SHARE * spare)


def _pages(model: ModelConfig, layout: Layout, spare: int, most: int) -> tuple[int, int, int]:
    """(pages on the device, in RAM, longest request in tokens): what `most` bytes give, but enough for one longest
    request out of `spare`."""
    page = page_bytes(model, layout)
    if layout.kv_bytes is not None:
        if layout.kv_bytes > spare:
            raise PlacementError(f"--kv-memory is {human(layout.kv_bytes)} and {human(spare)} are left for it")
        spare = most = layout.kv_bytes
    longest, in_ram = layout.max_model_len, layout.kv_in_ram // page
    if longest is None:
        longest = max(1, min(model.max_position_embeddings, (most // page + in_ram) * layout.page_size))
    least = -(-longest // layout.page_size)
    if (least - in_ram) * page > spare:
        needed = human(least * page)
        raise PlacementError(f"one request of {longest} tokens needs {needed} of KV pages and {human(spare)} are left")
    useful = least * layout.max_running
    on_device = most // page if layout.kv_bytes is not None else min(most // page, useful)
    on_device = max(least - in_ram, on_device)
    return on_device, min(in_ram, max(0, useful - on_device)), longest


def _overflow_note(mapped: int, free: int) -> Iterator[str]:
    if mapped > free:
        yield (
            f"the experts need {human(mapped)} of RAM and {human(max(free, 0))} are free: "
            "the rest is read from the disk as it is needed, which is slow"
        )


def _length_note(model: ModelConfig, layout: Layout, max_model_len: int) -> Iterator[str]:
    if layout.max_model_len is None and max_model_len < model.max_position_embeddings:
        yield f"the longest request is {max_model_len} tokens; the model allows {model.max_position_embeddings}"


def _remedy(model: ModelConfig, facts: Facts, wishes: Wishes) -> str:
    """The first change, nearest first, that makes it fit; or that none does."""
    changes: list[tuple[str, Wishes]] = [("--max-model-len {}", replace(wishes, max_model_len=None))]
    if wishes.kv_bytes is not None:
        changes.append(("no --kv-memory", replace(wishes, kv_bytes=None)))
    if wishes.dtype == "float32":
        changes.append(("--dtype bfloat16", replace(wishes, dtype="bfloat16")))
    if not wishes.packed:
        targets: tuple[ExpertTarget, ...] = ("int8", "int4", "native")
        changes += [(f"--expert-format {target}", replace(wishes, expert_target=target)) for target in targets]
        packed = f"`{pack_command(wishes)}`, and the experts are read from the disk as they are needed"
        changes.append((packed, replace(wishes, packed=True)))
    for flag, changed in changes:
        try:
            fitted = fit(model, facts, layout_of(model, facts, changed))
        except PlacementError:
            continue
        return f"this fits: {flag.format(fitted.max_model_len)}"
    return "no single setting helps; free memory or take a larger machine"


def _device_name(facts: Facts) -> str:
    return "RAM" if facts.device == "cpu" else f"the device ({facts.device_name})"
