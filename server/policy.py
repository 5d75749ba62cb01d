"""Who goes first where not all can: between requests that wait, between those that run, between two lanes.

The ideas and what they are worth under offload: docs/SCHEDULING.md. Every one can be switched off, to measure it. No
clock and no pages: `scheduler.py` asks, and carries out.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass

from server.sequence import Sequence

MOST_OVERTAKEN = 64  # later requests that may start before one that waits


@dataclass(frozen=True, slots=True)
class Policy:
    """The switches. All off: first come, first served, one prompt to a step."""

    bus: bool = True  # the prompts of many requests are read in one step
    prefix_once: bool = True  # who can share what another one is just reading waits for it
    express: bool = True  # patient requests leave those that are not half of the time
    fair_groups: bool = True  # places go to the group that holds fewest
    longest_first: bool = True  # among the patient ones of a group
    slowdown: float = 2.0  # how much longer a token may take beside patient requests than without them

    def patient(self, sequence: Sequence) -> bool:
        """Whether it goes in the slow lane."""
        return self.express and sequence.request.patient

    def first(self, waiting: Iterable[Sequence], running: List[Sequence]) -> Sequence:
        """Which of those that wait, in order of arrival, starts next."""
        waiting = list(waiting)
        late = [sequence for sequence in waiting if sequence.overtaken >= MOST_OVERTAKEN]
        if late:
            return late[0]
        held = self._held(running)

        def rank(sequence: Sequence) -> tuple[bool, int, int, int]:
            patient = self.patient(sequence)
            length = -sequence.remaining if self.longest_first and patient else 0
            return patient, held[_group(sequence)], length, sequence.number

        return min(waiting, key=rank)

    def victim(self, candidates: Iterable[Sequence], running: List[Sequence]) -> Sequence:
        """Which of these running ones gives its pages back: patient before others, of the group that holds most, the
        youngest."""
        held = self._held(running)
        return max(candidates, key=lambda one: (self.patient(one), held[_group(one)], one.number))

    def _held(self, running: List[Sequence]) -> Counter[str | int]:
        """Places by group."""
        return Counter(map(_group, running)) if self.fair_groups else Counter()


FIRST_COME = Policy(bus=False, prefix_once=False, express=False, fair_groups=False, longest_first=False)


def _group(sequence: Sequence) -> str | int:
    """A request that names no group is one of its own."""
    return sequence.request.group or sequence.number
