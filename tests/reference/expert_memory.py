"""Experts in memory as a store holds them, with the dense float64 weights beside them.

Every expert ends where readable memory ends, so a kernel that reads one byte too many dies on the spot.
"""

import ctypes
import itertools
import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from offload import formats
from offload.config import MATRICES, PROJECTIONS, ExpertFormat, ExpertGeometry
from offload.paging import PackedExperts, Pager
from offload.topology import Place, Topology
from tests.reference import experts, packing

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
    pager: Pager | None = None

    @property
    def n_nodes(self) -> int:
        return self.addresses.shape[2]

    def close(self) -> None:
        """Stays open: tests use it again."""


def memory_store(
    fmt: ExpertFormat, geometry: ExpertGeometry, layers: tuple[int, ...] = (3,), seed: int = 0, n_nodes: int = 1
) -> MemoryStore:
    """Random experts, scaled so that gate, up and outputs are of the order of one, each node's share by itself."""
    rng = np.random.default_rng(seed)
    addresses = np.zeros((len(layers), geometry.n_experts, n_nodes, 2), np.int64)
    store = MemoryStore(geometry, fmt, layers, addresses, [], [])
    for layer in range(len(layers)):
        dense: dict[str, list[np.ndarray]] = {projection: [] for projection in PROJECTIONS}
        for expert in range(geometry.n_experts):
            matrices = {}
            for projection in PROJECTIONS:
                shape = geometry.shape(projection)
                weights = (rng.standard_normal(shape) * 1.5 / np.sqrt(shape[1])).astype(np.float32)
                matrices[projection] = quantised(fmt, weights)
                dense[projection].append(experts.dense(fmt, *matrices[projection]))
            for node, units in enumerate(shares(geometry, packing.expert(fmt, geometry, matrices), n_nodes)):
                kept = [guarded(np.concatenate([*part, np.empty(0, np.uint8)])) for part in units]
                store.owners += kept
                addresses[layer, expert, node] = [array.ctypes.data for array in kept]
        store.dense.append(experts.Layer(fmt, **dense))
    return store


def paged(
    store: MemoryStore, path: Path, n_slots: int, start: int = 0, read_ahead: bool | None = None
) -> "MemoryStore":
    """The same experts in a file of which only so many are in memory at once. `start` is the first one's offset."""
    g, fmt = store.geometry, store.format
    sizes = [
        [len(g.units_of(m, n, store.n_nodes)) * g.unit_bytes(m, fmt) for m in MATRICES] for n in range(store.n_nodes)
    ]
    gate_up = g.n_units("gate_up") * g.unit_bytes("gate_up", fmt)
    firsts = [
        (g.units_of("gate_up", n, store.n_nodes).start, g.units_of("down", n, store.n_nodes).start)
        for n in range(store.n_nodes)
    ]
    inside = np.array(
        [(a * g.unit_bytes("gate_up", fmt), gate_up + b * g.unit_bytes("down", fmt)) for a, b in firsts], np.int64
    )
    with path.open("wb") as file:
        file.write(bytes(start))
        for nodes in store.addresses.reshape(-1, store.n_nodes, 2):
            for matrix in range(2):
                for node in range(store.n_nodes):
                    file.write(ctypes.string_at(int(nodes[node, matrix]), sizes[node][matrix]))
    lying = PackedExperts(path, start, g.expert_bytes(fmt), len(store.layers), g.n_experts, inside)
    pager = Pager(lying, n_slots * lying.slot_bytes, read_ahead)
    assert pager.n_slots == n_slots
    return replace(store, addresses=pager.addresses, pager=pager)


def shares(
    geometry: ExpertGeometry, units: tuple[list[np.ndarray], list[np.ndarray]], n_nodes: int
) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Each node's gate_up units and down units: as near to equal numbers as possible."""
    gate_up, down = units
    bounds = [(len(gate_up) * n // n_nodes, len(down) * n // n_nodes) for n in range(n_nodes + 1)]
    return [(gate_up[a:c], down[b:d]) for (a, b), (c, d) in itertools.pairwise(bounds)]


def unpinned(workers: int, n_nodes: int = 1) -> Topology:
    """Workers without cores of their own, dealt over nodes that may not exist."""
    return Topology(tuple([0] * n_nodes), tuple(Place(None, worker % n_nodes) for worker in range(workers)))
