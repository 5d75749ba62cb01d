"""The process that runs kt-kernel: loads the experts, then answers one request at a time.

A process of its own because kt-kernel's calls hold the interpreter lock, because it ends the whole process when
something goes wrong, and because its worker threads cannot be taken down again. Only the raw extension is loaded (no
torch). Requests come in shared memory and are announced on a socket; every failure here is the end of the process.
Started by `offload.kt`, which has checked everything: out-of-range sizes would corrupt kt-kernel's memory.
"""

import fcntl
import json
import mmap
import os
import select
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from offload.checkpoint import Checkpoint
from offload.config import GROUP, LINE, PROJECTIONS
from offload.isa import cpu_flags

REQUEST = struct.Struct("<iii")  # position of the layer, rows, experts for each row
DONE = b"."
PACKAGE = "kt_kernel"


@dataclass(frozen=True, slots=True)
class Regions:
    """Where the shared memory holds what, in bytes from its start; all are arrays without gaps."""

    x: int  # bf16 (rows, hidden)
    y: int  # bf16 (rows, hidden)
    ids: int  # int64 (rows, k)
    weights: int  # float32 (rows, k)
    end: int

    @classmethod
    def of(cls, rows: int, hidden: int, per_token: int) -> "Regions":
        sizes = (2 * rows * hidden, 2 * rows * hidden, 8 * rows * per_token, 4 * rows * per_token)
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // LINE) * LINE)
        return cls(*starts)


@dataclass(frozen=True, slots=True)
class Setup:
    """What the parent tells at the start, as one line of JSON."""

    directory: str
    names: list[list[list[str]]]  # of the matrices: layer, expert, projection
    hidden: int
    inner: int
    per_token: int
    rows: int  # most in one request
    threads: list[int]  # of each memory node


def main(bell: int, memory: int) -> None:
    """Both are file descriptors. Serves until standard input, which the parent holds, is closed."""
    setup = Setup(**json.loads(sys.stdin.buffer.readline()))
    _end_with_parent()
    with socket.socket(fileno=bell) as line:
        regions = Regions.of(setup.rows, setup.hidden, setup.per_token)
        shared = np.frombuffer(mmap.mmap(memory, regions.end), np.uint8)
        _Layers(setup).serve(line, regions, shared.ctypes.data)


def _end_with_parent() -> None:
    """Have the system end this process when the parent closes standard input or dies, even amid native code."""
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO ends a process
    closed = select.poll()
    closed.register(0, 0)
    if closed.poll(0):  # it was gone before
        sys.exit(1)


class _Layers:
    """kt-kernel's objects, one for each layer."""

    def __init__(self, setup: Setup) -> None:
        extension, variant = _extension()
        self._setup = setup
        self._kernels = extension.moe
        self.name = _class_name(self._kernels, variant, cpu_flags())
        self._runner = extension.CPUInfer(self._workers(extension))
        # The AVX2 class goes on reading the mapped bytes; the others copy them. Mapped pages can be dropped by the
        # system, so keeping them costs nothing.
        self._checkpoint = Checkpoint(Path(setup.directory))
        self._order = np.arange(len(setup.names[0]), dtype=np.int64)
        self._layers: list[Any] = []

    def serve(self, line: socket.socket, regions: Regions, base: int) -> None:
        """Say the kernel's name, then `DONE` for every layer loaded and every request computed."""
        line.send(self.name.encode())
        for names in self._setup.names:
            self._layers.append(self._load(len(self._layers), names))
            line.send(DONE)
        rows = np.zeros(1, np.int32)
        while request := line.recv(REQUEST.size):
            layer, rows[0], k = REQUEST.unpack(request)
            self._run(
                self._layers[layer].forward_task(
                    rows.ctypes.data,
                    k,
                    base + regions.ids,
                    base + regions.weights,
                    base + regions.x,
                    base + regions.y,
                    False,  # not on top of an earlier result
                )
            )
            line.send(DONE)

    def _workers(self, extension: Any) -> Any:
        """kt-kernel's numbering of nodes is an index into its own list of them, so it must be 0, 1, 2 …"""
        setup, config = self._setup, extension.WorkerPoolConfig()
        n_nodes = len(setup.threads)
        splits = self.name.startswith("AMX") and setup.inner % (2 * GROUP * n_nodes) == 0
        threads = setup.threads if splits else [sum(setup.threads)]
        config.subpool_count = len(threads)
        config.subpool_numa_map = list(range(len(threads)))
        config.subpool_thread_count = threads
        return config

    def _load(self, position: int, names: Sequence[Sequence[str]]) -> Any:
        setup = self._setup
        self._read_ahead(names)
        config = self._kernels.MOEConfig(len(names), setup.per_token, setup.hidden, setup.inner, 0)
        config.max_len, config.pool, config.layer_idx = setup.rows, self._runner.backend_, position
        quantisation = config.quant_config
        quantisation.bits, quantisation.group_size, quantisation.zero_point = 4, GROUP, False
        config.quant_config = quantisation
        for i, projection in enumerate(PROJECTIONS):
            for what, suffix in (("projs", ".weight_packed"), ("scales", ".weight_scale")):
                addresses = [self._checkpoint.address(expert[i] + suffix) for expert in names]
                setattr(config, f"{projection}_{what}", [addresses])
        layer = getattr(self._kernels, self.name)(config)
        self._run(layer.load_weights_task(self._order.ctypes.data))
        return layer

    def _read_ahead(self, names: Sequence[Sequence[str]]) -> None:
        infos = [
            self._checkpoint.info(name + suffix)
            for expert in names
            for name in expert
            for suffix in (".weight_packed", ".weight_scale")
        ]
        for info in sorted(infos, key=lambda info: (info.path, info.offset)):
            self._checkpoint.read_ahead(info.path, info.offset, info.offset + info.n_bytes)

    def _run(self, task: object) -> None:
        self._runner.submit(task)
        self._runner.sync()


def _extension() -> tuple[Any, str]:
    """The extension for this processor and its variant's name, without the package around it: that imports torch."""
    spec = util.find_spec(PACKAGE)
    folder = Path((spec.submodule_search_locations or [""])[0] if spec else "")
    loader = util.spec_from_file_location("kt_kernel_cpu_detect", folder / "_cpu_detect.py")
    assert loader is not None and loader.loader is not None
    detect = util.module_from_spec(loader)
    loader.loader.exec_module(detect)
    extension, variant = detect.initialize()
    return extension, str(variant)


def _class_name(kernels: Any, variant: str, flags: frozenset[str]) -> str:
    """The class for published int4, as kt-kernel itself would choose it."""
    wanted: Mapping[str, bool] = {
        "AMXInt4_KGroup_MOE": variant != "avx2",
        "AVXVNNI256RawInt4_MOE": "avx_vnni" in flags,
        "AVX2RawInt4_MOE": True,
    }
    for name, usable in wanted.items():
        if usable and hasattr(kernels, name):
            return name
    raise RuntimeError(f"this kt-kernel ({variant}) has no class for int4 experts; install kt-kernel==0.7.2")
