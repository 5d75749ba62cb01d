"""Exact match on held-out conversations while nano trains.

Every taught token is predicted from the right text before it. As answers are the only right ones, a turn whose every
token is the model's first choice is exactly what greedy decoding writes, so this is its whole-turn exact match, with
the reasoning included. Called by `hybrid.nano.train`.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from hybrid.nano.batches import packed
from hybrid.nano.conversation import Encoded, encode
from hybrid.nano.data import Make
from hybrid.nano.network import Network
from hybrid.nano.vocabulary import Vocabulary

SEED = 20_000
_TOKENS = 12_000  # of one batch


def probes(families: Mapping[Make, int], vocabulary: Vocabulary) -> list[Encoded]:
    """The given number of held-out conversations of each family, always the same."""
    rng = random.Random(SEED)
    return [encode(make(rng, True), vocabulary) for make, n in families.items() for _ in range(n)]


@torch.no_grad()
def exact(network: Network, documents: Sequence[Encoded], device: torch.device) -> dict[str, tuple[int, int]]:
    """By score name: turns that are right to the last token, and turns."""
    network.eval()
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    pending: list[Encoded] = []
    ordered = sorted(documents, key=lambda document: len(document.ids))
    for i, document in enumerate(ordered):
        pending.append(document)
        if sum(len(one.ids) for one in pending) < _TOKENS and i < len(ordered) - 1:
            continue
        batch, spans = packed(pending, device)
        right = (network(batch).argmax(-1) == batch.targets).cpu()
        for span in spans:
            counts[span.score][0] += bool(right[span.start : span.stop].all())
            counts[span.score][1] += 1
        pending = []
    network.train()
    return {name: (right, total) for name, (right, total) in sorted(counts.items())}
