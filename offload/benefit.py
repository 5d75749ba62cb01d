"""Whether experts in VRAM bring more than they cost, by what was measured over a window of steps.

A hit saves the CPU the time that an expert takes it; an upload reads the expert's bytes from RAM once, which takes as
long; and where the device is done after the CPU, the step waits for the difference. While that is a loss uploads rest
for a while and are then tried again. Knows seconds and counts only. Called by offload/vram.py.
"""

from dataclasses import dataclass

WINDOW = 128  # steps that are judged together
REST = 8  # windows without uploads after one with a loss


@dataclass(slots=True)
class Spent:
    """What a window's steps came to."""

    hits: int = 0  # experts that the device ran
    uploads: int = 0  # into slots that held another expert: filling the empty ones pays off later
    experts: int = 0  # that the CPU ran in layers of which the device ran none
    seconds: float = 0.0  # for these
    late: float = 0.0  # seconds that layers waited for the device

    def add(self, other: "Spent") -> None:
        self.hits += other.hits
        self.uploads += other.uploads
        self.experts += other.experts
        self.seconds += other.seconds
        self.late += other.late


class Benefit:
    """The switch."""

    def __init__(self) -> None:
        self.uploads = True  # whether experts may be uploaded
        self.hits = True  # whether those in slots may be used: without even the uploads' cost they were a loss
        self._spent, self._steps, self._rest = Spent(), 0, 0
        self._each = 0.0  # seconds of the CPU for an expert, as last known
        self.won = 0.0  # seconds, over all windows

    def step(self, spent: Spent) -> bool:
        """A step has ended. True where the window that it ends was a loss and uploads have just stopped."""
        self._spent.add(spent)
        self._steps += 1
        if self._steps < WINDOW:
            return False
        spent, self._spent, self._steps = self._spent, Spent(), 0
        if spent.experts:
            self._each = spent.seconds / spent.experts
        saved = spent.hits * self._each - spent.late
        net = saved - spent.uploads * self._each
        self.won += net
        if self._rest:
            self._rest -= 1
            self.uploads, self.hits = not self._rest, self.hits or not self._rest
        elif net < 0:
            self.uploads, self.hits, self._rest = False, saved >= 0, REST
            return True
        return False
