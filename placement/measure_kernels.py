"""Seconds of one routed expert by its rows, for each backend, and the rate at which memory is read at all.

Eight experts of a layer are active and all tokens choose the same eight, as large as K2.5's; the next call takes the
next eight, over more memory than the caches hold. Knows no models and no plans. Called by `placement.measure`.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hybrid.config import ModelConfig
from hybrid.random_checkpoint import write_checkpoint
from offload.bandwidth import ReadCeiling
from offload.checkpoint import Checkpoint
from offload.config import ExpertFormat, ExpertGeometry, Isa, PoolConfig, Precision
from offload.experts import Experts
from offload.kt import ENTRY, KtExperts, Published, refusal
from offload.ram import ram
from offload.repeated import LAYER, random_expert, repeated_store
from offload.topology import Topology, allowed_cpus
from placement.document import Measured
from placement.hardware import Hardware
from placement.measure_timing import CannotMeasureError, Effort, Sizes, medians, take_turns
from placement.profile import Kernel, Memory, median_of

ACTIVE = 8  # experts of one call
CACHES = 4  # times the caches: then hardly anything of a set is still there when its turn comes again
SHARE_OF_RAM = 0.4  # of what is free, at most
PASSES = 9  # timed readings of the memory for one figure


def measure_memory(hardware: Hardware, topology: Topology, sizes: Sizes, tell: Callable[[str], None]) -> Memory:
    """Reading RAM with 1, 2, 4, … and all threads, and each node by itself."""
    n_bytes = min(max(sizes.read_bytes, CACHES * cache_bytes(hardware)), int(SHARE_OF_RAM * ram()[1]))
    cpus = _cpus(topology)
    nodes = [topology.nodes[place.node] for place in topology.places] if len(topology.nodes) > 1 else []
    counts = sorted({*(2**n for n in range(len(cpus).bit_length())), len(cpus)})
    with closing(ReadCeiling(cpus, n_bytes, nodes)) as ceiling:
        for line in ceiling.notices:
            tell(line)
        read = {threads: median_of(ceiling.rates(threads, PASSES)) for threads in counts if threads <= len(cpus)}
    return Memory(read, _per_node(cpus, nodes, n_bytes) if nodes else (read[len(cpus)],))


def measure_kernel(
    hardware: Hardware,
    topology: Topology,
    kind: tuple[Isa, ExpertFormat, Precision],
    sizes: Sizes,
    tell: Callable[[str], None],
) -> Kernel:
    """One of our kernels. Raises CannotMeasureError where the tier may not run or memory is short."""
    isa, fmt, precision = kind
    geometry, sets = _geometry(hardware, fmt, sizes)
    store = repeated_store(geometry, fmt, [random_expert(fmt, geometry)], topology.nodes)
    for line in store.notices:
        tell(line)
    try:
        experts = Experts(store, PoolConfig(len(topology.places), precision, isa), topology)
    except ValueError as error:  # the system does not permit the tier
        store.close()
        raise CannotMeasureError(str(error)) from error
    with closing(experts):
        seconds = time_experts(experts, LAYER, sizes.hidden, sets, sizes.rows, sizes.effort)
    return Kernel(f"numba/{isa}/{fmt}/{precision}", sizes.hidden, sizes.inner, seconds)


def measure_kt(hardware: Hardware, topology: Topology, sizes: Sizes, scratch: Path, entry: str = ENTRY) -> Kernel:
    """kt-kernel on a checkpoint that is written for it. Raises CannotMeasureError with its reason, or PoolError."""
    geometry, sets = _geometry(hardware, "int4", sizes)
    raw = small_config(
        hidden_size=sizes.hidden, moe_intermediate_size=sizes.inner, n_routed_experts=geometry.n_experts,
        num_experts_per_tok=ACTIVE, num_hidden_layers=1, first_k_dense_replace=0,
    )  # fmt: skip
    with TemporaryDirectory(dir=scratch) as folder:
        write_checkpoint(raw, Path(folder) / "model", 0)
        model = ModelConfig.from_json(raw)
        with closing(Checkpoint(Path(folder) / "model")) as checkpoint:
            published = Published(checkpoint, model.expert_name, geometry, model.moe_layers, ACTIVE)
            if reason := refusal(published, "native"):
                raise CannotMeasureError(reason)
            with closing(KtExperts(published, topology, _silent, entry=entry)) as experts:
                layer = model.moe_layers[0]
                seconds = time_experts(experts, layer, sizes.hidden, sets, sizes.rows, sizes.effort)
                return Kernel(f"kt/{experts.isa}/int4/a8", sizes.hidden, sizes.inner, seconds)


def time_experts(
    experts: Experts | KtExperts, layer: int, hidden: int, sets: int, rows: tuple[int, ...], effort: Effort
) -> dict[int, Measured]:
    """Seconds of one expert by rows: an eighth of a layer whose tokens all choose the same eight experts."""
    generator = torch.Generator().manual_seed(0)
    turns = itertools.cycle(range(sets))

    def call_with(n: int) -> Callable[[], float]:
        x = torch.randn((n, hidden), generator=generator)
        chosen = [(ACTIVE * turn + torch.arange(ACTIVE)).expand(n, -1).contiguous() for turn in range(sets)]
        weights = torch.full((n, ACTIVE), 1 / ACTIVE)

        def call() -> float:
            ids = chosen[next(turns)]
            began = time.perf_counter()
            experts.submit(layer, x, ids, weights).wait()
            return time.perf_counter() - began

        return call

    samples = take_turns({n: call_with(n) for n in rows}, effort, leaves_out=True)
    return medians({n: [seconds / ACTIVE for seconds in taken] for n, taken in samples.items()})


def cache_bytes(hardware: Hardware) -> int:
    """All caches of the last level together."""
    last = max((cache.level for cache in hardware.caches), default=0)
    return sum(cache.size * cache.count for cache in hardware.caches if cache.level == last)


def small_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a small model with int4 experts."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {
        "model_type": "kimi_k2", "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
        "num_hidden_layers": 2, "first_k_dense_replace": 0, "num_attention_heads": 1, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-5,
        "vocab_size": 512, "max_position_embeddings": 131072, "rope_theta": 50000.0, "eos_token_id": 258,
        "bos_token_id": 256, "pad_token_id": 511, "norm_topk_prob": True,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    } | changes  # fmt: skip


def _geometry(hardware: Hardware, fmt: ExpertFormat, sizes: Sizes) -> tuple[ExpertGeometry, int]:
    """Experts of a layer, and how many sets of eight they are. Raises CannotMeasureError where memory is short."""
    each = ACTIVE * ExpertGeometry(1, sizes.hidden, sizes.inner).expert_bytes(fmt)
    sets = max(2, -(-max(sizes.expert_bytes, CACHES * cache_bytes(hardware)) // each))
    free = ram()[1]
    sets = min(sets, int(SHARE_OF_RAM * free) // each)
    if not sets:
        raise CannotMeasureError(
            f"eight {fmt} experts take {each / 1e9:.1f} GB, and {free / 1e9:.1f} GB of RAM are free"
        )
    return ExpertGeometry(ACTIVE * sets, sizes.hidden, sizes.inner), sets


def _cpus(topology: Topology) -> list[int]:
    """A CPU for each worker, also where workers are not pinned."""
    pinned = [place.cpu for place in topology.places if place.cpu is not None]
    return pinned or sorted(allowed_cpus())[: len(topology.places)]


def _per_node(cpus: list[int], nodes: list[int], n_bytes: int) -> tuple[Measured, ...]:
    found = []
    for node in sorted(set(nodes)):
        mine = [cpu for cpu, its in zip(cpus, nodes, strict=True) if its == node]
        with closing(ReadCeiling(mine, n_bytes, [node] * len(mine))) as ceiling:
            found.append(median_of(ceiling.rates(len(mine), PASSES)))
    return tuple(found)


def _silent(stage: str, done: int, total: int) -> None:
    """The item's own line is progress enough."""
