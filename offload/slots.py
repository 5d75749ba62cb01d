"""Which experts sit in VRAM slots: the table, and the policy that says what to upload.

    table.begin()                  # a step: the table is fixed, and a miss runs on the CPU
    policy.observe(layer, …)       # what the step chose
    table.end()
    table.apply(policy.decide())   # between steps: the uploads

Slots belong to a layer: a shared pool smaller than one token's experts would never hit. Integers only; the bytes are
moved by the caller. Knows no models. Used by `offload.vram`, and by `placement.replay`, for which uploads take no time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload.uses import UseForecast

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]

MISS = -1  # in the device's table: the expert is in no slot
EMPTY = -1  # in the list of slots: no expert is in it


@dataclass(frozen=True, slots=True)
class Move:
    """Expert `into` of a layer takes one of its slots, in place of expert `out` if there is one."""

    layer: int  # its place among the MoE layers
    slot: int  # of the layer, from 0
    out: int | None
    into: int | None  # None: the slot becomes empty


class SlotTable:
    """(layer, expert) to slot. Changes only between steps."""

    def __init__(self, slots: Sequence[int], n_experts: int) -> None:
        """`slots`: of each layer."""
        if any(not 0 <= n <= n_experts for n in slots):
            raise ValueError(f"expected 0 to {n_experts} slots for each layer, found {[*slots]}")
        self.slots = tuple(slots)
        self._where = np.full((len(slots), n_experts), MISS, np.int32)
        self._held = [np.full(n, EMPTY, np.int32) for n in slots]
        self._stepping = False

    @property
    def where(self) -> Integers:
        """(L, E) int32: the slot of each expert or `MISS`. A view that cannot be written to."""
        view = self._where.view()
        view.flags.writeable = False
        return view

    def held(self, layer: int) -> Integers:
        """(slots of the layer,) the expert in each or `EMPTY`: a copy."""
        return self._held[layer].copy()

    def begin(self) -> None:
        """A step reads the table from now on."""
        assert not self._stepping, "a step within a step"
        self._stepping = True

    def end(self) -> None:
        """The step's last reader is done."""
        assert self._stepping, "no step to end"
        self._stepping = False

    def apply(self, moves: Iterable[Move]) -> None:
        """Put the moves into force, all or none. Raises RuntimeError within a step, ValueError for a move that does
        not fit the table."""
        if self._stepping:
            raise RuntimeError(
                "the slot table was changed within a step: its readers would take another expert's bytes"
            )
        where, held = self._where.copy(), [row.copy() for row in self._held]
        for move in moves:
            before = EMPTY if move.out is None else move.out
            taken = move.into is not None and where[move.layer, move.into] != MISS
            if held[move.layer][move.slot] != before or taken:
                raise ValueError(f"{move} does not fit the table")
            if move.out is not None:
                where[move.layer, move.out] = MISS
            held[move.layer][move.slot] = EMPTY if move.into is None else move.into
            if move.into is not None:
                where[move.layer, move.into] = move.slot
        self._where[:], self._held = where, held

    def check(self) -> None:
        """Both directions agree."""
        for where, held in zip(self._where, self._held, strict=True):
            full = np.flatnonzero(held != EMPTY)
            assert np.array_equal(where[held[full]], full), "a slot's expert is elsewhere"
            assert (where != MISS).sum() == len(full), "an expert without a slot of its own"


@dataclass(frozen=True, slots=True)
class Rules:
    """When an upload pays. Uses are steps in which the layer needs the expert, however many tokens ask for it: each
    saves the CPU one reading of its bytes, and an upload costs one."""

    horizon: float = 16  # steps of which the expected uses count
    tax: float = 1.0  # uses that an upload costs
    margin: float = 0.1  # more than its victim's, as a share of them: two alike do not change places in turn
    dwell: int = 2  # steps that an expert stays at least
    uploads: int = 8  # of a step, over all layers


RULES = Rules()


class SlotPolicy:
    """Says which experts to upload, by expected uses over the horizon."""

    def __init__(self, table: SlotTable, rules: Rules = RULES) -> None:
        self._table, self._rules = table, rules
        self._forecast = UseForecast(len(table.slots), table.where.shape[1], rules.horizon)
        self._used = np.zeros(table.where.shape, np.bool_)  # by the step that is observed
        self._since = [np.full(n, -rules.dwell) for n in table.slots]  # step of each slot's last upload
        self._step = 0

    def observe(self, layer: int, experts: Integers) -> None:
        """Experts (T, K) that a layer's tokens chose in the step."""
        self._used[layer, experts.ravel()] = True

    def decide(self, forecast: Floats | None = None) -> list[Move]:
        """Take the step into account, and the uploads before the next one, best first.

        `forecast` (L, E): uses that a predictor expects beyond what the past says. Without one only experts that the
        step used are let in: whatever is worth an upload comes by.
        """
        value = self._forecast.observe(self._used)  # (L, E)
        candidates = self._table.where == MISS
        if forecast is None:
            candidates &= self._used
        else:
            value = value + forecast
        # Most layers have nothing to gain in most steps; a look at all of them at once finds the others.
        hope = np.where(candidates, value, -np.inf).max(1) - self._rules.tax
        least = np.where(self._table.where == MISS, np.inf, value).min(1)
        least[[EMPTY in self._table.held(layer) for layer in range(len(value))]] = 0
        found = [
            gain_and_move
            for layer in np.flatnonzero(hope > least).tolist()
            for gain_and_move in self._gains(layer, value[layer], candidates[layer])
        ]
        found.sort(key=lambda gain_and_move: -gain_and_move[0])
        moves = [move for _, move in found[: self._rules.uploads]]
        self._step += 1
        for move in moves:
            self._since[move.layer][move.slot] = self._step
        self._used[:] = False
        return moves

    def _gains(self, layer: int, value: Floats, candidates: npt.NDArray[np.bool_]) -> list[tuple[float, Move]]:
        """The layer's uploads that pay, with their gain in uses: its best candidates for its worst slots."""
        rules, held = self._rules, self._table.held(layer)
        free = np.flatnonzero((held == EMPTY) | (self._step - self._since[layer] >= rules.dwell))
        worth = np.where(held == EMPTY, 0, np.maximum(value[held], 0))[free]
        order = np.argsort(worth, kind="stable")
        into = np.flatnonzero(candidates)
        into = into[np.argsort(-value[into], kind="stable")][: rules.uploads]
        moves = []
        for slot, least, expert in zip(free[order].tolist(), worth[order].tolist(), into.tolist(), strict=False):
            gain = float(value[expert]) - (1 + rules.margin) * least - rules.tax
            if gain <= 0:
                break
            moves.append((gain, Move(layer, slot, None if held[slot] == EMPTY else int(held[slot]), expert)))
        return moves
