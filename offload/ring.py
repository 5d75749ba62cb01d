"""A few places on the device that experts pass through, one expert each.

    loan = ring.load(key, parts)    # the upload begins once the place's last reader is done
    data = ring.read(loan)          # the device's later work begins once the upload is done
    …                               # products with data
    ring.done(loan)                 # free once that work is done; or ring.drop(loan) if nobody wants it after all

Nothing here waits but the copy stream and the device, except where the host's memory is not pinned: then bytes go
through pinned staging of as many places, which the host must fill. With `checked` every loan's bytes are summed up on
the host, on the device before they are read, and again when their reader is done: `check` raises where the three
differ, so a place that is used too early does not stay a wrong number somewhere. Knows no layers and no products.
Called by `offload.streaming`.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from offload.copies import Copies, Event

LEAST_PLACES = 2  # one is read while the next is written


class RingError(RuntimeError):
    """A place was used while it belonged to another expert."""


@dataclass(frozen=True, slots=True, eq=False)
class Loan:
    """A place that holds an expert, or will once its upload is done."""

    key: Hashable
    place: int
    uploaded: Event
    total: int | None  # of the expert's bytes, where the ring is checked


class Ring:
    """Places and who owns them. Used by one thread."""

    def __init__(self, copies: Copies, n_places: int, n_bytes: int, *, staged: bool, checked: bool = False) -> None:
        """`n_bytes` of an expert, a multiple of 8; `staged` where the host's memory is not pinned."""
        assert n_places >= LEAST_PLACES and n_bytes % 8 == 0, "a ring of two places or more, of whole words"
        self._copies, self._checked = copies, checked
        self._memory = copies.memory(n_places, n_bytes)
        self._staging = copies.host_memory(n_places, n_bytes) if staged else None
        self._staged: list[Event | None] = [None] * n_places  # when each place's staging may be filled again
        self._free = deque(range(n_places))  # whose reader ends first, first
        self._last_read: list[Event | None] = [None] * n_places
        self._loans: dict[int, Loan] = {}  # by place
        self._sums: list[tuple[Loan, torch.Tensor]] = []  # on the device, not yet compared

    @property
    def n_places(self) -> int:
        return len(self._memory)

    @property
    def n_free(self) -> int:
        """Places that `load` may take."""
        return len(self._free)

    def load(self, key: Hashable, parts: Sequence[torch.Tensor]) -> Loan:
        """Begin the upload of an expert's bytes, which lie in `parts` on the host, one after another."""
        if not self._free:
            raise RingError(f"no place is free for {key}: {[loan.key for loan in self._loans.values()]} are there")
        place = self._free.popleft()
        last_read = self._last_read[place]
        if last_read is not None:
            self._copies.copy_after(last_read)
        total = sum(_sum(part) for part in parts) if self._checked else None
        at = 0
        for part in self._stage(place, parts):
            self._copies.copy(self._memory[place, at : at + part.numel()], part)
            at += part.numel()
        assert at == self._memory.shape[1], "an expert of another size"
        loan = Loan(key, place, self._copies.copied(), None if total is None else _wrapped(total))
        if self._staging is not None:
            self._staged[place] = loan.uploaded
        self._loans[place] = loan
        return loan

    def read(self, loan: Loan) -> torch.Tensor:
        """(n_bytes,) on the device, for work that is begun before `done`."""
        self._own(loan)
        self._copies.compute_after(loan.uploaded)
        self._note(loan)
        return self._memory[loan.place]

    def done(self, loan: Loan) -> None:
        """All work that reads the expert has begun."""
        self._own(loan)
        self._note(loan)
        self._last_read[loan.place] = self._copies.computed()
        self._release(loan)

    def drop(self, loan: Loan) -> None:
        """Nobody will read the expert. Its place's next upload comes after this one: copies keep their order."""
        self._own(loan)
        self._release(loan)

    def check(self) -> None:
        """Every place has one owner, and no loan's bytes changed. Waits for the device where the ring is checked.

        Raises RingError.
        """
        sums, self._sums = self._sums, []
        for loan, found in sums:
            if int(found) != loan.total:
                raise RingError(
                    f"place {loan.place} of the ring did not hold {loan.key} while it was read: it was read before its "
                    "upload was done, or written before its reader was"
                )
        owned = [*self._free, *self._loans]
        if sorted(owned) != list(range(self.n_places)):
            raise RingError(f"places of the ring with no owner, or with two: {sorted(owned)}")

    def close(self) -> None:
        """Wait for the copies that were begun: their sources may go then."""
        self._copies.host_after(self._copies.copied())

    def _own(self, loan: Loan) -> None:
        if self._loans.get(loan.place) is not loan:
            raise RingError(f"place {loan.place} of the ring is not lent to {loan.key} any more")

    def _release(self, loan: Loan) -> None:
        del self._loans[loan.place]
        self._free.append(loan.place)

    def _stage(self, place: int, parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The parts where the device can fetch them by itself."""
        if self._staging is None:
            return parts
        before = self._staged[place]
        if before is not None:
            self._copies.host_after(before)
        torch.cat(tuple(parts), out=self._staging[place])
        return (self._staging[place],)

    def _note(self, loan: Loan) -> None:
        if self._checked:
            self._sums.append((loan, self._memory[loan.place].view(torch.int64).sum()))


def _sum(part: torch.Tensor) -> int:
    return int(part.view(torch.int64).sum())


def _wrapped(total: int) -> int:
    """As an int64 that went round."""
    return (total + 2**63) % 2**64 - 2**63
