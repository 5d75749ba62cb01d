"""placement.recall: shares by counting, and records whose experts can be foreseen in a known way."""

from dataclasses import replace

import numpy as np
import pytest

from hybrid.routes import Record
from offload.correction import features_of
from placement.recall import Foresight, Recall, Rehearsal, in_lanes, recall

L, E, K = 3, 16, 3
LENGTHS = [30, 20, 41, 25, 30, 33, 28, 24]
SCORED = 5  # documents


def record(seed: int = 1) -> Record:
    """The best K of random scores choose. Layer 1's look-ahead tells all, layer 2's the experts one number off."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    n, scored = sum(LENGTHS), starts[SCORED]
    scores = rng.random((n, L, E)).astype(np.float16)
    ahead = np.zeros((scored, L, 2, E), np.float16)
    ahead[:, 1, 0] = scores[:scored, 1]
    ahead[:, 2, 0] = np.roll(scores[:scored, 2], 1, axis=1)
    ahead[:, 2, 1] = rng.random((scored, E))
    experts = np.sort(scores.argsort(axis=2)[..., -K:], axis=2)
    return Record(
        "0", np.arange(1, L + 1), np.zeros((L, E), np.float32), rng.integers(2000, size=n), starts,
        np.full(len(LENGTHS), "a"), np.stack((starts + 2, starts + LENGTHS), 1), np.full(len(LENGTHS), "b"),
        experts, scores[:scored], ahead,
    )  # fmt: skip


def by_name(foresight: Foresight) -> dict[tuple[str, int | None], Recall]:
    return {(found.predictor, found.horizon): found for found in foresight.recalls}


@pytest.fixture(scope="module")
def found() -> Foresight:
    return Rehearsal(record()).foresight()


def test_recall_by_sets() -> None:
    rng = np.random.default_rng(2)
    values, experts = rng.random((50, E)), rng.random((50, E)).argsort(axis=1)[:, :K]
    for n in (K, 2 * K, 99):
        shares = [len({*np.argsort(v)[-n:]} & {*e}) / K for v, e in zip(values, experts.tolist(), strict=True)]
        assert recall(values, experts, n) == pytest.approx(np.mean(shares))


def test_knowing_all_and_knowing_nothing() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random((4000, E))
    experts = truth.argsort(axis=1)[:, -K:]
    assert recall(truth, experts, K) == 1
    assert recall(rng.random((4000, E)), experts, K) == pytest.approx(K / E, abs=0.01)
    assert recall(rng.random((4000, E)), experts, 2 * K) == pytest.approx(2 * K / E, abs=0.01)


def test_lanes() -> None:
    spans = [np.array([0, 1, 2]), np.array([], int), np.array([5]), np.array([7, 8])]
    assert [*in_lanes(spans, 2)] == [[(0, 0), (2, 5)], [(0, 1), (3, 7)], [(0, 2), (3, 8)]]
    assert [token for step in in_lanes(spans, 1) for _, token in step] == [0, 1, 2, 5, 7, 8]


def test_a_look_ahead_that_tells_all(found: Foresight) -> None:
    ahead = by_name(found)["look-ahead", 1]
    assert np.isnan(ahead.at_k[0])
    assert ahead.at_k[1] > 0.99  # float16 rounds, and then two are equal
    assert ahead.at_k[2] < 0.4
    far = by_name(found)["look-ahead", 2]
    assert np.isnan(far.at_k[:2]).all()
    assert far.at_k[2] == pytest.approx(K / E, abs=0.05)
    assert far.at_2k[2] == pytest.approx(2 * K / E, abs=0.06)


def test_a_correction_learns_what_other_documents_show(found: Foresight) -> None:
    """The shift by one is learned, and nothing where there is nothing: no document is asked what it taught itself."""
    shares = by_name(found)
    assert shares["corrected, full", 1].at_2k[2] > 0.85 > shares["look-ahead", 1].at_2k[2]
    assert shares["corrected, full", 1].at_k[1] > 0.8
    assert shares["corrected, full", 2].at_k[2] == pytest.approx(K / E, abs=0.06)


def test_tokens_that_always_choose_the_same() -> None:
    some = record()
    rows = np.sort(np.random.default_rng(4).random((4, L, E)).argsort(axis=2)[..., :K], axis=2)
    same = replace(some, tokens=some.tokens % 4, experts=rows[some.tokens % 4], scores=some.scores[:0], ahead=None)
    found = Rehearsal(same).foresight()
    assert found.note == "no looks ahead in the record: predictors that need them are left out"
    shares = by_name(found)
    assert set(shares) == {
        (name, None) for name in ("most popular", "last token", "history", "token id", "pair of ids")
    }
    assert (shares["token id", None].at_k == 1).all()
    assert (shares["pair of ids", None].at_k == 1).all()
    assert (shares["last token", None].at_k < 0.9).all()
    assert found.documents == 4
    assert found.measured == sum(LENGTHS[4:]) - 4 * 3  # two tokens of a prompt and the end token of each
    assert found.learned == sum(LENGTHS[:4])


def test_what_is_measured_are_the_scored_documents(found: Foresight) -> None:
    assert found.documents == SCORED
    assert found.measured == sum(LENGTHS[:SCORED]) - SCORED * 3
    assert found.learned == sum(LENGTHS[SCORED:])
    assert found.note is None


def test_progress_and_the_correction_for_a_server() -> None:
    heard: list[tuple[str, int, int]] = []
    rehearsal = Rehearsal(record(), lambda *what: heard.append(what))
    assert heard[-1] == ("replaying tokens", sum(LENGTHS), sum(LENGTHS))
    correction = rehearsal.correction()
    assert set(correction.maps) == {(1, 1), (1, 2), (2, 2)}
    some = record().ahead
    assert some is not None
    ahead = some[:, 2, 0].astype(np.float32)
    flat = np.full_like(ahead, K / E)
    scores = correction.scores(1, 2, features_of(ahead, flat, flat))
    assert scores is not None
    assert recall(scores, record().experts[: len(scores), 2], 2 * K) > 0.85
    with pytest.raises(ValueError, match="no looks ahead to learn"):
        Rehearsal(replace(record(), ahead=None)).correction()


def test_looks_ahead_of_one_document_teach_nothing_about_another() -> None:
    some = record()
    assert some.ahead is not None
    one = replace(some, scores=some.scores[: LENGTHS[0]], ahead=some.ahead[: LENGTHS[0]])
    found = Rehearsal(one).foresight()
    assert found.note == "looks ahead of one document: a correction could not be measured on another"
    assert {name for name, _ in by_name(found)} & {"corrected, full", "corrected, own weights"} == set()
