"""Our own experts through `offload.experts`, one variant for each kernel tier and activation precision."""

import numpy as np
import torch

from offload.config import MATRICES, PROJECTIONS, ExpertFormat, ExpertGeometry, PoolConfig, Precision
from offload.experts import Experts
from offload.kernels.pack import pack_expert
from offload.numa import huge_memory, prefer_node
from offload.store import ExpertStore
from offload.topology import Topology, find_topology
from tests.bench.peers.child import Job, Variant, Work, serve

FORMAT: ExpertFormat = "int4"
LAYER = 0
PRECISIONS: tuple[Precision, ...] = ("a8", "a16")


def build(work: Work) -> dict[str, tuple[Variant, str]]:
    topology = find_topology(len(work.cpus))
    store = _store(work, topology)
    variants = {}
    for tier in work.tiers:
        for precision in PRECISIONS:
            config = PoolConfig(threads=len(work.cpus), precision=precision, isa=tier)  # type: ignore[arg-type]
            experts = Experts(store, config, topology)
            variants[f"hybrid {tier} {precision}"] = (_variant(experts), f"int4 weights, {precision} activations")
    return variants


def _variant(experts: Experts) -> Variant:
    def prepare(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Job:
        tokens, chosen, shares = (torch.from_numpy(array) for array in (x, ids, weights))
        results: list[torch.Tensor] = []

        def run() -> None:
            results.append(experts.submit(LAYER, tokens, chosen, shares).wait())

        return Job(run, lambda: results[-1].numpy())

    return prepare


def _store(work: Work, topology: Topology) -> ExpertStore:
    """All experts in memory, each node's units together."""
    geometry = ExpertGeometry(work.n_experts, work.hidden, work.inner)
    templates = _templates(work, geometry)
    n_nodes = len(topology.nodes)
    addresses = np.zeros((1, work.n_experts, n_nodes, 2), np.int64)
    owners = []
    for node in range(n_nodes):
        shares = [_share(geometry, template, node, n_nodes) for template in templates]
        memory = huge_memory(work.n_experts * len(shares[0]))
        if n_nodes > 1 and (failed := prefer_node(memory, topology.nodes[node])):
            raise RuntimeError(f"memory of node {topology.nodes[node]}: {failed}")
        arena = np.frombuffer(memory, np.uint8).reshape(work.n_experts, -1)
        for expert in range(work.n_experts):
            arena[expert] = shares[expert % len(shares)]
        addresses[0, :, node, 0] = arena.ctypes.data + np.arange(work.n_experts) * arena.shape[1]
        gate_up = len(geometry.units_of("gate_up", node, n_nodes)) * geometry.unit_bytes("gate_up", FORMAT)
        addresses[0, :, node, 1] = addresses[0, :, node, 0] + gate_up
        owners.append(memory)
    return ExpertStore(geometry, FORMAT, (LAYER,), addresses, owners, True, ())


def _templates(work: Work, geometry: ExpertGeometry) -> list[np.ndarray]:
    parts = {matrix: work.template(matrix) for matrix in PROJECTIONS}
    return [
        pack_expert(
            FORMAT, geometry, {m: (np.array(data[i]), np.array(scales[i])) for m, (data, scales) in parts.items()}
        )
        for i in range(len(parts["gate"][0]))
    ]


def _share(geometry: ExpertGeometry, packed: np.ndarray, node: int, n_nodes: int) -> np.ndarray:
    """One memory node's units of an expert that was packed for one node."""
    pieces, start = [], 0
    for matrix in MATRICES:
        size, units = geometry.unit_bytes(matrix, FORMAT), geometry.units_of(matrix, node, n_nodes)
        pieces.append(packed[start + units.start * size : start + units.stop * size])
        start += geometry.n_units(matrix) * size
    return np.concatenate(pieces)


if __name__ == "__main__":
    serve(build)
