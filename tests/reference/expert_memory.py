"""Experts in memory as a store holds them, with the dense float64 weights beside them.

Every tensor ends where readable memory ends, so a kernel that reads one byte too many dies on the spot; that also
gives the tensors odd addresses.
"""

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np

from offload import formats
from offload.config import PROJECTIONS, ExpertFormat, ExpertGeometry
from tests.reference import experts

PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is followed by a page that may not be read."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = np.frombuffer(mmap.mmap(-1, size + page), np.uint8)
    start = memory.ctypes.data
    if _libc.mprotect(start + size, page, PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = memory[size - array.nbytes : size]
    copy[:] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    return copy


def quantised(fmt: ExpertFormat, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Data (int4 as bytes) and scales of float32 weights (out, in)."""
    if fmt == "int4":
        data, scales = formats.quantise_int4(weights)
        return data.view(np.uint8), scales
    if fmt == "bf16":
        return formats.float32_to_bf16(weights), None
    return formats.quantise_int8(weights) if fmt == "int8" else formats.quantise_fp8(weights)


@dataclass
class MemoryStore:
    """What Experts needs of offload.store.ExpertStore."""

    geometry: ExpertGeometry
    format: ExpertFormat
    layers: tuple[int, ...]
    addresses: np.ndarray
    dense: list[experts.Layer]  # by layer
    owners: list[np.ndarray]
    resident: bool = True


def memory_store(
    fmt: ExpertFormat, geometry: ExpertGeometry, layers: tuple[int, ...] = (3,), seed: int = 0
) -> MemoryStore:
    """Random experts, scaled so that gate, up and outputs are of the order of one."""
    rng = np.random.default_rng(seed)
    addresses = np.zeros((len(layers), geometry.n_experts, 3, 2), np.int64)
    store = MemoryStore(geometry, fmt, layers, addresses, [], [])
    for layer in range(len(layers)):
        dense: dict[str, list[np.ndarray]] = {projection: [] for projection in PROJECTIONS}
        for expert in range(geometry.n_experts):
            for i, projection in enumerate(PROJECTIONS):
                shape = geometry.shape(projection)
                weights = (rng.standard_normal(shape) * 1.5 / np.sqrt(shape[1])).astype(np.float32)
                data, scales = quantised(fmt, weights)
                dense[projection].append(experts.dense(fmt, data, scales))
                kept = [guarded(array) for array in (data, scales) if array is not None]
                store.owners += kept
                addresses[layer, expert, i, : len(kept)] = [array.ctypes.data for array in kept]
        store.dense.append(experts.Layer(fmt, **dense))
    return store
