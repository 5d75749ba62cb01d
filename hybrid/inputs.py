"""A batch as device tensors: one upload for each step, and rows gathered into groups that attend together.

Knows rows and pages, no model. Called by `hybrid.engine`; read by `hybrid.model` and `hybrid.mla`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from hybrid.batch import Batch, Row
from hybrid.config import PIECE_TOKENS

IntArray = npt.NDArray[np.int64]

GROUP_ROWS = 32  # decode rows that attend together; bounds the gathered cache of one key block
GROUP_SPREAD = 2  # longest context of a group over its shortest: at most half of the gathered cache is padding


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that attend together: B rows with n new ids each (B = 1 or n = 1).

    Rows shorter than the longest are padded with page 0; positions beyond a row's own are never visible to it.
    """

    tokens: torch.Tensor  # (B, n) indices among the step's T new ids
    positions: torch.Tensor  # (B, n)
    pages: torch.Tensor  # (B, N)
    n_context: int  # ids, old and new, of the longest row
    first_position: int  # the smallest of `positions`


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's integers on the device."""

    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,)
    slots: torch.Tensor  # (T,) where each new id's cache entry goes
    groups: tuple[Group, ...]


def upload(batch: Batch, page_size: int, device: torch.device) -> StepInputs:
    """Lay the batch out and copy it to the device in one transfer of int64."""
    rows = batch.rows
    starts = row_starts(rows)
    positions = np.concatenate([np.arange(row.position, row.position + len(row.ids)) for row in rows])
    slots = np.concatenate([slots_of(row, page_size) for row in rows])
    arrays = [np.concatenate([row.ids for row in rows]), positions, slots]
    members = grouped(rows, page_size)
    for group in members:
        tokens = np.stack([np.arange(starts[i], starts[i] + len(rows[i].ids)) for i in group])  # (B, n)
        arrays += [tokens, positions[tokens], page_table([rows[i] for i in group], page_size)]
    on_device = iter(_one_transfer(arrays, device))
    ids, where, into = next(on_device), next(on_device), next(on_device)
    groups = [
        Group(
            tokens=next(on_device),
            positions=next(on_device),
            pages=next(on_device),
            n_context=max(rows[i].position + len(rows[i].ids) for i in group),
            first_position=min(rows[i].position for i in group),
        )
        for group in members
    ]
    return StepInputs(ids, where, into, tuple(groups))


def in_pieces(batch: Batch) -> list[Batch]:
    """The batch's new ids in order, PIECE_TOKENS at a time: a long row goes on in the next piece from where it was."""
    pieces: list[list[Row]] = [[]]
    room = PIECE_TOKENS
    for row in batch.rows:
        at = 0
        while at < len(row.ids):
            if not room:
                pieces.append([])
                room = PIECE_TOKENS
            some = row.ids[at : at + room]
            pieces[-1].append(row if len(some) == len(row.ids) else replace(row, ids=some, position=row.position + at))
            at, room = at + len(some), room - len(some)
    return [Batch(tuple(rows)) for rows in pieces]


def check_rows(rows: Sequence[Row], n_pages: int, page_size: int, vocab_size: int) -> None:
    """Assert what the scheduler and the server owe us: a batch that breaks it would corrupt other requests' cache."""
    assert rows, "a batch without rows"
    assert len({row.request_id for row in rows}) == len(rows), "a request has two rows in one batch"
    written: set[tuple[int, int]] = set()
    for row in rows:
        assert row.ids and row.position >= 0, f"request {row.request_id}: no new ids, or a negative position"
        assert min(row.ids) >= 0 and max(row.ids) < vocab_size, f"request {row.request_id}: id outside the vocabulary"
        end = row.position + len(row.ids)
        assert end <= len(row.pages) * page_size, f"request {row.request_id}: {end} ids, {len(row.pages)} pages"
        assert min(row.pages) >= 0 and max(row.pages) < n_pages, f"request {row.request_id}: page out of range"
        assert row.targets is None or len(row.targets) <= len(row.ids), f"request {row.request_id}: too many targets"
        places = {(row.pages[p // page_size], p % page_size) for p in range(row.position, end)}
        assert len(places) == len(row.ids) and not places & written, f"request {row.request_id}: a slot written twice"
        written |= places


def row_starts(rows: Sequence[Row]) -> list[int]:
    """Index of each row's first new id among the step's T."""
    lengths = [len(row.ids) for row in rows]
    return [sum(lengths[:i]) for i in range(len(rows))]


def grouped(rows: Sequence[Row], page_size: int) -> list[list[int]]:
    """Indices of rows that attend together: decode rows of similar context, every longer row alone."""
    groups = [[i] for i, row in enumerate(rows) if len(row.ids) > 1]
    decode = sorted((_n_pages(row, page_size), i) for i, row in enumerate(rows) if len(row.ids) == 1)
    shortest = 0
    current: list[int] = []
    for n_pages, i in decode:
        if not current or len(current) == GROUP_ROWS or n_pages > GROUP_SPREAD * shortest:
            shortest, current = n_pages, []
            groups.append(current)
        current.append(i)
    return groups


def _n_pages(row: Row, page_size: int) -> int:
    """Pages that the row's ids, old and new, fill."""
    return -(-(row.position + len(row.ids)) // page_size)


def slots_of(row: Row, page_size: int) -> IntArray:
    """(n,) cache slots of the row's new ids."""
    positions = np.arange(row.position, row.position + len(row.ids))
    return np.asarray(row.pages)[positions // page_size] * page_size + positions % page_size


def page_table(rows: Sequence[Row], page_size: int) -> IntArray:
    """(B, N) pages of each row, padded with page 0."""
    counts = [_n_pages(row, page_size) for row in rows]
    table = np.zeros((len(rows), max(counts)), dtype=np.int64)
    for line, row, count in zip(table, rows, counts, strict=True):
        line[:count] = row.pages[:count]
    return table


def _one_transfer(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, as views of one block."""
    block = torch.from_numpy(np.concatenate([a.astype(np.int64, copy=False).ravel() for a in arrays])).to(device)
    parts = torch.split(block, [a.size for a in arrays])
    return [part.view(a.shape) for part, a in zip(parts, arrays, strict=True)]
