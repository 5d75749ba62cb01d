"""offload.predict against loops over single tokens, and how the parts are joined."""

from collections import Counter

import numpy as np
import pytest

from offload.correction import Correction, Map, features_of
from offload.predict import FADING, History, Popularity, Predictor, Shape, any_of, best
from offload.token_table import DOUBT

SHAPE = Shape(layers=2, experts=10, per_token=3, ids=64, pairs=64)
L, E, K = SHAPE.layers, SHAPE.experts, SHAPE.per_token


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.random((n, L, E)).argsort(axis=2)[..., :K]


def test_best_are_the_largest() -> None:
    values = np.random.default_rng(1).random((20, E))
    for n in (1, 4, E, E + 5):
        found = best(values, n)
        assert [sorted(row) for row in found.tolist()] == [sorted(np.argsort(row)[-n:].tolist()) for row in values]


def test_any_of_several_tokens() -> None:
    found = any_of(np.array([[0.5, 0.0, 1.2], [0.5, 0.1, 0.0]]))
    assert found == pytest.approx([0.75, 0.1, 1.0])


def test_popularity_by_counting() -> None:
    experts = draw(np.random.default_rng(2), 40)
    found = Popularity(SHAPE)
    for part in np.split(experts, [7, 8, 30]):
        found.learn(part)
    for layer in range(L):
        counts = Counter(experts[:, layer].ravel().tolist())
        total = 40 * K + E / 2
        assert found.shares()[layer] == pytest.approx([(counts[e] + 0.5) / total * K for e in range(E)])


def test_history_of_each_sequence() -> None:
    rng = np.random.default_rng(3)
    history, base = History(SHAPE), np.full((L, E), K / E, np.float32)
    mass: dict[int, np.ndarray] = {}
    latest: dict[int, np.ndarray] = {}
    for _ in range(20):
        sequences = rng.integers(3, size=4).tolist()
        experts = draw(rng, 4)
        history.learn(sequences, experts, base)
        for sequence, chosen in zip(sequences, experts, strict=True):
            share = mass.get(sequence, base) * FADING
            for layer in range(L):
                share[layer, chosen[layer]] += 1 - FADING
            mass[sequence], latest[sequence] = share, chosen
    asked = [0, 2, 1, 9]  # 9 is new
    for layer in range(L):
        shares, last = history.shares(layer, asked, base[layer]), history.last(layer, asked, base[layer])
        for row, sequence in enumerate(asked):
            assert shares[row] == pytest.approx(mass.get(sequence, base)[layer], rel=1e-4)
            wanted = base[layer].copy()
            if sequence in latest:
                wanted[latest[sequence][layer]] += 1
            assert last[row] == pytest.approx(wanted)
    history.forget(0)
    assert np.array_equal(history.shares(0, [0], base[0])[0], base[0])


def test_every_predictor_over_a_few_steps() -> None:
    """Sequences of a few ids, by dictionaries of what was seen."""
    rng = np.random.default_rng(4)
    predictor = Predictor(SHAPE, np.zeros((L, E)))
    by_id: dict[int, list[np.ndarray]] = {}
    by_pair: dict[tuple[int, int], list[np.ndarray]] = {}
    seen: list[np.ndarray] = []
    before = dict.fromkeys(range(3), -1)
    for _ in range(25):
        tokens, experts = rng.integers(4, size=3), draw(rng, 3)
        predictor.begin([0, 1, 2], tokens)
        for layer in range(L):
            counts = Counter(e for chosen in seen for e in chosen[layer].tolist())
            popular = np.array([counts[e] + 0.5 for e in range(E)])
            popular *= K / popular.sum()
            assert predictor.popular(layer) == pytest.approx(np.tile(popular, (3, 1)), rel=1e-5)
            ids = np.stack([blend(by_id.get(t, []), layer, popular) for t in tokens.tolist()])
            assert predictor.by_token(layer) == pytest.approx(ids, rel=1e-4)
            pairs = [
                blend(by_pair.get((before[s], t), []), layer, base)
                for s, (t, base) in enumerate(zip(tokens.tolist(), ids, strict=True))
            ]
            assert predictor.prior(layer) == pytest.approx(np.stack(pairs), rel=1e-4)
            assert np.array_equal(predictor.likely(layer), predictor.prior(layer))
        predictor.end(experts)
        for sequence, (token, chosen) in enumerate(zip(tokens.tolist(), experts, strict=True)):
            by_id.setdefault(token, []).append(chosen)
            by_pair.setdefault((before[sequence], token), []).append(chosen)
            before[sequence] = token
        seen += [*experts]


def blend(seen: list[np.ndarray], layer: int, base: np.ndarray) -> np.ndarray:
    counts = Counter(e for chosen in seen for e in chosen[layer].tolist())
    return np.array([(counts[e] + DOUBT * base[e]) / (len(seen) + DOUBT) for e in range(E)])


def test_the_bias_moves_a_look_ahead() -> None:
    bias = np.random.default_rng(5).random((L, E))
    predictor = Predictor(SHAPE, bias)
    predictor.begin([0, 1], np.array([3, 4]))
    ahead = np.random.default_rng(6).random((2, E))
    assert predictor.likely(1, ahead) == pytest.approx(ahead + bias[1])


def test_a_correction_is_put_to_use_where_it_was_learned() -> None:
    rng = np.random.default_rng(7)
    weight = Map(rng.random((3, E)), rng.random((3, E, E)), rng.random(E))
    bias, ahead = rng.random((L, E)), rng.random((2, E))
    predictor = Predictor(SHAPE, bias, Correction("", {(1, 1): weight}))
    predictor.begin([0, 1], np.array([3, 4]))
    features = features_of(ahead, predictor.prior(1), predictor.history(1))
    wanted = 1 / (1 + np.exp(-features[:, 0] - weight(features)))
    assert predictor.likely(1, ahead, 1) == pytest.approx(wanted + bias[1])
    assert predictor.likely(1, ahead, 2) == pytest.approx(ahead + bias[1])


def test_a_sequence_that_ended_is_forgotten() -> None:
    predictor = Predictor(SHAPE, np.zeros((L, E)))
    first = draw(np.random.default_rng(8), 1)
    predictor.begin([5], np.array([1]))
    predictor.end(first)
    predictor.forget(5)
    predictor.begin([5], np.array([1]))
    assert predictor.last(0) == pytest.approx(predictor.popular(0))
    assert predictor.history(0) == pytest.approx(predictor.popular(0))
    # id 1 at a beginning was seen once, so the pair is known as well as the id
    assert predictor.prior(0)[0, first[0, 0]].min() > predictor.by_token(0)[0, first[0, 0]].min()
