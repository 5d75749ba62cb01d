"""How well experts can be foreseen: a routing record replayed through the predictors of `offload.predict`.

Documents are replayed side by side, token by token, prompts too, and every predictor learns as it goes. Where the
record has looks ahead, the documents that have them come last and are measured; else the second half is. Corrections
are learned on other documents than they are measured on, every document in its turn. Only decode steps count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.routes import Floats, Integers, Record
from offload.correction import Correction, Map, features_of, fit
from offload.predict import Predictor, Shape, best

LANES = 16  # documents side by side
FOLDS = 4  # of the documents, to learn a correction on all but one
PROMPT_WEIGHT = 0.1  # of a prompt's token beside a decode step's
HORIZONS = (1, 2)
FULL_UP_TO = 64  # experts of a layer: for more, a full correction would take too long beside a decode step
ONLINE = ("most popular", "last token", "history", "token id", "pair of ids")  # as `_online` gives them


@dataclass(frozen=True, slots=True)
class Recall:
    """Of one predictor: the share of a token's K experts that are among its best K and 2K, (L,) each; NaN where it
    has nothing to say."""

    predictor: str
    horizon: int | None  # MoE layers ahead; None: known at the start of the step
    at_k: Floats
    at_2k: Floats


@dataclass(frozen=True, slots=True)
class Foresight:
    """All predictors on the same tokens."""

    recalls: tuple[Recall, ...]
    measured: int  # decode steps
    documents: int  # that they are of
    learned: int  # tokens that the tables had seen before
    note: str | None  # what is missing, and why


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


def recall(values: Floats, experts: Integers, n: int) -> float:
    """Share of the experts (N, K) that are among the n best by values (N, E)."""
    guess = best(values, min(n, values.shape[1]))
    return float((guess[:, :, None] == experts[:, None, :]).any(1).mean())


def in_lanes(spans: Sequence[Integers], lanes: int) -> Iterator[list[tuple[int, int]]]:
    """Steps of (sequence, token): the tokens of each span one by one, `lanes` spans side by side. Whoever ends makes
    room for the next."""
    waiting = [(i, span.tolist()[::-1]) for i, span in enumerate(spans) if len(span)][::-1]
    running: list[tuple[int, list[int]]] = []
    while waiting or running:
        while waiting and len(running) < lanes:
            running.append(waiting.pop())
        yield [(i, tokens.pop()) for i, tokens in running]
        running = [(i, tokens) for i, tokens in running if tokens]


class Rehearsal:
    """A record replayed once: what was foreseen, and what a correction is learned from."""

    def __init__(self, record: Record, progress: Callable[[str, int, int], None] = _silent) -> None:
        """`progress` hears of (stage, tokens done, tokens in all)."""
        self.record, self._progress, self._done = record, progress, 0
        n_documents, n_layers, per_token = len(record.starts), len(record.layers), record.experts.shape[2]
        self.ahead_is_there = record.ahead is not None and len(record.ahead) > 0
        n_scored = int(np.searchsorted(record.starts, len(record.scores)))
        self.measured = range(n_scored) if self.ahead_is_there else range(n_documents // 2, n_documents)
        learned = [d for d in range(n_documents) if d not in self.measured]
        ends = np.append(record.starts, len(record.tokens))
        self.learned = int(sum(ends[d + 1] - ends[d] for d in learned))
        self.tokens = np.arange(ends[self.measured.start], ends[self.measured.stop])
        self.decoded = record.decoded
        self.ks = (per_token, 2 * per_token)
        self.prior = np.zeros((len(self.tokens), n_layers, record.n_experts), np.float16)
        self.history = np.zeros_like(self.prior)
        self.hits = np.zeros((len(ONLINE), 2, n_layers))
        self.predictor = Predictor(Shape(n_layers, record.n_experts, per_token), record.bias)
        self._replay([np.arange(ends[d], ends[d + 1]) for d in learned], False)
        self._replay([np.arange(ends[d], ends[d + 1]) for d in self.measured], True)

    def _replay(self, spans: Sequence[Integers], measured: bool) -> None:
        before: list[int] = []
        for step in in_lanes(spans, LANES):
            sequences, tokens = [i for i, _ in step], np.array([token for _, token in step])
            for ended in {*before} - {*sequences}:
                self.predictor.forget(ended)
            before = sequences
            self.predictor.begin(sequences, self.record.tokens[tokens])
            if measured:
                self._measure(tokens)
            self.predictor.end(self.record.experts[tokens])
            self._done += len(tokens)
            self._progress("replaying tokens", self._done, len(self.record.tokens))
        for ended in before:
            self.predictor.forget(ended)

    def _measure(self, tokens: Integers) -> None:
        predictor, decoded = self.predictor, self.decoded[tokens]
        at = tokens - self.tokens[0]
        for layer in range(len(self.record.layers)):
            prior, history = predictor.prior(layer), predictor.history(layer)
            self.prior[at, layer], self.history[at, layer] = prior, history
            if decoded.any():
                truth = self.record.experts[tokens[decoded], layer]
                popular, last, by_token = predictor.popular(layer), predictor.last(layer), predictor.by_token(layer)
                for i, values in enumerate((popular, last, history, by_token, prior)):
                    for j, k in enumerate(self.ks):
                        self.hits[i, j, layer] += recall(values[decoded], truth, k) * len(truth)

    def correction(self) -> Correction:
        """What all looks ahead of the record teach, for a server. Raises ValueError where there are none."""
        if not self.ahead_is_there:
            raise ValueError("the record has no looks ahead to learn a correction from; record them anew")
        everything = np.ones(len(self.tokens), np.bool_)
        maps = {
            (horizon, layer): self._fit(horizon, layer, everything, self.record.n_experts <= FULL_UP_TO)
            for horizon in HORIZONS
            for layer in range(horizon, len(self.record.layers))
        }
        return Correction(self.record.model, maps)

    def foresight(self) -> Foresight:
        """Recall of every predictor."""
        chosen = self.decoded[self.tokens]
        shares = self.hits / max(chosen.sum(), 1)
        recalls = [Recall(name, None, *shares[i]) for i, name in enumerate(ONLINE)]
        note = "no looks ahead in the record: predictors that need them are left out"
        if self.ahead_is_there:
            note = ""
            for horizon in HORIZONS:
                recalls.append(self._recall("look-ahead", horizon, self._plain))
                if len(self.measured) > 1:
                    recalls.append(self._recall("corrected, own weights", horizon, self._own))
                    if self.record.n_experts <= FULL_UP_TO:
                        recalls.append(self._recall("corrected, full", horizon, self._full))
                else:
                    note = "looks ahead of one document: a correction could not be measured on another"
        return Foresight(tuple(recalls), int(chosen.sum()), len(self.measured), self.learned, note or None)

    def _recall(self, name: str, horizon: int, values: Callable[[int, int], Floats]) -> Recall:
        """Of values (S, E) for a horizon and layer, on the measured decode steps."""
        n_layers = len(self.record.layers)
        found = np.full((2, n_layers), np.nan)
        chosen = self.decoded[self.tokens]
        for layer in range(horizon, n_layers):
            rows, truth = values(horizon, layer)[chosen], self.record.experts[self.tokens[chosen], layer]
            found[:, layer] = [recall(rows, truth, k) for k in self.ks]
        return Recall(name, horizon, *found)

    def _plain(self, horizon: int, layer: int) -> Floats:
        return np.asarray(self._ahead(horizon, layer) + self.record.bias[layer])

    def _own(self, horizon: int, layer: int) -> Floats:
        return self._corrected(horizon, layer, False)

    def _full(self, horizon: int, layer: int) -> Floats:
        return self._corrected(horizon, layer, True)

    def _corrected(self, horizon: int, layer: int, full: bool) -> Floats:
        """(S, E), each document by what the documents of the other folds teach."""
        fold = self.record.documents[self.tokens] % min(FOLDS, len(self.measured))
        features = self._features(horizon, layer)
        found = np.zeros((len(self.tokens), self.record.n_experts))
        for i in range(fold.max() + 1):
            other = Correction(self.record.model, {(horizon, layer): self._fit(horizon, layer, fold != i, full)})
            scores = other.scores(horizon, layer, features[fold == i])
            assert scores is not None, "it was just learned"
            found[fold == i] = scores + self.record.bias[layer]
        return found

    def _fit(self, horizon: int, layer: int, chosen: npt.NDArray[np.bool_], full: bool) -> Map:
        """What some of the measured tokens (S,) teach."""
        weights = np.where(self.decoded[self.tokens], 1.0, PROMPT_WEIGHT)[chosen]
        scores = self.record.scores[chosen, layer].astype(np.float32)
        return fit(self._features(horizon, layer)[chosen], scores, weights, full)

    def _features(self, horizon: int, layer: int) -> Floats:
        return features_of(self._ahead(horizon, layer), self.prior[:, layer], self.history[:, layer])

    def _ahead(self, horizon: int, layer: int) -> Floats:
        assert self.record.ahead is not None, "asked for only where it is there"
        return np.asarray(self.record.ahead[:, layer, horizon - 1].astype(np.float32))
