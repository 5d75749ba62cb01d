"""A routing record of what a server really runs: `hybrid.routes.Record`, one document for each request.

Joins what the routers chose (`watch`, given to `Engine`) with the batch that they chose for (`recording`, around
`Engine.step`). Holds at most so many bytes, then stops and says so. A token that is run again after a preemption counts
once; tokens that came from another request's pages were not run and are missing. Knows no files and no scores.
Used by the engine process.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hybrid.batch import Batch, Row, StepOutput
from hybrid.moe import Moe
from hybrid.routes import Floats, Integers, Record

MOST_BYTES = 64_000_000  # 44,000 tokens of Kimi-K2.5
OVERHEAD = 500  # bytes that Python needs for a token beside its experts, measured on tokens that came one by one
FAMILY, KIND = "request", "answer"

Step = Callable[[Batch], StepOutput]


@dataclass(slots=True)
class _Document:
    """What was run of a request."""

    end: int  # position behind its last token
    tokens: list[int] = field(default_factory=list)
    experts: list[Integers] = field(default_factory=list)  # (n, L, K) of each step
    decoded: int | None = None  # its first token that the model wrote


class ServedRecord:
    """Records until it is full."""

    def __init__(self, directory: Path, notice: Callable[[str], None], most_bytes: int = MOST_BYTES) -> None:
        """`directory`: the checkpoint. `notice(line)` hears when the record is full."""
        self._directory, self._notice, self._most_bytes = directory, notice, most_bytes
        self._documents: dict[int, _Document] = {}  # by request
        self._bias: dict[int, Floats] = {}  # of each MoE layer
        self._chosen: list[Integers] = []  # (T, K) of this step's layers so far
        self._bytes = 0
        self.n_tokens = 0

    @property
    def full(self) -> bool:
        return self._bytes >= self._most_bytes

    def watch(self, moe: Moe, x: torch.Tensor, ids: torch.Tensor) -> None:
        """A `hybrid.moe.Watch`."""
        if self.full:
            return
        router = moe.router
        if moe.layer not in self._bias:
            bias = torch.zeros(len(router.weight)) if router.bias is None else router.bias
            self._bias[moe.layer] = bias.float().cpu().numpy()
        self._chosen.append(ids.sort(-1).values.cpu().numpy().astype(np.min_scalar_type(len(router.weight) - 1)))

    def recording(self, step: Step) -> Step:
        """The engine's step, whose rows are written down."""

        def run(batch: Batch) -> StepOutput:
            self._chosen.clear()  # of a step that failed
            out = step(batch)
            if self._chosen:
                self._add(batch)
            return out

        return run

    def record(self) -> Record | None:
        """Everything so far; None where nothing was run."""
        documents = [document for document in self._documents.values() if document.tokens]
        if not documents:
            return None
        lengths = [len(document.tokens) for document in documents]
        starts = np.cumsum([0, *lengths])[:-1]
        turns = [
            (at + document.decoded, at + n)
            for at, n, document in zip(starts.tolist(), lengths, documents, strict=True)
            if document.decoded is not None
        ]
        bias = np.stack([*self._bias.values()])
        return Record(
            model=_hash(self._directory),
            layers=np.array([*self._bias], np.int32),
            bias=bias,
            tokens=np.array([token for document in documents for token in document.tokens], np.uint32),
            starts=starts.astype(np.int32),
            families=np.full(len(documents), FAMILY),
            turns=np.array(turns, np.int32).reshape(-1, 2),
            kinds=np.full(len(turns), KIND),
            experts=np.concatenate([experts for document in documents for experts in document.experts]),
            scores=np.zeros((0, *bias.shape), np.float16),
        )

    def _add(self, batch: Batch) -> None:
        experts = np.stack(self._chosen, 1)  # (T, L, K)
        self._chosen.clear()
        at = 0
        for row in batch.rows:
            self._add_row(row, experts[at : at + len(row.ids)])
            at += len(row.ids)
        if self.full:
            self._notice(f"the routing record is full: {self.n_tokens:,} tokens; later ones are not recorded")

    def _add_row(self, row: Row, experts: Integers) -> None:
        document = self._documents.setdefault(row.request_id, _Document(row.position))
        known = document.end - row.position  # tokens of the row that are written down already
        if known < 0 or known >= len(row.ids):
            return
        if row.n_sampled and document.decoded is None:
            document.decoded = len(document.tokens)
        document.tokens += row.ids[known:]
        document.experts.append(experts[known:].copy())
        document.end = row.position + len(row.ids)
        self.n_tokens += len(row.ids) - known
        self._bytes += document.experts[-1].nbytes + OVERHEAD * (len(row.ids) - known)


def _hash(directory: Path) -> str:
    """SHA-256 of config.json and the index of the weights: the weights themselves may take minutes to read."""
    total = hashlib.sha256((directory / "config.json").read_bytes())
    index = directory / "model.safetensors.index.json"
    if index.exists():
        total.update(index.read_bytes())
    return total.hexdigest()
