"""kt_kernel's expert layer on the CPU: int4 with groups of 32, as the checkpoint has it; with AMX its own formats too.

Drives the extension itself, because the package's wrapper cannot be built without a GPU. Needs kt_kernel and torch.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kt_kernel import kt_kernel_ext as kt

from tests.bench.peers.child import MATRICES, Job, Variant, Work, serve

# The class that kt_kernel itself would take for such a checkpoint: the first one it has and the processor can run.
# The first repacks weights into memory of its own; the others read nibbles where they were (measured: loading
# AVX2RawInt4_MOE allocates float32 scales and nothing else), so there every expert gets a copy that stays.
RAW_INT4 = (("AMXInt4_KGroup_MOE", None), ("AVXVNNI256RawInt4_MOE", "avx_vnni"), ("AVX2RawInt4_MOE", None))
REPACKS = "AMXInt4_KGroup_MOE"
WATCHER_NICE = 1
FROM_BF16 = (("kt int4", "AMXInt4_MOE"), ("kt int8", "AMXInt8_MOE"))  # rounds weights anew, one scale for each row


def build(work: Work) -> dict[str, tuple[Variant, str]]:
    """With a worker on every core, and with a core left for the thread that watches the queue, where there are more."""
    flags = _cpu_flags()
    kind = next(name for name, flag in RAW_INT4 if hasattr(kt.moe, name) and (flag is None or flag in flags))
    about, source = f"{kt.__cpu_variant__} {kind}", _source(work, copies=kind != REPACKS)
    per_node = len(work.cpus) // len(work.nodes)
    cpu = _workers(work, per_node)
    variants = {"kt rawint4": (_raw_int4(work, cpu, kind, source), about)}
    if per_node > 1:
        fewer = _workers(work, per_node - 1)
        variants["kt rawint4 spare core"] = (_raw_int4(work, fewer, kind, source), f"{about}, one worker fewer")
    if "amx_int8" in flags:
        for name, kind in FROM_BF16:
            variants[name] = (_from_bf16(work, cpu, kind), f"{kt.__cpu_variant__} {kind}")
    return variants


def _workers(work: Work, per_node: int) -> Any:
    """A pool. The thread that watches its queue spins beside the pinned workers, so it gets a lower priority.

    Two Zen 3 cores, two workers, K2.5 at 32 tokens, three rounds: 1328 ms as it comes, 1149 ms at nice 5 (2026-11-22).
    At nice 1 large calls are as fast and small ones wait less for that thread.
    """
    settings = kt.WorkerPoolConfig()
    settings.subpool_count, settings.subpool_numa_map = len(work.nodes), list(work.nodes)
    settings.subpool_thread_count = [per_node] * len(work.nodes)
    cpu = kt.CPUInfer(settings)
    for thread in Path("/proc/self/task").iterdir():
        if int(thread.name) != os.getpid() and not (thread / "comm").read_text().startswith("numa_"):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), WATCHER_NICE)
    return cpu


def _source(work: Work, copies: bool) -> dict[str, list[np.ndarray]]:
    """What each expert is loaded from, by the name that the configuration has for it."""
    source = {}
    for matrix in MATRICES:
        for part, templates in zip(("projs", "scales"), work.template(matrix), strict=True):
            arrays = [np.array(template) for template in templates]
            every = [arrays[expert % len(arrays)] for expert in range(work.n_experts)]
            source[f"{matrix}_{part}"] = [array.copy() for array in every] if copies and part == "projs" else every
    return source


def _raw_int4(work: Work, cpu: Any, kind: str, source: dict[str, list[np.ndarray]]) -> Variant:
    config = _config(work, cpu)
    for name, arrays in source.items():
        setattr(config, name, [[array.ctypes.data for array in arrays]])
    config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, 32, False
    layer = _loaded(cpu, getattr(kt.moe, kind)(config), torch.arange(work.n_experts))
    return _variant(work, cpu, layer, source)


def _from_bf16(work: Work, cpu: Any, kind: str) -> Variant:
    """Slot e takes the weights of template e % n."""
    config, kept = _config(work, cpu), []
    for matrix in MATRICES:
        templates = np.array(work.array(f"{matrix}-bf16"))
        setattr(config, f"{matrix}_proj", templates.ctypes.data)
        kept.append(templates)
    order = torch.arange(work.n_experts) % len(kept[0])
    return _variant(work, cpu, _loaded(cpu, getattr(kt.moe, kind)(config), order), None)


def _config(work: Work, cpu: Any) -> Any:
    config = kt.moe.MOEConfig(work.n_experts, work.top_k, work.hidden, work.inner, 0)
    config.max_len, config.pool, config.layer_idx = work.max_rows, cpu.backend_, 0
    return config


def _loaded(cpu: Any, layer: Any, order: torch.Tensor) -> Any:
    cpu.submit(layer.load_weights_task(order.data_ptr()))
    cpu.sync()
    return layer


def _variant(work: Work, cpu: Any, layer: Any, kept: object) -> Variant:
    def prepare(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Job:
        rows = torch.tensor([len(x)], dtype=torch.int32)
        given = torch.from_numpy(x).to(torch.bfloat16)
        chosen, shares = torch.from_numpy(ids), torch.from_numpy(weights)
        result = torch.empty_like(given)
        tensors = (chosen, shares, given, result)

        def run() -> None:
            task = layer.forward_task(rows.data_ptr(), work.top_k, *(t.data_ptr() for t in tensors), False)
            cpu.submit(task)
            cpu.sync()

        return Job(run, lambda: result.float().numpy())

    prepare.kept = kept  # type: ignore[attr-defined]  # what the layer reads must outlive it
    return prepare


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split(":", 1)[1].split())


if __name__ == "__main__":
    serve(build)
