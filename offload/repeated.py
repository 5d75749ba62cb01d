"""Stores of experts that are copies of a few: as many bytes in memory as a model's, made in a second.

What benches and `placement.measure` time kernels on; speed does not depend on which numbers the weights are, only on
that they are ordinary ones. Knows no checkpoint and no clock.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from offload import formats
from offload.config import MATRICES, PROJECTIONS, ExpertFormat, ExpertGeometry, Projection
from offload.kernels.pack import pack_expert
from offload.numa import huge_memory, prefer_node
from offload.store import ONE_NODE, ExpertStore

Packed = npt.NDArray[np.uint8]
Matrices = Mapping[Projection, tuple[formats.Array, formats.Array | None]]  # data and scales as `formats` draws them

LAYER = 0
DRAWN_ROWS = 128  # the rows of a matrix repeat after so many, which is also what an fp8 scale covers


def random_expert(fmt: ExpertFormat, geometry: ExpertGeometry, seed: int = 0) -> Matrices:
    """Quantised normal weights; gate, up and outputs are of the order of one for inputs that are."""
    rng = np.random.default_rng(seed)
    matrices: dict[Projection, tuple[formats.Array, formats.Array | None]] = {}
    for projection in PROJECTIONS:
        n_out, n_in = geometry.shape(projection)
        drawn = rng.standard_normal((min(n_out, DRAWN_ROWS), n_in), np.float32) / np.float32(n_in**0.5)
        data, scales = _quantised(fmt, drawn)
        if scales is not None:
            scales = np.resize(scales, (-(-n_out * len(scales) // len(data)), scales.shape[1]))
        matrices[projection] = np.resize(data, (n_out, data.shape[1])), scales
    return matrices


def repeated_store(
    geometry: ExpertGeometry, fmt: ExpertFormat, experts: Sequence[Matrices], nodes: Sequence[int] = ONE_NODE
) -> ExpertStore:
    """One layer, number `LAYER`: expert e has the weights of `experts[e % len(experts)]` in memory of its own.

    Each of the memory `nodes` holds its share; the store's notices say where the system would not promise that.
    """
    packed = [pack_expert(fmt, geometry, matrices) for matrices in experts]
    addresses = np.zeros((1, geometry.n_experts, len(nodes), len(MATRICES)), np.int64)
    owners, notices = [], []
    for node, number in enumerate(nodes):
        shares = [_share(geometry, fmt, expert, node, len(nodes)) for expert in packed]
        memory = huge_memory(geometry.n_experts * len(shares[0]))
        if len(nodes) > 1 and (why := prefer_node(memory, number)):
            notices.append(f"memory node {number}: {why}; its experts lie wherever the system puts them")
        arena = np.frombuffer(memory, np.uint8).reshape(geometry.n_experts, -1)
        for expert in range(geometry.n_experts):
            arena[expert] = shares[expert % len(shares)]
        addresses[0, :, node, 0] = arena.ctypes.data + np.arange(geometry.n_experts) * arena.shape[1]
        gate_up = len(geometry.units_of("gate_up", node, len(nodes))) * geometry.unit_bytes("gate_up", fmt)
        addresses[0, :, node, 1] = addresses[0, :, node, 0] + gate_up
        owners.append(memory)
    return ExpertStore(geometry, fmt, (LAYER,), addresses, owners, notices)


def _quantised(fmt: ExpertFormat, weights: formats.Float) -> tuple[formats.Array, formats.Array | None]:
    if fmt == "bf16":
        return formats.float32_to_bf16(weights), None
    if fmt == "fp8":
        return formats.quantise_fp8(weights)
    return formats.quantise_int4(weights) if fmt == "int4" else formats.quantise_int8(weights)


def _share(geometry: ExpertGeometry, fmt: ExpertFormat, packed: Packed, node: int, n_nodes: int) -> Packed:
    """One memory node's units of an expert that was packed for one node."""
    pieces, start = [], 0
    for matrix in MATRICES:
        size, units = geometry.unit_bytes(matrix, fmt), geometry.units_of(matrix, node, n_nodes)
        pieces.append(packed[start + units.start * size : start + units.stop * size])
        start += geometry.n_units(matrix) * size
    return np.concatenate(pieces)
