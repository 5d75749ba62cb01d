"""Which of the two runs the experts: our kernels (numba) or kt-kernel.

"auto" lets both run a few of the model's own experts and takes kt-kernel only where it is faster at batch 1. Knows
neither models nor requests. Hybrid's engine asks once, before it opens the experts.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Literal

import torch

from offload.config import ExpertGeometry, PoolConfig
from offload.experts import Experts
from offload.kt import INSTALL, KtExperts, Published, installed, refusal
from offload.pool import PoolError
from offload.sources import Target
from offload.store import open_store
from offload.topology import Topology

Backend = Literal["numba", "kt"]

TRIAL_BYTES = 200_000_000  # of experts; one backend at a time, with the pages of the checkpoint that they come from
TRIAL_SECONDS = 0.3  # for each backend and batch
TRIAL_CALLS = 100  # at most
BATCHES = (1, 8)

Times = tuple[str, dict[int, float]]  # the kernels' name; batch to seconds of one layer


class BackendError(ValueError):
    """The backend that was asked for cannot run these experts. One line with the remedy."""


def choose(
    asked: Literal["numba", "kt", "auto"], published: Published, target: Target, pool: PoolConfig, topology: Topology
) -> tuple[Backend, str]:
    """The backend, and a line for the user, empty where there was nothing to choose. Raises BackendError."""
    if asked == "numba":
        return "numba", ""
    if not installed():
        if asked == "kt":
            raise BackendError(f"--experts kt needs kt-kernel: {INSTALL}")
        return "numba", "--experts auto: numba is used: kt-kernel is not installed"
    reason = _unheard(pool) or refusal(published, target)
    if asked == "kt":
        if reason is not None:
            raise BackendError(f"--experts kt: {reason}; use --experts numba")
        return "kt", ""
    if reason is not None:
        return "numba", f"--experts auto: numba is used, not kt-kernel: {reason}"
    try:
        return decide(*try_both(published, pool, topology))
    except PoolError as error:
        return "numba", f"--experts auto: numba is used: {error}"


def _unheard(pool: PoolConfig) -> str | None:
    """The wish that kt-kernel would not heed."""
    if pool.precision != "a8":
        return f"it chooses its activations itself, not by --expert-precision {pool.precision}"
    if pool.isa is not None:
        return f"it chooses its instructions itself, not by --isa {pool.isa}"
    return None


def decide(numba: Times, kt: Times) -> tuple[Backend, str]:
    """The faster one at batch 1, and the figures."""
    backend: Backend = "kt" if kt[1][1] < numba[1][1] else "numba"
    shown = [f"{name} {' and '.join(f'{times[n] * 1e3:.2f}' for n in BATCHES)}" for name, times in (numba, kt)]
    batches = " and ".join(map(str, BATCHES))
    return backend, f"--experts auto: {backend} is used; ms for a layer's batch of {batches}: {', '.join(shown)}"


def try_both(published: Published, pool: PoolConfig, topology: Topology) -> tuple[Times, Times]:
    """Time both on as many of the first layer's experts as the trial may hold. One after the other: kt-kernel's
    threads go on spinning for a while after a call."""
    whole = published.geometry
    few = max(published.per_token, min(whole.n_experts, TRIAL_BYTES // published.expert_bytes))
    geometry = ExpertGeometry(few, whole.hidden, whole.inner)
    some = replace(published, geometry=geometry, layers=published.layers[:1])
    with closing(KtExperts(some, topology, _silent)) as kt:
        kt_times = time_batches(kt, some)
    with _numba(some, pool, topology) as experts:
        return ("numba", time_batches(experts, some)), (f"kt ({kt.isa})", kt_times)


def time_batches(experts: Experts | KtExperts, published: Published) -> dict[int, float]:
    """Median seconds of a layer, by batch."""
    generator = torch.Generator().manual_seed(0)

    def once(n: int) -> float:
        x = torch.randn((n, published.geometry.hidden), generator=generator)
        weights = torch.rand((n, published.per_token), generator=generator)
        scores = torch.rand((n, published.geometry.n_experts), generator=generator)
        ids = scores.topk(published.per_token, -1).indices
        began = time.perf_counter()
        experts.submit(published.layers[0], x, ids, weights).wait()
        return time.perf_counter() - began

    once(1)  # warms up
    found = {}
    for n in BATCHES:
        seconds = [once(n)]
        while sum(seconds) < TRIAL_SECONDS and len(seconds) < TRIAL_CALLS:
            seconds.append(once(n))
        found[n] = statistics.median(seconds)
    return found


@contextmanager
def _numba(published: Published, pool: PoolConfig, topology: Topology) -> Iterator[Experts]:
    store = open_store(
        published.checkpoint,
        published.prefix,
        published.geometry,
        published.layers,
        "native",
        _silent,
        nodes=topology.nodes,
    )
    with closing(store), closing(Experts(store, pool, topology)) as experts:
        yield experts


def _silent(stage: str, done: int, total: int) -> None:
    """A trial shows no progress."""
