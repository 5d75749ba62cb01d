"""The kt-kernel backend: the protocol and every way to fail with fake children, the numbers where it is installed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from offload import backends, kt
from offload.checkpoint import Checkpoint, CheckpointError
from offload.child import Child
from offload.config import PROJECTIONS, ExpertGeometry, PoolConfig, Projection
from offload.formats import quantise_int4
from offload.kt import KtExperts, Published, installed, refusal
from offload.pool import PoolError
from offload.topology import Place, Topology, find_topology
from tests.reference import experts as reference

GEOMETRY = ExpertGeometry(n_experts=5, hidden=128, inner=64)
LAYERS = (2, 5)
K = 3
ROWS = 8  # most tokens of one request here
TWO = Topology((0,), (Place(None, 0), Place(None, 0)))
FAKE = "from tests.reference.fake_kt import main"
needs_kt = pytest.mark.skipif(not installed(), reason=f"kt-kernel is not installed: {kt.INSTALL}")


def prefix(layer: int, expert: int, projection: Projection) -> str:
    return f"layers.{layer}.experts.{expert}.{projection}_proj"


def silent(stage: str, done: int, total: int) -> None:
    pass


def written(directory: Path, geometry: ExpertGeometry, layers: tuple[int, ...]) -> dict[int, reference.Layer]:
    """A checkpoint of random int4 experts; returns the dense weights by layer."""
    rng = np.random.default_rng(0)
    tensors: dict[str, torch.Tensor] = {}
    dense: dict[int, reference.Layer] = {}
    for layer in layers:
        held: dict[str, list[np.ndarray]] = {projection: [] for projection in PROJECTIONS}
        for expert in range(geometry.n_experts):
            for projection in PROJECTIONS:
                shape = geometry.shape(projection)
                weights = (rng.standard_normal(shape) * 1.5 / np.sqrt(shape[1])).astype(np.float32)
                packed, scales = quantise_int4(weights)
                name = prefix(layer, expert, projection)
                tensors[f"{name}.weight_packed"] = torch.from_numpy(packed)
                tensors[f"{name}.weight_scale"] = torch.from_numpy(scales).view(torch.bfloat16)
                held[projection].append(reference.weights_int4(packed.view(np.uint8), scales))
        dense[layer] = reference.Layer("bf16", **held)  # activations are not quantised to int8
    save_file(tensors, directory / "model.safetensors")
    return dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4")
    written(directory, GEOMETRY, LAYERS)
    return directory


@pytest.fixture
def published(folder: Path) -> Iterator[Published]:
    checkpoint = Checkpoint(folder)
    yield Published(checkpoint, prefix, GEOMETRY, LAYERS, K)
    checkpoint.close()


@pytest.fixture
def fake(published: Published) -> Iterator[KtExperts]:
    experts = KtExperts(published, TWO, silent, rows=ROWS, entry=FAKE)
    yield experts
    experts.close()


def routed(tokens: int, geometry: ExpertGeometry = GEOMETRY, k: int = K) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn((tokens, geometry.hidden), generator=generator)
    scores = torch.rand((tokens, geometry.n_experts), generator=generator)
    return x, scores.topk(k, -1).indices, torch.rand((tokens, k), generator=generator)


def faked(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
    factor = (weights.float() * (1 + ids + 10 * LAYERS.index(layer))).sum(1, keepdim=True)
    return (x.bfloat16().float() * factor).bfloat16()


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 43])
def test_any_number_of_tokens_goes_through(fake: KtExperts, tokens: int) -> None:
    for layer in LAYERS:
        question = routed(tokens)
        got = fake.submit(layer, *question).wait()
        assert got.dtype == torch.float32 and got.shape == (tokens, GEOMETRY.hidden)
        torch.testing.assert_close(got, faked(*question, layer).float(), rtol=0.01, atol=0)


def test_types_and_fewer_experts_for_a_token(fake: KtExperts) -> None:
    x, ids, weights = routed(5)
    got = fake.submit(2, x.bfloat16(), ids[:, :2].int(), weights[:, :2].bfloat16()).wait()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, faked(x, ids[:, :2], weights[:, :2].bfloat16(), 2), rtol=0.01, atol=0)
    none = fake.submit(2, x, ids[:, :0], weights[:, :0]).wait()
    assert torch.equal(none, torch.zeros_like(x))


def test_counters(fake: KtExperts) -> None:
    x = torch.ones(4, GEOMETRY.hidden)
    ids = torch.tensor([[0, 1, 2], [0, 1, 2], [2, 1, 0], [0, 4, 2]])
    for layer in LAYERS:
        fake.submit(layer, x, ids, torch.ones(4, K)).wait()
    stats = fake.stats()
    assert (stats.layers_run, stats.tokens, stats.assignments, stats.distinct_experts) == (2, 8, 24, 8)
    assert stats.bytes_read == 8 * 3 * 128 * 64 * 20 // 32  # 16 bytes and a float32 for 32 weights
    assert stats.seconds > 0
    fake.hint(2, ids)
    assert not fake.wants_hints and fake.stats() == stats
    assert fake.n_workers == 2 and fake.isa == "fake"
    layers, counts, tokens = fake.choices()
    assert (layers, tokens) == (LAYERS, 4)
    assert np.array_equal(counts, [np.bincount(ids.numpy().ravel(), minlength=5)] * 2)


def test_what_a_caller_does_wrong(fake: KtExperts) -> None:
    x, ids, weights = routed(3)
    for question, words in (
        ((3, x, ids, weights), "layer: 3 has no routed experts here"),
        ((2, x[:, :64], ids, weights), r"x: expected \(tokens, 128\)"),
        ((2, x, ids[:2], weights), "ids, weights: expected two"),
        ((2, x, torch.zeros(3, K + 1), torch.zeros(3, K + 1)), "at most 3"),
        ((2, x, ids + 4, weights), "ids: experts are 0 to 4"),
        ((2, x, ids - 5, weights), "ids: experts are 0 to 4"),
        ((2, x, ids[:, [0, 1, 0]], weights), "cannot run an expert twice for one token"),
    ):
        with pytest.raises(ValueError, match=words):
            fake.submit(*question)
    pending = fake.submit(2, x, ids, weights)
    with pytest.raises(RuntimeError, match="a layer is running"):
        fake.submit(2, x, ids, weights)
    pending.wait()
    with pytest.raises(RuntimeError, match="waited for already"):
        pending.wait()


def test_loading_tells_its_progress(published: Published) -> None:
    calls: list[tuple[str, int, int]] = []
    KtExperts(published, TWO, lambda *call: calls.append(call), entry=FAKE).close()
    half, total = published.n_bytes // 2, published.n_bytes
    assert [call[1:] for call in calls] == [(0, total), (half, total), (total, total)]


def test_a_child_that_dies_between_layers(fake: KtExperts) -> None:
    question = routed(2)
    fake.submit(2, *question).wait()
    os.kill(fake._child.pid, signal.SIGSEGV)
    for _ in range(2):
        with pytest.raises(PoolError, match="the kt-kernel process ended with SIGSEGV"):
            fake.submit(2, *question).wait()
    fake.close()


def failing(stop: str) -> Child:
    entry = f"from tests.reference.fake_kt import serve_until\ndef main(line, memory): serve_until(line, {stop!r})"
    child = Child("kt-kernel", entry, {}, 4096)
    assert child.answer(60) == b"ready"
    child.ask(bytes(12))
    assert child.answer(60) == b"."
    child.ask(bytes(12))
    return child


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ("crash", "^the kt-kernel process ended with SIGABRT: free.*: invalid pointer$"),
        ("raise", "^the kt-kernel process ended with status 1: RuntimeError: group size 48$"),
        ("hang", "^the kt-kernel process did not answer for 1 s and was ended$"),
    ],
)
def test_a_child_that_fails_is_one_line(stop: str, words: str) -> None:
    child = failing(stop)
    for _ in range(2):
        with pytest.raises(PoolError, match=words):
            child.answer(1 if stop == "hang" else 60)
    with pytest.raises(PoolError, match=words):
        child.ask(bytes(12))
    child.close()
    assert not psutil.pid_exists(child.pid)


def test_a_child_that_cannot_start() -> None:
    child = Child("kt-kernel", "from offload.nowhere import main", {"big": "x" * 10}, 4096)
    with pytest.raises(
        PoolError, match=r"ended with status 1: ModuleNotFoundError: No module named 'offload\.nowhere'"
    ):
        child.answer(60)
    with pytest.raises(PoolError, match="ModuleNotFoundError"):  # it is gone while the setup is still being written
        Child("kt-kernel", "from offload.nowhere import main", {"big": "x" * 10_000_000}, 4096)


def test_a_closed_one_says_so(fake: KtExperts) -> None:
    pid = fake._child.pid
    began = time.monotonic()
    fake.close()
    fake.close()
    assert time.monotonic() - began < 5 and not psutil.pid_exists(pid)
    with pytest.raises(PoolError, match="the kt-kernel process is closed"):
        fake.submit(2, *routed(1))


def test_the_child_ends_with_its_parent_even_in_native_code() -> None:
    """The parent is killed, the child holds the interpreter lock: only the system can end it."""
    code = (
        f"import sys, time; sys.path[:] = {sys.path!r}\n"
        "from offload.child import Child\n"
        "entry = 'from tests.reference.fake_kt import hold_the_lock\\n'\n"
        "entry += 'def main(line, memory): hold_the_lock(line)'\n"
        "child = Child('kt-kernel', entry, {}, 4096)\n"
        "assert child.answer(60) == b'ready'\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)  # into the native call
        parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone and not alive


def test_refusals(published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PoolConfig(threads=1)
    assert refusal(published, "native") is None and refusal(published, "int4") is None
    assert "--expert-format int8" in (refusal(published, "int8") or "")
    odd = replace(published, geometry=ExpertGeometry(5, 128, 96))
    assert "multiples of 64, and hidden_size is 128, moe_intermediate_size 96" in (refusal(odd, "native") or "")
    huge = replace(published, geometry=ExpertGeometry(10**9, 128, 64))
    assert "GB of RAM, and" in (refusal(huge, "native") or "")
    save_file(
        {f"{prefix(layer, 0, 'gate')}.weight": torch.zeros(1) for layer in LAYERS}, tmp_path / "model.safetensors"
    )
    others = replace(published, checkpoint=Checkpoint(tmp_path))
    assert "published int4 experts only" in (refusal(others, "native") or "")

    monkeypatch.setattr(backends, "installed", lambda: False)
    with pytest.raises(ValueError, match=r"^--experts kt needs kt-kernel: pip install --no-deps kt-kernel==0\.7\.2$"):
        backends.choose("kt", published, "native", pool, TWO)
    assert backends.choose("numba", published, "native", pool, TWO) == ("numba", "")
    backend, line = backends.choose("auto", published, "native", pool, TWO)
    assert backend == "numba" and line.endswith("kt-kernel is not installed")
    monkeypatch.setattr(backends, "installed", lambda: True)
    assert backends.choose("kt", published, "native", pool, TWO) == ("kt", "")
    with pytest.raises(ValueError, match=r"^--experts kt: it runs the experts as published.*use --experts numba$"):
        backends.choose("kt", published, "int8", pool, TWO)
    backend, line = backends.choose("auto", published, "int8", pool, TWO)
    assert backend == "numba" and "--expert-format int8" in line


def test_auto_takes_the_faster_one_at_batch_one(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed", lambda: True)
    for kt_ms, chosen in ((1.0, "kt"), (3.0, "numba")):
        times = ("numba", {1: 2e-3, 8: 9e-3}), ("kt (AVX2)", {1: kt_ms * 1e-3, 8: 1e-2})
        monkeypatch.setattr(backends, "try_both", lambda *a, times=times: times)
        backend, line = backends.choose("auto", published, "native", PoolConfig(threads=1), TWO)
        assert backend == chosen
        assert line.endswith(f"{chosen} is used; ms for a layer's batch of 1 and 8: numba 2.00 and 9.00, "
                             f"kt (AVX2) {kt_ms:.2f} and 10.00")  # fmt: skip

    def broken(*given: object) -> None:
        raise PoolError("the kt-kernel process ended with SIGILL")

    monkeypatch.setattr(backends, "try_both", broken)
    backend, line = backends.choose("auto", published, "native", PoolConfig(threads=1), TWO)
    assert backend == "numba" and line.endswith("SIGILL")


def test_the_clock_asks_both_batches(fake: KtExperts, published: Published) -> None:
    times = backends.time_batches(fake, published)
    assert set(times) == {1, 8} and all(0 < seconds < 60 for seconds in times.values())


def test_a_checkpoint_that_does_not_fit(published: Published) -> None:
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight_packed: expected I32 \[128, 16\] .* found I32 \[64, 16\]"
    ):
        KtExperts(replace(published, geometry=ExpertGeometry(5, 128, 128)), TWO, silent, entry=FAKE)
    with pytest.raises(CheckpointError, match=r"experts\.5\.gate_proj\.weight_packed is missing"):
        KtExperts(replace(published, geometry=ExpertGeometry(6, 128, 64)), TWO, silent, entry=FAKE)


@needs_kt
def test_kt_agrees_with_the_reference(tmp_path: Path) -> None:
    """bf16 x, products and sums of bf16 outputs give 0.4 %; the AVX-512 kernels quantise x to int8: about 1.2 %."""
    geometry = ExpertGeometry(6, 256, 128)
    dense = written(tmp_path, geometry, LAYERS)
    published = Published(Checkpoint(tmp_path), prefix, geometry, LAYERS, K)
    experts = KtExperts(published, find_topology(), silent, rows=16)
    limit = 0.006 if experts.isa == "AVX2RawInt4_MOE" else 0.02
    for tokens in (1, 5, 16, 17, 40):
        for layer in LAYERS:
            x, ids, weights = routed(tokens, geometry)
            got = experts.submit(layer, x, ids, weights).wait()
            exact = reference.experts(dense[layer], x.bfloat16().float().numpy(), ids.numpy(), weights.numpy(), "a16")
            assert np.linalg.norm(got.numpy() - exact) <= limit * np.linalg.norm(exact)
    experts.close()


@needs_kt
def test_auto_tries_both(tmp_path: Path) -> None:
    geometry = ExpertGeometry(6, 256, 128)
    written(tmp_path, geometry, LAYERS)
    published = Published(Checkpoint(tmp_path), prefix, geometry, LAYERS, K)
    backend, line = backends.choose("auto", published, "native", PoolConfig(threads=1), find_topology(1))
    assert backend in ("numba", "kt") and "kt (A" in line
