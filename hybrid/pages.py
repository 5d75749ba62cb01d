"""The page table: which KV page belongs to whom, and which prefix each page holds. Plain integers, no torch.

A page holds the KV of `page_size` consecutive positions. A full page is known by a key that covers every id from the
start of the sequence to the page's end, so equal keys mean equal content and sequences with the same beginning share
pages. The scheduler owns the only table; the engine sees page ids inside a batch and never this module. It does not
know what a request, a step or a tensor is.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from hashlib import blake2b


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
    when no blank page is left.
    """

    def __init__(self, n_pages: int, page_size: int) -> None:
        if n_pages < 1 or page_size < 1:
            raise ValueError(f"n_pages ({n_pages}) and page_size ({page_size}) must be at least 1")
        self.n_pages = n_pages
        self.page_size = page_size
        self._holders = [0] * n_pages
        self._key_of: list[bytes | None] = [None] * n_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(n_pages - 1, -1, -1))  # a stack: page 0 goes first
        self._kept: dict[int, None] = {}  # least recently used first

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
        """Give an empty `holding` the known pages of its beginning; return the tokens they hold.

        At most `limit` tokens, and never the last id: at least one must be computed to get logits.
        """
        assert not holding.pages, "only an empty holding can take shared pages"
        n_tokens = len(holding.ids) - 1 if limit is None else min(limit, len(holding.ids) - 1)
        for i in range(n_tokens // self.page_size):
            page = self._page_of.get(self._key(holding, i))
            if page is None:
                break
            self._kept.pop(page, None)
            self._holders[page] += 1
            holding.pages.append(page)
        holding.n_published = len(holding.pages)
        return len(holding.pages) * self.page_size

    def unwritten(self, holding: Holding) -> list[bytes]:
        """Keys of the full pages of its ids that are not published yet, and will be once they are computed."""
        n_full = len(holding.ids) // self.page_size
        return [self._key(holding, i) for i in range(holding.n_published, n_full)]

    def awaited(self, holding: Holding, coming: Set[bytes]) -> tuple[int, int]:
        """Tokens that an empty holding could share now, and those right after them that it could share once the pages
        of these keys are published. Takes no page."""
        pages = range((len(holding.ids) - 1) // self.page_size)
        now = sum(1 for _ in itertools.takewhile(lambda i: self._key(holding, i) in self._page_of, pages))
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
        known = {page: key for page, key in enumerate(self._key_of) if key is not None}
        assert {key: page for page, key in known.items()} == self._page_of, "keys and pages disagree"
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
        return page

    def _key(self, holding: Holding, i: int) -> bytes:
        """Key of the full page `i`: a 256-bit digest of the key before it and its ids, too wide to collide by chance
        or by intent."""
        for j in range(len(holding.keys), i + 1):
            parent = holding.keys[j - 1] if j else b""
            ids = array("q", holding.ids[j * self.page_size : (j + 1) * self.page_size])
            holding.keys.append(blake2b(parent + ids.tobytes(), digest_size=32).digest())
        return holding.keys[i]
