"""The job record that the workers run (kernels.layer), with the buffers it points to.

Filled once with what a store and its kernels settle, and for every layer with its tokens grouped by expert. Knows no
threads and starts nothing. Used by experts.py.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload.config import BLOCKS, GROUP, LINE, MATRICES, Matrix
from offload.kernels import amx
from offload.kernels.grouping import begin
from offload.kernels.layer import ACTIVE_COLUMNS, JOB, SCRATCH_BYTES
from offload.kernels.table import Kernels, ManyTokens
from offload.store import ExpertStore


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


class LayerJob:
    """One job at a time, over all layers of a store."""

    def __init__(self, store: ExpertStore, kernels: Kernels, nodes: npt.NDArray[np.int64]) -> None:
        """`nodes` is the memory node of each worker."""
        self._store = store
        self._active, self._tokens, self._weights = Buffer(), Buffer(), Buffer()
        self._x_records, self._h_records, self._scratch = Buffer(), Buffer(), Buffer()
        self._x_rows, self._h_rows, self._panels = Buffer(), Buffer(), Buffer()  # for experts with many tokens
        self._nodes = nodes
        self.addresses = np.ascontiguousarray(store.addresses)
        self.layer_addresses = [layer.ctypes.data for layer in self.addresses]  # int64 (E, N, 2) each
        self._ends = np.zeros(store.geometry.n_experts, np.int64)
        self.chosen = np.zeros((len(store.layers), store.geometry.n_experts), np.int64)  # tokens of each expert so far
        self._chosen_addresses = [row.ctypes.data for row in self.chosen]
        self._record = self._new(kernels)
        self.address = self._record.ctypes.data
        self._room = 0, 0  # tokens and assignments that the buffers hold
        self._active_address = 0
        self.n_active = 0  # experts of the job

    def begin(self, index: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, result: torch.Tensor) -> int:
        """Fill the job: how many experts it has, or UNKNOWN_EXPERT where an id is none."""
        self.n_active = begin(*self.grouping(index, x, ids, weights, result))
        return self.n_active

    def grouping(
        self, index: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, result: torch.Tensor
    ) -> tuple[int, ...]:
        """What `kernels.grouping.begin` takes to fill the job, when x, ids and weights are there. Makes room."""
        n_tokens, k = ids.shape
        if n_tokens > self._room[0] or n_tokens * k > self._room[1]:
            self._make_room(n_tokens, n_tokens * k)
        self._record["active"], self._record["keep"] = self._active_address, 0  # a layer in parts has moved them
        return (
            self.address, self.layer_addresses[index], self._store.geometry.n_experts, x.data_ptr(), ids.data_ptr(),
            weights.data_ptr(), n_tokens, k, result.data_ptr(), self._ends.ctypes.data, self._chosen_addresses[index],
        )  # fmt: skip

    def take_part(self, first: int, stop: int) -> None:
        """Let the job be some of its experts only, added to what those before have left."""
        self._record["active"] = self._active_address + first * ACTIVE_COLUMNS * 8
        self._record["n_active"], self._record["keep"] = stop - first, first

    def experts(self) -> npt.NDArray[np.int64]:
        """The experts of the job, ascending."""
        return self._active.array(np.int64, self.n_active * ACTIVE_COLUMNS)[::ACTIVE_COLUMNS]

    def _new(self, kernels: Kernels) -> npt.NDArray[np.void]:
        """The record with all that stays the same."""
        job, store, n_workers = np.zeros((), JOB), self._store, len(self._nodes)
        inputs: dict[Matrix, int] = {"gate_up": store.geometry.hidden, "down": store.geometry.inner}
        for matrix, n_in in inputs.items():
            units = [store.geometry.units_of(matrix, node, store.n_nodes) for node in range(store.n_nodes)]
            job[matrix]["n_in"] = n_in
            job[matrix]["n_blocks"] = store.geometry.n_blocks(matrix, store.format)
            job[matrix]["unit_bytes"] = store.geometry.unit_bytes(matrix, store.format)
            job[matrix]["units"][: len(units) + 1] = [0, *(part.stop for part in units)]
            job[matrix]["record_bytes"] = kernels.layout.row_bytes(n_in, store.format)
        job["n_nodes"], job["worker_nodes"] = store.n_nodes, self._nodes.ctypes.data
        job["scratch"] = self._scratch.address(n_workers * SCRATCH_BYTES)
        job["group_bytes"] = kernels.layout.group_bytes
        job["encode_inputs"], job["encode_swiglu"] = kernels.encode_inputs, kernels.encode_swiglu
        job["products"] = kernels.products
        job["many"] = np.iinfo(np.int64).max
        if kernels.many is not None:
            self._describe_many(job, kernels.many, n_workers)
        return job

    def _describe_many(self, job: npt.NDArray[np.void], many: ManyTokens, n_workers: int) -> None:
        """What the job needs for experts with many tokens."""
        geometry = self._store.geometry
        job["many"] = amx.MANY_TOKENS
        for matrix in MATRICES:
            job[matrix]["steps"] = job[matrix]["n_blocks"] * BLOCKS[many.fmt].inputs // GROUP
        job["x_row_bytes"] = amx.row_bytes(geometry.hidden, many.fmt)
        job["h_row_bytes"] = amx.row_bytes(geometry.inner, many.fmt)
        job["panel_bytes"] = amx.panel_bytes(max(geometry.hidden, geometry.inner), many.fmt)
        job["panels"] = self._panels.address(n_workers * int(job["panel_bytes"]))
        job["bf16_inputs"], job["bf16_swiglu"] = many.inputs, many.swiglu
        job["unpack"], job["multiply"] = many.unpack, many.multiply

    def _make_room(self, n_tokens: int, n_assignments: int) -> None:
        """Let the job's buffers hold so many."""
        job, n_experts = self._record, self._store.geometry.n_experts
        n_active = min(n_experts, n_assignments)
        self._active_address = self._active.address(8 * ACTIVE_COLUMNS * n_active)
        job["tokens"] = self._tokens.address(8 * n_assignments)
        job["weights"] = self._weights.address(4 * n_assignments)
        job["x_records"] = self._x_records.address(n_tokens * int(job["gate_up"]["record_bytes"]))
        job["h_records"] = self._h_records.address(n_assignments * int(job["down"]["record_bytes"]))
        job["x_rows"] = self._x_rows.address(n_assignments * int(job["x_row_bytes"]))
        job["h_rows"] = self._h_rows.address(n_assignments * int(job["h_row_bytes"]))
        self._room = max(n_tokens, self._room[0]), max(n_assignments, self._room[1])
