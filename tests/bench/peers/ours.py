"""Our own experts through `offload.experts`, one variant for each kernel tier and activation precision."""

import numpy as np
import torch

from offload.config import PROJECTIONS, ExpertFormat, ExpertGeometry, PoolConfig, Precision
from offload.experts import Experts
from offload.repeated import LAYER, Matrices, repeated_store
from offload.store import ExpertStore
from offload.topology import Topology, find_topology
from tests.bench.peers.child import Job, Variant, Work, serve

FORMAT: ExpertFormat = "int4"
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
    store = repeated_store(geometry, FORMAT, _templates(work), topology.nodes)
    if store.notices:
        raise RuntimeError(store.notices[0])
    return store


def _templates(work: Work) -> list[Matrices]:
    parts = {matrix: work.template(matrix) for matrix in PROJECTIONS}
    n_templates = len(parts["gate"][0])
    return [
        {m: (np.array(data[i]), np.array(scales[i])) for m, (data, scales) in parts.items()} for i in range(n_templates)
    ]


if __name__ == "__main__":
    serve(build)
