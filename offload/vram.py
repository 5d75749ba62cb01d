"""Experts that lie in VRAM as well: their slots, what a step may read of them, and uploads between steps.

    vram.begin()             # uploads that are over take effect; the table is fixed from here
    rows = vram.rows(index)  # …where the layer's experts lie in `memory`, or MISS
    vram.observe(index, ids)
    vram.end(teaches=True)   # what the step used settles what is uploaded next

A slot whose expert gives way is in nobody's table from the end of a step on; its upload waits on the device for the
last work that was begun before, and the new expert takes effect at the start of a later step, when its bytes are there.
Nothing waits for an upload. Misses are the CPU's. Knows no products and no tokens' values. Called by offload/split.py.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from offload.benefit import Benefit, Spent
from offload.copies import Copies, Event
from offload.device_product import host_pieces
from offload.slots import EMPTY, MISS, RULES, Move, Rules, SlotPolicy, SlotTable
from offload.store import ExpertStore
from offload.uploads import Upload, Uploads

Integers = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]
Notice = Callable[[str], None]


@dataclass(slots=True)
class VramStats:
    """Counters since the start; they only grow. An expert counts once for a layer and step."""

    slots: int  # over all layers
    hits: int = 0  # experts that the device ran from a slot
    misses: int = 0  # that the CPU ran
    uploads: int = 0  # experts that came to lie in a slot
    bytes: int = 0  # of these
    used: int = 0  # of these, run before they gave way
    skipped: int = 0  # uploads that were not made: the slot's last one was under way, or the expert on the disk
    won: float = 0.0  # seconds by the measured rates, uploads and waiting for the device deducted
    uploading: bool = True  # whether uploads pay at present

    @property
    def hit_rate(self) -> float | None:
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    @property
    def uses_per_upload(self) -> float | None:
        return self.hits / self.uploads if self.uploads else None


class VramSlots:
    """The slots of all layers. Used by one thread."""

    def __init__(
        self,
        store: ExpertStore,
        slots: Sequence[int],
        copies: Copies,
        uploads: Uploads,
        notice: Notice,
        rules: Rules = RULES,
    ) -> None:
        """`slots` of each MoE layer. Raises ValueError where they do not fit the store's layers."""
        n_layers, n_experts = len(store.layers), store.geometry.n_experts
        if len(slots) != n_layers or not all(0 <= n <= n_experts for n in slots):
            raise ValueError(
                f"vram_slots: expected a number from 0 to {n_experts} for each of {n_layers} MoE layers, got {[*slots]}"
            )
        self._store, self._copies, self._uploads, self._notice = store, copies, uploads, notice
        self._pieces = host_pieces(store.geometry, store.format, store.n_nodes)
        self.memory = copies.memory(sum(slots), store.geometry.expert_bytes(store.format))  # (slots, n_bytes) uint8
        self._first = np.cumsum([0, *slots])[:-1]  # each layer's first slot in memory
        self.table = SlotTable(slots, n_experts)  # what a step reads
        self._coming = SlotTable(slots, n_experts)  # the same with what is under way: the policy's view
        self._policy = SlotPolicy(self._coming, rules)
        self._under_way: dict[tuple[int, int], tuple[Upload, int]] = {}  # by layer and slot: with its expert
        self._unused = np.zeros((n_layers, n_experts), np.bool_)  # uploaded and not run yet
        self._used = np.zeros((n_layers, n_experts), np.bool_)  # by the running step
        self._spent, self._benefit = Spent(), Benefit()
        self._stats = VramStats(sum(slots))

    def begin(self) -> None:
        """A step begins."""
        for (layer, slot), (upload, expert) in list(self._under_way.items()):
            if upload.over:
                self._arrive(layer, slot, expert)
        self.table.begin()
        self._coming.begin()

    def rows(self, index: int) -> Integers:
        """(E,) where in `memory` the experts of a layer (its place among the layers) lie; MISS for those that don't."""
        where = self.table.where[index]
        if not self._benefit.hits:
            return np.full_like(where, MISS)
        return np.asarray(np.where(where == MISS, MISS, where + self._first[index]))

    def elsewhere(self, index: int) -> Mask:
        """(E,) which experts of a layer the CPU need not run."""
        return np.asarray(self.rows(index) != MISS)

    def observe(self, index: int, experts: Integers) -> None:
        """The experts, in any shape, that a layer's tokens chose; -1 for none."""
        chosen = np.zeros(self._used.shape[1], np.bool_)
        chosen[experts[experts >= 0]] = True
        self._used[index] |= chosen  # a step in halves comes here twice
        here = chosen & self.elsewhere(index)
        n_hits = int(here.sum())
        self._stats.hits += n_hits
        self._stats.misses += int(chosen.sum()) - n_hits
        self._stats.used += int((here & self._unused[index]).sum())
        self._unused[index] &= ~here
        self._spent.hits += n_hits

    def spend(self, experts: int, seconds: float, late: float) -> None:
        """The CPU ran so many experts of a layer in so long, and the layer then waited for the device."""
        self._spent.experts += experts
        self._spent.seconds += seconds
        self._spent.late += late

    def end(self, teaches: bool) -> None:
        """The step has ended: all device work that reads the slots has begun. It `teaches` which experts are wanted if
        it only decoded: a prompt's step uses nearly all of them."""
        self.table.end()
        self._coming.end()
        if teaches:
            for layer, used in enumerate(self._used):
                self._policy.observe(layer, np.flatnonzero(used)[None])
            moves = self._policy.decide()
            if self._benefit.uploads and moves:
                self._upload(moves, self._copies.computed())
            if self._benefit.step(self._spent):
                self._notice(
                    "experts in VRAM cost more than they bring here: uploads rest for a while"
                    + ("" if self._benefit.hits else ", and the CPU runs all experts")
                )
        self._spent = Spent()
        self._used[:] = False

    def stats(self) -> VramStats:
        """The counters as they are now."""
        return replace(self._stats, won=self._benefit.won, uploading=self._benefit.uploads)

    def check(self) -> None:
        """The two tables agree but for what is under way."""
        self.table.check()
        self._coming.check()
        for layer in range(len(self._first)):
            for slot, (now, soon) in enumerate(zip(self.table.held(layer), self._coming.held(layer), strict=True)):
                upload = self._under_way.get((layer, slot))
                assert (now == EMPTY and soon == upload[1]) if upload else now == soon, (layer, slot)

    def close(self) -> None:
        """Uploads end; the store's memory may go then."""
        self._uploads.close()

    def _upload(self, moves: Sequence[Move], last_read: Event) -> None:
        """Begin the uploads that can be made now, into slots that work before `last_read` may still read."""
        for move in moves:
            layer, slot, into = move.layer, move.slot, move.into
            assert into is not None, "the policy fills slots"
            if (layer, slot) in self._under_way or not self._hold(layer, into):
                self._stats.skipped += 1
                continue
            if move.out is not None:
                self.table.apply([Move(layer, slot, move.out, None)])
                self._unused[layer, move.out] = False
                self._spent.uploads += 1
            self._coming.apply([move])
            target = self.memory[self._first[layer] + slot]
            upload = self._uploads.begin(self._bytes(layer, into), target, last_read)
            self._under_way[layer, slot] = upload, into

    def _arrive(self, layer: int, slot: int, expert: int) -> None:
        """An upload is over."""
        del self._under_way[layer, slot]
        if self._store.pager is not None:
            self._store.pager.release(layer, expert)
        self.table.apply([Move(layer, slot, None, expert)])
        self._unused[layer, expert] = True
        self._stats.uploads += 1
        self._stats.bytes += self.memory.shape[1]

    def _hold(self, layer: int, expert: int) -> bool:
        """Whether the expert's bytes are in RAM, and stay there until they have come."""
        return self._store.pager is None or self._store.pager.hold(layer, expert)

    def _bytes(self, layer: int, expert: int) -> list[torch.Tensor]:
        """An expert's bytes where they lie on the host."""
        places = self._store.addresses[layer, expert]
        return [
            torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(places[node, matrix]))))
            for node, matrix, _, size in self._pieces
        ]
