"""offload.correction: what it learns from made-up errors of a look-ahead, its products by loops, and its file."""

from pathlib import Path

import numpy as np
import pytest

from offload.correction import (
    Correction,
    CorrectionError,
    Map,
    features_of,
    fit,
    logit,
    read_correction,
    sigmoid,
    write_correction,
)

E = 6


def data(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 3, E) and the scores (n, E) that a look-ahead, another expert's logit and the prior lead to."""
    rng = np.random.default_rng(seed)
    features = features_of(sigmoid(rng.normal(size=(n, E))), rng.random((n, E)), rng.random((n, E)))
    logits = features[:, 0] + 0.8 * np.roll(features[:, 0], 1, axis=1) + 0.5 * features[:, 1] - np.arange(E) / 5
    return features, sigmoid(logits)


def test_features_by_definition() -> None:
    rng = np.random.default_rng(2)
    ahead, prior, history = rng.random((3, 4, E))
    found = features_of(ahead, prior, history)
    for t in range(4):
        for e in range(E):
            wanted = [np.log(ahead[t, e] / (1 - ahead[t, e])), np.log(prior[t, e] + 0.02), np.log(history[t, e] + 0.02)]
            assert found[t, :, e] == pytest.approx(wanted, rel=1e-5)
    assert np.isfinite(features_of(np.array([[0.0, 1.0]]), np.zeros((1, 2)), np.zeros((1, 2)))).all()


def test_a_full_map_learns_a_linear_error() -> None:
    features, scores = data(4000)
    found = fit(features, scores, np.ones(4000), full=True)
    others, wanted = data(500, seed=9)
    assert others[:, 0] + found(others) == pytest.approx(logit(wanted), abs=0.06)


def test_own_weights_are_the_least_squares_of_each_expert() -> None:
    features, scores = data(3000)
    found = fit(features, scores, np.ones(3000), full=False)
    for e in range(E):
        x = np.column_stack((features[:, :, e], np.ones(3000)))
        solved, *_ = np.linalg.lstsq(x, logit(scores)[:, e] - features[:, 0, e], rcond=None)
        values = x @ solved
        assert found(features)[:, e] == pytest.approx(values, abs=0.05)


def test_tokens_count_by_their_weights() -> None:
    features, scores = data(400)
    weights = np.r_[np.ones(200), np.zeros(200)]
    for full in (True, False):
        half = fit(features[:200], scores[:200], np.ones(200), full)
        both = fit(features, scores, weights, full)
        assert both(features) == pytest.approx(half(features), abs=0.02)


def test_few_tokens_change_little() -> None:
    features, scores = data(4000)
    much, little = (fit(features[:n], scores[:n], np.ones(n), True) for n in (4000, 5))
    assert np.abs(little.weight).sum() < 0.5 * np.abs(much.weight).sum()


@pytest.mark.parametrize("full", [True, False])
def test_products_by_loops(full: bool) -> None:
    rng = np.random.default_rng(3)
    shape = (3, E, E) if full else (3, E)
    found = Map(rng.normal(size=(3, E)), rng.normal(size=shape), rng.normal(size=E))
    features = rng.normal(size=(5, 3, E))
    for t in range(5):
        wanted = found.offset.copy()
        for i in range(3):
            for e in range(E):
                x = features[t, i, e] - found.mean[i, e]
                if full:
                    wanted += x * found.weight[i, e]
                else:
                    wanted[e] += x * found.weight[i, e]
        assert found(features)[t] == pytest.approx(wanted)


def test_to_the_disk_and_back(tmp_path: Path) -> None:
    features, scores = data(300)
    maps = {(1, 1): fit(features, scores, np.ones(300), True), (2, 3): fit(features, scores, np.ones(300), False)}
    write_correction(tmp_path / "c.npz", Correction("cafe", maps))
    back = read_correction(tmp_path / "c.npz")
    assert back.model == "cafe"
    assert back.maps.keys() == maps.keys()
    for (horizon, layer), found in maps.items():
        ours = back.scores(horizon, layer, features)
        assert ours == pytest.approx(sigmoid(features[:, 0] + found(features)))
    assert back.scores(1, 2, features) is None
    assert [path.name for path in tmp_path.iterdir()] == ["c.npz"]


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    with pytest.raises(CorrectionError, match="cannot be read: No such file"):
        read_correction(path)
    write_correction(path, Correction("", {(1, 1): Map(np.zeros((3, E)), np.zeros((3, E)), np.zeros(E))}))
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CorrectionError, match=r"c\.npz: not a look-ahead correction, or a damaged one"):
            read_correction(path)
    np.savez(path, format=np.array("something else"))
    with pytest.raises(CorrectionError, match="make one with hybrid replay --correction"):
        read_correction(path)
    write_correction(path, Correction("", {(1, 2): Map(np.zeros((3, E)), np.zeros((3, E, 2)), np.zeros(E))}))
    with pytest.raises(CorrectionError, match=r"c\.npz: 1\.2: expected a mean"):
        read_correction(path)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_correction(tmp_path / "folder", Correction("", {}))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
