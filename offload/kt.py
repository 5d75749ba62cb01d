"""The routed experts run by kt-kernel: the same facade as `offload.experts`, with a child process behind it.

kt-kernel is ktransformers' expert library, of which only the raw extension is used (`offload.kt_worker`). Results go
through bf16, and with its AVX-512 kernels their last bits may depend on the batch. The experts take a ninth more
memory: kt-kernel keeps float32 scales. Knows what kt-kernel cannot do and says so before it starts. `offload.backends`
chooses between the two.
"""

import time
from dataclasses import asdict, dataclass, replace
from importlib import util

import numpy as np
import torch

from offload.checkpoint import Checkpoint
from offload.child import Child
from offload.config import GROUP, PROJECTIONS, ExpertGeometry, Progress
from offload.experts import Choices, ExpertStats
from offload.kt_worker import PACKAGE, REQUEST, Regions, Setup
from offload.ram import ram
from offload.sources import Prefix, Target, find_experts, formats
from offload.topology import Topology

INSTALL = "pip install --no-deps kt-kernel==0.7.2"
ENTRY = "from offload.kt_worker import main"
ROWS = 512  # most tokens that kt-kernel gets at once; its scratch memory grows with them
STEP = 64  # sizes must be multiples of it: the AVX-512 kernels do not check
# A request of one token takes milliseconds. Two loaded Zen 3 cores took 0.2 s for each of many (Kimi-K2.5's sizes).
STUCK_SECONDS, STUCK_SECONDS_PER_ROW, STUCK_SECONDS_LOADING = 60.0, 1.0, 900.0


@dataclass(frozen=True, slots=True)
class Published:
    """Experts as the checkpoint publishes them."""

    checkpoint: Checkpoint
    prefix: Prefix
    geometry: ExpertGeometry
    layers: tuple[int, ...]
    per_token: int  # most experts of one token

    @property
    def expert_bytes(self) -> int:
        """What kt-kernel keeps and reads of one expert: four bits a weight and a float32 for each group."""
        return 3 * self.geometry.hidden * self.geometry.inner * (GROUP // 2 + 4) // GROUP

    @property
    def n_bytes(self) -> int:
        return len(self.layers) * self.geometry.n_experts * self.expert_bytes


def installed() -> bool:
    return util.find_spec(PACKAGE) is not None


def refusal(published: Published, target: Target) -> str | None:
    """Why kt-kernel cannot run these experts; None where it can."""
    geometry = published.geometry
    source, _ = formats(published.checkpoint, published.prefix, published.layers, target)
    if source != "int4":
        return "it runs published int4 experts only, and this checkpoint has others"
    if target not in ("native", "int4"):
        return f"it runs the experts as published, not with --expert-format {target}"
    if geometry.hidden % STEP or geometry.inner % STEP:
        return (
            f"it needs sizes that are multiples of {STEP}, and hidden_size is {geometry.hidden}, "
            f"moe_intermediate_size {geometry.inner}"
        )
    available = ram()[1]
    if published.n_bytes > available:
        return f"its experts take {published.n_bytes / 1e9:.1f} GB of RAM, and {available / 1e9:.1f} GB are free"
    return None


class Pending:
    """A submitted layer."""

    def __init__(self, experts: "KtExperts", layer: int, *tensors: torch.Tensor) -> None:
        self._experts = experts
        self.layer = layer
        self.x, self.ids, self.weights = tensors
        self.started = time.perf_counter()

    def wait(self) -> torch.Tensor:
        """Block until the sum is there: (T, D), in x's dtype, on x's device. Raises PoolError when the child ended."""
        return self._experts._finish(self)


class KtExperts:
    """All layers' experts in a child process. Used by one thread."""

    wants_hints = False  # kt-kernel has no use for them

    def __init__(
        self, published: Published, topology: Topology, progress: Progress, rows: int = ROWS, entry: str = ENTRY
    ) -> None:
        """Start the child and load everything. Ask `refusal` first.

        Raises CheckpointError for tensors that do not fit, and PoolError when the child fails. `entry` is for tests.
        """
        self._published, self._rows = published, rows
        hidden, per_token = published.geometry.hidden, published.per_token
        self._index = {layer: i for i, layer in enumerate(published.layers)}
        self._stats = ExpertStats()
        self._chosen = np.zeros((len(published.layers), published.geometry.n_experts), np.int64)
        self._seen = 0  # tokens, by the first layer
        self._pending: Pending | None = None
        threads = [sum(place.node == node for place in topology.places) for node in range(len(topology.nodes))]
        self.n_workers = len(topology.places)
        setup = Setup(
            directory=str(published.checkpoint.directory),
            names=_names(published),
            hidden=hidden,
            inner=published.geometry.inner,
            per_token=per_token,
            rows=rows,
            threads=threads,
        )
        regions = Regions.of(rows, hidden, per_token)
        self._child = Child("kt-kernel", entry, asdict(setup), regions.end)
        memory = self._child.memory
        self._x = torch.frombuffer(memory, dtype=torch.bfloat16, count=rows * hidden, offset=regions.x)
        self._y = torch.frombuffer(memory, dtype=torch.bfloat16, count=rows * hidden, offset=regions.y)
        self._ids = torch.frombuffer(memory, dtype=torch.int64, count=rows * per_token, offset=regions.ids)
        self._weights = torch.frombuffer(memory, dtype=torch.float32, count=rows * per_token, offset=regions.weights)
        self.isa = self._child.answer(STUCK_SECONDS_LOADING).decode()
        for done in range(len(published.layers)):
            progress(
                "loading experts into kt-kernel", done * published.n_bytes // len(published.layers), published.n_bytes
            )
            self._child.answer(STUCK_SECONDS_LOADING)
        progress("loading experts into kt-kernel", published.n_bytes, published.n_bytes)

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pending:
        """As `Experts.submit`; leave the three alone until `wait`."""
        if self._pending is not None:
            raise RuntimeError("a layer is running: wait for it before the next submit")
        index = self._find(layer)
        self._check(x, ids, weights)
        ids = ids.detach().long().cpu()
        active = self._active(ids)
        self._chosen[index] += np.bincount(ids.numpy().ravel(), minlength=self._chosen.shape[1])
        self._seen += len(ids) if index == 0 else 0
        pending = Pending(self, index, x.detach(), ids, weights.detach())
        if x.shape[0]:
            self._send(pending, 0)
        self._pending = pending
        self._stats = replace(
            self._stats,
            layers_run=self._stats.layers_run + 1,
            tokens=self._stats.tokens + len(x),
            assignments=self._stats.assignments + ids.numel(),
            distinct_experts=self._stats.distinct_experts + active,
            bytes_read=self._stats.bytes_read + active * self._published.expert_bytes,
        )
        return pending

    def hint(self, layer: int, scores: torch.Tensor) -> None:
        """Nothing to do: everything is in memory."""
        self._find(layer)

    def stats(self) -> ExpertStats:
        return self._stats

    def choices(self) -> Choices:
        """How often each expert was chosen since the start."""
        return Choices(self._published.layers, self._chosen.copy(), self._seen)

    def close(self) -> None:
        """End the child, a running layer with it."""
        self._child.close()

    def _find(self, layer: int) -> int:
        if layer not in self._index:
            raise ValueError(f"layer: {layer} has no routed experts here, layers are {sorted(self._index)}")
        return self._index[layer]

    def _check(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        hidden, per_token = self._published.geometry.hidden, self._published.per_token
        if x.ndim != 2 or x.shape[1] != hidden:
            raise ValueError(f"x: expected (tokens, {hidden}), got {tuple(x.shape)}")
        if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.shape != weights.shape or ids.shape[1] > per_token:
            raise ValueError(
                f"ids, weights: expected two ({x.shape[0]}, at most {per_token}), got {tuple(ids.shape)} and "
                f"{tuple(weights.shape)}"
            )

    def _active(self, ids: torch.Tensor) -> int:
        """How many experts are named. Ids out of range would write outside kt-kernel's tables.

        A token that names an expert twice gets a wrong sum from kt-kernel (seen at batch 1).
        """
        named, n_experts = np.unique(ids.numpy()), self._published.geometry.n_experts
        if named.size and not 0 <= named[0] <= named[-1] < n_experts:
            raise ValueError(f"ids: experts are 0 to {n_experts - 1}, got {named[0]} to {named[-1]}")
        each = np.sort(ids.numpy(), axis=1)
        if (each[:, 1:] == each[:, :-1]).any():
            raise ValueError("ids: kt-kernel cannot run an expert twice for one token")
        return len(named)

    def _send(self, pending: Pending, first: int) -> None:
        """Hand over the rows from `first`, as many as fit."""
        rows = slice(first, first + self._rows)
        x, k = pending.x[rows], pending.ids.shape[1]
        for shared, values in ((self._x, x), (self._ids, pending.ids[rows]), (self._weights, pending.weights[rows])):
            shared[: values.numel()].view(values.shape).copy_(values)
        self._child.ask(REQUEST.pack(pending.layer, len(x), k))

    def _finish(self, pending: Pending) -> torch.Tensor:
        if self._pending is not pending:
            raise RuntimeError("this layer was waited for already")
        self._pending = None
        result = torch.empty_like(pending.x)
        for first in range(0, len(result), self._rows):
            if first:
                self._send(pending, first)
            rows = result[first : first + self._rows]
            self._child.answer(STUCK_SECONDS + STUCK_SECONDS_PER_ROW * len(rows))
            rows.copy_(self._y[: rows.numel()].view(rows.shape))
        seconds = time.perf_counter() - pending.started
        self._stats = replace(self._stats, seconds=self._stats.seconds + seconds)
        return result


def _names(published: Published) -> list[list[list[str]]]:
    """Of all matrices, by layer, expert and projection. Raises CheckpointError where one does not fit."""
    p = published
    find_experts(p.checkpoint, p.prefix, p.geometry, p.layers, "int4", "int4")
    return [
        [[p.prefix(layer, expert, projection) for projection in PROJECTIONS] for expert in range(p.geometry.n_experts)]
        for layer in p.layers
    ]
