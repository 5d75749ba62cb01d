"""Which expert gives way: against a plain model of the tables, and on real routing against LRU and Belady."""

import random
from pathlib import Path

import numpy as np
import pytest

import hybrid.nano
from hybrid.routes import read_record
from offload.ram_slots import Slots

LAYERS, EXPERTS = 3, 5


@pytest.mark.parametrize("seed", range(20))
def test_tables_agree_whatever_happens(seed: int) -> None:
    draw, slots = random.Random(seed), Slots(6, LAYERS, EXPERTS)
    locks: dict[int, int] = {}  # expert in a slot -> how often it is locked
    for _ in range(200):
        there = [expert for expert, count in locks.items() if count == 0]
        locked = [expert for expert, count in locks.items() if count]
        what = draw.choice(("take", "lock", "unlock", "forget", "ran", "expect"))
        if what == "take":
            wanted = draw.sample([e for e in range(LAYERS * EXPERTS) if e not in locks], draw.randint(1, 4))
            got, gone = slots.take(wanted)
            assert len(got) == min(len(wanted), 6 - len(locked)) and set(gone) <= set(there)
            for expert in gone:
                del locks[expert]
            locks |= dict.fromkeys(wanted[: len(got)], 1)
        elif what == "lock" and locks:
            expert = draw.choice(list(locks))
            slots.lock([expert])
            locks[expert] += 1
        elif what == "unlock" and locked:
            slots.unlock([locked[0]])
            locks[locked[0]] -= 1
        elif what == "forget" and (once := [expert for expert in locked if locks[expert] == 1]):
            slots.forget(once[0])
            del locks[once[0]]
        elif what in ("ran", "expect"):
            layer = draw.randrange(LAYERS)
            some = np.array(sorted(draw.sample(range(layer * EXPERTS, (layer + 1) * EXPERTS), 2)))
            slots.ran(layer, some) if what == "ran" else slots.expect(some)
        slots.check()
        every = slots.find(np.arange(LAYERS * EXPERTS))
        assert set(np.flatnonzero(every >= 0).tolist()) == set(locks)


def test_an_expert_in_use_keeps_its_slot() -> None:
    slots = Slots(2, 1, 4)
    slots.take([0, 1])
    assert slots.take([2]) == ([], [])
    with pytest.raises(AssertionError, match="a slot in use was given"):
        slots._vacate(0)
    slots.unlock([0])
    assert slots.take([2])[1] == [0]
    with pytest.raises(AssertionError, match="lost its slot while it was in use"):
        slots.unlock([0])


def test_what_is_named_for_the_next_layer_stays() -> None:
    slots = Slots(2, 2, 4)
    slots.take([4, 5])
    slots.unlock([4, 5])
    for _ in range(9):
        slots.ran(1, np.array([5]))
    slots.ended(np.array([5]))
    slots.expect(np.array([4]))
    assert slots.take([0])[1] == [5]


def hits(policy: str, steps: list[tuple[int, list[int]]], n_slots: int) -> float:
    """Share of the experts found in one of `n_slots`, by plain lists: "lru" or "belady"."""
    following: dict[int, list[int]] = {}
    for i in range(len(steps) - 1, -1, -1):
        for expert in steps[i][1]:
            following.setdefault(expert, []).append(i)
    there: dict[int, int] = {}  # expert -> last use
    found = total = 0
    for i, (_, experts) in enumerate(steps):
        for expert in experts:
            following[expert].pop()
        found, total = found + sum(expert in there for expert in experts), total + len(experts)
        there |= dict.fromkeys(experts, i)
        old = [expert for expert in there if expert not in experts]
        if policy == "lru":
            old.sort(key=lambda expert: there[expert])
        else:
            old.sort(key=lambda expert: -(following[expert] or [len(steps)])[-1])
        for expert in old[: max(0, len(there) - n_slots)]:
            del there[expert]
    return found / total


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
def test_better_than_the_least_recently_used(share: float, record_property: object) -> None:
    record = read_record(Path(hybrid.nano.__file__).parent / "routing.npz")
    chosen = record.experts[:1500].astype(np.int64)
    n_layers, n_experts = chosen.shape[1], record.bias.shape[1]
    steps = [(layer, (layer * n_experts + row[layer]).tolist()) for row in chosen for layer in range(n_layers)]
    n_slots = int(share * n_layers * n_experts)
    slots, found = Slots(n_slots, n_layers, n_experts), 0
    for layer, experts in steps:
        numbers = np.array(experts)
        there = slots.find(numbers) >= 0
        found += int(there.sum())
        slots.ran(layer, numbers)
        slots.lock(numbers[there])
        assert len(slots.take(numbers[~there].tolist())[0]) == int((~there).sum())
        slots.unlock(numbers)
    ours = found / sum(len(experts) for _, experts in steps)
    lru, belady = hits("lru", steps, n_slots), hits("belady", steps, n_slots)
    record_property("hit rates", {"ours": ours, "lru": lru, "belady": belady})  # type: ignore[operator]
    assert lru < ours < belady
