"""The page table: which KV page belongs to whom, and which prefix each page holds. Plain integers, no torch.

A page holds the KV of `page_size` consecutive positions. A full page is known by a key that covers every id from the
start of the sequence to the page's end, so equal keys mean equal content and sequences with the same beginning share
pages. Where there is a second tier of pages in RAM (`hybrid.ram_pages`), a prefix whose page is needed moves there and
comes back when it is asked for. The table speaks of the memory as it is after the moves that it has decided;
`take_moves` hands them over with the next batch.
The scheduler owns the only table; the engine sees page ids inside a batch and never this module. It does not know what
a request, a step or a tensor is.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from hashlib import blake2b

from hybrid.batch import Moves
from hybrid.ram_pages import RamPages


@dataclass(slots=True, eq=False)
class Holding:
    """One sequence and the pages that hold its beginning. The owner only appends to `ids`; the table does the rest."""

    ids: list[int]
    pages: list[int] = field(default_factory=list)  # in order of position
    n_published: int = 0  # leading pages whose content is computed and known to the table
    keys: list[bytes] = field(default_factory=list)  # of the leading full pages, as far as they were asked for


class PageTable:
    """`n_pages` pages of `page_size` tokens. A page is held (by one sequence or more), kept or blank.

    Kept pages are free but still findable by their prefix; they are overwritten, least recently used first, only
    when no blank page is left, and go to one of `n_ram_pages` then, if there are any.
    """

    def __init__(self, n_pages: int, page_size: int, n_ram_pages: int = 0) -> None:
        if n_pages < 1 or page_size < 1:
            raise ValueError(f"n_pages ({n_pages}) and page_size ({page_size}) must be at least 1")
        self.n_pages = n_pages
        self.page_size = page_size
        self._holders = [0] * n_pages
        self._key_of: list[bytes | None] = [None] * n_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(n_pages - 1, -1, -1))  # a stack: page 0 goes first
        self._kept: dict[int, None] = {}  # least recently used first
        self.ram = RamPages(n_ram_pages)
        self._demoted: dict[int, int] = {}  # moves so far: RAM page to the device page that it is copied from
        self._promoted: dict[int, int] = {}  # device page to the RAM page that it is copied from

    @property
    def n_free(self) -> int:
        """Pages that nobody holds: blank and kept ones."""
        return len(self._blank) + len(self._kept)

    @property
    def n_used(self) -> int:
        """Pages held by at least one sequence."""
        return self.n_pages - self.n_free

    def pages_for(self, n_tokens: int) -> int:
        """Pages that `n_tokens` positions take."""
        return -(-n_tokens // self.page_size)

    def room(self, holding: Holding) -> int:
        """Tokens that `holding` could hold if it took every free page."""
        return (len(holding.pages) + self.n_free) * self.page_size

    def share(self, holding: Holding, limit: int | None = None) -> int:
        """Give an empty `holding` the device's known pages of its beginning; return the tokens they hold.

        At most `limit` tokens, and never the last id: at least one must be computed to get logits.
        """
        assert not holding.pages, "only an empty holding can take shared pages"
        for i in range(self._n_shareable(holding, limit)):
            page = self._page_of.get(self._key(holding, i))
            if page is None:
                break
            self._hold_shared(holding, page)
        return len(holding.pages) * self.page_size

    def fetch(self, holding: Holding, limit: int | None = None) -> int:
        """Go on where `share` found no more, with pages out of RAM, as far as there are free ones to put them into;
        return the tokens of both. Called once it is settled that the sequence starts."""
        places = range(len(holding.pages), self._n_shareable(holding, limit))
        wanted = list(itertools.takewhile(self._is_known, (self._key(holding, i) for i in places)))
        for key in wanted:  # what gives way to the victims of these pages must not be one of them
            if key in self.ram:
                self.ram.read(key)
        for key in wanted:
            page = self._page_of.get(key)
            if page is None:
                if key not in self.ram or not self.n_free:
                    break
                page = self._promote(key)
            self._hold_shared(holding, page)
        return len(holding.pages) * self.page_size

    def take_moves(self) -> Moves:
        """The moves decided since the last call. They come before the rows of the step that they are handed over
        with: those write to pages that were demoted, and read pages that were promoted."""
        moves = Moves(
            tuple((device, ram) for ram, device in self._demoted.items()),
            tuple((ram, device) for device, ram in self._promoted.items()),
        )
        self._demoted.clear()
        self._promoted.clear()
        self.ram.settle(len(moves.demoted), len(moves.promoted))
        return moves

    def unwritten(self, holding: Holding) -> list[bytes]:
        """Keys of the full pages of its ids that are not published yet, and will be once they are computed."""
        n_full = len(holding.ids) // self.page_size
        return [self._key(holding, i) for i in range(holding.n_published, n_full)]

    def awaited(self, holding: Holding, coming: Set[bytes]) -> tuple[int, int]:
        """Tokens that an empty holding could share now, and those right after them that it could share once the pages
        of these keys are published. Takes no page."""
        pages = range((len(holding.ids) - 1) // self.page_size)
        now = sum(1 for _ in itertools.takewhile(lambda i: self._is_known(self._key(holding, i)), pages))
        soon = sum(1 for _ in itertools.takewhile(lambda i: self._key(holding, i) in coming, pages[now:]))
        return now * self.page_size, soon * self.page_size

    def grow(self, holding: Holding, n_tokens: int) -> bool:
        """Add pages until `holding` has room for `n_tokens`. False, with nothing changed, where they do not suffice."""
        n_new = self.pages_for(n_tokens) - len(holding.pages)
        if n_new > self.n_free:
            return False
        for _ in range(n_new):
            page = self._take_free()
            self._holders[page] = 1
            holding.pages.append(page)
        return True

    def publish(self, holding: Holding, n_computed: int) -> None:
        """Make the full pages among the first `n_computed` tokens findable: their content has really been written.

        A prefix that another page already holds stays with that page.
        """
        for i in range(holding.n_published, n_computed // self.page_size):
            key, page = self._key(holding, i), holding.pages[i]
            if self._page_of.setdefault(key, page) == page:
                self._key_of[page] = key
            holding.n_published = i + 1

    def release(self, holding: Holding) -> None:
        """Let go of every page; those that hold a known prefix are kept for reuse."""
        # Last page first: a prefix is found from its start, so its end must be overwritten first.
        for page in reversed(holding.pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._key_of[page] is None:
                    self._blank.append(page)
                else:
                    self._kept[page] = None
        holding.pages.clear()
        holding.n_published = 0

    def check(self, holdings: Iterable[Holding]) -> None:
        """Assert every invariant, given all holdings that there are."""
        holdings = list(holdings)
        held = Counter(page for holding in holdings for page in holding.pages)
        assert self._holders == [held[page] for page in range(self.n_pages)], "reference counts differ from holdings"
        free = [*self._blank, *self._kept]
        assert sorted([*held, *free]) == list(range(self.n_pages)), "a page is lost, or both held and free"
        self.ram.check()
        assert len(set(self._demoted.values())) == len(self._demoted), "a page is demoted twice"
        known = {page: key for page, key in enumerate(self._key_of) if key is not None}
        assert {key: page for page, key in known.items()} == self._page_of, "keys and pages disagree"
        assert all(known[page] in self.ram for page in self._promoted), "a page is promoted that RAM lacks"
        assert all(page in known for page in self._kept), "a kept page holds no known prefix"
        assert not any(page in known for page in self._blank), "a blank page is still findable"
        for holding in holdings:
            self._check_holding(holding)

    def _check_holding(self, holding: Holding) -> None:
        assert len(set(holding.pages)) == len(holding.pages), "a sequence holds a page twice"
        assert holding.n_published <= len(holding.pages), "a page was published without being held"
        fresh = Holding(holding.ids)
        for i, page in enumerate(holding.pages):
            key = self._key_of[page]
            assert key is None or i < holding.n_published, "a page is findable before its content is computed"
            assert key is None or key == self._key(fresh, i), "a held page carries another prefix's key"

    def _take_free(self) -> int:
        if self._blank:
            return self._blank.pop()
        page = next(iter(self._kept))
        del self._kept[page]
        key, self._key_of[page] = self._key_of[page], None
        assert key is not None
        del self._page_of[key]
        self._demote(page, key)
        return page

    def _demote(self, page: int, key: bytes) -> None:
        """Copy a page to RAM before it is overwritten, if it is not there already."""
        came_from_ram = self._promoted.pop(page, None) is not None  # before the coming step: nobody reads it any more
        if key in self.ram:
            self.ram.touch(key)
            return
        assert not came_from_ram, "a page that is being promoted has left RAM"
        to = self.ram.take(key) if self.ram.n_pages else None
        if to is not None:
            self._demoted[to] = page

    def _promote(self, key: bytes) -> int:
        """A free device page that will hold the prefix, copied from RAM."""
        source, page = self.ram.read(key), self._take_free()
        self._promoted[page] = source
        self._page_of[key], self._key_of[page] = page, key
        return page

    def _hold_shared(self, holding: Holding, page: int) -> None:
        self._kept.pop(page, None)
        self._holders[page] += 1
        holding.pages.append(page)
        holding.n_published = len(holding.pages)

    def _n_shareable(self, holding: Holding, limit: int | None) -> int:
        """Leading pages that a holding may share."""
        most = len(holding.ids) - 1
        return (most if limit is None else min(limit, most)) // self.page_size

    def _is_known(self, key: bytes) -> bool:
        return key in self._page_of or key in self.ram

    def _key(self, holding: Holding, i: int) -> bytes:
        """Key of the full page `i`: a 256-bit digest of the key before it and its ids, too wide to collide by chance
        or by intent."""
        for j in range(len(holding.keys), i + 1):
            parent = holding.keys[j - 1] if j else b""
            ids = array("q", holding.ids[j * self.page_size : (j + 1) * self.page_size])
            holding.keys.append(blake2b(parent + ids.tobytes(), digest_size=32).digest())
        return holding.keys[i]
