"""What VRAM slots would have held: a routing record's decode steps replayed under several policies.

Every policy sees the first half of the documents and is measured on the second. A use is an expert that a layer needs
in a step, however many tokens ask for it; a load is an expert that is put into a slot. Misses run on the CPU, so no
policy waits. The yardstick is Belady's: the most hits that any policy can have which lets in only what a step has
used, from whatever it held at the beginning.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.routes import Integers, Record
from offload.slots import MISS, Rules, SlotPolicy, SlotTable
from placement.recall import in_lanes

Uses = npt.NDArray[np.bool_]  # (N, L, E): the experts that each step needs
RULES = Rules()
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Outcome:
    """A policy on the measured steps. Of all layers."""

    steps: int
    uses: int
    hits: int
    loads: int

    @property
    def rate(self) -> float:
        return self.hits / self.uses if self.uses else 0.0

    @property
    def net(self) -> float:
        """Hits less loads, as a share of the uses: a load reads the expert's bytes from RAM as a miss does."""
        return (self.hits - self.loads) / self.uses if self.uses else 0.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What one policy came to."""

    lanes: int  # conversations decoded at once
    residency: float  # asked for: share of a layer's experts in slots
    slots: int  # of each layer: that share of the experts, rounded, one at least
    policy: str
    outcome: Outcome


def replay(
    record: Record,
    lanes: Sequence[int],
    residencies: Sequence[float],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Cell]:
    """Every policy at every number of lanes and residency. `progress` hears of (stage, cells done, cells in all).

    Raises ValueError for a record whose halves have no decode steps.
    """
    n, half = len(record.starts), len(record.starts) // 2
    cells: list[Cell] = []
    for width in lanes:
        before, measured = (
            uses_of(record, decode_steps(record, part, width)) for part in (range(half), range(half, n))
        )
        if not len(before) or not len(measured):
            raise ValueError("the record has no decode steps in one half of its documents: nothing to replay")
        for residency in residencies:
            slots = max(1, round(residency * record.n_experts))
            for name, policy in POLICIES.items():
                cells.append(Cell(width, residency, slots, name, policy(before, measured, slots)))
                progress("replaying slots", len(cells), len(lanes) * len(residencies) * len(POLICIES))
    return cells


def decode_steps(record: Record, documents: Sequence[int], lanes: int) -> list[Integers]:
    """The tokens of each step, where so many conversations are decoded at once; whoever ends makes room for the next.

    Prompts are left out: they are no decode steps.
    """
    decoded = record.decoded
    bounds = [*record.starts.tolist(), len(record.tokens)]
    spans = [np.flatnonzero(decoded[bounds[d] : bounds[d + 1]]) + bounds[d] for d in documents]
    return [np.array([token for _, token in step]) for step in in_lanes(spans, lanes)]


def uses_of(record: Record, steps: Iterable[Integers]) -> Uses:
    """(N, L, E)."""
    rows = []
    for tokens in steps:
        row = np.zeros((len(record.layers), record.n_experts), np.bool_)
        for layer in range(len(row)):
            row[layer, record.experts[tokens, layer].ravel()] = True
        rows.append(row)
    return np.array(rows).reshape(-1, len(record.layers), record.n_experts)


def lru(before: Uses, measured: Uses, slots: int) -> Outcome:
    """The experts used last; of those used in the same step the higher ids."""
    latest = np.zeros(before.shape[1:], np.int64)

    def key(step: int, used: Uses) -> Integers:
        latest[used] = step + 1
        return latest

    return _keep(before, measured, slots, key)


def lfu(before: Uses, measured: Uses, slots: int) -> Outcome:
    """The experts used most often so far; of equals those used last."""
    count, latest = np.zeros(before.shape[1:], np.int64), np.zeros(before.shape[1:], np.int64)
    total = len(before) + len(measured) + 1

    def key(step: int, used: Uses) -> Integers:
        count[used] += 1
        latest[used] = step + 1
        return count * total + latest

    return _keep(before, measured, slots, key)


def static(before: Uses, measured: Uses, slots: int) -> Outcome:
    """The experts used most often in the first half, put there before the second begins and kept."""
    counts = before.sum(0)
    resident = _largest(counts + 1, slots)
    return Outcome(len(measured), int(measured.sum()), int((measured & resident).sum()), 0)


def belady(before: Uses, measured: Uses, slots: int) -> Outcome:
    """The experts that will be used soonest, with knowledge of the future. What it holds at the beginning is free."""
    following = _following(measured)
    resident = _largest(np.where(following[0] == NEVER, 0, len(measured) + 1 - following[0]), slots)
    hits = loads = 0
    for step, used in enumerate(measured):
        hits += int((used & resident).sum())
        soon = np.where(following[step + 1] == NEVER, 0, len(measured) + 1 - following[step + 1])
        kept = _largest(np.where(resident | used, soon, 0), slots)
        loads += int((kept & ~resident).sum())
        resident = kept
    return Outcome(len(measured), int(measured.sum()), hits, loads)


def slot_policy(before: Uses, measured: Uses, slots: int, rules: Rules = RULES) -> Outcome:
    """Ours, as the engine runs it."""
    n_layers, n_experts = before.shape[1:]
    table = SlotTable([slots] * n_layers, n_experts)
    policy = SlotPolicy(table, rules)
    hits = loads = 0
    for step, used in enumerate([*before, *measured]):
        table.begin()
        if step >= len(before):
            hits += int((used & (table.where != MISS)).sum())
        for layer in range(n_layers):
            policy.observe(layer, np.flatnonzero(used[layer])[None])
        table.end()
        moves = policy.decide()
        table.apply(moves)
        loads += len(moves) if step >= len(before) else 0
    return Outcome(len(measured), int(measured.sum()), hits, loads)


POLICIES: dict[str, Callable[[Uses, Uses, int], Outcome]] = {
    "slot policy": slot_policy, "LRU": lru, "LFU": lfu, "static popularity": static, "Belady bound": belady,
}  # fmt: skip


def _keep(before: Uses, measured: Uses, slots: int, key: Callable[[int, Uses], Integers]) -> Outcome:
    """After each step those with the largest keys stay, of what was held or used. `key(step, used)` is (L, E), larger
    than 0 for what was ever used."""
    resident = np.zeros(before.shape[1:], np.bool_)
    hits = loads = 0
    for step, used in enumerate([*before, *measured]):
        kept = _largest(np.where(resident | used, key(step, used), 0), slots)
        if step >= len(before):
            hits += int((used & resident).sum())
            loads += int((kept & ~resident).sum())
        resident = kept
    return Outcome(len(measured), int(measured.sum()), hits, loads)


def _largest(keys: Integers, n: int) -> Uses:
    """(L, E): the n largest keys above 0 of each layer; of equals the higher ids."""
    order = np.argsort(keys, axis=1, kind="stable")[:, keys.shape[1] - n :]
    found = np.zeros(keys.shape, np.bool_)
    np.put_along_axis(found, order, True, 1)
    return found & (keys > 0)


def _following(uses: Uses) -> Integers:
    """(N + 1, L, E): the first step from each one on that uses the expert, or `NEVER`."""
    found = np.full((len(uses) + 1, *uses.shape[1:]), NEVER, np.int64)
    for step in range(len(uses) - 1, -1, -1):
        found[step] = np.where(uses[step], step, found[step + 1])
    return found
