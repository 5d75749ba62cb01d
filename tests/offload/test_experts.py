"""The facade against float64 NumPy, and what a caller may rely on: invariance, NaN, odd shapes, counters, errors."""

import dataclasses
import threading
from collections.abc import Iterator
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from offload.config import ExpertFormat, ExpertGeometry, Isa, PoolConfig, Precision
from offload.experts import Experts
from offload.isa import REQUIRED, available, choose
from offload.kernels.amx import AmxFormat
from offload.kernels.table import kernels
from tests.reference import experts as reference
from tests.reference.amx import plain_many
from tests.reference.expert_memory import MemoryStore, memory_store, unpinned

FORMATS: tuple[ExpertFormat, ...] = ("int4", "int8", "bf16", "fp8")
PRECISIONS: tuple[Precision, ...] = ("a8", "a16")
GEOMETRIES = [
    ExpertGeometry(3, 2080, 64),
    ExpertGeometry(5, 96, 160),
    ExpertGeometry(3, 416, 32),
    ExpertGeometry(4, 256, 384),
]
ODD = ExpertGeometry(4, 99, 141)  # bf16 and fp8 only: partial blocks and tiles on every side
LAYER = 3


def open_experts(store: MemoryStore, config: PoolConfig) -> Experts:
    return Experts(store, config, unpinned(config.threads or 1, store.n_nodes))  # type: ignore[arg-type]


class Case:
    """A store with its workers, and a way to ask both them and the reference."""

    def __init__(self, store: MemoryStore, config: PoolConfig) -> None:
        self.store, self.precision = store, config.precision
        self.experts = open_experts(store, config)

    def run(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, layer: int = LAYER) -> np.ndarray:
        tensors = [torch.from_numpy(np.array(array)) for array in (x, ids, weights.astype(np.float32))]
        return self.experts.submit(layer, *tensors).wait().numpy()

    def expected(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, layer: int = LAYER) -> np.ndarray:
        dense = self.store.dense[self.store.layers.index(layer)]
        return reference.experts(dense, x, ids, weights.astype(np.float32), self.precision)


@pytest.fixture
def int4() -> Iterator[Case]:
    made = Case(memory_store("int4", ExpertGeometry(6, 160, 96), layers=(LAYER, 8)), PoolConfig(threads=2))
    yield made
    made.experts.close()


def routed(rng: np.random.Generator, tokens: int, geometry: ExpertGeometry, k: int) -> tuple[np.ndarray, ...]:
    """x, ids (k different experts for each token), weights."""
    ids = np.array([rng.permutation(geometry.n_experts)[:k] for _ in range(tokens)]).reshape(tokens, k)
    x = rng.standard_normal((tokens, geometry.hidden)).astype(np.float32)
    return x, ids, rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)


def tolerance(fmt: ExpertFormat, precision: Precision, expected: np.ndarray) -> float:
    """Float sums of up to 416 terms of order one: 416 * 2^-24 of the largest output is 2.5e-5 of it, twice.

    Quantising h rounds a value that lies on the edge between two integers either way, which moves an output by one
    step: a `limit`-th of a group's largest h times a weight, so a few times 1 / limit of a typical output. Fewer than
    one value in 1,000 is that close (the float error of h is below 1e-5 of a step with a8, 3e-3 with a16).
    """
    step = 1 / reference.LIMITS[precision] if fmt in ("int4", "int8") else 0.0
    return float(np.abs(expected).max() * (5e-5 + step / 4))


@pytest.mark.parametrize("isa", sorted({available()[0], "portable"}))
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_agree_with_the_reference(isa: Isa, fmt: ExpertFormat, precision: Precision) -> None:
    rng = np.random.default_rng(7)
    for geometry in (*GEOMETRIES, *([ODD] if fmt in ("bf16", "fp8") else [])):
        case = Case(memory_store(fmt, geometry), PoolConfig(threads=2, precision=precision, isa=isa))
        for tokens, k in ((1, 1), (1, 3), (6, 2), (13, 3)):
            question = routed(rng, tokens, geometry, k)
            expected = case.expected(*question)
            assert np.abs(case.run(*question) - expected).max() <= tolerance(fmt, precision, expected), geometry
        case.experts.close()


def test_precisions_differ_as_much_as_their_names_say() -> None:
    """Against the same layer with unquantised activations: about one percent with a8, next to nothing with a16."""
    rng, geometry = np.random.default_rng(1), ExpertGeometry(4, 512, 256)
    store = memory_store("int4", geometry)
    question = routed(rng, 8, geometry, 2)
    dense = store.dense[0]
    exact = reference.experts(reference.Layer("bf16", dense.gate, dense.up, dense.down), *question, "a16")
    error = {}
    for precision in PRECISIONS:
        case = Case(store, PoolConfig(threads=1, precision=precision))
        error[precision] = np.linalg.norm(case.run(*question) - exact) / np.linalg.norm(exact)
        case.experts.close()
    assert 1e-3 < error["a8"] < 3e-2
    assert error["a16"] < 1e-4


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_token_gets_the_same_bits_alone_and_in_any_batch(fmt: ExpertFormat) -> None:
    rng, geometry = np.random.default_rng(2), ExpertGeometry(6, 128, 96)
    store = memory_store(fmt, geometry)
    x, ids, weights = routed(rng, 300, geometry, 4)
    cases = [Case(store, PoolConfig(threads=n)) for n in (1, 2, 5)]
    whole = cases[0].run(x, ids, weights)
    for case in cases:
        assert np.array_equal(case.run(x, ids, weights), whole)
        for first, n in ((0, 1), (1, 1), (17, 8), (290, 3), (40, 130)):
            rows = slice(first, first + n)
            assert np.array_equal(case.run(x[rows], ids[rows], weights[rows]), whole[rows])
        order = rng.permutation(len(x))
        assert np.array_equal(case.run(x[order], ids[order], weights[order]), whole[order])
        turned = slice(None, None, -1)  # the router's order of a token's experts does not matter either
        assert np.array_equal(case.run(x, ids[:, turned], weights[:, turned]), whole)
        case.experts.close()


@pytest.mark.parametrize(("n_nodes", "workers"), [(2, 2), (3, 2), (3, 5), (8, 3)])
def test_an_expert_may_be_split_over_memory_nodes(n_nodes: int, workers: int) -> None:
    """Nodes without a worker, or without a unit, too; bit for bit what one node gives."""
    rng, geometry = np.random.default_rng(11), ExpertGeometry(5, 200, 160)
    question = routed(rng, 9, geometry, 3)
    stores = [memory_store("bf16", geometry, n_nodes=n) for n in (1, n_nodes)]
    cases = [Case(store, PoolConfig(threads=workers)) for store in stores]
    expected = cases[0].expected(*question)
    for _ in range(3):  # counters of nodes without a worker start anew as well
        whole, split = (case.run(*question) for case in cases)
        assert np.abs(whole - expected).max() <= tolerance("bf16", "a8", expected)
        assert np.array_equal(split, whole)
    for case in cases:
        case.experts.close()


@pytest.mark.parametrize("fmt", ["int4", "bf16"])
def test_experts_with_many_tokens_go_through_amx(fmt: AmxFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens by expert: 1, 15, 16, 33 and 70; the tile instructions are spelt out as loops."""
    isa, geometry = choose(), ExpertGeometry(5, 160, 96)
    monkeypatch.setattr(
        "offload.experts.kernels", lambda *variant: dataclasses.replace(kernels(*variant), many=plain_many(fmt))
    )
    case = Case(memory_store(fmt, geometry, n_nodes=2), PoolConfig(threads=2, isa=isa))
    rng = np.random.default_rng(12)
    ids = rng.permutation(np.repeat(np.arange(5), (1, 15, 16, 33, 70)))[:, None]
    ids = np.concatenate([ids, np.full_like(ids, -1)], axis=1)[:, rng.permutation(2)]
    x, weights = rng.standard_normal((len(ids), 160)), rng.uniform(0.5, 1, ids.shape)
    got = case.run(x.astype(np.float32), ids, weights)
    dense = case.store.dense[0]
    layer, named = reference.Layer("bf16", dense.gate, dense.up, dense.down), ids.max(axis=1, keepdims=True)
    shares = np.where(ids < 0, 0, weights).sum(axis=1, keepdims=True)
    exact = reference.experts(layer, x, named, shares, "a16")
    error = np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1)
    many = np.isin(named[:, 0], (2, 3, 4))
    assert error[many].max() < 0.008  # three roundings to bf16, 0.2 % each
    assert error[many].mean() > 1e-3  # so they did go that way
    if fmt == "int4":
        assert error[~many].mean() > 1.5 * error[many].mean()  # and the others did not
    else:
        assert error[~many].max() < 1e-5
    case.experts.close()


def test_no_tokens_and_no_experts(int4: Case) -> None:
    nothing = int4.run(np.empty((0, 160), np.float32), np.empty((0, 2), np.int64), np.empty((0, 2)))
    assert nothing.shape == (0, 160)
    unrouted = int4.run(np.ones((3, 160), np.float32), np.empty((3, 0), np.int64), np.empty((3, 0)))
    assert np.array_equal(unrouted, np.zeros((3, 160)))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 700])
def test_all_tokens_on_one_expert(int4: Case, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x, _, weights = routed(rng, tokens, int4.store.geometry, 1)
    question = x, np.full((tokens, 1), 4), weights
    got = int4.run(*question)
    check = slice(-5, None)  # the reference is slow
    expected = int4.expected(*(array[check] for array in question))
    assert np.abs(got[check] - expected).max() <= tolerance("int4", "a8", expected)


def test_an_expert_named_twice_counts_twice(int4: Case) -> None:
    x = np.random.default_rng(0).standard_normal((2, 160)).astype(np.float32)
    question = x, np.array([[2, 2, 5], [5, 2, 5]]), np.array([[0.25, 0.5, 1.0], [0.5, 1.0, 0.25]])
    expected = int4.expected(*question)
    assert np.abs(int4.run(*question) - expected).max() <= tolerance("int4", "a8", expected)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_sizes_and_any_routing(data: st.DataObject) -> None:
    """Sizes next to those of tiles and units, experts without tokens, all on one, named twice, masked."""
    fmt = data.draw(st.sampled_from(FORMATS))
    whole = fmt in ("int4", "int8")
    sizes = st.integers(1, 7).map(lambda n: 32 * n) if whole else st.integers(1, 200)
    geometry = ExpertGeometry(data.draw(st.integers(1, 6)), data.draw(sizes), data.draw(sizes))
    precision = data.draw(st.sampled_from(PRECISIONS))
    tokens, k = data.draw(st.integers(1, 21)), data.draw(st.integers(1, 4))
    ids = data.draw(arrays(np.int64, (tokens, k), elements=st.integers(-1, geometry.n_experts - 1)))
    seed = data.draw(st.integers(0, 1000))
    rng, store = np.random.default_rng(seed), memory_store(fmt, geometry, seed=seed)
    x, weights = rng.standard_normal((tokens, geometry.hidden)), rng.uniform(-1, 1, (tokens, k))
    case = Case(store, PoolConfig(threads=data.draw(st.integers(1, 3)), precision=precision))
    got = case.run(x.astype(np.float32), ids, weights)
    case.experts.close()
    expected = case.expected(x.astype(np.float32), np.maximum(ids, 0), np.where(ids < 0, 0, weights))
    scale = case.expected(x.astype(np.float32), np.maximum(ids, 0), np.where(ids < 0, 0, np.abs(weights)))
    assert np.abs(got - expected).max() <= tolerance(fmt, precision, np.abs(scale) + 0.1)


def test_layers_have_their_own_experts(int4: Case) -> None:
    question = routed(np.random.default_rng(4), 3, int4.store.geometry, 2)
    answers = {layer: int4.run(*question, layer=layer) for layer in (LAYER, 8, LAYER)}
    for layer, got in answers.items():
        expected = int4.expected(*question, layer=layer)
        assert np.abs(got - expected).max() <= tolerance("int4", "a8", expected)
    assert np.abs(answers[LAYER] - answers[8]).max() > 0.1


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_ruins_its_own_token_only(fmt: ExpertFormat, bad: float) -> None:
    geometry = ExpertGeometry(4, 96, 64)
    case = Case(memory_store(fmt, geometry), PoolConfig(threads=2))
    x, ids, weights = routed(np.random.default_rng(5), 9, geometry, 2)
    clean = case.run(x, ids, weights)
    x[4, 50] = bad
    got = case.run(x, ids, weights)
    case.experts.close()
    assert not np.isfinite(got[4]).any()
    if fmt in ("int4", "int8"):
        assert np.isnan(got[4]).all()
    assert np.array_equal(np.delete(got, 4, 0), np.delete(clean, 4, 0))


def test_tensors_of_other_types_and_strides(int4: Case) -> None:
    rng = np.random.default_rng(6)
    x, ids, weights = (torch.from_numpy(array) for array in routed(rng, 4, int4.store.geometry, 2))
    plain = int4.experts.submit(LAYER, x.bfloat16().float(), ids, weights).wait()
    half = int4.experts.submit(LAYER, x.bfloat16(), ids.int(), weights.bfloat16().float()).wait()
    assert half.dtype == torch.bfloat16
    turned = x.bfloat16().float().t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(int4.experts.submit(LAYER, turned, ids.t().contiguous().t(), weights).wait(), plain)
    again = int4.experts.submit(LAYER, x.bfloat16().float(), ids, weights.bfloat16().float()).wait()
    assert torch.equal(half, again.bfloat16())


def test_results_are_the_callers_to_keep(int4: Case) -> None:
    first_question, second_question = (routed(np.random.default_rng(i), 3, int4.store.geometry, 2) for i in (1, 2))
    first = int4.run(*first_question)
    kept = first.copy()
    int4.run(*second_question)
    assert np.array_equal(first, kept)


@pytest.mark.parametrize(
    ("layer", "x", "ids", "weights", "message"),
    [
        (4, (2, 160), [[0], [1]], (2, 1), r"layer: 4 .*\[3, 8\]"),
        (3, (2, 159), [[0], [1]], (2, 1), r"x: expected \(tokens, 160\), got \(2, 159\)"),
        (3, (3, 160), [[0], [1]], (2, 1), r"ids, weights: expected two \(3, k\)"),
        (3, (2, 160), [[0], [1]], (2, 2), r"ids, weights: .*\(2, 2\)"),
        (3, (2, 160), [[0], [6]], (2, 1), r"ids: experts are 0 to 5, -1 is none, got 0 to 6"),
        (3, (2, 160), [[-2], [5]], (2, 1), r"ids: experts are 0 to 5, -1 is none, got -2 to 5"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(int4: Case, layer, x, ids, weights, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        int4.experts.submit(layer, torch.ones(x), torch.tensor(ids), torch.ones(weights))
    int4.run(np.ones((1, 160), np.float32), np.array([[0]]), np.array([[1.0]]))


def test_one_layer_at_a_time(int4: Case) -> None:
    tensors = torch.ones(1, 160), torch.tensor([[0]]), torch.ones(1, 1)
    pending = int4.experts.submit(LAYER, *tensors)
    with pytest.raises(RuntimeError, match="wait for it"):
        int4.experts.submit(LAYER, *tensors)
    pending.wait()
    with pytest.raises(RuntimeError, match="already"):
        pending.wait()


def test_counters(int4: Case) -> None:
    expert = int4.store.geometry.expert_bytes("int4")
    x, weights = np.ones((3, 160), np.float32), np.ones((3, 2))
    int4.run(x, np.array([[0, 1], [1, 0], [5, 1]]), weights)
    one = int4.experts.stats()
    assert (one.layers_run, one.tokens, one.assignments, one.distinct_experts) == (1, 3, 6, 3)
    assert one.bytes_read == 3 * expert
    int4.run(x, np.array([[0, 1], [1, 0], [5, 4]]), weights, layer=8)
    two = int4.experts.stats()
    assert (two.layers_run, two.distinct_experts) == (2, 7)
    assert two.seconds > one.seconds > 0
    assert not int4.experts.wants_hints and int4.experts.paging() is None  # all in memory


def test_choices_are_counted_by_layer_and_expert(int4: Case) -> None:
    """Masked ids, an expert named twice, a refused submit: against np.bincount of the ids."""
    rng, expected = np.random.default_rng(8), np.zeros((2, 6), np.int64)
    for tokens, k, layer in ((5, 2, LAYER), (1, 3, 8), (40, 2, 8), (0, 2, LAYER), (7, 1, LAYER)):
        ids = rng.integers(-1, 6, (tokens, k))
        int4.run(np.ones((tokens, 160), np.float32), ids, np.ones((tokens, k)), layer=layer)
        expected[(LAYER, 8).index(layer)] += np.bincount(ids[ids >= 0], minlength=6)
    with pytest.raises(ValueError, match="got 1 to 6"):
        int4.run(np.ones((1, 160), np.float32), np.array([[1, 6]]), np.ones((1, 2)))
    layers, counts, tokens = int4.experts.choices()
    assert (layers, tokens) == ((LAYER, 8), 12)
    assert counts.dtype == np.int64 and np.array_equal(counts, expected)
    int4.run(np.ones((1, 160), np.float32), np.array([[1]]), np.ones((1, 1)))
    assert np.array_equal(counts, expected), "a copy"


def test_other_workers_take_over(int4: Case) -> None:
    """Bit for bit the same with other threads, near with the other precision; counters and weights stay."""
    question = routed(np.random.default_rng(6), 9, int4.store.geometry, 2)
    before, threads = int4.run(*question), threading.active_count()
    for n, precision in ((1, "a8"), (3, "a8"), (1, "a16")):
        config = PoolConfig(threads=n, precision=precision)  # type: ignore[arg-type]
        int4.experts = int4.experts.with_pool(config, unpinned(n, 1))
        assert int4.experts.n_workers == n and threading.active_count() == threads + n - 2
        after = int4.run(*question)
        if precision == "a8":
            assert np.array_equal(after, before)
        else:
            assert 0 < np.linalg.norm(after - before) / np.linalg.norm(before) < 0.03  # a8's error, and not none
    assert int4.experts.stats().tokens == 4 * 9
    assert int4.experts.choices().counts[0].sum() == 4 * 9 * 2


def test_workers_that_cannot_take_over_change_nothing(int4: Case) -> None:
    question = routed(np.random.default_rng(6), 9, int4.store.geometry, 2)
    before, threads = int4.run(*question), threading.active_count()
    with pytest.raises(ValueError, match=r"threads: .* over 1 memory nodes, .* would use 2"):
        int4.experts.with_pool(PoolConfig(threads=2), unpinned(2, 2))
    missing = [isa for isa in REQUIRED if isa not in available()]
    if missing:
        with pytest.raises(ValueError, match="cannot run on this machine"):
            int4.experts.with_pool(PoolConfig(isa=missing[0]), unpinned(2, 1))  # type: ignore[arg-type]
    assert threading.active_count() == threads
    assert np.array_equal(int4.run(*question), before)
    pending = int4.experts.submit(LAYER, *(torch.from_numpy(np.array(array)) for array in question))
    with pytest.raises(RuntimeError, match="a layer is running"):
        int4.experts.with_pool(PoolConfig(threads=1), unpinned(1, 1))
    assert np.array_equal(pending.wait().numpy(), before)


def test_hints_are_checked(int4: Case) -> None:
    with pytest.raises(ValueError, match="layer: 4"):
        int4.experts.hint(4, torch.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"scores: expected \(tokens, 6\), got \(1, 7\)"):
        int4.experts.hint(LAYER, torch.zeros((1, 7)))
    int4.experts.hint(LAYER, torch.zeros((1, 6)))  # nothing to do


def test_a_tier_that_cannot_run_is_refused() -> None:
    missing = [isa for isa in REQUIRED if isa not in available()]
    if not missing:
        pytest.skip("this processor runs every tier")
    with pytest.raises(ValueError, match="cannot run on this machine"):
        open_experts(memory_store("int4", ExpertGeometry(1, 32, 32)), PoolConfig(isa=missing[0]))  # type: ignore[arg-type]


def test_an_interrupted_wait_can_be_taken_up_again(int4: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the job and its buffers are the workers'."""
    question = routed(np.random.default_rng(3), 5, int4.store.geometry, 2)
    expected = int4.run(*question)
    tensors = [torch.from_numpy(np.array(array)) for array in question]
    pending = int4.experts.submit(LAYER, *tensors)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(int4.experts._pool, "wait", Mock(side_effect=KeyboardInterrupt))
        pending.wait()
    with pytest.raises(RuntimeError, match="a layer is running"):
        int4.experts.submit(LAYER, *tensors)
    assert np.array_equal(pending.wait().numpy(), expected)


def test_ids_must_be_integers(int4: Case) -> None:
    with pytest.raises(ValueError, match=r"ids: expected integers, got torch\.float32"):
        int4.experts.submit(LAYER, torch.ones(1, 160), torch.ones(1, 1), torch.ones(1, 1))


def test_close_ends_the_workers() -> None:
    before = threading.active_count()
    experts = open_experts(memory_store("int4", ExpertGeometry(1, 32, 32)), PoolConfig(threads=3))
    assert threading.active_count() == before + 3
    experts.close()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_on_the_device(int4: Case, dtype: torch.dtype) -> None:
    for tokens in (1, 40, 7):
        x, ids, weights = (
            torch.from_numpy(a) for a in routed(np.random.default_rng(9), tokens, int4.store.geometry, 2)
        )
        host = int4.experts.submit(LAYER, x.to(dtype), ids, weights).wait()
        device = int4.experts.submit(LAYER, x.to("cuda", dtype), ids.cuda(), weights.cuda()).wait()
        assert device.is_cuda
        assert torch.equal(device.cpu(), host)
