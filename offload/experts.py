"""The routed experts of a model: submit one layer's tokens, go on, wait for the sum.

The facade that hybrid talks to: torch tensors in, torch tensors out, on any device. Knows layers by number and
experts by id, no model and no request. The work is done by kernels.layer on a WorkerPool; this file owns the
buffers, and counts.

A token whose input holds NaN or an infinity gets NaN in every output with int4 and int8 (its scale becomes NaN); with
bf16 and fp8 it spreads as float arithmetic has it. The other tokens of the batch are not touched.
"""

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload.config import BLOCKS, GROUP, LINE, MATRICES, Matrix, PoolConfig
from offload.isa import choose
from offload.kernels import amx, grouping
from offload.kernels.grouping import MASKED, UNKNOWN_EXPERT, begin
from offload.kernels.layer import ACTIVE_COLUMNS, JOB, SCRATCH_BYTES
from offload.kernels.table import ManyTokens, kernels
from offload.paging import PagingStats
from offload.pool import PoolError, WorkerPool
from offload.store import ExpertStore
from offload.topology import Topology

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


class HostTokens(NamedTuple):
    """A layer's tokens where the workers read them."""

    x: torch.Tensor  # (T, D) float32
    ids: torch.Tensor  # (T, K) int64
    weights: torch.Tensor  # (T, K) float32


class Buffer:
    """Memory for the workers that grows and never shrinks; bytes not yet written are zero."""

    def __init__(self) -> None:
        self._memory = np.zeros(LINE, np.uint8)

    def address(self, n_bytes: int) -> int:
        """Address of at least `n_bytes`, at a cache line. Growing loses what was written."""
        if self._memory.nbytes < n_bytes + LINE:
            self._memory = np.zeros((1 << n_bytes.bit_length()) + LINE, np.uint8)
        return -(-self._memory.ctypes.data // LINE) * LINE

    def array(self, kind: type[np.generic], n: int) -> npt.NDArray[Any]:
        """The first `n` values."""
        start = -self._memory.ctypes.data % LINE
        return self._memory[start : start + n * np.dtype(kind).itemsize].view(kind)


class Pending:
    """A submitted layer."""

    def __init__(self, experts: "Experts", result: torch.Tensor, like: torch.Tensor) -> None:
        self._experts = experts
        self._result = result  # float32 (T, D) on the host, written by the workers
        self._like = like
        self._started = time.perf_counter()

    def wait(self) -> torch.Tensor:
        """Block until the sum is there: (T, D), in x's dtype, on x's device. Raises PoolError when a worker failed."""
        self._experts._finish(self, self._started)
        return self._result.to(self._like.device, non_blocking=True).to(self._like.dtype)

    def add_to(self, out: torch.Tensor) -> None:
        """The same added to `out` (T, D) float32 on the device, some rows at a time."""
        self._experts._finish(self, self._started)
        for some, mine in zip(torch.split(out, PIECE_ROWS), torch.split(self._result, PIECE_ROWS), strict=True):
            some += mine.to(out.device, non_blocking=True)


class Experts:
    """All layers' experts and the workers that run them. Used by one thread."""

    def __init__(self, store: ExpertStore, config: PoolConfig, topology: Topology) -> None:
        """Compiles or loads the kernels that this store and precision need, then starts the workers.

        The store must be split over the topology's nodes; it is closed with these experts. Raises ValueError when
        `config.isa` cannot run here.
        """
        self._store = store
        self.isa = choose(config.isa)
        grouping.warm()
        self._kernels = kernels(self.isa, store.format, config.precision)
        self._index = {layer: i for i, layer in enumerate(store.layers)}
        self._addresses = np.ascontiguousarray(store.addresses)
        self._expert_bytes = store.geometry.expert_bytes(store.format)
        self._stats = ExpertStats()
        self._pager = store.pager
        self._k = 0  # experts of a token, as last submitted
        self._pending: Pending | None = None
        self._late: object = None  # what a job reads that begins only when its experts have come
        self._active, self._tokens, self._weights = Buffer(), Buffer(), Buffer()
        self._x_records, self._h_records, self._scratch = Buffer(), Buffer(), Buffer()
        self._x_rows, self._h_rows, self._panels = Buffer(), Buffer(), Buffer()  # for experts with many tokens
        self._host: dict[str, torch.Tensor] = {}  # pinned staging, by role
        self._pool = WorkerPool(topology.places)
        self._nodes = np.array([place.node for place in topology.places], np.int64)
        self._job = self._new_job()
        self._job_address = self._job.ctypes.data
        self._layer_addresses = [layer.ctypes.data for layer in self._addresses]
        self._ends = np.zeros(store.geometry.n_experts, np.int64)
        self._chosen = np.zeros((len(store.layers), store.geometry.n_experts), np.int64)
        self._chosen_addresses = [row.ctypes.data for row in self._chosen]
        self._seen = 0  # tokens, by the first layer
        self._room = 0, 0  # tokens and assignments that the buffers hold
        self._n_active = 0  # experts of the last job
        self._active_address = 0  # of their list
        self._lost = False  # the running layer was interrupted between two of its parts

    @property
    def n_workers(self) -> int:
        return self._pool.n_workers

    @property
    def wants_hints(self) -> bool:
        """True where a hint can do something: the experts are larger than RAM, so some are on the disk."""
        return self._pager is not None

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pending:
        """Start y = sum_k weights_k * down(silu(gate x) * up x) for every row of x (T, D).

        `ids` (T, K) are experts of the layer, any integer type, -1 for none; `weights` (T, K) are the router's. x may
        be on any device and of any float type; on the CPU in float32 it is read in place, so leave it alone until
        `wait`.
        Raises ValueError for shapes or ids that do not fit and RuntimeError while another layer is running.
        """
        return self.start(layer, x, self.fetch(x, ids, weights))

    def fetch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HostTokens:
        """The first half of `submit`: the tokens on the host, for a caller who looks at the ids before `start`."""
        if self._pending is not None or self._pool.busy:  # busy alone: a wait was interrupted
            raise RuntimeError("a layer is running: wait for it before the next submit")
        self._check(x, ids, weights)
        return self._fetch(x, ids, weights)

    def start(self, layer: int, x: torch.Tensor, tokens: HostTokens) -> Pending:
        """The second half: run what `fetch` made of x. The ids may be others by now."""
        index = self._find(layer)
        values, chosen, shares = tokens
        result = self._staged("result", x, x.shape, torch.float32)
        if not self._pool.broken:  # a stuck worker may still read the job before this one
            self._begin(index, values, chosen, shares, result)
        pending = Pending(self, result, x)
        alive = self, values, result
        if self._pager is None or self._pool.broken or self._pager.start(index, self._running()):
            self._pool.submit(self._kernels.layer, self._job_address, alive)
        else:
            self._late = alive  # the disk is at work: `wait` goes on from here
        self._pending = pending
        self._count(chosen.shape)
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

    def stats(self) -> ExpertStats:
        """The counters as they are now."""
        return replace(self._stats)

    def paging(self) -> PagingStats | None:
        """How experts come from the disk; None where all are in memory."""
        return None if self._pager is None else self._pager.stats()

    def choices(self) -> Choices:
        """How often each expert was chosen since the start."""
        return Choices(self._store.layers, self._chosen.copy(), self._seen)

    def with_pool(self, config: PoolConfig, topology: Topology) -> "Experts":
        """The same experts and counters with other workers; these here end, unless the others cannot be made.

        Raises ValueError for a tier that cannot run, or for memory nodes that the store is not split over, PoolError
        where workers cannot start or one is stuck, and RuntimeError while a layer is running.
        """
        if self._pending is not None or self._pool.busy:
            raise RuntimeError("a layer is running: wait for it before other workers take over")
        if self._pool.broken:
            raise PoolError("the worker pool is broken, and a stuck worker may still read the experts: load them again")
        if len(topology.nodes) != self._store.n_nodes:
            raise ValueError(
                f"threads: the experts are split over {self._store.n_nodes} memory nodes, and these workers would use "
                f"{len(topology.nodes)}; name a thread for each node, or load again"
            )
        other = Experts(self._store, config, topology)
        other._stats, other._seen = self._stats, self._seen
        other._chosen[:] = self._chosen
        self._pool.close()
        return other

    def close(self) -> None:
        """Finish a running layer, end the workers and close the store, unless a stuck worker may still read there."""
        self._pool.close()
        if not self._pool.broken:
            self._store.close()

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

    def _fetch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HostTokens:
        """The three on the host, in the types that the workers read."""
        sources = {"x": x.detach().float(), "ids": ids.long(), "weights": weights.detach().float()}
        if x.device.type == "cpu":
            host = {role: tensor.cpu().contiguous() for role, tensor in sources.items()}
        else:
            host = {role: self._staged(role, x, tensor.shape, tensor.dtype) for role, tensor in sources.items()}
            for role, tensor in sources.items():
                host[role].copy_(tensor, non_blocking=True)
            # Also lets an earlier result leave its staging buffer before the workers write there again.
            torch.cuda.current_stream(x.device).synchronize()
        return HostTokens(**host)

    def _staged(self, role: str, x: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A host tensor: new for a CPU caller, who keeps it; else a part of a pinned buffer that is used again."""
        if x.device.type == "cpu":
            return torch.empty(shape, dtype=dtype)
        kept = self._host.get(role)
        if kept is None or kept.numel() < shape.numel():
            kept = self._host[role] = torch.empty(shape.numel(), dtype=dtype, pin_memory=True)
        return kept[: shape.numel()].view(shape)

    def _new_job(self) -> npt.NDArray[np.void]:
        """The job record with all that stays the same."""
        job, store = np.zeros((), JOB), self._store
        inputs: dict[Matrix, int] = {"gate_up": store.geometry.hidden, "down": store.geometry.inner}
        for matrix, n_in in inputs.items():
            units = [store.geometry.units_of(matrix, node, store.n_nodes) for node in range(store.n_nodes)]
            job[matrix]["n_in"] = n_in
            job[matrix]["n_blocks"] = store.geometry.n_blocks(matrix, store.format)
            job[matrix]["unit_bytes"] = store.geometry.unit_bytes(matrix, store.format)
            job[matrix]["units"][: len(units) + 1] = [0, *(part.stop for part in units)]
            job[matrix]["record_bytes"] = self._kernels.layout.row_bytes(n_in, store.format)
        job["n_nodes"], job["worker_nodes"] = store.n_nodes, self._nodes.ctypes.data
        job["scratch"] = self._scratch.address(self._pool.n_workers * SCRATCH_BYTES)
        job["group_bytes"] = self._kernels.layout.group_bytes
        job["encode_inputs"], job["encode_swiglu"] = self._kernels.encode_inputs, self._kernels.encode_swiglu
        job["products"] = self._kernels.products
        job["many"] = np.iinfo(np.int64).max
        if self._kernels.many is not None:
            self._describe_many(job, self._kernels.many)
        return job

    def _describe_many(self, job: npt.NDArray[np.void], many: ManyTokens) -> None:
        """What the job needs for experts with many tokens."""
        geometry = self._store.geometry
        job["many"] = amx.MANY_TOKENS
        for matrix in MATRICES:
            job[matrix]["steps"] = job[matrix]["n_blocks"] * BLOCKS[many.fmt].inputs // GROUP
        job["x_row_bytes"] = amx.row_bytes(geometry.hidden, many.fmt)
        job["h_row_bytes"] = amx.row_bytes(geometry.inner, many.fmt)
        job["panel_bytes"] = amx.panel_bytes(max(geometry.hidden, geometry.inner), many.fmt)
        job["panels"] = self._panels.address(self._pool.n_workers * int(job["panel_bytes"]))
        job["bf16_inputs"], job["bf16_swiglu"] = many.inputs, many.swiglu
        job["unpack"], job["multiply"] = many.unpack, many.multiply

    def _begin(
        self, index: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Fill the job. Raises ValueError for ids that are no experts."""
        n_tokens, k = ids.shape
        if n_tokens > self._room[0] or n_tokens * k > self._room[1]:
            self._make_room(n_tokens, n_tokens * k)
        self._job["active"], self._job["keep"] = self._active_address, 0  # a layer in parts has moved them
        self._n_active = begin(
            self._job_address, self._layer_addresses[index], self._store.geometry.n_experts, x.data_ptr(),
            ids.data_ptr(), weights.data_ptr(), n_tokens, k, result.data_ptr(), self._ends.ctypes.data,
            self._chosen_addresses[index],
        )  # fmt: skip
        if self._n_active == UNKNOWN_EXPERT:
            self._check_ids(ids)
        if index == 0:
            self._seen += n_tokens

    def _make_room(self, n_tokens: int, n_assignments: int) -> None:
        """Let the job's buffers hold so many."""
        job, n_experts = self._job, self._store.geometry.n_experts
        n_active = min(n_experts, n_assignments)
        self._active_address = self._active.address(8 * ACTIVE_COLUMNS * n_active)
        job["tokens"] = self._tokens.address(8 * n_assignments)
        job["weights"] = self._weights.address(4 * n_assignments)
        job["x_records"] = self._x_records.address(n_tokens * int(job["gate_up"]["record_bytes"]))
        job["h_records"] = self._h_records.address(n_assignments * int(job["down"]["record_bytes"]))
        job["x_rows"] = self._x_rows.address(n_assignments * int(job["x_row_bytes"]))
        job["h_rows"] = self._h_rows.address(n_assignments * int(job["h_row_bytes"]))
        self._room = max(n_tokens, self._room[0]), max(n_assignments, self._room[1])

    def _finish(self, pending: Pending, started: float) -> None:
        if self._pending is not pending:
            raise RuntimeError("this layer was waited for already")
        waits = time.perf_counter()
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

    def _run_parts(self, alive: object) -> None:
        """The job, some experts after others as they come from the disk: added up in the same order as at once."""
        assert self._pager is not None
        job = self._job
        for first, stop in self._pager.parts():
            job["active"] = self._active_address + first * ACTIVE_COLUMNS * 8
            job["n_active"], job["keep"] = stop - first, first
            self._pool.submit(self._kernels.layer, self._job_address, alive)
            self._pool.wait()

    def _running(self) -> npt.NDArray[np.int64]:
        """The experts of the job, ascending."""
        return self._active.array(np.int64, self._n_active * ACTIVE_COLUMNS)[::ACTIVE_COLUMNS]

    def _count(self, shape: torch.Size) -> None:
        stats = self._stats
        stats.layers_run += 1
        stats.tokens += shape[0]
        stats.assignments += shape.numel()
        stats.distinct_experts += self._n_active
        stats.bytes_read += self._n_active * self._expert_bytes
        self._k = shape[1]
