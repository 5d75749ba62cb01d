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
# With as many workers as cores the thread that watches the queue takes time from them. At a lower priority large calls
# are faster and small ones slower, which wait for it by the scheduler's tick (two idle Zen 3 cores, 2026-11-22: K2.5
# at one token 63 ms as it comes and 48 ms so, a layer of 7 MB 0.2 ms and 16 ms). So both take part.
YIELDING = 5
FROM_BF16 = (("kt int4", "AMXInt4_MOE"), ("kt int8", "AMXInt8_MOE"))  # rounds weights anew, one scale for each row


def build(work: Work) -> dict[str, tuple[Variant, str]]:
    flags = _cpu_flags()
    settings = kt.WorkerPoolConfig()
    settings.subpool_count, settings.subpool_numa_map = len(work.nodes), list(work.nodes)
    settings.subpool_thread_count = [len(work.cpus) // len(work.nodes)] * len(work.nodes)
    cpu = kt.CPUInfer(settings)
    watchers = _watchers()
    kind = next(name for name, flag in RAW_INT4 if hasattr(kt.moe, name) and (flag is None or flag in flags))
    about, layer = f"{kt.__cpu_variant__} {kind}", _raw_int4(work, cpu, kind)
    variants = {"kt rawint4": (layer, about)}
    if os.geteuid() == 0:  # who else may give a thread its priority back
        variants = {
            "kt rawint4": (_at_priority(layer, watchers, 0), about),
            "kt rawint4 yielding": (
                _at_priority(layer, watchers, YIELDING),
                f"{about}, queue thread at nice {YIELDING}",
            ),
        }
    if "amx_int8" in flags:
        for name, kind in FROM_BF16:
            variants[name] = (_from_bf16(work, cpu, kind), f"{kt.__cpu_variant__} {kind}")
    return variants


def _watchers() -> list[int]:
    """The thread that watches kt_kernel's queue: it spins beside the pinned workers."""
    threads = {int(folder.name): (folder / "comm").read_text() for folder in Path("/proc/self/task").iterdir()}
    return [thread for thread, name in threads.items() if thread != os.getpid() and not name.startswith("numa_")]


def _at_priority(variant: Variant, watchers: list[int], nice: int) -> Variant:
    def prepare(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Job:
        for thread in watchers:
            os.setpriority(os.PRIO_PROCESS, thread, nice)
        return variant(x, ids, weights)

    return prepare


def _raw_int4(work: Work, cpu: Any, kind: str) -> Variant:
    config, kept = _config(work, cpu), []
    for matrix in MATRICES:
        for part, templates in zip(("projs", "scales"), work.template(matrix), strict=True):
            arrays = [np.array(template) for template in templates]
            every = [arrays[expert % len(arrays)] for expert in range(work.n_experts)]
            if part == "projs" and kind != REPACKS:
                every = [array.copy() for array in every]
            setattr(config, f"{matrix}_{part}", [[array.ctypes.data for array in every]])
            kept += every
    config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, 32, False
    layer = _loaded(cpu, getattr(kt.moe, kind)(config), torch.arange(work.n_experts))
    return _variant(work, cpu, layer, kept if kind != REPACKS else [])


def _from_bf16(work: Work, cpu: Any, kind: str) -> Variant:
    """Slot e takes the weights of template e % n."""
    config, kept = _config(work, cpu), []
    for matrix in MATRICES:
        templates = np.array(work.array(f"{matrix}-bf16"))
        setattr(config, f"{matrix}_proj", templates.ctypes.data)
        kept.append(templates)
    order = torch.arange(work.n_experts) % len(kept[0])
    return _variant(work, cpu, _loaded(cpu, getattr(kt.moe, kind)(config), order), [])


def _config(work: Work, cpu: Any) -> Any:
    config = kt.moe.MOEConfig(work.n_experts, work.top_k, work.hidden, work.inner, 0)
    config.max_len, config.pool, config.layer_idx = work.max_rows, cpu.backend_, 0
    return config


def _loaded(cpu: Any, layer: Any, order: torch.Tensor) -> Any:
    cpu.submit(layer.load_weights_task(order.data_ptr()))
    cpu.sync()
    return layer


def _variant(work: Work, cpu: Any, layer: Any, kept: list[np.ndarray]) -> Variant:
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
