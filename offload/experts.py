"""The routed experts of a model: submit one layer's tokens, go on, wait for the sum.

The facade that hybrid talks to: torch tensors in, torch tensors out, on any device. Knows layers by number and
experts by id, no model and no request. The work is done by kernels.layer on a WorkerPool, with the job of job.py; a
device's tokens come by handoff.py. This file says when, and counts.

A token whose input holds NaN or an infinity gets NaN in every output with int4 and int8 (its scale becomes NaN); with
bf16 and fp8 it spreads as float arithmetic has it. The other tokens of the batch are not touched.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload.config import PoolConfig
from offload.handoff import Handoff, HostTokens
from offload.isa import choose
from offload.job import LayerJob
from offload.kernels import grouping
from offload.kernels.grouping import MASKED, UNKNOWN_EXPERT
from offload.kernels.table import kernels
from offload.paging import PagingStats
from offload.pool import STUCK_SECONDS, PoolError, WorkerPool
from offload.store import ExpertStore
from offload.topology import Topology
from offload.warming import Warmer, WarmStats, shared_cache

PIECE_ROWS = 2048  # of a sum that come to the device at a time: 59 MB of float32 at 7168 hidden


@dataclass(slots=True)
class ExpertStats:
    """Counters since the start; they only grow."""

    layers_run: int = 0
    tokens: int = 0
    assignments: int = 0  # pairs of a token and an expert
    distinct_experts: int = 0  # summed over the layers run
    bytes_read: int = 0  # of those experts
    seconds: float = 0.0  # from submit until wait has the result
    waited: float = 0.0  # of these, in wait: the caller had nothing else to do


class Choices(NamedTuple):
    """Which experts tokens were routed to."""

    layers: tuple[int, ...]
    counts: npt.NDArray[np.int64]  # (L, E): tokens that chose each expert; one without an expert (id -1) adds nothing
    tokens: int  # that went through the first of the layers


class Pending:
    """A submitted layer."""

    def __init__(
        self, experts: "Experts", tokens: HostTokens, like: torch.Tensor, staged: bool = False, sent: bool = False
    ) -> None:
        self._experts, self._tokens, self._like = experts, tokens, like
        self._staged = staged  # the sum's buffer is used again
        self.sent = sent  # the workers begin when the flag comes
        self._started = time.perf_counter()

    def wait(self) -> torch.Tensor:
        """Block until the sum is there: (T, D), in x's dtype, on x's device. Raises PoolError when a worker failed."""
        return self.total().to(self._like.dtype)

    def total(self) -> torch.Tensor:
        """The same in float32, as it was added up."""
        self._finish()
        result, device = self._tokens.result, self._like.device
        return (
            torch.empty_like(result, device=device).copy_(result, non_blocking=True)
            if self._staged
            else result.to(device)
        )

    def add_to(self, out: torch.Tensor) -> None:
        """The same added to `out` (T, D) float32 on the device, some rows at a time."""
        self._finish()
        for some, mine in zip(torch.split(out, PIECE_ROWS), torch.split(self._tokens.result, PIECE_ROWS), strict=True):
            some += mine.to(out.device, non_blocking=True)

    def _finish(self) -> None:
        self._experts._finish(self, self._started, self._tokens if self.sent else None)


class Experts:
    """All layers' experts and the workers that run them. Used by one thread."""

    def __init__(
        self,
        store: ExpertStore,
        config: PoolConfig,
        topology: Topology,
        sender: torch.device | None = None,
        warm: bool = False,
    ) -> None:
        """Compiles or loads the kernels that this store and precision need, then starts the workers.

        The store must be split over the topology's nodes; it is closed with these experts. `sender` is the device whose
        tokens release the workers without waiting for it (handoff.py); others are waited for, and so is this one where
        experts come from the disk. `warm` lets idle workers read ahead into their caches (warming.py).
        Raises ValueError when `config.isa` cannot run here.
        """
        self._store, self._sender = store, sender
        self.isa = choose(config.isa)
        grouping.warm()
        self._kernels = kernels(self.isa, store.format, config.precision)
        self._index = {layer: i for i, layer in enumerate(store.layers)}
        self._expert_bytes = store.geometry.expert_bytes(store.format)
        self._stats = ExpertStats()
        self._pager = store.pager
        self._k = 0  # experts of a token, as last submitted
        self._pending: Pending | None = None
        self._late: object = None  # what a job reads that begins only when its experts have come
        self._pool = WorkerPool(topology.places)
        nodes = np.array([place.node for place in topology.places], np.int64)
        self._job = LayerJob(store, self._kernels, nodes)
        self._seen = 0  # tokens, by the first layer
        self._lost = False  # the running layer was interrupted between two of its parts
        self._handoff = None if sender is None else Handoff(self._pool, sender, STUCK_SECONDS)
        if sender is not None and sender.type == "cuda":
            self._pool.spin_between_jobs()
        self._warmer = Warmer(self._job, shared_cache()) if warm and self._pager is None else None

    @property
    def n_workers(self) -> int:
        return self._pool.n_workers

    @property
    def wants_hints(self) -> bool:
        """True where a hint can do something: some experts are on the disk, or idle workers warm their caches."""
        return self._pager is not None or self._warmer is not None

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pending:
        """Start y = sum_k weights_k * down(silu(gate x) * up x) for every row of x (T, D).

        `ids` (T, K) are experts of the layer, any integer type, -1 for none; `weights` (T, K) are the router's. x may
        be on any device and of any float type; on the CPU in float32 it is read in place, so leave it alone until
        `wait`.
        Raises ValueError for shapes or ids that do not fit (for a sender's ids only `wait` does) and RuntimeError while
        another layer is running.
        """
        if self._pager is not None or not self._sends(x):
            return self.start(layer, x, self.fetch(x, ids, weights))
        self._ready(x, ids, weights)
        assert self._handoff is not None, "a sender has one"
        index, warming = self._find(layer), self._warmer is not None and self._warmer.running
        tokens = self._handoff.send(x, ids, weights)
        self._pool.reserve((self, tokens), after=warming)
        stop_word = self._warmer.stop_word if self._warmer is not None and warming else 0
        self._handoff.post(self._kernels.layer, self._job.grouping(index, *tokens), stop_word)
        self._pending = Pending(self, tokens, x, staged=True, sent=True)
        self._began(index, ids)
        return self._pending

    def fetch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HostTokens:
        """The first half of `submit`: the tokens on the host, for a caller who looks at the ids before `start`."""
        self._ready(x, ids, weights)
        if self._handoff is not None and self._sends(x):
            tokens = self._handoff.send(x, ids, weights)
            self._handoff.arrive()
            return tokens
        return HostTokens(
            x.detach().float().cpu().contiguous(),
            ids.long().cpu().contiguous(),
            weights.detach().float().cpu().contiguous(),
            torch.empty(x.shape, dtype=torch.float32),
        )

    def start(self, layer: int, x: torch.Tensor, tokens: HostTokens) -> Pending:
        """The second half: run what `fetch` made of x. The ids may be others by now."""
        index = self._find(layer)
        if self._warmer is not None:
            self._warmer.stop(self._pool)
        # A stuck worker may still read the job before this one.
        if not self._pool.broken and self._job.begin(index, *tokens) == UNKNOWN_EXPERT:
            self._check_ids(tokens.ids)
        pending = Pending(self, tokens, x, staged=self._sends(x))
        alive = self, tokens
        if self._pager is None or self._pool.broken or self._pager.start(index, self._job.experts()):
            self._pool.submit(self._kernels.layer, self._job.address, alive)
        else:
            self._late = alive  # the disk is at work: `wait` goes on from here
        self._pending = pending
        self._began(index, tokens.ids)
        self._count()
        return pending

    def hint(self, layer: int, scores: torch.Tensor, elsewhere: npt.NDArray[np.bool_] | None = None) -> None:
        """Say how well the layer's experts will probably fit the tokens: (T, E), -inf for those that are ruled out.

        Where the experts are larger than RAM, those that lack are read before the layer's next submit, but for those
        that somebody else runs: `elsewhere` (E,).
        """
        index, n_experts = self._find(layer), self._store.geometry.n_experts
        if scores.ndim != 2 or scores.shape[1] != n_experts:
            raise ValueError(f"scores: expected (tokens, {n_experts}), got {tuple(scores.shape)}")
        if self._pager is not None and self._k:
            self._pager.expect(index, scores, self._k, elsewhere)
        if self._warmer is not None and self._k:
            self._warmer.expect(index, scores, self._k, elsewhere)

    def stats(self) -> ExpertStats:
        """The counters as they are now."""
        return replace(self._stats)

    def paging(self) -> PagingStats | None:
        """How experts come from the disk; None where all are in memory."""
        return None if self._pager is None else self._pager.stats()

    def warming(self) -> WarmStats | None:
        """What idle workers read into their caches; None where they do not."""
        return None if self._warmer is None else self._warmer.stats()

    def choices(self) -> Choices:
        """How often each expert was chosen since the start."""
        return Choices(self._store.layers, self._job.chosen.copy(), self._seen)

    def with_pool(self, config: PoolConfig, topology: Topology) -> "Experts":
        """The same experts and counters with other workers; these here end, unless the others cannot be made.

        Raises ValueError for a tier that cannot run, or for memory nodes that the store is not split over, PoolError
        where workers cannot start or one is stuck, and RuntimeError while a layer is running.
        """
        if self._warmer is not None:
            self._warmer.stop(self._pool)
        if self._pending is not None or self._pool.busy:
            raise RuntimeError("a layer is running: wait for it before other workers take over")
        if self._pool.broken:
            raise PoolError("the worker pool is broken, and a stuck worker may still read the experts: load them again")
        if len(topology.nodes) != self._store.n_nodes:
            raise ValueError(
                f"threads: the experts are split over {self._store.n_nodes} memory nodes, and these workers would use "
                f"{len(topology.nodes)}; name a thread for each node, or load again"
            )
        other = Experts(self._store, config, topology, self._sender, self._warmer is not None)
        other._stats, other._seen = self._stats, self._seen
        other._job.chosen[:] = self._job.chosen
        self._end_threads()
        return other

    def close(self) -> None:
        """Finish a running layer, end the workers and close the store, unless a stuck worker may still read there."""
        self._end_threads()
        if not self._pool.broken:
            self._store.close()

    def _end_threads(self) -> None:
        """A layer under way is finished first, or given up with its flag."""
        published = self._handoff is not None and self._handoff.close()
        with contextlib.suppress(PoolError):
            if self._pending is not None and self._pending.sent and not published:
                self._take_back()
            elif self._warmer is not None and not (self._pending is not None and self._pending.sent):
                self._warmer.stop(self._pool)
        self._pool.close()

    def _find(self, layer: int) -> int:
        if layer not in self._index:
            raise ValueError(f"layer: {layer} has no routed experts here, layers are {sorted(self._index)}")
        return self._index[layer]

    def _check_ids(self, ids: torch.Tensor) -> None:
        n_experts = self._store.geometry.n_experts
        if ids.numel() and not MASKED <= int(ids.min()) <= int(ids.max()) < n_experts:
            raise ValueError(
                f"ids: experts are 0 to {n_experts - 1}, {MASKED} is none, got {int(ids.min())} to {int(ids.max())}"
            )

    def _check(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self._store.geometry.hidden:
            raise ValueError(f"x: expected (tokens, {self._store.geometry.hidden}), got {tuple(x.shape)}")
        if ids.is_floating_point():
            raise ValueError(f"ids: expected integers, got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.shape != weights.shape:
            raise ValueError(
                f"ids, weights: expected two ({x.shape[0]}, k), got {tuple(ids.shape)} and {tuple(weights.shape)}"
            )

    def _sends(self, x: torch.Tensor) -> bool:
        """True where x is on the device whose tokens come by the flag."""
        return self._sender is not None and x.device.type == self._sender.type

    def _ready(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Raises RuntimeError or ValueError where these tokens cannot be taken."""
        warming = self._warmer is not None and self._warmer.running
        if self._pending is not None or (self._pool.busy and not warming):  # busy alone: a wait was interrupted
            raise RuntimeError("a layer is running: wait for it before the next submit")
        self._check(x, ids, weights)

    def _handed(self, handoff: Handoff, sent: HostTokens) -> None:
        """Wait until the workers have a sent layer. Raises PoolError when it did not come, ValueError for its ids."""
        try:
            self._job.n_active = handoff.wait()
        except PoolError:
            self._take_back()
            raise
        if self._job.n_active == UNKNOWN_EXPERT:
            self._take_back()
            self._check_ids(sent.ids)
        self._count()
        if self._warmer is not None:
            self._warmer.running = False  # ended before the layer began

    def _take_back(self) -> None:
        """A sent layer will not run."""
        self._pending = None
        if self._warmer is not None and self._warmer.running:
            self._warmer.stop(self._pool)
        else:
            self._pool.cancel()

    def _finish(self, pending: Pending, started: float, sent: HostTokens | None) -> None:
        if self._pending is not pending:
            raise RuntimeError("this layer was waited for already")
        waits = time.perf_counter()
        if sent is not None and self._handoff is not None:
            self._handed(self._handoff, sent)
        alive, self._late = self._late, None
        try:
            if self._lost:
                if self._pool.busy:
                    self._pool.wait()
                self._lost, self._pending = False, None
                raise RuntimeError("the layer was interrupted while its experts came from the disk: submit it again")
            if alive is None:
                self._pool.wait()
            else:
                self._lost = True
                self._run_parts(alive)
                self._lost = False
        except PoolError:
            self._lost = False
            self._pending = None
            raise
        finally:
            if self._pager is not None and not self._pool.broken and not self._pool.busy:
                self._pager.finish()
        self._pending = None
        now = time.perf_counter()
        self._stats.seconds += now - started
        self._stats.waited += now - waits
        if self._warmer is not None:
            self._warmer.start(self._pool)

    def _run_parts(self, alive: object) -> None:
        """The job, some experts after others as they come from the disk: added up in the same order as at once."""
        assert self._pager is not None
        for first, stop in self._pager.parts():
            self._job.take_part(first, stop)
            self._pool.submit(self._kernels.layer, self._job.address, alive)
            self._pool.wait()

    def _began(self, index: int, ids: torch.Tensor) -> None:
        """Count a layer's tokens."""
        self._stats.layers_run += 1
        self._stats.tokens += ids.shape[0]
        self._stats.assignments += ids.numel()
        self._seen += ids.shape[0] if index == 0 else 0
        self._k = ids.shape[1]

    def _count(self) -> None:
        """The experts of the job that was begun."""
        self._stats.distinct_experts += self._job.n_active
        self._stats.bytes_read += self._job.n_active * self._expert_bytes
