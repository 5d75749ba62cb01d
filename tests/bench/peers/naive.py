"""The plain way in torch: bfloat16 weights, one matrix product for each expert's tokens. Needs torch."""

import numpy as np
import torch

from tests.bench.peers.child import MATRICES, Job, Variant, Work, serve


def build(work: Work) -> dict[str, tuple[Variant, str]]:
    torch.set_num_threads(len(work.cpus))
    experts = {matrix: _own(work, matrix) for matrix in MATRICES}

    def prepare(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Job:
        tokens = torch.from_numpy(x).bfloat16()
        chosen, shares = torch.from_numpy(ids), torch.from_numpy(weights)
        y = torch.zeros(x.shape)

        def run() -> None:
            for expert in torch.unique(chosen).tolist():
                rows, slots = torch.where(chosen == expert)
                some = tokens[rows]
                gate, up, down = (experts[matrix][expert].T for matrix in MATRICES)
                h = torch.nn.functional.silu(some @ gate) * (some @ up)
                y.index_add_(0, rows, (h @ down).float() * shares[rows, slots, None])

        return Job(run, y.numpy)

    return {"torch bf16": (prepare, f"torch {torch.__version__}, one product for each expert")}


def _own(work: Work, matrix: str) -> torch.Tensor:
    """(E, out, in), every expert in memory of its own."""
    templates = np.array(work.array(f"{matrix}-bf16"))
    every = np.empty((work.n_experts, *templates.shape[1:]), np.uint16)
    for expert in range(work.n_experts):
        every[expert] = templates[expert % len(templates)]
    return torch.from_numpy(every.view(np.int16)).view(torch.bfloat16)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(build)
