"""The second tier's copies against the obvious loop, in every type and shape that a cache may have."""

import random
from collections.abc import Sequence

import pytest
import torch

from hybrid.batch import Moves
from hybrid.kv_ram import RamTier

PAGES, RAM_PAGES = 9, 7


def storage() -> list[torch.Tensor]:
    """(L, P, page_size, …): floats, one byte values with scales beside them, and an odd number of octets."""
    make = torch.Generator().manual_seed(3)

    def octets(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=make)

    return [
        octets(3, PAGES, 4, 40).view(torch.float32),
        octets(3, PAGES, 4, 6).view(torch.float8_e4m3fn),
        octets(3, PAGES, 4, 2).view(torch.bfloat16).squeeze(-1),
        octets(2, PAGES, 1, 3),
    ]


def octets_of(tensor: torch.Tensor) -> list[bytes]:
    """What each page of (L, P, …) holds."""
    return [bytes(tensor[:, i].contiguous().view(torch.uint8).flatten().tolist()) for i in range(tensor.shape[1])]


def some_moves(draw: random.Random, known: Sequence[int]) -> Moves:
    """Out: any pages to any places. In: what is known there by then, to any pages."""
    n_out, goals = draw.randint(0, RAM_PAGES), draw.sample(range(RAM_PAGES), RAM_PAGES)
    demoted = tuple((draw.randrange(PAGES), goals[i]) for i in range(n_out))
    readable = sorted({*known, *goals[:n_out]})
    n_in = draw.randint(0, PAGES) if readable else 0
    promoted = tuple((draw.choice(readable), page) for page in draw.sample(range(PAGES), n_in))
    return Moves(demoted, promoted)


@pytest.mark.parametrize("seed", range(3))
def test_out_then_in_as_the_loop_does_it(seed: int) -> None:
    tensors, draw, n_moved = storage(), random.Random(seed), 0
    expected = [octets_of(tensor) for tensor in tensors]
    ram: list[dict[int, bytes]] = [{} for _ in tensors]
    tier = RamTier(tensors, RAM_PAGES)
    assert tier.page_bytes == sum(len(pages[0]) for pages in expected)
    for _ in range(60):
        moves = some_moves(draw, list(ram[0]))
        tier.move(moves)
        for pages, places in zip(expected, ram, strict=True):
            places |= {to: pages[page] for page, to in moves.demoted}
            for source, page in moves.promoted:
                pages[page] = places[source]
        assert [octets_of(tensor) for tensor in tensors] == expected
        n_moved += len(moves.promoted)
    assert n_moved > 100
    tier.close()


@pytest.mark.parametrize(
    "moves",
    [
        Moves(demoted=((PAGES, 0),)),
        Moves(demoted=((0, RAM_PAGES),)),
        Moves(promoted=((RAM_PAGES, 0),)),
        Moves(promoted=((0, -1),)),
        Moves(demoted=((0, 1), (2, 1))),
        Moves(promoted=((0, 1), (2, 1))),
    ],
)
def test_moves_that_no_page_table_makes_are_refused(moves: Moves) -> None:
    with pytest.raises(AssertionError, match="move"):
        RamTier(storage(), RAM_PAGES).move(moves)


def test_a_tier_of_no_pages_takes_no_memory_and_moves_nothing() -> None:
    tensors = storage()
    before = [octets_of(tensor) for tensor in tensors]
    RamTier(tensors, 0).move(Moves())
    assert [octets_of(tensor) for tensor in tensors] == before
