"""llama.cpp's expert layer on the CPU: Q4_0 weights, repacked for the vector unit and plain.

Drives the ggml libraries that llama-cpp-python bundles, with the graph that llama.cpp builds for such a layer. Q4_0
has blocks of 32 with a float16 scale, so the checkpoint's int4 weights go over unchanged. Needs NumPy only besides.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.peers.child import MATRICES, Job, Variant, Work, serve

PACKAGE = "llama_cpp"
F32, Q4_0, I32 = 0, 2, 26  # enum ggml_type
BLOCK = 32
CONTEXT_BYTES = 1 << 20  # of tensor descriptions; data lie in buffers


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# name: (result, arguments)
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (InitParams,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_new_tensor_3d": (c_void_p, (c_void_p, c_int, c_int64, c_int64, c_int64)),
    "ggml_mul_mat_id": (c_void_p, (c_void_p,) * 4),
    "ggml_swiglu_split": (c_void_p, (c_void_p,) * 3),
    "ggml_mul": (c_void_p, (c_void_p,) * 3),
    "ggml_add": (c_void_p, (c_void_p,) * 3),
    "ggml_view_2d": (c_void_p, (c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_gallocr_new": (c_void_p, (c_void_p,)),
    "ggml_gallocr_alloc_graph": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
}


class Ggml:
    """The functions above, from whichever of the bundled libraries has them."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ImportError(f"No module named {PACKAGE!r}")
        folder = Path(spec.origin).parent / "lib"
        libraries = [
            ctypes.CDLL(str(folder / f"lib{n}.so"), ctypes.RTLD_GLOBAL) for n in ("ggml-base", "ggml-cpu", "ggml")
        ]
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in FUNCTIONS.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def __getattr__(self, name: str) -> Any:
        return self._functions[f"ggml_{name}"]

    def context(self) -> int:
        return int(self.init(InitParams(CONTEXT_BYTES, None, True)))

    def set(self, tensor: int, array: np.ndarray) -> None:
        self.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def extra_buffer_types(self) -> dict[str, int]:
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        listing = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
        found: dict[str, int] = {}
        while kind := listing[len(found)]:
            found[self.backend_buft_name(kind).decode()] = kind
        return found


def build(work: Work) -> dict[str, tuple[Variant, str]]:
    ggml = Ggml()
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, len(work.cpus))
    repacked = ggml.extra_buffer_types()["CPU_REPACK"]
    return {
        "llama q4_0 repacked": (_layer(work, ggml, backend, repacked), "ggml Q4_0, CPU_REPACK"),
        "llama q4_0": (_layer(work, ggml, backend, ggml.backend_cpu_buffer_type()), "ggml Q4_0, CPU buffer"),
    }


def _layer(work: Work, ggml: Ggml, backend: int, buffer_type: int) -> Variant:
    experts = _weights(work, ggml, buffer_type)
    graphs: dict[int, Callable[..., Job]] = {}

    def prepare(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Job:
        if len(x) not in graphs:
            graphs[len(x)] = _graph(work, ggml, backend, experts, len(x))
        return graphs[len(x)](x, ids, weights)

    return prepare


def _weights(work: Work, ggml: Ggml, buffer_type: int) -> dict[str, int]:
    """The three tensors of all experts. Templates are converted once and their bytes copied to every expert."""
    tensors = {}
    for matrix in MATRICES:
        blocks = q4_0(*work.template(matrix))  # (n, out, in/32 * 18)
        n_out, n_in = (work.hidden, work.inner) if matrix == "down" else (work.inner, work.hidden)
        few, few_buffer = _tensor(ggml, buffer_type, n_in, n_out, len(blocks))
        tensors[matrix], _ = _tensor(ggml, buffer_type, n_in, n_out, work.n_experts)
        ggml.set(few, blocks)
        source, target, size = ggml.get_data(few), ggml.get_data(tensors[matrix]), blocks[0].nbytes
        for expert in range(work.n_experts):
            ctypes.memmove(target + expert * size, source + expert % len(blocks) * size, size)
        ggml.backend_buffer_free(few_buffer)
    return tensors


def _tensor(ggml: Ggml, buffer_type: int, n_in: int, n_out: int, n: int) -> tuple[int, int]:
    context = ggml.context()
    tensor = ggml.new_tensor_3d(context, Q4_0, n_in, n_out, n)
    buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
    if not buffer:
        raise RuntimeError("ggml could not allocate the experts' memory")
    return tensor, buffer


def q4_0(data: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks of a float16 scale and 16 bytes: input i in the low nibbles, i + 16 in the high ones, each value + 8."""
    pairs = np.array(data).view(np.uint8)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    blocks = np.empty((*scales.shape, 2 + BLOCK // 2), np.uint8)
    factors = (np.array(scales).astype(np.uint32) << 16).view(np.float32).astype(np.float16)
    blocks[..., :2] = factors[..., None].view(np.uint8)
    blocks[..., 2:] = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    return blocks.reshape(*data.shape[:2], -1)


def _graph(work: Work, ggml: Ggml, backend: int, experts: dict[str, int], rows: int) -> Callable[..., Job]:
    """The layer for so many tokens, as llama.cpp's build_moe_ffn has it."""
    inputs, c = ggml.context(), ggml.context()
    x = ggml.new_tensor_3d(inputs, F32, work.hidden, 1, rows)
    ids = ggml.new_tensor_2d(inputs, I32, work.top_k, rows)
    shares = ggml.new_tensor_3d(inputs, F32, 1, work.top_k, rows)
    ggml.backend_alloc_ctx_tensors_from_buft(inputs, ggml.backend_cpu_buffer_type())
    up = ggml.mul_mat_id(c, experts["up"], x, ids)
    gate = ggml.mul_mat_id(c, experts["gate"], x, ids)
    each = ggml.mul(c, ggml.mul_mat_id(c, experts["down"], ggml.swiglu_split(c, gate, up), ids), shares)
    row = work.hidden * 4
    parts = [ggml.view_2d(c, each, work.hidden, rows, work.top_k * row, k * row) for k in range(work.top_k)]
    graph = ggml.new_graph(c)
    for part in parts:
        ggml.build_forward_expand(graph, part)
    total = parts[0]
    for part in parts[1:]:
        total = ggml.add(c, total, part)
    ggml.build_forward_expand(graph, total)
    if not ggml.gallocr_alloc_graph(ggml.gallocr_new(ggml.backend_cpu_buffer_type()), graph):
        raise RuntimeError("ggml could not allocate the graph")

    def result() -> np.ndarray:
        y = np.empty((rows, work.hidden), np.float32)
        ggml.backend_tensor_get(total, y.ctypes.data, 0, y.nbytes)
        return y

    def prepare(tokens: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> Job:
        for tensor, values in ((x, tokens), (ids, chosen.astype(np.int32)), (shares, weights)):
            ggml.set(tensor, values)
        return Job(lambda: ggml.backend_graph_compute(backend, graph), result)

    return prepare


if __name__ == "__main__":
    serve(build)
