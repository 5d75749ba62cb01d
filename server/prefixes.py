"""Which prefixes are about to be readable, so that who shares one waits instead of reading it too.

Called by `scheduler.py`.
"""

from hybrid.pages import PageTable
from server.policy import Policy
from server.sequence import Sequence


class Coming:
    """The prefixes that running requests are about to publish. Patient ones stand still in steps of the express lane,
    so only patient ones wait for them."""

    def __init__(self, policy: Policy, pages: PageTable) -> None:
        self._policy, self._pages = policy, pages
        self._keys: dict[bool, set[bytes]] = {True: set(), False: set()}  # for patient ones, for others

    def add(self, reader: Sequence) -> None:
        """What it will publish."""
        keys = self._pages.unwritten(reader.held)
        self._keys[True].update(keys)
        if not self._policy.patient(reader):
            self._keys[False].update(keys)

    def worth_waiting(self, sequence: Sequence) -> bool:
        """Whether half or more of what it must compute can be shared soon."""
        keys = self._keys[self._policy.patient(sequence)]
        if not keys or sequence.scoring:
            return False
        now, soon = self._pages.awaited(sequence.held, keys)
        return 0 < len(sequence.held.ids) - now <= 2 * soon
