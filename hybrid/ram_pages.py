"""Which prefix lies in which page of the RAM tier, and which one gives way. Plain integers, no torch.

The tier holds copies of pages that the device had to give up. A prefix that was brought back may lie in both places;
its copy here is then the first to be overwritten. Owned by `hybrid.pages`, which says what is moved and when.
"""

from collections import OrderedDict


class RamPages:
    """`n_pages` pages. One is blank, known by its prefix, or leaving: known, and read by the next step's moves."""

    def __init__(self, n_pages: int) -> None:
        if n_pages < 0:
            raise ValueError(f"n_ram_pages ({n_pages}) must be at least 0")
        self.n_pages = n_pages
        self._blank = list(range(n_pages - 1, -1, -1))  # a stack: page 0 goes first
        self._page_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._leaving: dict[bytes, int] = {}
        self.n_demoted = self.n_promoted = 0  # pages moved since the start

    @property
    def n_used(self) -> int:
        """Pages that hold a known prefix."""
        return self.n_pages - len(self._blank)

    def __contains__(self, key: bytes) -> bool:
        """Whether the prefix is here, or will be once the moves so far are done."""
        return key in self._page_of or key in self._leaving

    def touch(self, key: bytes) -> None:
        """A known prefix is as good as demoted now: it goes last."""
        if key in self._page_of:
            self._page_of.move_to_end(key)

    def take(self, key: bytes) -> int | None:
        """The page that `key` will lie in from now on: a blank one, else the least recently used. None where all of
        them are leaving."""
        assert key not in self, "the prefix is here already"
        if not self._blank and not self._page_of:
            return None
        page = self._blank.pop() if self._blank else self._page_of.popitem(last=False)[1]
        self._page_of[key] = page
        return page

    def read(self, key: bytes) -> int:
        """The page of a known prefix, which is not overwritten before `settle`."""
        if key not in self._leaving:
            self._leaving[key] = self._page_of.pop(key)
        return self._leaving[key]

    def settle(self, n_demoted: int, n_promoted: int) -> None:
        """So many moves were handed over: what they read may be overwritten by later ones, and goes first.

        Beginnings before ends: the device gives up the end of a prefix first, and finds it here still.
        """
        self.n_demoted += n_demoted
        self.n_promoted += n_promoted
        for key, page in reversed(self._leaving.items()):
            self._page_of[key] = page
            self._page_of.move_to_end(key, last=False)
        self._leaving.clear()

    def check(self) -> None:
        """Assert every invariant."""
        pages = [*self._blank, *self._page_of.values(), *self._leaving.values()]
        assert sorted(pages) == list(range(self.n_pages)), "a page of the RAM tier is lost, or there twice"
        assert not self._page_of.keys() & self._leaving.keys(), "a prefix is twice in the RAM tier"
