"""Which experts the tokens of a step will probably choose, before their routers have said so.

    predictor.begin(sequences, tokens)            # a step: all that tables know holds for every layer at once
    predictor.likely(layer, ahead, horizon)       # (T, E), when a look-ahead's scores are there
    predictor.end(experts)                        # what was chosen, to learn from

Every value is (T, E): larger is likelier; `best` ranks. A layer is its place among the MoE layers, from 0. NumPy
only; knows no models and moves nothing: `offload.slots` and the prefetchers do. Costs O(T E) a layer, but for full
corrections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload.correction import Correction, features_of
from offload.token_table import TokenTable, pair_keys

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]

FADING = 0.95  # of a sequence's history, for each token


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model's routing, and what the tables may hold."""

    layers: int
    experts: int
    per_token: int
    ids: int = 8192  # token ids that the table knows at a time
    pairs: int = 16384  # ids with the one before
    ways: int = 16  # experts that a row of them keeps


def best(values: Floats, n: int) -> Integers:
    """(T, n) the experts with the largest values (T, E), in no order."""
    if n >= values.shape[1]:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, -n, axis=1)[:, -n:]


def any_of(probabilities: Floats) -> Floats:
    """(E,) the probability that any of T independent tokens chooses each expert, of (T, E)."""
    return np.asarray(1 - np.prod(1 - np.clip(probabilities, 0, 1), axis=0))


class Popularity:
    """How often each expert was chosen, in all."""

    def __init__(self, shape: Shape) -> None:
        self._per_token = shape.per_token
        self._counts = np.full((shape.layers, shape.experts), 0.5)

    def shares(self) -> Floats:
        """(L, E) the share of tokens that chose each expert; a row's sum is K."""
        return np.asarray(self._counts / self._counts.sum(1, keepdims=True) * self._per_token, np.float32)

    def learn(self, experts: Integers) -> None:
        """Of experts (T, L, K)."""
        self._counts += _chosen(experts, self._counts.shape[1]).sum(0)


class History:
    """What each sequence chose lately: its last experts, and shares that fade."""

    def __init__(self, shape: Shape) -> None:
        self._n_experts = shape.experts
        self._last: dict[int, Integers] = {}  # (L, K)
        self._mass: dict[int, Floats] = {}  # (L, E)

    def last(self, layer: int, sequences: Sequence[int], base: Floats) -> Floats:
        """(T, E): shares `base` (E,), below 1, and 1 more for the experts of each sequence's last token."""
        found = np.repeat(base[None], len(sequences), 0)
        for row, sequence in zip(found, sequences, strict=True):
            if sequence in self._last:
                row[self._last[sequence][layer]] += 1
        return found

    def shares(self, layer: int, sequences: Sequence[int], base: Floats) -> Floats:
        """(T, E): the faded shares of each sequence, `base` (E,) for one that has none."""
        return np.stack([self._mass[s][layer] if s in self._mass else base for s in sequences])

    def learn(self, sequences: Sequence[int], experts: Integers, base: Floats) -> None:
        """Experts (T, L, K) of tokens in their order; a new sequence begins with `base` (L, E)."""
        chosen = _chosen(experts, self._n_experts)
        for i, sequence in enumerate(sequences):
            before = self._mass.get(sequence, base)
            self._mass[sequence] = np.float32(FADING) * before + np.float32(1 - FADING) * chosen[i]
            self._last[sequence] = experts[i]

    def forget(self, sequence: int) -> None:
        """It has ended."""
        self._last.pop(sequence, None)
        self._mass.pop(sequence, None)


class Predictor:
    """All of them, fed step by step; `likely` is their best answer."""

    def __init__(self, shape: Shape, bias: Floats, correction: Correction | None = None) -> None:
        """`bias` (L, E) is added to the routers' scores to choose."""
        self._bias, self._correction = bias, correction
        ways = min(shape.ways, shape.experts)
        self._ids = TokenTable(shape.ids, shape.layers, shape.experts, ways)
        self._pairs = TokenTable(shape.pairs, shape.layers, shape.experts, ways)
        self._popularity, self._history = Popularity(shape), History(shape)
        self._before: dict[int, int] = {}  # last token of each sequence
        self._sequences: Sequence[int] = ()
        self._tokens: Integers = np.zeros(0, np.int64)
        self._keys: Integers = np.zeros(0, np.int64)
        self._shares: Floats = self._popularity.shares()

    def begin(self, sequences: Sequence[int], tokens: Integers) -> None:
        """A step of tokens (T,) of `sequences`, the tokens of one in their order."""
        previous: list[int] = []
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            previous.append(self._before.get(sequence, -1))
            self._before[sequence] = token
        self._sequences, self._tokens = sequences, tokens
        self._keys = pair_keys(np.array(previous, np.int64), tokens)
        self._shares = self._popularity.shares()

    def popular(self, layer: int) -> Floats:
        """(T, E): by all tokens so far."""
        return np.repeat(self._shares[layer][None], len(self._tokens), 0)

    def last(self, layer: int) -> Floats:
        """(T, E): the experts of the sequence's last token, then the popular ones."""
        return self._history.last(layer, self._sequences, self._shares[layer])

    def history(self, layer: int) -> Floats:
        """(T, E): by the sequence's last tokens, the latest counting most."""
        return self._history.shares(layer, self._sequences, self._shares[layer])

    def by_token(self, layer: int) -> Floats:
        """(T, E): by what the same token chose elsewhere."""
        return self._ids.probabilities(layer, self._tokens, self.popular(layer))

    def prior(self, layer: int) -> Floats:
        """(T, E) probabilities: by what the same token after the same one chose, and before that `by_token`."""
        return self._pairs.probabilities(layer, self._keys, self.by_token(layer))

    def likely(self, layer: int, ahead: Floats | None = None, horizon: int = 1) -> Floats:
        """(T, E): the best that is known. `ahead` (T, E): scores of this layer's router on the state `horizon` MoE
        layers before it. Without one, or without a correction learned for it, the prior or the plain look-ahead."""
        if ahead is None:
            return self.prior(layer)
        found = None
        if self._correction is not None:
            found = self._correction.scores(horizon, layer, features_of(ahead, self.prior(layer), self.history(layer)))
        return np.asarray((ahead if found is None else found) + self._bias[layer])

    def end(self, experts: Integers) -> None:
        """Learn the experts (T, L, K) that the step's tokens chose."""
        self._ids.learn(self._tokens, experts)
        self._pairs.learn(self._keys, experts)
        self._history.learn(self._sequences, experts, self._shares)
        self._popularity.learn(experts)

    def forget(self, sequence: int) -> None:
        """It has ended."""
        self._history.forget(sequence)
        self._before.pop(sequence, None)


def _chosen(experts: Integers, n_experts: int) -> Floats:
    """(T, L, E): 1 for the experts (T, L, K)."""
    found = np.zeros((*experts.shape[:2], n_experts), np.float32)
    np.put_along_axis(found, experts.astype(np.int64), 1, 2)
    return found
