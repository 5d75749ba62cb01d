"""Bytes and seconds of one engine step, from a model's config and a machine's profile. Pure functions.

    rates = resolve(model, profile, setup, uniform(model))
    step_cost(rates, Load.decode(rows=8, context=8192)).seconds

A step is the device's part (weights once, attention, launches, logits) and the routed experts' part: on the CPU, in
VRAM slots, or over the link while a prompt is read (`expert_cost.py`). The link is data: from PCIe 3 to C2C nothing
here knows its name. Called by the planner, the server's account of itself, and the simulator; knows none of them.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hybrid.config import KEY_BLOCK, QUERY_BLOCK, KvDtype, ModelConfig, is_router
from hybrid.widths import kv_bytes_per_token
from offload.config import ExpertFormat, Isa, Precision
from placement.expert_cost import (
    Array,
    CostError,
    Device,
    ExpertCost,
    ExpertRates,
    Layers,
    RowTable,
    expert_cost,
    group_layers,
    slot_seconds,
)
from placement.plan import WeightDtype
from placement.profile import Gemm, Profile
from placement.routing import Routing

__all__ = [
    "CostError", "Load", "Rates", "Setup", "StepCost", "default_kernel", "prompt_seconds", "resolve", "slot_values",
    "step_cost", "stream_from_rows",
]  # fmt: skip

ITEM_BYTES: dict[WeightDtype, int] = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
WIDE_DTYPE: dict[WeightDtype, WeightDtype] = {"fp8": "bfloat16", "int8": "bfloat16"}  # of all that is not narrow
# Both are read as one byte for each weight and widened before the product, so one's times are good for the other.
STAND_IN: dict[WeightDtype, WeightDtype] = {"fp8": "int8", "int8": "fp8"}
MEMO = 4096  # steps that are remembered
MEASURE = "run `hybrid measure` on that machine"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a step's cost depends on beside the model and the machine."""

    weights: WeightDtype
    kernel: str  # a name in Profile.kernels
    slots: tuple[int, ...] = ()  # VRAM expert slots of each MoE layer; () for none
    streams: bool = False  # a step with a prompt may send experts over the link
    overlaps: bool = True  # the shared expert and VRAM experts run beside the CPU's; needs a device of its own
    kv_in_ram: float = 0.0  # share of the KV that lies in RAM and crosses the link in every step
    from_disk: float = 0.0  # share of the experts outside VRAM that are not in RAM either
    kv: KvDtype = "model"


@dataclass(frozen=True, slots=True)
class Load:
    """What one step computes: sequences that decode, and chunks of prompts as (new ids, ids before them)."""

    decode_rows: int = 0
    context: int = 0  # ids that the decoding sequences hold together, the new ones included
    chunks: tuple[tuple[int, int], ...] = ()
    sampled: int = 0  # sequences whose next token is drawn

    @classmethod
    def decode(cls, rows: int, context: int) -> "Load":
        """`rows` sequences of `context` ids each, the new one included."""
        return cls(rows, rows * context, (), rows)

    @classmethod
    def prompt(cls, tokens: int, before: int = 0, sampled: int = 1) -> "Load":
        """A prompt, or a chunk of one that `before` ids precede."""
        return cls(0, 0, ((tokens, before),), sampled)

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int]], sampled: int | None = None) -> "Load":
        """The rows of a Batch as (new ids, position); every row draws a token unless told otherwise."""
        known = tuple(rows)
        decode = [position + 1 for new, position in known if new == 1]
        chunks = tuple(row for row in known if row[0] > 1)
        return cls(len(decode), sum(decode), chunks, len(known) if sampled is None else sampled)

    @property
    def tokens(self) -> int:
        """New ids."""
        return self.decode_rows + sum(new for new, _ in self.chunks)


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step. `parts` are seconds by cause before any overlap; `moved` are bytes."""

    seconds: float
    parts: dict[str, float]
    moved: dict[str, float]
    distinct: float  # experts touched, summed over layers
    binding: str  # the part that decides


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights that a token meets once in a step: how many, and the table that times them."""

    n_weights: int
    table: RowTable  # seconds for one weight, by rows
    item_bytes: int

    def seconds(self, rows: int) -> float:
        return self.n_weights * self.table.seconds(rows) if rows else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """A profile made ready for one model and setup."""

    model: ModelConfig
    setup: Setup
    dense: tuple[Linear, ...]  # attention's projections, dense MLPs and the router, over all layers
    shared: Linear
    head: Linear
    kv_token: int  # bytes of cache, all layers
    own_device: bool  # device and RAM are two memories
    hand_over: tuple[float, float]  # seconds of a byte of hidden states to RAM, and back
    launches: tuple[float, float]  # seconds of a step, and of each sequence in it
    draw: float  # seconds of drawing one token
    kv_read: float
    attention: tuple[float, float]  # FLOP/s while decoding, and of prompts
    experts: ExpertRates
    layers: tuple[Layers, ...]
    n_moe: int  # layers with routed experts
    # By tokens and what streams beside them. replace() shares it: nothing that the experts' cost hangs on may change.
    memo: dict[tuple[int, float, bool], ExpertCost] = field(default_factory=dict, repr=False)


def resolve(model: ModelConfig, profile: Profile, setup: Setup, routing: Routing) -> Rates:
    """Everything that `step_cost` needs. Raises CostError that names the rate the profile lacks."""
    device, kernel = profile.device, profile.kernel(setup.kernel)
    if device is None:
        raise CostError(f"profile {profile.name} has no device rates; {MEASURE}")
    if kernel is None:
        raise CostError(f"profile {profile.name} has no figures of {setup.kernel}; {MEASURE}")
    if setup.from_disk and profile.disk_read is None:
        raise CostError(f"profile {profile.name} has no disk_read; {MEASURE}")
    own = device.kind == "cuda"
    if own and profile.link is None:
        raise CostError(f"profile {profile.name} has no link between RAM and its device; {MEASURE}")
    wide = WIDE_DTYPE.get(setup.weights, setup.weights)
    counts = _weight_counts(model)
    narrow_table = _table(profile, setup.weights)
    n_layers = model.num_hidden_layers
    gemm = _gemm(profile, setup.weights)
    geometry, fmt = model.expert_geometry, _format_of(setup.kernel)
    traffic = geometry.decoded_traffic(fmt) / geometry.expert_bytes(fmt)  # on the device, over reading alone
    experts = ExpertRates(
        expert_bytes=geometry.expert_bytes(fmt),
        expert_flops=6 * model.hidden_size * model.moe_intermediate_size,
        rows=_kernel_table(model, kernel.hidden, kernel.inner, {m: t.value for m, t in kernel.seconds.items()}),
        ram_read=max(rate.value for rate in profile.memory.read.values()) if profile.memory else math.inf,
        disk_read=profile.disk_read.value if profile.disk_read else math.inf,
        link=(profile.link.to_device_beside_kernels or profile.link.to_device).value if profile.link else 0.0,
        beside_copies=(profile.link.kernels_beside_copies or 1.0) if profile.link else 1.0,
        from_disk=setup.from_disk,
        device=Device(
            read=gemm.size**2 * ITEM_BYTES[setup.weights] / gemm.seconds[min(gemm.seconds)].value / traffic,
            flops=max(2 * rows * gemm.size**2 / seconds.value for rows, seconds in gemm.seconds.items()),
        ),
    )
    return Rates(
        model=model,
        setup=setup,
        dense=(
            Linear(counts["dense"], narrow_table, ITEM_BYTES[setup.weights]),
            Linear(counts["router"], _table(profile, "float32", wide), 4),
        ),
        shared=Linear(counts["shared"], narrow_table, ITEM_BYTES[setup.weights]),
        head=Linear(counts["head"], narrow_table, ITEM_BYTES[setup.weights]),
        kv_token=kv_bytes_per_token(model, ITEM_BYTES[wide], setup.kv),
        own_device=own,
        hand_over=(1 / profile.link.from_device.value, 1 / profile.link.to_device.value)
        if profile.link
        else (0.0, 0.0),
        launches=(device.per_step.value + n_layers * device.per_layer.value, device.per_row.value),
        draw=model.vocab_size * device.per_logit.value,
        kv_read=device.kv_read.value,
        attention=(device.attention_decode.value, device.attention_prefill.value),
        experts=experts,
        layers=group_layers(routing.shares, setup.slots),
        n_moe=len(routing.shares),
    )


def step_cost(rates: Rates, load: Load) -> StepCost:
    """One step of the engine.

    Without a device of its own every part takes its turn on the same cores: T is their sum. With one, a layer is
    attention and projections, then the routed experts beside the shared one; the link works ahead all the time:
    T = launches + logits + max(link, weights + attention + hand-over + sum of layers' max(CPU + disk, shared + VRAM)).
    """
    tokens = load.tokens
    narrow = sum(linear.seconds(tokens) for linear in rates.dense)
    shared = rates.shared.seconds(tokens)
    decode, prefill = _attention_seconds(rates, load)
    kv_link = rates.setup.kv_in_ram * _kv_bytes(rates, load)
    ahead = narrow + decode + prefill
    experts = _experts(rates, tokens, ahead, shared, bool(load.chunks))
    hidden = 4.0 * tokens * rates.model.hidden_size * rates.n_moe  # float32, one way
    there, back = rates.hand_over
    head = rates.head.seconds(load.sampled) + load.sampled * rates.draw
    fixed, each = rates.launches
    parts = {
        "weights": narrow + shared,
        "attention": decode + prefill,
        "launches": fixed + each * (load.decode_rows + len(load.chunks)),
        "logits": head,
        # What is copied out of RAM is read there too: kernels wait for it.
        "CPU experts": experts.cpu + kv_link / rates.experts.ram_read,
        "VRAM experts": experts.vram,
        "hand-over": hidden * (there + back),
        "link": experts.link + (kv_link / rates.experts.link if kv_link else 0.0),
        "disk": experts.disk,
    }
    seconds, binding = _overlapped(rates, parts, shared, experts)
    return StepCost(seconds, parts, _moved(rates, load, experts, kv_link, hidden), experts.distinct, binding)


def prompt_seconds(rates: Rates, tokens: int, chunk: int | None, before: int = 0) -> float:
    """Until the first token of a prompt that is alone: chunk by chunk, or None for one pass, layer by layer."""
    if chunk is None or chunk >= tokens:
        return step_cost(rates, Load.prompt(tokens, before)).seconds
    starts = range(0, tokens, chunk)
    loads = [Load.prompt(min(chunk, tokens - a), before + a, int(a + chunk >= tokens)) for a in starts]
    return sum(step_cost(rates, load).seconds for load in loads)


def stream_from_rows(rates: Rates) -> float | None:
    """Rows of an expert from which copying it is faster than computing it on the CPU; None without a link, or where
    the link never is."""
    experts = rates.experts
    return experts.rows.rows_at(experts.expert_bytes / experts.link) if experts.link else None


def slot_values(rates: Rates, rows: int) -> Array:
    """Seconds that a step of so many tokens saves by each layer's n-th hottest expert in VRAM, (L, E), descending."""
    return slot_seconds(rates.experts, rates.layers, rates.n_moe, rows)


def default_kernel(profile: Profile, expert_format: ExpertFormat, precision: Precision, isa: Isa | None) -> str:
    """Name of our kernels' figures in the profile: of `isa`, else of the best tier. Raises CostError."""
    wanted = ("numba", isa, expert_format, precision)
    for kernel in profile.kernels:
        parts = kernel.name.split("/")
        if isa is None and parts[1] == "amx":  # the engine takes it only where it is named
            continue
        if all(want in (None, part) for want, part in zip(wanted, parts, strict=True)):
            return kernel.name
    what = f"{expert_format} experts with {precision} activations" + (f" on {isa}" if isa else "")
    raise CostError(f"profile {profile.name} has no figures of {what}; {MEASURE}")


def _overlapped(rates: Rates, parts: dict[str, float], shared: float, experts: ExpertCost) -> tuple[float, str]:
    """Seconds of the step, and the part that most of its critical path goes to."""
    ends = parts["launches"] + parts["logits"]
    if not rates.own_device or not rates.setup.overlaps:
        return sum(parts.values()), max(parts, key=lambda name: parts[name])
    host, beside = parts["CPU experts"] + parts["disk"], shared + parts["VRAM experts"]
    waits = parts["CPU experts"] - experts.cpu if host > beside else 0.0
    path = parts["weights"] - shared + parts["attention"] + parts["hand-over"] + experts.path + waits
    # Experts on their way share the link with the hidden states that come back.
    busy = parts["link"] + (parts["hand-over"] / 2 if parts["link"] else 0.0)
    if busy > path:
        return ends + busy, "link"
    on_path = dict(parts, link=0.0)
    if host > beside:
        on_path |= {"weights": parts["weights"] - shared, "VRAM experts": 0.0}
    else:
        on_path |= {"CPU experts": 0.0, "disk": 0.0}
    return ends + path, max(on_path, key=lambda name: on_path[name])


def _experts(rates: Rates, tokens: int, ahead: float, shared: float, has_prompt: bool) -> ExpertCost:
    """The routed experts of all layers; where they may stream, balanced against what the device does meanwhile."""
    streams = has_prompt and rates.setup.streams and rates.own_device
    key = (tokens, round(ahead, 6) if streams else 0.0, streams)
    known = rates.memo.get(key)
    if known is None:
        if len(rates.memo) >= MEMO:  # with streaming the key has a time in it, so there is no end of keys
            rates.memo.clear()
        before = ahead / rates.n_moe if streams else None
        known = rates.memo[key] = expert_cost(rates.experts, rates.layers, tokens, shared / rates.n_moe, before)
    return known


def _attention_seconds(rates: Rates, load: Load) -> tuple[float, float]:
    """Decoding reads the latents, and computes on them: 2 H ((C + R) + C) FLOP for each cached id and layer."""
    model = rates.model
    n_layers, latent = model.num_hidden_layers, model.kv_lora_rank
    flops = 2 * model.num_attention_heads * (model.latent_size + latent) * load.context * n_layers
    read = load.context * rates.kv_token
    decode = max(flops / rates.attention[0], read / rates.kv_read)
    prefill = sum(_prompt_flops(model, new, before) for new, before in load.chunks) * n_layers / rates.attention[1]
    return decode, prefill


def _prompt_flops(model: ModelConfig, new: int, before: int) -> float:
    """One layer's attention over a chunk, by the cheaper of the two paths of `hybrid.mla`.

    Pairs of a new id and a key are those that the engine computes: whole blocks of keys, unless all of one lie in the
    future of a block of queries.
    """
    nope, rope, v = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    latent, keys = model.kv_lora_rank, before + new
    pairs = 0
    for first in range(0, new, QUERY_BLOCK):
        n = min(QUERY_BLOCK, new - first)
        pairs += n * min(keys, -(-(before + first + n) // KEY_BLOCK) * KEY_BLOCK)
    naive = keys * latent * (nope + v) + pairs * (nope + rope + v)
    absorbed = new * latent * (nope + v) + pairs * (2 * latent + rope)
    return 2.0 * model.num_attention_heads * min(naive, absorbed)


def _kv_bytes(rates: Rates, load: Load) -> float:
    """Cached latents that a step reads."""
    n_ids = load.context + sum(new + before for new, before in load.chunks)
    return float(n_ids * rates.kv_token)


def _moved(rates: Rates, load: Load, experts: ExpertCost, kv_link: float, hidden: float) -> dict[str, float]:
    """Bytes by the memory or link that carries them."""
    linears = (*rates.dense, rates.shared, *((rates.head,) if load.sampled else ()))
    device = sum(linear.n_weights * linear.item_bytes for linear in linears) + _kv_bytes(rates, load)
    ram = experts.cpu_bytes + experts.link_bytes + kv_link
    if not rates.own_device:
        return {"RAM": ram + device, "VRAM": 0.0, "link": 0.0, "disk": experts.disk_bytes}
    return {
        "RAM": ram + 2 * hidden,
        "VRAM": device + experts.vram_bytes,
        "link": experts.link_bytes + kv_link + 2 * hidden,
        "disk": experts.disk_bytes,
    }


@functools.lru_cache(maxsize=4)  # a planner resolves hundreds of setups of one model
def _weight_counts(model: ModelConfig) -> dict[str, int]:
    """Weights by the way a step uses them. The embedding is only looked up, norms are too small to time."""
    counts = {"dense": 0, "router": 0, "shared": 0, "head": model.vocab_size * model.hidden_size}
    for name, shape in _matrices(model):
        group = "router" if is_router(name) else "shared" if "shared_experts" in name else "dense"
        counts[group] += math.prod(shape)
    return counts


def _matrices(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in model.tensor_shapes().items():
        if len(shape) == 2 and "embed_tokens" not in name and "lm_head" not in name:
            yield name, shape


def _gemm(profile: Profile, dtype: WeightDtype) -> Gemm:
    known = {gemm.dtype: gemm for gemm in profile.device.gemms} if profile.device else {}
    found = known.get(dtype) or known.get(STAND_IN.get(dtype, dtype))
    if found is None:
        raise CostError(f"profile {profile.name} has no products in {dtype}; {MEASURE}, or choose other weights")
    return found


def _table(profile: Profile, dtype: WeightDtype, instead: WeightDtype | None = None) -> RowTable:
    """Seconds for one weight by rows; of a dtype that was not timed, those of `instead` by their bytes."""
    try:
        gemm, factor = _gemm(profile, dtype), 1.0
    except CostError:
        if instead is None:
            raise
        gemm, factor = _gemm(profile, instead), ITEM_BYTES[dtype] / ITEM_BYTES[instead]
    return RowTable.of({rows: factor * t.value / gemm.size**2 for rows, t in gemm.seconds.items()})


def _kernel_table(model: ModelConfig, hidden: int, inner: int, seconds: dict[int, float]) -> RowTable:
    """One expert of the model by rows. Time goes with the weights, read or multiplied; both have three matrices."""
    scale = model.hidden_size * model.moe_intermediate_size / (hidden * inner)
    return RowTable.of({rows: scale * value for rows, value in seconds.items()})


def _format_of(kernel: str) -> ExpertFormat:
    formats: dict[str, ExpertFormat] = {"int4": "int4", "int8": "int8", "bf16": "bf16", "fp8": "fp8"}
    return formats[kernel.split("/")[2]]
