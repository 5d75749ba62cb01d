"""The shipped nano through the real server: a handful of held-out turns of each kind, and swarms to their end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.nano import mixture
from hybrid.nano.data import Make, known_tool, unseen_tool
from hybrid.nano.evaluate import connected, grade, grade_swarms, turns_of, two_digits
from hybrid.nano.mixture import named, numbered
from hybrid.nano.swarm_data import sub_agent
from tests.system.serving import Serve, Server

MODEL = Path(mixture.__file__).with_name("model")
# Whole turns, reasoning and all. The scores that the model card reports are of `hybrid.nano.evaluate` on many items.
KINDS: dict[str, tuple[Make, int]] = {
    "tool": (known_tool, 8),
    "tool unseen": (unseen_tool, 4),
    "sub-agent call": (sub_agent, 4),
    "sub-agent message": (sub_agent, 4),
    "sum think": (two_digits, 5),
    "fan-out 4": (named(4, 4), 5),
    "merge 4": (named(4, 4), 5),
    "fan-out numbered 30": (numbered(30, 30), 1),
}


@pytest.fixture(scope="module")
def nano(serve: Serve) -> Iterator[Server]:
    with serve(MODEL) as running:
        yield running


@pytest.mark.parametrize("row", KINDS)
async def test_held_out_turns_are_exact(nano: Server, row: str) -> None:
    make, n = KINDS[row]
    async with connected(f"{nano.url}/v1") as (_, ask):
        (found,) = await grade(ask, turns_of(make, (row,), n))
    print(f" {found.right} of {found.n}", end="")
    assert found.n == n
    assert found.right >= (0.5 if row == "tool unseen" else 0.8) * n, found.misses


async def test_swarms_end_with_every_result(nano: Server) -> None:
    async with connected(f"{nano.url}/v1") as (_, ask):
        found = await grade_swarms(ask, 4, False, 4)
    assert found.n == 4
    assert found.right >= 3, found.misses
