"""The page table: sharing, reuse and accounting, by example and under random operation sequences."""

import random
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrid.batch import Moves
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


def demoted(ids: list[int], n_pages: int = 4, n_ram_pages: int = 8) -> PageTable:
    """A table whose device pages another sequence has just taken from one with these ids, moves not handed over."""
    table = PageTable(n_pages, PAGE, n_ram_pages)
    table.release(hold(table, ids))
    table.take_moves()
    other = Holding([99])
    assert table.grow(other, n_pages * PAGE)
    table.release(other)
    return table


def test_a_prefix_that_is_overwritten_goes_to_ram_and_comes_back() -> None:
    table = demoted(list(range(13)))
    assert table.take_moves() == Moves(demoted=((2, 0), (1, 1), (0, 2)))  # the end of the prefix goes first
    again = Holding(list(range(13)))
    assert table.share(again) == 0
    assert table.awaited(again, set()) == (12, 0)
    assert table.fetch(again) == 12
    assert table.take_moves() == Moves(promoted=tuple(zip((2, 1, 0), again.pages, strict=True)))
    assert (table.ram.n_used, table.ram.n_demoted, table.ram.n_promoted) == (3, 3, 3)
    table.check([again])
    table.release(again)  # RAM has these pages still: giving them up again moves nothing
    taker = Holding([50])
    assert table.grow(taker, 4 * PAGE)
    assert table.take_moves() == Moves()
    table.check([taker])


def test_a_prefix_goes_out_and_comes_back_between_two_steps() -> None:
    table = demoted(list(range(9)))
    again = Holding(list(range(9)))
    assert table.share(again) + table.fetch(again) == 8
    moves = table.take_moves()
    assert [ram for ram, _ in moves.promoted] == [ram for _, ram in reversed(moves.demoted)]
    table.check([again])


def test_fetch_stops_at_the_limit_and_where_pages_run_out() -> None:
    table = demoted(list(range(13)))
    some = Holding(list(range(13)))
    assert table.fetch(some, limit=7) == 4
    taker = Holding([50])
    assert table.grow(taker, 2 * PAGE)
    more = Holding(list(range(13)))
    assert table.share(more) == 4
    assert table.fetch(more) == 8  # the last free page
    assert table.n_free == 0
    table.check([some, taker, more])


def test_full_ram_gives_up_what_was_used_longest_ago_but_not_what_is_leaving() -> None:
    table = demoted(list(range(13)), n_ram_pages=3)
    table.take_moves()
    other = hold(table, list(range(100, 116)))
    table.release(other)
    again = Holding(list(range(13)))
    assert table.fetch(again) == 12  # takes three of the other's pages, and all places in RAM are leaving
    moves = table.take_moves()
    assert (len(moves.demoted), len(moves.promoted)) == (0, 3)
    table.release(again)
    taker = Holding([50])
    assert table.grow(taker, 4 * PAGE)
    # What is left of the other prefix takes the place of one copy, and gives it back when that page goes out as well.
    assert len(table.take_moves().demoted) == 1
    table.check([taker])
    table.release(taker)
    assert table.fetch(Holding(list(range(13)))) == 12


def test_check_sees_a_lost_page_and_a_wrong_count() -> None:
    table = PageTable(4, PAGE)
    holding = hold(table, list(range(8)))
    with pytest.raises(AssertionError, match="reference counts"):
        table.check([])
    holding.pages.pop()
    with pytest.raises(AssertionError, match="reference counts"):
        table.check([holding])


class PagesMachine(RuleBasedStateMachine):
    """Random sequences over few ids and few pages, with a model of what each page of both tiers really contains."""

    @initialize(n_pages=st.integers(1, 9), page_size=st.integers(1, 3), n_ram_pages=st.integers(0, 7))
    def start(self, n_pages: int, page_size: int, n_ram_pages: int) -> None:
        self.table = PageTable(n_pages, page_size, n_ram_pages)
        self.live: list[tuple[Holding, int]] = []  # with the tokens computed so far
        self.content: dict[int, tuple[int, ...]] = {}  # page → every id up to its last computed position
        self.ram: dict[int, tuple[int, ...]] = {}

    def _write(self, holding: Holding, start: int, end: int) -> None:
        for position in range(start, end):
            self.content[holding.pages[position // self.table.page_size]] = tuple(holding.ids[: position + 1])

    def _move(self) -> None:
        """What the engine does before a step: out, then in. Then every live sequence reads what it claims."""
        moves = self.table.take_moves()
        for goals in ([ram for _, ram in moves.demoted], [page for _, page in moves.promoted]):
            assert len(set(goals)) == len(goals)
        self.ram |= {ram: self.content[page] for page, ram in moves.demoted}
        for page, _ in moves.demoted:
            del self.content[page]
        self.content |= {page: self.ram[ram] for ram, page in moves.promoted}
        for holding, done in self.live:
            for position in range(done):
                content = self.content[holding.pages[position // self.table.page_size]]
                assert content[: position + 1] == tuple(holding.ids[: position + 1])

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def arrive(self, ids: list[int]) -> None:
        holding = Holding(ids)
        n_shared = self.table.share(holding)
        if self.table.pages_for(len(ids)) - len(holding.pages) > self.table.n_free:
            assert not self.table.grow(holding, len(ids))
            self.table.release(holding)
            return
        now, soon = self.table.awaited(holding, set())
        n_known = self.table.fetch(holding)
        assert n_shared <= n_known < len(ids) and soon == 0
        # Room for the pages that come in may cost the RAM tier some of those that were found.
        assert n_known == now or (n_known < now and self.table.ram.n_pages < self.table.n_pages)
        assert self.table.grow(holding, len(ids))
        self.live.append((holding, n_known))

    @precondition(lambda self: self.live)
    @rule(pick=st.randoms(use_true_random=False), n=st.integers(1, 5))
    def compute(self, pick: random.Random, n: int) -> None:
        self._move()
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
        if hasattr(self, "table"):
            self.table.check(holding for holding, _ in self.live)

    def teardown(self) -> None:
        if hasattr(self, "table"):
            self._move()
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
