"""placement.replay against caches spelt out, Belady's bound by trying everything, and the report's figures."""

import itertools
from collections import Counter, OrderedDict
from dataclasses import replace

import numpy as np
import pytest

from hybrid.routes import Record
from offload.slots import Rules
from placement.replay import POLICIES, belady, decode_steps, lfu, lru, replay, slot_policy, static, uses_of

L, E, K = 2, 9, 3


def uses(rng: np.random.Generator, n: int, sticky: float = 0.5, per_step: int = K, n_experts: int = E) -> np.ndarray:
    """(N, L, E): skewed experts, some of which stay for the next step."""
    found = np.zeros((n, L, n_experts), np.bool_)
    weights = 1 / np.arange(1, n_experts + 1)
    for step, layer in itertools.product(range(n), range(L)):
        kept = np.flatnonzero(found[step - 1, layer] & (rng.random(n_experts) < sticky)) if step else []
        others = rng.choice(n_experts, n_experts, replace=False, p=weights / weights.sum())
        found[step, layer, kept] = True
        found[step, layer, [e for e in others if e not in kept][: per_step - len(kept)]] = True
    return found


def lru_loop(before: np.ndarray, measured: np.ndarray, slots: int) -> tuple[int, int]:
    """Hits and loads. A load is what lies in the cache after a step and did not before."""
    hits = loads = 0
    for layer in range(L):
        cache: OrderedDict[int, None] = OrderedDict()
        for step, used in enumerate([*before[:, layer], *measured[:, layer]]):
            held = set(cache)
            for expert in np.flatnonzero(used).tolist():
                cache.pop(expert, None)
                cache[expert] = None
                if len(cache) > slots:
                    cache.popitem(last=False)
            if step >= len(before):
                hits += len(held & set(np.flatnonzero(used).tolist()))
                loads += len(set(cache) - held)
    return hits, loads


def lfu_loop(before: np.ndarray, measured: np.ndarray, slots: int) -> tuple[int, int]:
    hits = loads = 0
    for layer in range(L):
        counts: Counter[int] = Counter()
        latest: dict[int, int] = {}
        held: set[int] = set()
        for step, used in enumerate([*before[:, layer], *measured[:, layer]]):
            needed = set(np.flatnonzero(used).tolist())
            counts.update(needed)
            latest |= dict.fromkeys(needed, step)
            ranked = sorted(held | needed, key=lambda e: (counts[e], latest[e], e), reverse=True)
            if step >= len(before):
                hits += len(held & needed)
                loads += len(set(ranked[:slots]) - held)
            held = set(ranked[:slots])
    return hits, loads


def best_by_trying(measured: np.ndarray, slots: int) -> int:
    """The most hits of one layer that any sequence of contents can have that lets in only what a step used."""
    n_experts = measured.shape[1]
    contents = [frozenset(c) for n in range(slots + 1) for c in itertools.combinations(range(n_experts), n)]
    best = dict.fromkeys(contents, 0)
    for used in measured:
        needed = frozenset(np.flatnonzero(used).tolist())
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            for content in contents:
                if content <= held | needed:
                    after[content] = max(after.get(content, 0), hits + len(held & needed))
        best = after
    return max(best.values())


@pytest.mark.parametrize("slots", [1, 3, 5, E])
@pytest.mark.parametrize("per_step", [K, 6])
def test_lru_and_lfu_by_loops(slots: int, per_step: int) -> None:
    rng = np.random.default_rng(slots)
    before, measured = uses(rng, 30, per_step=per_step), uses(rng, 40, per_step=per_step)
    for policy, loop in ((lru, lru_loop), (lfu, lfu_loop)):
        found = policy(before, measured, slots)
        assert (found.hits, found.loads) == loop(before, measured, slots), policy
        assert (found.steps, found.uses) == (40, 40 * L * per_step)


def test_static_popularity_by_counting() -> None:
    rng = np.random.default_rng(1)
    before, measured = uses(rng, 30), uses(rng, 40)
    wanted = 0
    for layer in range(L):
        counts = Counter(np.nonzero(before[:, layer])[1].tolist())
        ranked = sorted(range(E), key=lambda e: (counts[e], e), reverse=True)[:3]
        wanted += int(measured[:, layer, ranked].sum())
    found = static(before, measured, 3)
    assert (found.hits, found.loads) == (wanted, 0)


@pytest.mark.parametrize("seed", range(5))
def test_belady_is_the_best_of_everything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    measured = uses(rng, 9, per_step=2, n_experts=5)
    for slots in (1, 2, 3):
        wanted = sum(best_by_trying(measured[:, layer], slots) for layer in range(L))
        assert belady(measured, measured, slots).hits == wanted


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_is_better_than_belady(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, measured = uses(rng, 40, 0.7), uses(rng, 60, 0.7)
    for slots in (1, 2, 4, 7):
        bound = belady(before, measured, slots).hits
        for name, policy in POLICIES.items():
            assert policy(before, measured, slots).hits <= bound, (name, slots)
        eager = slot_policy(before, measured, slots, Rules(tax=0.0, margin=0.0, dwell=0, uploads=99))
        assert 0 < eager.hits <= bound
    assert belady(before, measured, E).rate == 1


def record(lengths: list[int], turns: list[tuple[int, int]]) -> Record:
    rng = np.random.default_rng(3)
    n = sum(lengths)
    return Record(
        "0", np.arange(1, L + 1), np.zeros((L, E), np.float32), np.arange(n), np.cumsum([0, *lengths[:-1]]),
        np.full(len(lengths), "a"), np.array(turns), np.full(len(turns), "b"),
        np.sort(rng.random((n, L, E)).argsort(axis=2)[..., :K], axis=2), np.zeros((0, L, E), np.float16),
    )  # fmt: skip


RECORD = record([6, 4, 8, 5], [(1, 4), (7, 10), (12, 14), (15, 18), (20, 23)])


def test_decode_steps_side_by_side() -> None:
    # decode steps: 1 2 | 7 8 | 12 15 16 | 20 21; an end token is no step
    assert [step.tolist() for step in decode_steps(RECORD, range(4), 1)] == [
        [i] for i in (1, 2, 7, 8, 12, 15, 16, 20, 21)
    ]
    assert [step.tolist() for step in decode_steps(RECORD, range(4), 2)] == [
        [1, 7], [2, 8], [12, 20], [15, 21], [16],
    ]  # fmt: skip
    assert [step.tolist() for step in decode_steps(RECORD, [3], 5)] == [[20], [21]]


def test_a_use_counts_once_however_many_ask() -> None:
    found = uses_of(RECORD, [np.array([1, 7]), np.array([2])])
    for layer in range(L):
        assert set(np.flatnonzero(found[0, layer])) == {*RECORD.experts[1, layer], *RECORD.experts[7, layer]}
        assert set(np.flatnonzero(found[1, layer])) == {*RECORD.experts[2, layer]}


def test_the_cells() -> None:
    heard = []
    cells = replay(RECORD, [1, 3], [0.05, 0.5], lambda *what: heard.append(what))
    assert len(cells) == 2 * 2 * len(POLICIES)
    assert heard[-1] == ("replaying slots", 20, 20)
    assert {(cell.residency, cell.slots) for cell in cells} == {(0.05, 1), (0.5, 4)}
    # the second half: documents 2 and 3, 5 decode steps one by one, 3 steps side by side
    assert {(cell.lanes, cell.outcome.steps) for cell in cells} == {(1, 5), (3, 3)}
    for cell in cells:
        assert 0 <= cell.outcome.rate <= 1
        assert cell.outcome.net == pytest.approx(cell.outcome.rate - cell.outcome.loads / cell.outcome.uses)


def test_a_record_without_decode_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no decode steps in one half"):
        replay(replace(RECORD, turns=RECORD.turns[:2], kinds=RECORD.kinds[:2]), [1], [0.5])
