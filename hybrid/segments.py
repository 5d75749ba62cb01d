"""Decode steps whose device parts are replayed from CUDA graphs: what lies between two hand-offs is one launch.

A lane of a fixed shape (so many rows, so many pages each) keeps all that a step reads in tensors that stay where they
are: ids, positions, pages, the experts' sums. Its device parts are the very functions of an eager lane (`hybrid.lanes`)
and are captured when the shape is first needed, each compared once with what it gave eagerly. A shape that cannot be
captured, or whose replay differs, runs eagerly from then on, with the reason counted and said once.

Rows are filled up to the shape by repeating the last one. The CPU does not see the repeated ones: their experts are
masked, and they are given the last row's sum, so that they go on writing what it writes to its place of the cache.
Knows no requests. Called by `hybrid.engine`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hybrid.batch import Row
from hybrid.inputs import GROUP_ROWS, Group, StepInputs, page_table, slots_of
from hybrid.kv import LatentCache
from hybrid.lanes import Block, Lane
from hybrid.model import Transformer
from hybrid.moe import NO_EXPERT, Moe, Routed

SHAPES = (1, 2, 4, 8, 16, GROUP_ROWS)  # rows: they attend as one group
LEAST_PAGES = 16  # of a shape; others are powers of two, so at most half of what is attended to is padding
TOLERANCE = 1e-2  # of a part's largest output, between replay and eager: the same kernels, perhaps chosen otherwise

Part = Callable[[], tuple[torch.Tensor, ...]]
Notice = Callable[[str], None]


class CaptureError(RuntimeError):
    """A part cannot be captured, or its replay gave something else."""

    def __init__(self, reason: str, lane: "CapturedLane") -> None:
        super().__init__(reason)
        self.lane = lane


class Recorder(Protocol):
    """Turns a part into one that is replayed, and the tensors that it writes every time."""

    def __call__(self, part: Part) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]: ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory: they must be replayed in the order of a step."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, part: Part) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
        """The part must have run before, so that nothing is set up while it is captured."""
        graph = torch.cuda.CUDAGraph()
        # Another thread may allocate meanwhile: only this one's calls must fit a capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            written = part()
        self._pool = graph.pool()
        return graph.replay, written


class StaticInputs:
    """One block of integers on the device, and its views as a step's inputs."""

    def __init__(self, rows: int, pages: int, page_size: int, device: torch.device) -> None:
        self.rows, self.pages, self._page_size = rows, pages, page_size
        self._block = torch.zeros(rows * (6 + pages), dtype=torch.int64, device=device)
        ids, positions, slots, tokens, self.source, real, table = torch.split(
            self._block, [rows] * 6 + [rows * pages]
        )  # source (B,): the row itself, or the one that it repeats
        self._real, self.real = real, real[:, None] != 0  # (B, 1): not a repeated row
        group = Group(tokens[:, None], positions[:, None], table.view(rows, pages), pages * page_size, 0)
        self.step = StepInputs(ids, positions, slots, (group,))

    def fill(self, rows: Sequence[Row]) -> None:
        """Upload decode rows, the last one repeated, with one copy."""
        padded = [*rows, *[rows[-1]] * (self.rows - len(rows))]
        table = np.zeros((self.rows, self.pages), np.int64)
        filled = page_table(padded, self._page_size)
        table[:, : filled.shape[1]] = filled
        columns = [
            np.array([row.ids[0] for row in padded]),
            np.array([row.position for row in padded]),
            np.concatenate([slots_of(row, self._page_size) for row in padded]),
            np.arange(self.rows),
            np.minimum(np.arange(self.rows), len(rows) - 1),
            np.arange(self.rows) < len(rows),
            table.ravel(),
        ]
        self._block.copy_(torch.from_numpy(np.concatenate([column.astype(np.int64) for column in columns])))
        self.real.copy_(self._real[:, None] != 0)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A captured part."""

    replay: Callable[[], None]
    written: tuple[torch.Tensor, ...]


class CapturedLane(Lane):
    """A lane of one shape, captured while it is first taken through the blocks. Used for many steps."""

    def __init__(self, inputs: StaticInputs, model: Transformer, cache: LatentCache, record: Recorder) -> None:
        """Captures nothing yet."""
        start = torch.zeros(inputs.rows, model.embed.shape[1], dtype=model.embed.dtype, device=model.norm.device)
        super().__init__(start, [inputs.step], cache, model.rope, model.eps)
        self._static, self._model, self._record, self._start = inputs, model, record, start
        self._table = self._pieces[0][2]
        self._sum = torch.zeros_like(start)  # what the routed experts said
        self._said: tuple[torch.Tensor, ...] = ()  # that and what the shared expert said, not yet added
        self._parts: list[Replayed] = []
        self._next = 0
        self._n_rows = 0

    def begin(self, rows: Sequence[Row]) -> None:
        """Start a step."""
        step, model = self._static.step, self._model
        self._static.fill(rows)
        self._n_rows, self._next = len(rows), 0
        self._routed, self._pending, self._said = None, None, ()
        self._start.copy_(model.embedded(step.ids))  # never captured: the embedding may lie in RAM
        self.x = self._start
        cos, sin = self._run(lambda: model.rope.table(step.positions))
        self._table = cos, sin

    def attend(self, block: Block) -> None:
        """As eagerly, in one launch."""
        self.collect()
        x, said, table = self.x, self._said, self._table

        def part() -> tuple[torch.Tensor, ...]:
            after, normed = self.before(block, added(x, said), self._static.step, table)
            if not isinstance(block.mlp, Moe):
                return (after,)
            ids, weights = block.mlp.router(normed)
            return after, normed, ids.masked_fill(~self._static.real, NO_EXPERT), weights

        self.x, *routed = self._run(part)
        self._said = ()
        if isinstance(block.mlp, Moe):
            self._routed = Routed(block.mlp, *routed)

    def hand_over(self) -> None:
        """Start the routed experts; the shared one is a part of its own beside them."""
        if self._routed is not None:
            routed, self._routed = self._routed, None
            self._pending = routed.submit()
            (self._shared,) = self._run(lambda: (routed.moe.shared(routed.x),))

    def collect(self) -> None:
        """Wait for the experts; their sum goes where the next part reads it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._sum.copy_(pending.wait()[self._static.source])
            assert self._shared is not None, "computed while the experts ran"
            self._said = self._sum, self._shared

    def settle(self) -> None:
        """Add what the last block's experts said."""
        self.collect()
        if self._said:
            x, said = self.x, self._said
            (self.x,) = self._run(lambda: (added(x, said),))
            self._said = ()

    @property
    def result(self) -> torch.Tensor:
        """The residual stream of the real rows."""
        return self.x[: self._n_rows]

    def _run(self, part: Part) -> tuple[torch.Tensor, ...]:
        """The next part of the step: replayed, or captured after a first eager run."""
        if self._next == len(self._parts):
            self._parts.append(self._capture(part))
        else:
            self._parts[self._next].replay()
        self._next += 1
        return self._parts[self._next - 1].written

    def _capture(self, part: Part) -> Replayed:
        """Run the part eagerly, capture it, replay it, compare. Raises CaptureError."""
        expected = part()
        try:
            captured = Replayed(*self._record(part))
            captured.replay()
        except RuntimeError as error:
            raise CaptureError(f"part {self._next} cannot be captured: {error}", self) from error
        if not all(map(_alike, captured.written, expected)):
            raise CaptureError(f"part {self._next} is different when replayed", self)
        return captured


class Segments:
    """The captured lanes of a model, by shape and half."""

    def __init__(
        self, model: Transformer, cache: LatentCache, notice: Notice, recorder: Callable[[], Recorder] = CudaRecorder
    ) -> None:
        self._model, self._cache, self._notice = model, cache, notice
        # Halves take turns within a step, so one's scratch memory must not be the other's results.
        self._recorders = recorder(), recorder()
        self._lanes: dict[tuple[int, int, int], CapturedLane] = {}
        self._refused: set[tuple[int, int, int]] = set()
        self.eager: Counter[str] = Counter()  # lanes that ran eagerly, by reason
        self.replayed = 0  # lanes that did not

    def lane(self, half: int, rows: Sequence[Row]) -> CapturedLane | None:
        """The lane for these rows, at the start of their step; None where they run eagerly. Raises CaptureError."""
        if any(len(row.ids) > 1 for row in rows):
            self.eager["a prompt in the step"] += 1
            return None
        if len(rows) > SHAPES[-1]:
            self.eager[f"more than {SHAPES[-1]} rows"] += 1
            return None
        page_size = self._cache.page_size
        n_pages = max(-(-(row.position + 1) // page_size) for row in rows)
        shape = half, min(n for n in SHAPES if n >= len(rows)), max(LEAST_PAGES, 1 << (n_pages - 1).bit_length())
        if shape in self._refused:
            self.eager["cannot be captured"] += 1
            return None
        if shape not in self._lanes:
            inputs = StaticInputs(*shape[1:], page_size, self._model.norm.device)  # the embedding may lie in RAM
            self._lanes[shape] = CapturedLane(inputs, self._model, self._cache, self._recorders[half])
        self._lanes[shape].begin(rows)
        self.replayed += 1
        return self._lanes[shape]

    def refuse(self, error: CaptureError) -> None:
        """Run the shape at fault eagerly from now on; its step must be taken again."""
        (shape,) = (shape for shape, lane in self._lanes.items() if lane is error.lane)
        del self._lanes[shape]
        self._refused.add(shape)
        self._notice(f"decoding {shape[1]} rows over {shape[2]} pages runs without CUDA graphs: {error}")


def added(x: torch.Tensor, said: Sequence[torch.Tensor]) -> torch.Tensor:
    """The residual stream with what a layer's experts said, if anything, in the order of an eager lane."""
    return x + (said[0] + said[1]) if said else x


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a replay gave what the eager part gave."""
    if not found.is_floating_point():
        return torch.equal(found, expected)
    if not bool(expected.isfinite().all()):
        return torch.equal(found.isnan(), expected.isnan())  # a request with broken values says no more
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
