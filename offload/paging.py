"""Experts that RAM has no room for: slots for some of them, filled from the packed file when and before they run.

    start(layer, experts)   begin to read what is missing, all at once; forget what was read ahead in vain
    parts()                 the experts in pieces that fit the slots, each when it has come; the next is read meanwhile
    expect(layer, scores)   read ahead what the router's look-ahead names, behind everything that is waited for

Kernels find an expert through `addresses`, which is changed here and only between jobs: an expert that runs keeps its
slot until its part has run. The system's page cache is not used, so the slots are all that the experts take of RAM.
Called by offload/experts.py from one thread.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from offload.config import LINE
from offload.disk import BLOCK, DiskReader, Read, blocks
from offload.numa import address_of, huge_memory
from offload.pool import PoolError
from offload.prefetch import Recall, Switch, ranked
from offload.ram_slots import Numbers, Slots

LEAST_SLOTS = 2  # one expert runs while the next is read


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Where experts lie in a packed file."""

    path: Path
    start: int  # offset of the first
    expert_bytes: int
    n_layers: int
    n_experts: int  # of a layer
    inside: npt.NDArray[np.int64]  # (nodes, 2): where a node's units of each matrix begin in an expert

    @property
    def slot_bytes(self) -> int:
        """Direct reads bring whole blocks, in which an expert begins somewhere."""
        return -(-self.expert_bytes // BLOCK) * BLOCK + (
            BLOCK if self.start % BLOCK or self.expert_bytes % BLOCK else 0
        )


@dataclass(slots=True)
class PagingStats:
    """Counters since the start; they only grow."""

    n_slots: int
    recall: list[Recall]  # of the hints, by layer
    wanted: int = 0  # experts that layers had to run
    hits: int = 0  # of these, whole in memory by then
    ahead: int = 0  # experts that were read ahead of use, in whole or in part
    ahead_used: int = 0  # of these, run before they gave way
    bytes_on_demand: int = 0  # of experts that a layer waited for; read ahead in part they count whole
    bytes_ahead: int = 0  # of experts that had come before they were asked for, used or not
    bytes_read: int = 0  # from the disk, whatever for
    waited: float = 0.0  # seconds until missing experts were there
    read_ahead: bool = True  # whether reading ahead pays at present

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.wanted if self.wanted else None

    @property
    def useful(self) -> float | None:
        """Share of the experts read ahead that were run."""
        return self.ahead_used / self.ahead if self.ahead else None


@dataclass(slots=True)
class _Layer:
    """The layer that runs."""

    index: int
    experts: Numbers  # by number over all layers, ascending
    parts: list[tuple[int, int]]
    waited: float = 0.0
    held: list[Numbers] = field(default_factory=list)  # locked for parts that have not ended


class Pager:
    """The slots, the reader and the addresses. `close` only after the last kernel that uses them has returned."""

    def __init__(self, experts: PackedExperts, budget: int, read_ahead: bool | None = None) -> None:
        """As many slots as `budget` bytes hold, all experts at most. `read_ahead` settles what is else measured.

        Raises PoolError where the file cannot be opened; the budget must hold LEAST_SLOTS.
        """
        n_all = experts.n_layers * experts.n_experts
        n_slots = min(n_all, budget // experts.slot_bytes)
        assert n_slots >= LEAST_SLOTS, budget
        assert experts.start % LINE == experts.expert_bytes % LINE == 0, "kernels load whole lines"
        self._file, self._forced = experts, read_ahead
        self._slots = Slots(n_slots, experts.n_layers, experts.n_experts)
        self._memory = huge_memory(n_slots * experts.slot_bytes)
        self._reader = DiskReader(experts.path)  # last, since its threads would outlive an error
        self._base = address_of(self._memory)
        self.addresses = np.zeros((experts.n_layers, experts.n_experts, *experts.inside.shape), np.int64)
        self._flat = self.addresses.reshape(n_all, *experts.inside.shape)
        self._part = max(1, n_slots // 3)  # two parts and what is read ahead fit the slots together
        self._most_ahead = n_slots // 4
        self._most_held = n_slots // 12
        self._held: set[int] = set()  # read by others than kernels
        self._ahead: dict[int, Read] = {}  # experts being read before anybody waits
        self._vain: dict[int, Read] = {}  # likewise, cancelled: pieces may still arrive
        self._unused = np.zeros(n_all, np.bool_)  # read ahead and not run yet
        self._coming: dict[int, Read] = {}  # experts that a part waits for
        self._hints: dict[int, Numbers] = {}
        self._layer: _Layer | None = None
        self._switch = Switch()
        self._step = [0.0, 0]  # seconds waited and experts run since the first layer ran
        self._stats = PagingStats(n_slots, [Recall() for _ in range(experts.n_layers)])

    @property
    def n_slots(self) -> int:
        return self._slots.n_slots

    @property
    def reads_ahead(self) -> bool:
        return self._switch.on if self._forced is None else self._forced

    def start(self, layer: int, experts: Numbers) -> bool:
        """`experts` of the layer, ascending, will run. True where they are all there: the one part may run at once.

        Raises PoolError once the disk was stuck.
        """
        assert self._layer is None, "a layer runs"
        self._reader.check()
        if layer == 0:
            self._switch.step(self._step[0], int(self._step[1]))
            self._step = [0.0, 0]
        numbers = layer * self._file.n_experts + experts
        self._count_hint(layer, numbers)
        self._give_up_ahead(layer, set(numbers.tolist()))
        self._collect()
        self._stats.wanted += len(numbers)
        self._step[1] += len(numbers)
        self._slots.ran(layer, numbers)
        bounds = [*range(0, len(numbers), self._part), len(numbers)]
        parts = list(itertools.pairwise(bounds))
        self._layer = _Layer(layer, numbers, parts)
        if parts:
            self._bring(self._layer, parts[0])
        return len(parts) <= 1 and not self._coming

    def parts(self) -> Iterator[tuple[int, int]]:
        """(first, stop) of the running layer's experts, each when it may run; the one before is let go of.

        Raises PoolError when the disk fails: the layer is over then, and the slots are as good as before.
        """
        layer = self._layer
        assert layer is not None, "no layer runs"
        for i, part in enumerate(layer.parts):
            self._arrive(layer)
            if i + 1 < len(layer.parts):
                self._bring(layer, layer.parts[i + 1])
            assert self._flat[layer.experts[part[0] : part[1]]].all(), "an expert without an address is about to run"
            yield part
            ran = layer.held.pop(0)
            self._slots.unlock(ran)
            self._slots.ended(ran)

    def hold(self, layer: int, expert: int) -> bool:
        """Let an expert stay in RAM until `release`, for somebody who reads it beside the layers; False where its
        bytes are not all there, or where as many are held as leave room for a layer's parts and what is read ahead."""
        number = layer * self._file.n_experts + expert
        there = int(self._slots.find(np.array([number]))[0]) >= 0
        if not there or len(self._held) >= self._most_held or number in self._held:
            return False
        if any(number in reads for reads in (self._ahead, self._vain, self._coming)):
            return False
        self._slots.lock([number])
        self._held.add(number)
        return True

    def release(self, layer: int, expert: int) -> None:
        """A held expert may give way again."""
        number = layer * self._file.n_experts + expert
        self._held.remove(number)
        self._slots.unlock([number])

    def finish(self) -> None:
        """The layer has run, or will not: its experts may give way."""
        layer, self._layer = self._layer, None
        if layer is None:
            return
        self._abandon()
        for held in layer.held:
            self._slots.unlock(held[self._slots.find(held) >= 0])
        self._slots.ended(layer.experts)

    def expect(self, layer: int, scores: torch.Tensor, k: int, elsewhere: npt.NDArray[np.bool_] | None = None) -> None:
        """The layer's next run is likely to choose each token's best k by scores (T, E): read them ahead of use.

        Not those that run `elsewhere` (E,), from other memory.
        """
        named = ranked(scores, k)
        numbers = layer * self._file.n_experts + (named if elsewhere is None else named[~elsewhere[named]])
        self._hints[layer] = numbers
        self._slots.expect(numbers)
        if self.reads_ahead:
            self._collect()
            missing = numbers[self._slots.find(numbers) < 0]
            room = max(0, self._most_ahead - len(self._ahead) - len(self._vain))
            for number, read in self._read(missing[:room].tolist(), urgent=False).items():
                self._ahead[number] = read

    def stats(self) -> PagingStats:
        """The counters; they go on counting."""
        self._stats.bytes_read = self._reader.bytes_read
        self._stats.read_ahead = self.reads_ahead
        return self._stats

    def check(self) -> None:
        """Tables agree: an expert has an address just where it has a slot, and no slot is locked while nothing runs."""
        self._slots.check()
        every = np.arange(len(self._flat))
        slots = self._slots.find(every)
        assert (self._flat[slots < 0] == 0).all()
        for number in np.flatnonzero(slots >= 0).tolist():
            assert (self._flat[number] == self._address(number, int(slots[number]))).all()

    def close(self) -> None:
        """End the reader and let go of the memory."""
        self._reader.close()
        self._memory.release()

    def _bring(self, layer: _Layer, part: tuple[int, int]) -> None:
        """Lock the part's experts in slots, and begin to read those that are missing."""
        numbers = layer.experts[part[0] : part[1]]
        if not self._vain.keys().isdisjoint(numbers.tolist()):
            self._wait_vain()  # half of it came, and it is wanted after all
        there = self._slots.find(numbers) >= 0
        self._slots.lock(numbers[there])
        for number in numbers[there].tolist():
            read = self._ahead.pop(number, None)
            if read is None:
                self._stats.hits += 1
                continue
            self._slots.unlock([number])  # the lock of the reading; the part has its own
            self._stats.ahead += read.begun
            self._stats.ahead_used += read.begun
            self._reader.hurry(read)
            self._coming[number] = read
        self._stats.ahead_used += int(self._unused[numbers].sum())
        self._unused[numbers] = False
        missing = numbers[~there].tolist()
        self._coming |= self._read(missing, urgent=True)
        if len(self._coming.keys() & missing) < len(missing):  # slots that are read into ahead of use make room
            self._give_up_ahead(None, set())
            self._wait_vain()
            self._coming |= self._read([number for number in missing if number not in self._coming], urgent=True)
        assert self._coming.keys() >= set(missing), "the slots do not hold two parts"
        layer.held.append(numbers)
        self._stats.bytes_on_demand += len(self._coming) * self._file.expert_bytes

    def _arrive(self, layer: _Layer) -> None:
        """Wait for what a part lacks."""
        if not self._coming:
            return
        began = time.perf_counter()
        try:
            self._reader.wait(self._coming.values())
        finally:
            waited = time.perf_counter() - began
            self._stats.waited += waited
            self._step[0] += waited
        self._coming.clear()

    def _read(self, numbers: list[int], urgent: bool) -> dict[int, Read]:
        """Begin to read experts into slots, for as many as there are slots."""
        slots, gone = self._slots.take(numbers)
        for number in gone:
            self._flat[number] = 0
            self._unused[number] = False
        reads = {}
        for number, slot in zip(numbers, slots, strict=False):
            self._flat[number] = self._address(number, slot)
            at, n_bytes = blocks(self._offset(number), self._file.expert_bytes)
            first = slot * self._file.slot_bytes
            wanted = self._offset(number) + self._file.expert_bytes - at
            reads[number] = self._reader.read(at, self._memory[first : first + n_bytes], wanted, urgent)
        return reads

    def _give_up_ahead(self, layer: int | None, wanted: set[int]) -> None:
        """Stop reading ahead what the layer, or any for None, does not want after all."""
        for number in list(self._ahead):
            if (layer is None or number // self._file.n_experts == layer) and number not in wanted:
                read = self._ahead[number]
                if not self._reader.cancel(read):
                    self._vain[number] = self._ahead.pop(number)

    def _collect(self) -> None:
        """Unlock what has come ahead of use; free the slots of what was given up and is no longer written."""
        for number, read in list(self._ahead.items()):
            if read.done:
                del self._ahead[number]
                if read.error is None:
                    self._slots.unlock([number])
                    self._unused[number] = True
                    self._stats.ahead += 1
                    self._stats.bytes_ahead += self._file.expert_bytes
                else:  # whoever needs it will read it again, and hear of the error
                    self._forget(number)
        for number in [number for number, read in self._vain.items() if read.done]:
            self._stats.ahead += self._vain.pop(number).begun
            self._forget(number)

    def _wait_vain(self) -> None:
        """Until the slots of what was given up are free."""
        for read in self._vain.values():
            self._reader.settle(read)
        self._collect()

    def _abandon(self) -> None:
        """Give up what a part waits for, after an error."""
        for number, read in self._coming.items():
            if not self._reader.cancel(read):
                with contextlib.suppress(PoolError):  # a stuck disk: no layer will run again
                    self._reader.settle(read)
                self._forget(number)
        self._coming.clear()

    def _forget(self, number: int) -> None:
        self._slots.forget(number)
        self._flat[number] = 0
        self._unused[number] = False

    def _count_hint(self, layer: int, numbers: Numbers) -> None:
        hint = self._hints.pop(layer, None)
        if hint is not None:
            recall = self._stats.recall[layer]
            recall.named += len(hint)
            recall.wanted += len(numbers)
            recall.found += len(np.intersect1d(hint, numbers))

    def _offset(self, number: int) -> int:
        return self._file.start + number * self._file.expert_bytes

    def _address(self, number: int, slot: int) -> npt.NDArray[np.int64]:
        start = self._base + slot * self._file.slot_bytes + self._offset(number) % BLOCK
        return self._file.inside + start
