"""The sampler against the obvious float64 version, its distribution, and its edges."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid.batch import Row, Sampling, TokenLogprob
from hybrid.sampler import LogitsError, sample_rows, score, uniform
from tests.reference import sampler as reference

V = 50
GREEDY = Sampling(temperature=0.0)


def row(
    sampling: Sampling | None = GREEDY, n_sampled: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = ()
) -> Row:
    return Row(7, (1,), 0, (0,), sampling, n_sampled, prompt=prompt, output=output)


def settings_of(r: Row) -> Sampling:
    assert r.sampling is not None
    return r.sampling


def random_logits(seed: int, n_rows: int, n_vocab: int = V, scale: float = 2.0) -> np.ndarray:
    """Spread enough that filters cut somewhere in the middle and penalties change the order."""
    return (np.random.default_rng(seed).standard_normal((n_rows, n_vocab)) * scale).astype(np.float32)


def tokens(logits: np.ndarray, rows: list[Row]) -> list[int]:
    return [token for token, _ in sample_rows(torch.from_numpy(logits), rows)]


def random_row(rng: random.Random) -> Row:
    def some() -> tuple[int, ...]:
        return tuple(rng.choices(range(V), k=rng.randint(0, 12)))

    sampling = Sampling(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_p=rng.choice([None, 0.1, 0.5, 0.9, 0.999]),
        top_k=rng.choice([None, 1, 3, 20, 1000]),
        min_p=rng.choice([None, 0.02, 0.3]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5, -0.7]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.8, -0.4]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.4, 0.8]),
        logit_bias=tuple((rng.randrange(V), rng.uniform(-3, 3)) for _ in range(rng.choice([0, 0, 4]))),
        seed=rng.randrange(2**63),
    )
    return row(sampling, rng.randrange(1000), prompt=some(), output=some())


@pytest.mark.parametrize("seed", range(20))
def test_mixed_batches_draw_what_the_reference_draws(seed: int) -> None:
    rng = random.Random(seed)
    rows = [random_row(rng) for _ in range(40)]
    logits = random_logits(seed, len(rows))
    before = logits.copy()
    numbers = [uniform(settings_of(r).seed, r.n_sampled) for r in rows]
    assert tokens(logits, rows) == [reference.sample(*case) for case in zip(logits, rows, numbers, strict=True)]
    assert np.array_equal(logits, before), "the caller's logits are not touched"


def test_every_setting_changes_something() -> None:
    """Else the comparison above would be blind to it."""
    rng, changed = random.Random(1), dict.fromkeys(("top_p", "top_k", "min_p", "logit_bias"), 0)
    changed |= dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature"), 0)
    for i, x in enumerate(random_logits(0, 400)):
        r = random_row(rng)
        for name in changed:
            other = replace(r, sampling=replace(settings_of(r), **{name: getattr(Sampling(), name)}))
            changed[name] += reference.sample(x, r, uniform(i, 0)) != reference.sample(x, other, uniform(i, 0))
    assert min(changed.values()) >= 15, changed


@pytest.mark.parametrize(
    ("sampling", "n_left"),
    [
        (Sampling(), 8),
        (Sampling(temperature=0.6), 8),
        (Sampling(top_k=4), 4),
        (Sampling(top_p=0.8), 4),
        (Sampling(min_p=0.15, temperature=1.2), 7),
        (Sampling(logit_bias=((3, 1.0),), presence_penalty=0.5), 8),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "n_sampled"])
def test_draws_follow_the_distribution(sampling: Sampling, n_left: int, vary: str) -> None:
    n, output, quantile = 4000, (2, 2, 5), {8: 24.32, 7: 22.46, 4: 16.27}  # chi-square at 0.999, n_left - 1 degrees
    x = np.linspace(1.5, -1.0, 8, dtype=np.float32)[[3, 0, 6, 1, 7, 2, 5, 4]]
    if vary == "seed":
        rows = [row(replace(sampling, seed=i), output=output) for i in range(n)]
    else:
        rows = [row(replace(sampling, seed=5), i, output=output) for i in range(n)]
    counts = np.bincount(tokens(np.tile(x, (n, 1)), rows), minlength=8)
    ids, expected = reference.candidates(x, rows[0])
    assert len(ids) == n_left
    assert counts.sum() == counts[ids].sum(), "nothing outside the filters is drawn"
    assert ((counts[ids] - n * expected) ** 2 / (n * expected)).sum() < quantile[n_left]


def test_uniform_numbers_of_neighbours_are_unrelated() -> None:
    grid = np.zeros((8, 8))
    for seed in range(80):
        for n in range(80):
            grid[int(uniform(seed, n) * 8), int(uniform(seed, n + 1) * 8)] += 1
    assert ((grid - 100) ** 2 / 100).sum() < 103.4  # chi-square, 63 degrees, 0.999
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
    assert 0 <= uniform(-1, 0) < 1
    assert uniform(2**70, 0) != uniform(2**70 + 1, 0)


def test_a_draw_does_not_depend_on_the_batch() -> None:
    rng = random.Random(3)
    rows, logits = [random_row(rng) for _ in range(30)], random_logits(3, 30)
    together = tokens(logits, rows)
    assert together == [tokens(logits[i : i + 1], [rows[i]])[0] for i in range(30)]
    order = list(range(30))
    rng.shuffle(order)
    assert tokens(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_work_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    rows, logits = [random_row(rng) for _ in range(20)], random_logits(4, 20)
    targets = rng.choices(range(V), k=20)
    whole = tokens(logits, rows), score(torch.from_numpy(logits), targets, 3)
    for block in (1, 3 * V, 7 * V + 1):
        monkeypatch.setattr("hybrid.sampler.BLOCK", block)
        assert (tokens(logits, rows), score(torch.from_numpy(logits), targets, 3)) == whole


@pytest.mark.parametrize(("sampling", "n_left"), [(Sampling(), 163_840), (Sampling(top_p=0.5), 81_920)])
def test_a_flat_vocabulary_of_full_size_is_drawn_exactly(sampling: Sampling, n_left: int) -> None:
    """The largest sum the fixed point must hold: every id as probable as the best."""
    rows = [row(replace(sampling, seed=i)) for i in range(3)]
    assert tokens(np.full((3, 163_840), -3.0, np.float32), rows) == [int(uniform(i, 0) * n_left) for i in range(3)]


# Logprobs


def assert_logprob(got: TokenLogprob | None, x: np.ndarray, token: int, k: int) -> None:
    expected = reference.log_softmax(x)
    assert got is not None
    assert got.token == token
    assert got.logprob == pytest.approx(expected[token], abs=2e-6)
    assert [i for i, _ in got.top] == reference.best(x, k)
    assert [p for _, p in got.top] == pytest.approx(expected[reference.best(x, k)], abs=2e-6)


def test_logprobs_are_of_the_raw_logits() -> None:
    rng = random.Random(5)
    wanted = [None, 0, 1, 5, 20, V + 3]
    rows = [random_row(rng) for _ in range(40)]
    rows = [replace(r, sampling=replace(settings_of(r), logprobs=rng.choice(wanted))) for r in rows]
    logits = random_logits(5, len(rows))
    for x, r, (token, logprob) in zip(logits, rows, sample_rows(torch.from_numpy(logits), rows), strict=True):
        k = settings_of(r).logprobs
        if k is None:
            assert logprob is None
        else:
            assert_logprob(logprob, x, token, k)


@pytest.mark.parametrize("k", [0, 1, 4, V, V + 1])
def test_score_against_the_reference(k: int) -> None:
    logits = random_logits(6, 30)
    targets = np.random.default_rng(6).integers(0, V, 30).tolist()
    for x, target, got in zip(logits, targets, score(torch.from_numpy(logits), targets, k), strict=True):
        assert_logprob(got, x, target, k)


def test_alternatives_that_tie_come_lowest_id_first() -> None:
    x = np.full((1, 300), -1.5, np.float32)
    x[0, [250, 3, 77]] = 2.0
    x[0, [299, 10]] = [0.0, -0.0]
    (got,) = score(torch.from_numpy(x), [0], 8)
    assert [i for i, _ in got.top] == [3, 77, 250, 10, 299, 0, 1, 2]


def test_masked_logits_are_legal() -> None:
    x = np.full((2, 9), -np.inf, np.float32)
    x[:, [4, 6]] = 0.0
    rows = [row(replace(GREEDY, logprobs=3)), row(Sampling(top_p=0.9, logprobs=0, seed=2))]
    (first, logprob), (second, _) = sample_rows(torch.from_numpy(x), rows)
    assert first == 4
    assert second in (4, 6)
    assert logprob is not None
    assert [i for i, _ in logprob.top] == [4, 6, 0]
    assert [p for _, p in logprob.top] == [pytest.approx(-np.log(2)), pytest.approx(-np.log(2)), -np.inf]
    assert score(torch.from_numpy(x), [6, 0], 0)[1].logprob == -np.inf


# Edges


def test_greedy_takes_the_lowest_of_equals() -> None:
    x = np.zeros((1, V), np.float32)
    x[0, [9, 20]] = 3.0
    assert tokens(x, [row()]) == [9]
    assert tokens(x, [row(Sampling(top_k=1, seed=4))]) == [9]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
        Sampling(top_p=0.0),
        Sampling(min_p=1.0),
        Sampling(temperature=1e-6),
        Sampling(temperature=1e-45),
        Sampling(top_k=1, top_p=0.5, min_p=0.5),
    ],
)
def test_what_leaves_one_id_is_greedy(sampling: Sampling) -> None:
    logits = random_logits(8, 20)
    rows = [row(replace(sampling, seed=i)) for i in range(20)]
    assert tokens(logits, rows) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("sampling", [Sampling(top_k=10**9), Sampling(top_p=1.0), Sampling(min_p=0.0)])
def test_filters_that_let_all_pass_cut_nothing(sampling: Sampling) -> None:
    x = np.tile(np.linspace(0, 0.1, 6, dtype=np.float32), (400, 1))
    assert set(tokens(x, [row(replace(sampling, seed=i)) for i in range(400)])) == set(range(6))


def test_equals_at_the_cut_go_by_id() -> None:
    x = np.zeros((300, 8), np.float32)
    filters = [Sampling(top_k=3)] * 100 + [Sampling(top_p=0.25)] * 100 + [Sampling(min_p=1.0)] * 100
    drawn = tokens(x, [row(replace(s, seed=i)) for i, s in enumerate(filters)])
    assert set(drawn[:100]) == {0, 1, 2}
    assert set(drawn[100:200]) == {0, 1}
    assert set(drawn[200:]) == set(range(8)), "as probable as the best is probable enough"


def test_a_bias_of_a_hundred_decides() -> None:
    logits = random_logits(9, 20)
    force, ban = Sampling(logit_bias=((30, 100.0),)), int(logits[1].argmax())
    rows = [row(replace(force, seed=i)) for i in range(20)]
    assert tokens(logits, rows) == [30] * 20
    assert tokens(logits[1:2], [row(replace(GREEDY, logit_bias=((ban, -100.0),)))]) == [int(logits[1].argsort()[-2])]


def test_a_bias_given_twice_adds_up() -> None:
    x = np.zeros((1, V), np.float32)
    x[0, 2] = 1.5
    assert tokens(x, [row(replace(GREEDY, logit_bias=((8, 1.0), (8, 1.0))))]) == [8]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.9, top_k=5), replace(GREEDY, logprobs=2)])
def test_logits_that_are_no_numbers_are_named(bad: float, sampling: Sampling) -> None:
    logits = random_logits(10, 3)
    logits[1, 4] = bad
    rows = [replace(row(sampling), request_id=i) for i in (11, 12, 13)]
    with pytest.raises(LogitsError, match="request 12: the logits hold NaN or infinity"):
        sample_rows(torch.from_numpy(logits), rows)
    with pytest.raises(LogitsError, match="scored row 1"):
        score(torch.from_numpy(logits), [0, 1, 2], 2)


def test_nothing_but_minus_infinity_is_named() -> None:
    logits = torch.full((1, V), -torch.inf)
    for sampling in (GREEDY, Sampling(), Sampling(min_p=0.1)):
        with pytest.raises(LogitsError, match="request 7"):
            sample_rows(logits, [row(sampling)])
    with pytest.raises(LogitsError, match="scored row 0"):
        score(logits, [0], 0)


@pytest.mark.parametrize("token", [-1, V])
def test_ids_outside_the_vocabulary_are_named(token: int) -> None:
    logits = torch.zeros(1, V)
    with pytest.raises(ValueError, match=f"logit_bias: token id {token} is outside the vocabulary of {V}"):
        sample_rows(logits, [row(replace(GREEDY, logit_bias=((token, 1.0),)))])
    with pytest.raises(ValueError, match=f"targets: token id {token}"):
        score(logits, [token], 0)


def test_nothing_asked_is_nothing_answered() -> None:
    assert sample_rows(torch.zeros(0, V), []) == ()
    assert score(torch.zeros(0, V), [], 3) == ()
    with pytest.raises(ValueError, match="2 targets for 1 rows"):
        score(torch.zeros(1, V), [0, 1], 0)
    with pytest.raises(ValueError, match="asks for no token"):
        sample_rows(torch.zeros(1, V), [row(None)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_draws_what_the_cpu_draws() -> None:
    rng = random.Random(11)
    rows, logits = [random_row(rng) for _ in range(60)], torch.from_numpy(random_logits(11, 60))
    assert [t for t, _ in sample_rows(logits.cuda(), rows)] == [t for t, _ in sample_rows(logits, rows)]
