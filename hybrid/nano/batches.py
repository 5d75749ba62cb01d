"""From conversations to rectangles of tokens.

Called by `hybrid.nano.train` and `hybrid.nano.probe`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hybrid.nano.conversation import Encoded
from hybrid.nano.network import Batch
from hybrid.nano.vocabulary import SPECIAL

_WINDOW = 16  # calls of a long fan-out that are taught at once, at most
# Of the windows. Where to stop is the hard part of a long list: not after 3 of 30, but after 30.
_AT_THE_START = 0.3
_AT_THE_END = 0.4  # of the others
_LONG = 12  # calls; shorter fan-outs are taught whole
_PADDED = 0.12  # of a rectangle, at most, before a new one is begun


@dataclass(frozen=True, slots=True)
class Span:
    """A taught turn: its predictions are `start` to `stop` of the batch's asked tokens."""

    score: str
    start: int
    stop: int


def windowed(rng: random.Random, encoded: Encoded) -> Encoded:
    """A long fan-out with most of its calls left out: the first, then a few in a row, then the end or nothing. Whole
    where the results are merged, as they need all the calls.

    The call right after the gap is not taught, as nothing in sight tells which one it is. Windows differ in length, or
    the number of calls in sight would tell where the list ends.
    """
    if any(score.startswith("merge") for _, _, score in encoded.turns):
        return encoded
    for start, stop, score in encoded.turns:
        calls = [i for i in range(start, stop) if encoded.ids[i] == SPECIAL["<|tool_call_begin|>"]]
        if not score.startswith("fan-out") or len(calls) <= _LONG:
            continue
        window = rng.randint(2, min(_WINDOW, len(calls) - 3))
        if rng.random() < _AT_THE_START:
            return _ended(encoded, calls[window + 1])
        latest = len(calls) - window
        first = latest if rng.random() < _AT_THE_END else rng.randint(2, latest)
        weights = list(encoded.weights)
        weights[calls[first] : calls[first + 1]] = [0.0] * (calls[first + 1] - calls[first])
        encoded = replace(encoded, weights=weights)
        last = first + 1 + window
        if last < len(calls):  # the rest would show what comes after, so it goes
            encoded = _ended(encoded, calls[last])
        return encoded.without(calls[1], calls[first])
    return encoded


def _ended(encoded: Encoded, at: int) -> Encoded:
    turns = [(start, min(stop, at), score) for start, stop, score in encoded.turns if start < at]
    return Encoded(encoded.ids[:at], encoded.weights[:at], encoded.positions[:at], turns, encoded.images)


def packed(documents: Sequence[Encoded], device: torch.device) -> tuple[Batch, list[Span]]:
    """Documents of like length side by side, each rectangle padded on the right."""
    ids: list[int] = []
    positions: list[int] = []
    real: list[bool] = []
    shapes: list[tuple[int, int]] = []
    asked: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    spans: list[Span] = []
    images: list[torch.Tensor] = []
    for rectangle in _rectangles(sorted(documents, key=lambda document: len(document.ids))):
        length = len(rectangle[-1].ids)
        shapes.append((len(rectangle), length))
        for document in rectangle:
            offset, pad = len(ids), length - len(document.ids)
            ids += document.ids + [0] * pad
            positions += document.positions + [0] * pad
            images += [image.tensor().to(device) for image in document.images]
            real += [True] * len(document.ids) + [False] * pad
            for start, stop, score in document.turns:
                begun = len(asked)
                for i in range(max(start, 1), stop):
                    if document.weights[i]:
                        asked.append(offset + i - 1)
                        targets.append(document.ids[i])
                        weights.append(document.weights[i])
                spans.append(Span(score, begun, len(asked)))

    def tensor(values: Sequence[float], kind: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    seen_at = tensor([i for i, token in enumerate(ids) if token == SPECIAL["<|media_pad|>"]]) if images else None
    batch = Batch(
        tensor(ids), tensor(positions), tensor(real, torch.bool), shapes,
        tensor(asked), tensor(targets), tensor(weights, torch.float32), images, seen_at,
    )  # fmt: skip
    return batch, spans


def _rectangles(documents: Sequence[Encoded]) -> list[list[Encoded]]:
    """Cut a list in order of length where padding the shortest to the longest would cost too much."""
    cut: list[list[Encoded]] = []
    for document in documents:
        mine = [*cut[-1], document] if cut else [document]
        used = sum(len(one.ids) for one in mine)
        if cut and used >= (1 - _PADDED) * len(mine) * len(document.ids):
            cut[-1].append(document)
        else:
            cut.append([document])
    return cut
