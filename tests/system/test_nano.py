"""The shipped nano through the real server: a handful of held-out turns of each kind, and swarms to their end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.nano import mixture
from hybrid.nano.data import Make, known_tool, unseen_tool
from hybrid.nano.evaluate import connected, grade, grade_swarms, turns_of, two_digits
from hybrid.nano.mixture import named
from hybrid.nano.swarm_data import sub_agent
from tests.system.serving import Serve, Server

MODEL = Path(mixture.__file__).with_name("model")
# Whole turns, reasoning and all: how many are asked for, and how many must be exact. Well below the shares that the
# model card reports from many items (`hybrid.nano.evaluate`), since a handful says little; raised as nano learns.
KINDS: dict[str, tuple[Make, int, int]] = {
    "tool": (known_tool, 8, 6),
    "tool unseen": (unseen_tool, 5, 3),
    "sub-agent call": (sub_agent, 6, 5),
    "sub-agent message": (sub_agent, 6, 4),
    "create": (named(4, 4), 4, 4),
    "sum think": (two_digits, 5, 4),
    "fan-out 2": (named(2, 2), 5, 4),
    "fan-out 4": (named(4, 4), 5, 4),
    "fan-out 10": (named(10, 10), 3, 1),
    "merge 2": (named(2, 2), 5, 4),
    "merge 6": (named(6, 6), 4, 2),
}


@pytest.fixture(scope="module")
def nano(serve: Serve) -> Iterator[Server]:
    with serve(MODEL) as running:
        yield running


@pytest.mark.parametrize("row", KINDS)
async def test_held_out_turns_are_exact(nano: Server, row: str) -> None:
    make, n, least = KINDS[row]
    async with connected(f"{nano.url}/v1") as (_, ask):
        (found,) = await grade(ask, turns_of(make, (row,), n))
    print(f" {found.right} of {found.n}", end="")
    assert found.n == n
    assert found.right >= least, found.misses


async def test_swarms_end_with_every_result(nano: Server) -> None:
    """The model decides every turn."""
    async with connected(f"{nano.url}/v1") as (_, ask):
        found = await grade_swarms(ask, 4, False, 8)
    print(f" {found.right} of {found.n}", end="")
    assert found.n == 8
    assert found.right >= 5, found.misses
