"""The ledger of bytes: what goes on the device and what into RAM, settled before a tensor is read.

A first honest step: the device holds everything but the routed experts, RAM holds those, and the KV pages take what
is left. `place` is a pure function of the model's config, the wishes and the facts, so it also answers for a model
that is not on the disk and a machine that is not this one; `read_facts` is the only part that looks around.
Knows no speeds and no requests. The engine process calls it before it builds the engine.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hybrid.config import KEY_BLOCK, LOGIT_ROWS, QUERY_BLOCK, ModelConfig, is_router
from offload.config import ExpertFormat
from placement.facts import Facts

Dtype = Literal["float32", "bfloat16"]
ExpertTarget = Literal["native", "int8", "int4"]
Where = Literal["device", "RAM"]

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
ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
DEVICE_RESERVE = 0.05  # of the device's memory: its context, libraries, allocator gaps
HOST_RESERVE = 512 * 2**20  # interpreter, torch, compiled kernels, the REST process
CPU_KV_SHARE = 0.5  # of what is left beside weights and experts: the rest of the machine lives there too
CROWDED_KV_SHARE = 0.1  # likewise, where the mapped experts overflow RAM as it is


class PlacementError(ValueError):
    """The model does not fit. One line: what is short, by how much, and the nearest remedy."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator asked for. None leaves the choice to `place`."""

    dtype: Dtype
    expert_target: ExpertTarget
    max_model_len: int | None  # tokens of the longest request
    max_running: int
    max_batch_tokens: int
    kv_bytes: int | None = None
    page_size: int = 16  # tokens
    packed: bool = False  # a packed file of the experts in this format lies beside the shards


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
    n_pages: int
    page_size: int
    max_model_len: int
    notes: tuple[str, ...] = ()

    def n_bytes(self, where: Where) -> int:
        """Sum of the entries of one place."""
        return sum(entry.n_bytes for entry in self.entries if entry.where == where)

    def table(self) -> str:
        """The ledger as text: every entry, the sums against what is free, the notes."""
        lines = [f"  {e.where:<7}{e.what:<52}{human(e.n_bytes):>11}" for e in self.entries]
        return "\n".join(["where the bytes go", *lines, *self._sums(), *(f"  note: {note}" for note in self.notes)])

    def _sums(self) -> list[str]:
        facts = self.facts
        device, ram = self.n_bytes("device"), self.n_bytes("RAM")
        if facts.device == "cpu":  # one memory plays both parts
            return [_sum_line("device + RAM: memory", device + ram, facts.ram_free)]
        return [
            _sum_line(f"device: {facts.device_name}", device, facts.device_free),
            _sum_line("RAM", ram, facts.ram_free),
        ]


def place(model: ModelConfig, facts: Facts, wishes: Wishes) -> Placement:
    """Settle pages and context length. Raises PlacementError with the numbers and the nearest remedy."""
    if wishes.max_model_len is not None and wishes.max_model_len > model.max_position_embeddings:
        limit = model.max_position_embeddings
        raise PlacementError(f"--max-model-len {wishes.max_model_len}: the model allows at most {limit} tokens")
    try:
        return _fit(model, facts, wishes)
    except PlacementError as error:
        raise PlacementError(f"{error}; {_remedy(model, facts, wishes)}") from None


def weight_bytes(model: ModelConfig, itemsize: int) -> dict[str, int]:
    """Bytes of everything but the routed experts, by tensor group. The router stays float32."""
    groups: dict[str, int] = {}
    for name, shape in model.tensor_shapes().items():
        group = next(group for part, group in GROUPS if part in name)
        groups[group] = groups.get(group, 0) + math.prod(shape) * (4 if is_router(name) else itemsize)
    return groups


def expert_bytes(model: ModelConfig, fmt: ExpertFormat) -> int:
    """Bytes of all routed experts in `fmt`."""
    return len(model.moe_layers) * model.n_routed_experts * model.expert_geometry.expert_bytes(fmt)


def workspace_bytes(model: ModelConfig, wishes: Wishes) -> int:
    """Estimate of what one step needs beside weights and pages: activations, attention blocks, logits.

    The largest tensors of each part times the copies that live at once; the blocks are those of `hybrid.mla`.
    """
    item, heads = ITEM_BYTES[wishes.dtype], model.num_attention_heads
    head = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    inner = max(model.intermediate_size, model.moe_intermediate_size * model.n_shared_experts)
    activations = wishes.max_batch_tokens * (4 * model.hidden_size + 3 * inner + 3 * heads * head) * item
    keys = KEY_BLOCK * max(2 * heads * head, wishes.max_running * model.latent_size) * item
    scores = 3 * 4 * max(QUERY_BLOCK, wishes.max_running) * heads * KEY_BLOCK
    return activations + keys + scores + 3 * 4 * LOGIT_ROWS * model.vocab_size


def human(n_bytes: float) -> str:
    """Bytes for people, decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"


def _fit(model: ModelConfig, facts: Facts, wishes: Wishes) -> Placement:
    mapped = wishes.packed
    weights = weight_bytes(model, ITEM_BYTES[wishes.dtype])
    workspace = workspace_bytes(model, wishes)
    experts = expert_bytes(model, _expert_format(model, wishes))
    reserve = HOST_RESERVE if facts.device == "cpu" else int(DEVICE_RESERVE * facts.device_total)
    spare = facts.device_free - reserve - workspace - sum(weights.values())
    if not mapped:
        _check_experts(facts, experts)
        spare -= experts if facts.device == "cpu" else 0
    if spare < 0:
        needed = human(facts.device_free - spare)
        raise PlacementError(f"{_device_name(facts)} has {human(facts.device_free)} free and {needed} are needed")
    n_pages, max_model_len = _pages(model, wishes, spare, _kv_room(facts, spare, experts if mapped else 0))
    kv = n_pages * _page_bytes(model, wishes)
    entries = (
        *(Entry("device", what, n_bytes) for what, n_bytes in weights.items()),
        Entry("device", f"KV: {n_pages} pages of {wishes.page_size} tokens", kv),
        Entry("device", f"workspace for {wishes.max_batch_tokens} tokens (estimate)", workspace),
        Entry("device", "reserve", reserve),
        Entry("RAM", _experts_entry(model, wishes), experts),
    )
    page_cache = spare - kv if facts.device == "cpu" else facts.ram_free - HOST_RESERVE
    notes = (
        *_overflow_note(experts if mapped else 0, page_cache),
        *_length_note(model, wishes, max_model_len),
    )
    return Placement(facts, entries, n_pages, wishes.page_size, max_model_len, notes)


def _expert_format(model: ModelConfig, wishes: Wishes) -> ExpertFormat:
    return model.expert_format if wishes.expert_target == "native" else wishes.expert_target


def _check_experts(facts: Facts, experts: int) -> None:
    """Experts from the shards must lie in RAM as a whole; a mapped file may overflow it (slowly, and with a note)."""
    if experts + HOST_RESERVE > facts.ram_free:
        needed = human(experts + HOST_RESERVE)
        raise PlacementError(f"RAM has {human(facts.ram_free)} free and {needed} are needed for the experts")


def _kv_room(facts: Facts, spare: int, mapped: int) -> int:
    """Bytes that pages may take beyond one longest request.

    On the CPU they share RAM with the page cache: they must not push mapped experts out of it.
    """
    if facts.device != "cpu":
        return spare
    return int(CPU_KV_SHARE * (spare - mapped)) if mapped < spare else int(CROWDED_KV_SHARE * spare)


def _pages(model: ModelConfig, wishes: Wishes, spare: int, room: int) -> tuple[int, int]:
    """(pages, longest request in tokens): what `room` gives, but enough for one longest request out of `spare`."""
    page_bytes = _page_bytes(model, wishes)
    if wishes.kv_bytes is not None:
        if wishes.kv_bytes > spare:
            raise PlacementError(f"--kv-memory is {human(wishes.kv_bytes)} and {human(spare)} are left for it")
        spare = room = wishes.kv_bytes
    longest = wishes.max_model_len
    if longest is None:
        longest = max(1, min(model.max_position_embeddings, room // page_bytes * wishes.page_size))
    least = -(-longest // wishes.page_size)
    if least * page_bytes > spare:
        needed = human(least * page_bytes)
        raise PlacementError(f"one request of {longest} tokens needs {needed} of KV pages and {human(spare)} are left")
    most = room // page_bytes if wishes.kv_bytes is not None else min(room // page_bytes, least * wishes.max_running)
    return max(least, most), longest


def _page_bytes(model: ModelConfig, wishes: Wishes) -> int:
    return wishes.page_size * model.kv_bytes_per_token(ITEM_BYTES[wishes.dtype])


def _experts_entry(model: ModelConfig, wishes: Wishes) -> str:
    source = "mapped from the packed file" if wishes.packed else "packed"
    return f"routed experts, {_expert_format(model, wishes)}, {source}"


def _overflow_note(mapped: int, page_cache: int) -> Iterator[str]:
    if mapped > page_cache:
        yield (
            f"the experts need {human(mapped)} of page cache and {human(max(page_cache, 0))} are free: "
            "the rest is read from the disk again and again, which is slow"
        )


def _length_note(model: ModelConfig, wishes: Wishes, max_model_len: int) -> Iterator[str]:
    if wishes.max_model_len is None and max_model_len < model.max_position_embeddings:
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
        chosen = "" if wishes.expert_target == "native" else f" --expert-format {wishes.expert_target}"
        packed = f"`hybrid pack MODEL{chosen}`, and the experts are read from the disk as they are needed"
        changes.append((packed, replace(wishes, packed=True)))
    for flag, changed in changes:
        try:
            fitted = _fit(model, facts, changed)
        except PlacementError:
            continue
        return f"this fits: {flag.format(fitted.max_model_len)}"
    return "no single setting helps; free memory or take a larger machine"


def _device_name(facts: Facts) -> str:
    return "RAM" if facts.device == "cpu" else f"the device ({facts.device_name})"


def _sum_line(what: str, used: int, free: int) -> str:
    return f"  = {what:<57}{human(used):>11} of {human(free)} free"
