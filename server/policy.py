"""Who goes first where not all can: between requests that wait, between those that run, between two lanes.

The ideas and what they are worth under offload: docs/SCHEDULING.md. Every one can be switched off, to measure it. No
clock and no pages: `scheduler.py` asks, and carries out.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from server.sequence import Sequence

MOST_OVERTAKEN = 64  # later requests that may start before one that waits
Line = tuple[bool, str]  # lane (patient?) and group


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

    def order(self, waiting: Iterable[Sequence], running: Iterable[Sequence]) -> Generator[Sequence, bool, None]:
        """Those that wait, in order of arrival, in the order in which they may start; send whether one did.

        O(W log W) for all of them: a line for each group of a lane, and a heap of the lines' heads.
        """
        held = Counter(map(self._line, running))
        lines: defaultdict[Line, list[tuple[int, int, Sequence]]] = defaultdict(list)
        for sequence in waiting:
            if sequence.overtaken >= MOST_OVERTAKEN:
                held[self._line(sequence)] += bool((yield sequence))
            else:
                length = sequence.remaining if self.longest_first and self.patient(sequence) else 0
                lines[self._line(sequence)].append((-length, sequence.number, sequence))
        heads = []
        for line, members in lines.items():
            members.sort(reverse=True)  # the first one last, where pop() takes it
            heads.append((line[0], held[line], *members[-1][:2], line))
        heapq.heapify(heads)
        while heads:
            *_, line = heapq.heappop(heads)
            members = lines[line]
            held[line] += bool((yield members.pop()[-1]))
            if members:
                heapq.heappush(heads, (line[0], held[line], *members[-1][:2], line))

    def victim(self, candidates: Iterable[Sequence], running: Iterable[Sequence]) -> Sequence:
        """Which of these running ones gives its pages back: patient before others, of the group that holds most, the
        youngest."""
        held = Counter(map(self._line, running))
        return max(candidates, key=lambda one: (self.patient(one), held[self._line(one)], one.number))

    def _line(self, sequence: Sequence) -> Line:
        """Its lane and group. A request that names no group is one of its own."""
        group = (sequence.request.group or sequence.number) if self.fair_groups else ""
        return self.patient(sequence), str(group)


FIRST_COME = Policy(bus=False, prefix_once=False, express=False, fair_groups=False, longest_first=False)
