"""How evenly a record's tokens use the experts, and how many a batch needs: `python -m hybrid.nano.load RECORD`.

Batches are put together from tokens that a server would run as decode steps, one of each conversation. Knows no model.
Called by `hybrid.nano.record`.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hybrid.routes import Floats, Integers, Record, RecordError, read_record, shares_of

BATCHES = (8, 32)
LOCK_STEP = "sub-agent call"
DRAWS = 400  # batches that a mean is taken over
SEED = 3


@dataclass(frozen=True, slots=True)
class Balance:
    """Loads of each layer's experts, (L,) each; the mean load is 1."""

    busiest: Floats
    idlest: Floats
    dead: Integers  # experts that no token chose


def balance(counts: npt.NDArray[np.int64]) -> Balance:
    """Of `Record.counts`, (L, E), of one token at least."""
    loads = counts / counts.mean(axis=1, keepdims=True)
    return Balance(loads.max(axis=1), loads.min(axis=1), (counts == 0).sum(axis=1))


def law(shares: Floats, batch: int) -> Floats:
    """Distinct experts of a batch whose tokens choose independently, an expert with probability q: sum of 1 - (1-q)^n.

    `shares` (…, E) to (…).
    """
    return np.asarray((1 - (1 - shares) ** batch).sum(axis=-1))


def apart(record: Record, batch: int) -> Floats | None:
    """(L,) mean number of distinct experts of decode tokens from so many conversations, each at a place of its own.

    None where the record has fewer conversations.
    """
    decoded = np.flatnonzero(record.decoded)
    bounds = np.searchsorted(decoded, [*record.starts, len(record.tokens)])
    pools = [decoded[a:b] for a, b in itertools.pairwise(bounds) if a < b]  # of each document
    if len(pools) < batch:
        return None
    rng = np.random.default_rng(SEED)
    drawn = [[rng.choice(pools[i]) for i in rng.choice(len(pools), batch, replace=False)] for _ in range(DRAWS)]
    return mean_distinct(record, np.array(drawn))


def in_step(record: Record, batch: int, kind: str = LOCK_STEP) -> Floats | None:
    """The same where the tokens stand at the same place of turns of one kind: a swarm that was started at once.

    None where the record has fewer such turns.
    """
    turns = record.turns[record.kinds == kind]
    _, firsts = np.unique(record.documents[turns[:, 0]], return_index=True)  # one turn of each conversation
    starts, steps = turns[firsts, 0], turns[firsts, 1] - turns[firsts, 0] - 1  # the last token is no decode step
    starts, steps = starts[steps > 0], steps[steps > 0]
    if len(starts) < batch:
        return None
    rng = np.random.default_rng(SEED)
    drawn = []
    for _ in range(DRAWS):
        some = rng.choice(len(starts), batch, replace=False)
        drawn.append(starts[some] + rng.integers(steps[some].min()))
    return mean_distinct(record, np.array(drawn))


def mean_distinct(record: Record, batches: Integers) -> Floats:
    """(L,) mean number of distinct experts of batches of tokens, (N, n)."""
    hit = np.zeros((len(batches), len(record.layers), record.n_experts), np.bool_)
    for batch, tokens in zip(hit, batches, strict=True):
        for layer, row in enumerate(batch):
            row[record.experts[tokens, layer]] = True
    return np.asarray(hit.sum(axis=2).mean(axis=0))


def report(record: Record) -> str:
    """Two Markdown tables: loads, and distinct experts of batches beside the laws."""
    decoded, per_token = record.decoded, record.experts.shape[2]
    balances = (balance(record.counts()), balance(record.counts(decoded)) if decoded.any() else None)
    lines = [
        f"{len(record.tokens):,} tokens of {len(record.starts)} conversations, {decoded.sum():,} of them decode steps; "
        f"{per_token} of {record.n_experts} experts for a token; {len(record.scores):,} tokens with scores",
        "",
        "| layer | busiest expert's load over the mean, all tokens | idlest | dead | busiest, decode | idlest | dead |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for i, layer in enumerate(record.layers):
        lines.append(f"| {layer} | {' | '.join(_loads(one, i) for one in balances)} |")
    lines += [
        "",
        "| layer | batch | uniform law | law of the shares | apart | lock-step |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    shares = shares_of(record.counts(), per_token)
    for batch in BATCHES:
        found = (law(shares, batch), apart(record, batch), in_step(record, batch))
        uniform = law(np.full(record.n_experts, per_token / record.n_experts), batch)
        for i, layer in enumerate(record.layers):
            lines.append(f"| {layer} | {batch} | {uniform:.1f} | {' | '.join(_cell(one, i) for one in found)} |")
    return "\n".join(lines)


def _loads(of: Balance | None, layer: int) -> str:
    return "– | – | –" if of is None else f"{of.busiest[layer]:.2f} | {of.idlest[layer]:.2f} | {of.dead[layer]}"


def _cell(values: Floats | None, layer: int) -> str:
    return "–" if values is None else f"{values[layer]:.1f}"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.nano.load", description=__doc__)
    parser.add_argument("record", type=Path, help="of python -m hybrid.nano.record")
    options = parser.parse_args(arguments)
    try:
        found = read_record(options.record)
    except RecordError as error:
        parser.error(str(error))
    print(report(found))


if __name__ == "__main__":
    main(sys.argv[1:])
