"""The page table: sharing, reuse and accounting, by example and under random operation sequences."""

import random
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrid.pages import Holding, PageTable

PAGE = 4


def hold(table: PageTable, ids: list[int], n_computed: int | None = None) -> Holding:
    """A sequence that took what it could share, has room for all its ids and has computed `n_computed` of them."""
    holding = Holding(list(ids))
    table.share(holding)
    assert table.grow(holding, len(ids))
    table.publish(holding, len(ids) if n_computed is None else n_computed)
    return holding


def test_full_pages_of_a_known_prefix_are_shared() -> None:
    table = PageTable(8, PAGE)
    first = hold(table, list(range(10)))
    second = Holding([*range(8), 99, 98, 97])
    assert table.share(second) == 8
    assert second.pages == first.pages[:2]
    assert table.n_used == 3
    table.check([first, second])


def test_pages_are_shared_only_once_their_content_is_computed() -> None:
    table = PageTable(8, PAGE)
    first = hold(table, list(range(12)), n_computed=0)
    assert table.share(Holding(list(range(12)))) == 0
    table.publish(first, 7)
    second = Holding(list(range(12)))
    assert table.share(second) == 4
    table.check([first, second])


@pytest.mark.parametrize(("n_ids", "expected"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_the_last_id_is_never_shared(n_ids: int, expected: int) -> None:
    table = PageTable(8, PAGE)
    hold(table, list(range(12)))
    assert table.share(Holding(list(range(n_ids)))) == expected


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (100, 8)])
def test_a_limit_bounds_what_is_shared(limit: int, expected: int) -> None:
    table = PageTable(8, PAGE)
    hold(table, list(range(12)))
    assert table.share(Holding(list(range(12))), limit) == expected


def test_same_ids_at_another_place_are_another_page() -> None:
    table = PageTable(8, PAGE)
    hold(table, [1, 2, 3, 4, 1, 2, 3, 4, 9])
    assert table.share(Holding([5, 6, 7, 8, 1, 2, 3, 4, 9])) == 0
    second = Holding([1, 2, 3, 4, 9])
    table.share(second)
    assert second.pages == [0]


def test_a_released_prefix_is_found_again_and_costs_nothing_else() -> None:
    table = PageTable(4, PAGE)
    first = hold(table, list(range(9)))
    pages = list(first.pages)
    table.release(first)
    assert (table.n_used, table.n_free) == (0, 4)
    second = Holding(list(range(9)))
    assert table.share(second) == 8
    assert second.pages == pages[:2]
    assert table.n_used == 2
    table.check([second])


def test_blank_pages_go_first_then_the_least_recently_used_prefix_from_its_end() -> None:
    table = PageTable(5, PAGE)
    old, new = hold(table, list(range(8))), hold(table, list(range(100, 108)))
    old_pages, new_pages = list(old.pages), list(new.pages)
    table.release(old)
    table.release(new)
    taker = Holding([7] * 100)
    taken = [4, old_pages[1], old_pages[0], new_pages[1], new_pages[0]]
    for n in range(5):
        assert table.grow(taker, (n + 1) * PAGE)
        assert taker.pages == taken[: n + 1]
        table.check([taker])
    assert not table.grow(taker, 6 * PAGE)


def test_a_prefix_stays_usable_while_only_its_end_was_overwritten() -> None:
    table = PageTable(3, PAGE)
    first = hold(table, list(range(12)))
    table.release(first)
    taker = Holding([50])
    assert table.grow(taker, 1)
    again = Holding(list(range(12)))
    assert table.share(again) == 8
    table.check([taker, again])


def test_grow_changes_nothing_where_pages_do_not_suffice() -> None:
    table = PageTable(4, PAGE)
    first = hold(table, list(range(8)))
    second = Holding([70])
    assert table.room(second) == 8
    assert not table.grow(second, 9)
    assert second.pages == []
    assert table.grow(second, 8)
    assert table.room(second) == 8
    table.check([first, second])


def test_a_prefix_computed_twice_is_known_once() -> None:
    table = PageTable(8, PAGE)
    first, second = Holding(list(range(9))), Holding(list(range(9)))
    for holding in (first, second):  # both looked before either had computed anything
        assert table.share(holding) == 0
        assert table.grow(holding, 9)
    for holding in (first, second):
        table.publish(holding, 9)
        table.check([first, second])
    third = Holding(list(range(9)))
    table.share(third)
    assert third.pages == first.pages[:2]
    table.release(second)
    assert table.n_free == 8 - 3
    table.check([first, third])


def test_a_holding_keeps_pages_its_twin_let_go() -> None:
    """The twin's page may be overwritten and forgotten while this copy is still held, unknown to the table."""
    table = PageTable(4, PAGE)
    first, second = Holding(list(range(5))), Holding(list(range(5)))
    for holding in (first, second):
        assert table.grow(holding, 5)
    for holding in (first, second):
        table.publish(holding, 5)
    table.release(first)
    taker = Holding([50])
    assert table.grow(taker, 8)
    table.check([second, taker])
    assert table.share(Holding(list(range(5)))) == 0


def test_keys_cover_the_whole_prefix() -> None:
    """The format of a key: digest(parent's digest + ids as little-endian int64)."""
    table = PageTable(4, PAGE)
    holding = hold(table, list(range(8)))
    raw = [b"".join(i.to_bytes(8, "little") for i in range(start, start + PAGE)) for start in (0, PAGE)]
    root = blake2b(raw[0], digest_size=32).digest()
    assert holding.keys == [root, blake2b(root + raw[1], digest_size=32).digest()]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="n_pages"):
        PageTable(*sizes)


def test_check_sees_a_lost_page_and_a_wrong_count() -> None:
    table = PageTable(4, PAGE)
    holding = hold(table, list(range(8)))
    with pytest.raises(AssertionError, match="reference counts"):
        table.check([])
    holding.pages.pop()
    with pytest.raises(AssertionError, match="reference counts"):
        table.check([holding])


class PagesMachine(RuleBasedStateMachine):
    """Random sequences over few ids and few pages, with a model of what each page really contains."""

    @initialize(n_pages=st.integers(1, 9), page_size=st.integers(1, 3))
    def start(self, n_pages: int, page_size: int) -> None:
        self.table = PageTable(n_pages, page_size)
        self.live: list[tuple[Holding, int]] = []  # with the tokens computed so far
        self.content: dict[int, tuple[int, ...]] = {}  # page → every id up to its last computed position

    def _write(self, holding: Holding, start: int, end: int) -> None:
        for position in range(start, end):
            self.content[holding.pages[position // self.table.page_size]] = tuple(holding.ids[: position + 1])

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def arrive(self, ids: list[int]) -> None:
        holding = Holding(ids)
        n_shared = self.table.share(holding)
        assert n_shared < len(ids)
        for i, page in enumerate(holding.pages):
            assert self.content[page] == tuple(ids[: (i + 1) * self.table.page_size])
        if self.table.grow(holding, len(ids)):
            self.live.append((holding, n_shared))
        else:
            assert self.table.pages_for(len(ids)) - len(holding.pages) > self.table.n_free
            self.table.release(holding)

    @precondition(lambda self: self.live)
    @rule(pick=st.randoms(use_true_random=False), n=st.integers(1, 5))
    def compute(self, pick: random.Random, n: int) -> None:
        at = pick.randrange(len(self.live))
        holding, done = self.live[at]
        end = min(done + n, len(holding.ids))
        self._write(holding, done, end)
        self.table.publish(holding, end)
        self.live[at] = (holding, end)

    @precondition(lambda self: self.live)
    @rule(pick=st.randoms(use_true_random=False), token=st.integers(0, 1))
    def append(self, pick: random.Random, token: int) -> None:
        holding, _ = pick.choice(self.live)
        if self.table.grow(holding, len(holding.ids) + 1):
            holding.ids.append(token)

    @precondition(lambda self: self.live)
    @rule(pick=st.randoms(use_true_random=False))
    def leave(self, pick: random.Random) -> None:
        holding, _ = self.live.pop(pick.randrange(len(self.live)))
        self.table.release(holding)

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.check(holding for holding, _ in self.live)
        for holding, done in self.live:  # nobody wrote over what a live sequence has computed or shares
            for position in range(done):
                content = self.content[holding.pages[position // self.table.page_size]]
                assert content[: position + 1] == tuple(holding.ids[: position + 1])

    def teardown(self) -> None:
        if hasattr(self, "table"):
            for holding, _ in self.live:
                self.table.release(holding)
            assert self.table.n_used == 0
            self.table.check([])


PagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPages = PagesMachine.TestCase


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=10), min_size=2, max_size=5), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_match_is_the_longest_common_run_of_full_pages(prompts: list[list[int]], page_size: int) -> None:
    table = PageTable(64, page_size)
    for known in prompts[:-1]:
        table.release(hold(table, known))
    ids = prompts[-1]
    known_pages = {tuple(p[:n]) for p in prompts[:-1] for n in range(page_size, len(p) + 1, page_size)}
    longest = max((n for n in range(0, len(ids), page_size) if n == 0 or tuple(ids[:n]) in known_pages), default=0)
    assert table.share(Holding(ids)) == longest
