"""RAM slots for experts that are read from the disk: which expert lies in which slot, and which one gives way.

A slot is given up by the expert that will be wanted last. The layers run in turn, so an expert that its layer wants
with probability p is wanted again after d + L (1 / p - 1) layers on average: d layers until its own runs again, and a
round of all L for each time that it is not chosen. p is a mean of the layer's last steps that fades with age. A list of
the least recently used would lose every expert just before its turn once a token's experts outnumber the slots.

Plain numbers: reads no disk and runs no experts. Called by offload/paging.py.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FADE = 1 / 8  # weight of the newest step in p: best of 1/4 to 1/64 on a real routing record (docs/LOG.md)
RAREST = 1e-6  # keeps 1 / p finite
NONE = -1

Numbers = npt.NDArray[np.int64]


class Slots:
    """Slots by number, experts by layer * n_experts + expert. Locked slots are being read by kernels or written."""

    def __init__(self, n_slots: int, n_layers: int, n_experts: int) -> None:
        self.n_slots = n_slots
        self._n_layers, self._n_experts = n_layers, n_experts
        self._slot_of = np.full(n_layers * n_experts, NONE, np.int64)
        self._owner = np.full(n_slots, NONE, np.int64)
        self._locked = np.zeros(n_slots, np.int64)  # how often
        self._free = list(range(n_slots))
        self._likely = np.full(n_layers * n_experts, RAREST)  # p
        self._certain = np.zeros(n_layers * n_experts, np.bool_)  # named for the layer's next run
        self._due = np.zeros(n_layers * n_experts, np.bool_)  # of the running layer, not run yet
        self._now = 0  # the layer that ran last

    def find(self, experts: Numbers) -> Numbers:
        """Their slots, -1 for those without."""
        return self._slot_of[experts]

    def expect(self, experts: Numbers) -> None:
        """The next run of their layer will probably want these."""
        self._certain[experts] = True

    def ran(self, layer: int, experts: Numbers) -> None:
        """The layer has these to run, and no others."""
        of_layer = slice(layer * self._n_experts, (layer + 1) * self._n_experts)
        self._certain[of_layer] = False
        self._likely[of_layer] *= 1 - FADE
        self._likely[experts] += FADE
        self._due[:] = False
        self._due[experts] = True
        self._now = layer

    def ended(self, experts: Numbers) -> None:
        """These of the running layer have run; the others are wanted before those of any other layer."""
        self._due[experts] = False

    def take(self, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Locked slots for experts without one, as many as there are; and the experts that gave way."""
        gone = self._evict(len(experts) - len(self._free))
        slots = [self._free.pop() for _ in experts[: len(self._free)]]
        for expert, slot in zip(experts, slots, strict=False):
            assert self._slot_of[expert] == NONE and self._owner[slot] == NONE
            self._slot_of[expert], self._owner[slot] = slot, expert
        self.lock(experts[: len(slots)])
        return slots, gone

    def lock(self, experts: Sequence[int] | Numbers) -> None:
        """They keep their slots until they are unlocked as often."""
        self._locked[self._slots(experts)] += 1

    def unlock(self, experts: Sequence[int] | Numbers) -> None:
        """Their slots may be given to others again."""
        slots = self._slots(experts)
        assert (self._locked[slots] > 0).all()
        self._locked[slots] -= 1

    def forget(self, expert: int) -> None:
        """Unlocks the slot of an expert whose bytes did not come, and frees it."""
        self.unlock([expert])
        self._vacate(int(self._slot_of[expert]))

    def check(self) -> None:
        """Tables agree with each other: for tests, and after them."""
        held = np.flatnonzero(self._owner != NONE)
        assert (self._slot_of[self._owner[held]] == held).all()
        assert len(held) == np.count_nonzero(self._slot_of != NONE) == self.n_slots - len(self._free)
        assert (self._owner[self._free] == NONE).all() and not self._locked[self._free].any()
        assert (self._locked >= 0).all()

    def _slots(self, experts: Sequence[int] | Numbers) -> Numbers:
        slots = self._slot_of[np.asarray(experts, np.int64)]
        assert (slots != NONE).all(), "an expert has lost its slot while it was in use"
        return slots

    def _evict(self, count: int) -> list[int]:
        """The experts that give way, so many or as many as are not locked."""
        if count <= 0:
            return []
        slots = np.flatnonzero((self._locked == 0) & (self._owner != NONE))
        owners = self._owner[slots]
        chance = np.where(self._certain[owners], 1.0, np.maximum(self._likely[owners], RAREST))
        distance = (owners // self._n_experts - self._now - 1) % self._n_layers + 1
        waits = distance + self._n_layers * (1 / chance - 1)
        waits[self._due[owners]] = 0
        last = slots if count >= len(slots) else slots[np.argpartition(-waits, count - 1)[:count]]
        gone: list[int] = self._owner[last].tolist()
        for slot in last.tolist():
            self._vacate(slot)
        return gone

    def _vacate(self, slot: int) -> None:
        assert not self._locked[slot], "a slot in use was given to another expert"
        self._slot_of[self._owner[slot]] = NONE
        self._owner[slot] = NONE
        self._free.append(slot)
