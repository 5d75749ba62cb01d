"""Measuring: what is timed is what the profile says, the order of items, resuming, stopping, and the tables."""

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybrid.kv import allocate
from hybrid.narrow import Matrix, Narrow
from offload import bandwidth
from offload.config import PROJECTIONS, ExpertFormat, ExpertGeometry, PoolConfig
from offload.disk import DiskReader, Read
from offload.experts import Experts
from offload.isa import choose
from offload.repeated import LAYER, random_expert, repeated_store
from offload.topology import find_topology
from placement import measure as measuring
from placement import measure_device, measure_kernels, measure_link
from placement.document import Measured
from placement.hardware import Cache, Gpu, Hardware, Node
from placement.measure import Item, items_of, measure, run_items, show_profile
from placement.measure_timing import CannotMeasureError, Effort, Sizes, take_turns
from placement.plan import WeightDtype
from placement.profile import Device, Gemm, Kernel, Link, Memory, Profile, read_profile, write_profile
from tests.reference import experts as reference
from tests.reference.expert_memory import unpinned

CPU = torch.device("cpu")
FORMATS: tuple[ExpertFormat, ...] = ("int4", "int8", "bf16", "fp8")
QUICK = Effort(seconds=0.0, rounds=3, visit=0.0, most=60.0)
TINY = Sizes(
    hidden=128, inner=64, rows=(1, 3), expert_bytes=1, read_bytes=1 << 22, gemm=64, gemm_rows=(1, 4), heads=2,
    decodes=((1, 32), (4, 16)), prompt=(8, 32), layers=(1, 2), batches=(1, 2), vocabulary=1024, copy_bytes=1 << 14,
    copies=8, effort=QUICK,
)  # fmt: skip
HARDWARE = Hardware(
    cpu="EPYC", cores=2, threads_per_core=1, cpu_quota=None, nodes=(Node(0, 2, 1 << 34),),
    caches=(Cache(2, 1 << 9, 2), Cache(3, 1 << 10, 1)), tiers=(choose(),), ram=1 << 34, ram_installed=1 << 34,
    huge_pages="madvise", memlock=None, gpus=(), disk="unknown",
)  # fmt: skip
EMPTY = Profile("box", "measured", "2026-11-22", HARDWARE)


def silent(*told: object) -> None:
    """Nobody listens."""


# --- what is timed


@pytest.mark.parametrize("way", bandwidth.WAYS)
def test_reading_touches_every_byte(way: tuple[int, int]) -> None:
    memory = np.random.default_rng(1).integers(-(2**62), 2**62, 4096 + 8, np.int64)
    begin = -memory.ctypes.data % 64 // 8
    values = memory[begin : begin + 4096]
    streams, ahead = way
    assert bandwidth._read(values.ctypes.data, values.nbytes // streams, streams, ahead) == values.sum()


def test_threads_of_a_node_share_its_memory_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    monkeypatch.setattr(bandwidth, "_read", lambda begin, stretch, streams, ahead: reads.append((begin, stretch)))
    cpu = find_topology(1).places[0].cpu or 0
    ceiling = bandwidth.ReadCeiling([cpu] * 4, 1 << 22, [0, 1, 0, 1])
    reads.clear()
    ceiling._pass(3, 1, 0)
    ceiling.close()
    first, second = sorted(at for at, _ in reads if any(0 < abs(at - other) < 1 << 21 for other, _ in reads))
    assert len(reads) == 3
    assert [size for _, size in reads] == [1 << 20] * 3  # half of a node's half of the memory
    assert second - first == 1 << 20


def test_reading_is_faster_than_nothing_and_slower_than_any_memory() -> None:
    memory = measure_kernels.measure_memory(HARDWARE, find_topology(), TINY, silent)
    assert set(memory.read) >= {1, len(find_topology().places)}
    for rate in (*memory.read.values(), *memory.per_node):
        assert 1e6 < rate.value < 1e14


@pytest.mark.parametrize("n_nodes", (1, 2))
@pytest.mark.parametrize("fmt", FORMATS)
def test_repeated_experts_answer_as_their_weights_do(fmt: ExpertFormat, n_nodes: int) -> None:
    geometry = ExpertGeometry(5, 416, 160)
    made = [random_expert(fmt, geometry, seed) for seed in range(2)]
    dense = {
        p: [reference.dense(fmt, as_bytes(fmt, matrices[p][0]), matrices[p][1]) for matrices in made]
        for p in PROJECTIONS
    }
    store = repeated_store(geometry, fmt, made, (0,) * n_nodes)
    rng = np.random.default_rng(2)
    x, ids = rng.standard_normal((3, 416), np.float32), rng.integers(0, 5, (3, 2))
    weights = rng.random((3, 2), np.float32)
    experts = Experts(store, PoolConfig(threads=2), unpinned(2, n_nodes))
    got = experts.submit(LAYER, *(torch.from_numpy(array) for array in (x, ids, weights))).wait().numpy().copy()
    experts.close()
    expected = reference.experts(reference.Layer(fmt, **dense), x, ids % 2, weights, "a8")
    assert np.linalg.norm(expected) > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def as_bytes(fmt: ExpertFormat, data: np.ndarray) -> np.ndarray:
    return data.view(np.uint8) if fmt == "int4" else data


@pytest.mark.parametrize("fmt", FORMATS)
def test_made_up_weights_are_ordinary_numbers(fmt: ExpertFormat) -> None:
    """Subnormal numbers would halve every figure, and zeros may be quicker than real weights."""
    made = random_expert(fmt, ExpertGeometry(8, 416, 160))
    for data, scales in made.values():
        weights = reference.dense(fmt, as_bytes(fmt, data), scales)
        nonzero = np.abs(weights[weights != 0])
        assert nonzero.size > 0.8 * weights.size
        assert nonzero.min() > np.finfo(np.float32).tiny
        assert 0.5 < np.sqrt((weights**2).mean() * weights.shape[1]) < 2


class FakeExperts:
    """Records what is submitted."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, np.ndarray]] = []

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> "FakeExperts":
        assert x.shape == (len(ids), 96) and weights.shape == ids.shape and float(x.std()) > 0.5
        self.calls.append((layer, ids.numpy()))
        return self

    def wait(self) -> None:
        """Nothing to wait for."""


def test_an_expert_is_an_eighth_of_a_layer_of_exactly_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=8)
    monkeypatch.setattr(measure_kernels, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    experts: Any = FakeExperts()
    seconds = measure_kernels.time_experts(experts, 7, 96, 3, (1, 5), dataclasses.replace(QUICK, longest=9.0))
    assert seconds == {1: Measured(1.0, 1.0, 1.0), 5: Measured(1.0, 1.0, 1.0)}
    assert {layer for layer, _ in experts.calls} == {7}
    assert sorted({len(ids) for _, ids in experts.calls}) == [1, 5]
    sets = []
    for _, ids in experts.calls:
        assert ids.shape[1] == 8 and len(set(ids[0])) == 8
        assert (ids == ids[0]).all()
        sets.append(frozenset(ids[0]))
    assert all(not a & b for a, b in itertools.pairwise(sets))
    assert frozenset().union(*sets) == frozenset(range(24))


def test_experts_exceed_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = dataclasses.replace(HARDWARE, caches=(Cache(2, 1 << 20, 64), Cache(3, 32 << 20, 4)))
    for fmt in FORMATS:
        geometry, sets = measure_kernels._geometry(hardware, fmt, dataclasses.replace(TINY, hidden=2048, inner=1024))
        assert geometry.n_experts == 8 * sets and sets >= 2
        assert geometry.n_experts * geometry.expert_bytes(fmt) >= 4 * 4 * (32 << 20)
    monkeypatch.setattr(measure_kernels, "ram", lambda: (1 << 34, 100_000))
    with pytest.raises(CannotMeasureError, match="eight int4 experts take"):
        measure_kernels._geometry(hardware, "int4", TINY)


def test_kt_is_timed_through_its_own_facade(tmp_path: Path) -> None:
    entry = "from tests.reference.fake_kt import main"
    kernel = measure_kernels.measure_kt(HARDWARE, find_topology(), TINY, tmp_path, entry)
    assert kernel.name == "kt/fake/int4/a8"
    assert set(kernel.seconds) == {1, 3} and all(t.value > 0 for t in kernel.seconds.values())
    assert list(tmp_path.iterdir()) == []


def test_attention_rates_count_the_flop_that_torch_counts() -> None:
    model = measure_device._attention_model(TINY)
    cache = allocate(model, 32, 16, torch.float32, CPU)
    attend = measure_device._Attend(model, cache, CPU, torch.float32)
    for path, rows, new, context, expected in (
        ("absorbed", 3, 1, 64, 3 * measure_device._absorbed_flops(model, 64)),
        ("naive", 1, 16, 64, measure_device._naive_flops(model, 16, 64)),
    ):
        call = attend.call(path, rows, new, context)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == expected


def test_overheads_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = {}

    def engine(out: Path, layers: int, device: torch.device, sizes: Sizes) -> Any:
        made[layers] = SimpleNamespace(layers=layers, closed=False)
        made[layers].close = lambda: setattr(made[layers], "closed", True)
        return made[layers]

    monkeypatch.setattr(measure_device, "_tiny_engine", engine)

    def step_call(engine: Any, batch: int) -> Callable[[], float]:
        calls = itertools.count()
        # Every seventh step is disturbed, and not in step with the other kinds.
        return lambda: (
            0.25 + 0.5 * engine.layers + 0.125 * batch + 99 * (next(calls) % 7 == (batch + engine.layers) % 7)
        )

    monkeypatch.setattr(measure_device, "_step_call", step_call)
    sizes = dataclasses.replace(TINY, batches=(1, 4, 16), effort=dataclasses.replace(QUICK, rounds=20))
    found = measure_device.measure_overheads(CPU, sizes, tmp_path)
    assert [figure.value for figure in found] == pytest.approx([0.25, 0.5, 0.125])
    assert all(0 <= figure.low <= figure.value <= figure.high for figure in found)  # type: ignore[operator]
    assert all(engine.closed for engine in made.values())


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_narrow_products_are_the_engines(dtype: WeightDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[type, torch.dtype]] = set()

    def product(x: torch.Tensor, weight: Matrix) -> None:
        assert isinstance(weight, Narrow)
        seen.add((weight.codes.dtype, x.dtype))

    monkeypatch.setattr(measure_device, "linear", product)
    found = measure_device.measure_gemm(HARDWARE, CPU, dtype, TINY)
    assert found.dtype == dtype and set(found.seconds) == set(TINY.gemm_rows)
    assert seen == {(torch.int8 if dtype == "int8" else torch.float8_e4m3fn, torch.float32)}


def test_products_come_from_more_weights_than_the_caches_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def product(x: torch.Tensor, weight: torch.Tensor) -> None:
        seen.append((len(x), weight.data_ptr()))

    monkeypatch.setattr(measure_device, "linear", product)
    hardware = dataclasses.replace(HARDWARE, caches=(Cache(3, 5 * 4 * 64 * 64, 1),))
    gemm = measure_device.measure_gemm(hardware, CPU, "float32", dataclasses.replace(TINY, gemm_rows=(1, 4, 9)))
    assert set(gemm.seconds) == {1, 4, 9} == {rows for rows, _ in seen}
    places = [place for _, place in seen[:12]]
    assert len(places) == 12 and len(set(places)) == min(12, 4 * 5)  # 20 weights: none comes again this soon


def test_copies_arrive() -> None:
    copies = measure_link.Copies(CPU, TINY)
    copies.pinned.random_(0, 256)
    copies.run(copies.pinned, copies.there)
    assert torch.equal(copies.there, copies.pinned)
    copies.other.random_(0, 256)
    copies.there.zero_()
    copies.both_ways()
    assert torch.equal(copies.there[:4], copies.pinned[:4])
    assert torch.equal(copies.other, copies.pinned[4:])


def test_every_kind_of_copy_is_timed() -> None:
    link = measure_link.measure_link(CPU, find_topology(), TINY)
    for name in Link.__slots__:
        assert getattr(link, name) is not None, name
    assert link.kernels_beside_copies is not None and link.kernels_beside_copies > 0


def test_the_disk_is_read_once_in_any_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    real = DiskReader.read

    def noted(self: DiskReader, at: int, into: memoryview, wanted: int, urgent: bool) -> Read:
        asked.append((at, at + wanted))
        return real(self, at, into, wanted, urgent)

    monkeypatch.setattr(DiskReader, "read", noted)
    rate = measure_link.measure_disk(TINY, tmp_path)
    assert rate.value > 0
    assert sorted(stop for _, stop in asked) == [(i + 1) * TINY.copy_bytes for i in range(TINY.copies)]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("offload.disk._open", lambda path: (os.open(path, os.O_RDONLY), False))
    with pytest.raises(CannotMeasureError, match="RAM disk"):
        measure_link.measure_disk(TINY, tmp_path)


# --- turns


def test_things_take_turns() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], float]:
        return lambda: order.append(name) or seconds  # type: ignore[func-returns-value]

    found = take_turns({"a": call("a", 0.5), "b": call("b", 2.0)}, dataclasses.replace(QUICK, visit=1.0))
    assert found == {"a": [0.5] * 6, "b": [2.0] * 3}  # a visit goes on until a second is over
    assert "".join(order) == "ab" + 3 * "aab"


def test_what_follows_a_slow_call_is_left_out() -> None:
    slow = {n: (lambda n=n: float(n)) for n in (1, 2, 4, 8)}
    effort = dataclasses.replace(QUICK, longest=1.5)
    assert list(take_turns(slow, effort, leaves_out=True)) == [1, 2]
    assert list(take_turns(slow, effort)) == [1, 2, 4, 8]


# --- items


def item(name: str, seconds: float = 0.0, clock: list[float] | None = None) -> Item:
    def run(profile: Profile) -> Profile:
        if clock is not None:
            clock[0] += seconds
        return dataclasses.replace(profile, notes=(*profile.notes, name))

    return Item(name, lambda profile: name in profile.notes, run)


def test_items_run_in_order_and_are_saved_at_once() -> None:
    saved: list[tuple[str, ...]] = []
    shown: list[tuple[str, int, int]] = []
    run_items([item("a"), item("b")], EMPTY, 60, lambda p: saved.append(p.notes), lambda *s: shown.append(s), silent)
    assert saved == [("a",), ("a", "b")]
    assert shown == [("a", 0, 2), ("b", 1, 2), ("done", 2, 2)]


def test_what_is_known_is_not_measured_again() -> None:
    shown: list[str] = []
    known = dataclasses.replace(EMPTY, notes=("a",))
    run_items([item("a"), item("b")], known, 60, silent, lambda *s: shown.append(s[0]), silent)
    assert shown == ["b", "done"]


def test_time_ends_before_an_item_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = [0.0], []
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    items = [item(name, 6, clock) for name in "abcd"]
    profile = run_items(items, EMPTY, 10, silent, silent, told.append)
    assert profile.notes == ("a", "b")
    assert told[-1] == "10 s are over; left out: c, d. Run it again to go on"
    assert run_items(items, profile, 10, silent, silent, told.append).notes == ("a", "b", "c", "d")


def test_an_interrupted_run_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupt(profile: Profile) -> Profile:
        raise KeyboardInterrupt

    file = tmp_path / "profile.yaml"
    items = [item("a"), Item("b", lambda profile: False, interrupt), item("c")]
    with pytest.raises(KeyboardInterrupt):
        run_items(items, EMPTY, 60, lambda profile: write_profile(file, profile), silent, silent)
    assert read_profile(file).notes == ("a",)


def test_what_cannot_be_measured_is_told_and_the_rest_goes_on() -> None:
    def refuse(profile: Profile) -> Profile:
        raise CannotMeasureError("no such thing here")

    told: list[str] = []
    items = [Item("a", lambda profile: False, refuse), item("b")]
    assert run_items(items, EMPTY, 60, silent, silent, told.append).notes == ("b",)
    assert "a: not measured: no such thing here" in told


def test_what_serve_needs_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "installed", lambda: True)
    hardware = dataclasses.replace(HARDWARE, tiers=("amx", "avx512", "avx2", "portable"))
    monkeypatch.setattr(measuring, "choose", lambda: "avx512")
    titles = [item.title for item in items_of(hardware, CPU, TINY, tmp_path, silent)]
    assert titles[:5] == [
        "experts numba/avx512/int4/a8", "reading RAM", "products in float32, attention, overheads", "kt-kernel",
        "experts numba/avx512/int8/a8",
    ]  # fmt: skip
    tiers = [title.split("/")[1] for title in titles if title.startswith("experts ")]
    assert [tier for tier, _ in itertools.groupby(tiers)] == ["avx512", "amx", "avx2", "portable"]
    assert len(set(titles)) == len(titles)
    on_cuda = [item.title for item in items_of(hardware, torch.device("cuda"), TINY, tmp_path, silent)]
    assert on_cuda[2:5] == [
        "products in bfloat16, attention, overheads", "copies to and from the device", "products in float32",
    ]  # fmt: skip


def test_a_whole_run_fills_a_profile_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LATER", (("bf16", "a8"),))
    monkeypatch.setattr(measuring, "installed", lambda: False)
    file, told = tmp_path / "profile.yaml", []
    run = [HARDWARE, None, 600, lambda p: write_profile(file, p), silent, told.append, "cpu", tmp_path]
    profile: Profile = measure(*run, sizes=TINY)  # type: ignore[arg-type]
    assert not any("not measured" in line for line in told)
    assert [kernel.name.split("/")[2:] for kernel in profile.kernels] == [
        ["int4", "a8"],
        ["bf16", "a8"],
        ["bf16", "a16"],
    ]
    assert profile.device is not None and profile.disk_read is not None and profile.link is None
    assert [gemm.dtype for gemm in profile.device.gemms] == ["float32", "bfloat16"]
    known = read_profile(file)
    assert known.device is not None and known.device.per_layer.value == pytest.approx(
        profile.device.per_layer.value, rel=1e-3
    )
    stages: list[str] = []
    run[1], run[4] = known, lambda *s: stages.append(s[0])
    assert measure(*run, sizes=TINY).kernels == known.kernels  # type: ignore[arg-type]
    assert stages == ["done"]


def test_other_work_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    monkeypatch.setattr(measuring, "items_of", lambda *given: ())
    for busy in (60.0, 5.0):
        monkeypatch.setattr(measuring.psutil, "cpu_percent", lambda seconds, busy=busy: busy)
        measure(HARDWARE, None, 1, silent, silent, told.append, "cpu", tmp_path)
    assert told == ["other programs use 60 % of the processor now: the figures will be too slow"]


def test_a_profile_of_another_device_keeps_what_is_not_the_devices() -> None:
    known = dataclasses.replace(show(), hardware=HARDWARE)
    profile = measuring.start(HARDWARE, known, "cpu")
    assert profile.device is None and profile.link is None
    assert profile.kernels == known.kernels and profile.memory == known.memory
    assert measuring.start(HARDWARE, known, "cuda").device == known.device


def test_a_missing_gpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(measuring.MeasureError, match="--device cuda"):
        measure(HARDWARE, None, 1, silent, silent, silent, "cuda", tmp_path)


# --- tables


def show() -> Profile:
    """Round numbers: 100 GB/s of RAM, PCIe 4 x 16."""
    figure = Measured(0.5e-3, 0.45e-3, 0.6e-3)
    kernel = {1: Measured(24_772_608 / 80e9), 64: Measured(6 * 7168 * 2048 * 64 / 2e12)}
    gemm = {1: Measured(2 * 4096**2 / 2e12), 2048: Measured(2 * 4096**2 * 2048 / 4e14)}
    return Profile(
        name="box", source="measured", measured="2026-11-22",
        hardware=dataclasses.replace(HARDWARE, gpus=(Gpu("H100", 80 << 30, "9.0", 4, 16),)),
        memory=Memory({1: Measured(25e9), 8: Measured(100e9, 90e9, 101e9)}, (Measured(50e9), Measured(49e9))),
        kernels=(Kernel("numba/avx2/int4/a8", 7168, 2048, kernel),),
        device=Device(
            kind="cuda", name="H100",
            gemms=(Gemm("bfloat16", 4096, gemm),),
            kv_read=Measured(1e12), attention_decode=Measured(1e14), attention_prefill=Measured(2e14),
            per_step=figure, per_layer=figure, per_row=figure, per_logit=Measured(1e-9),
        ),
        link=Link(Measured(25e9), Measured(24e9), Measured(40e9), kernels_beside_copies=1.25),
    )  # fmt: skip


def test_tables_show_figures_with_their_share_of_the_ceiling() -> None:
    text = show_profile(show())
    for expected in (
        "25 GB/s, 25% of the best",
        "100 GB/s (-10% +1%), 100% of the best",
        "1 row: 80 GB/s, 80% of reading RAM; 64 rows: 2 TFLOP/s",
        "1 row: 2 TB/s; 2048 rows: 400 TFLOP/s",
        "100 TFLOP/s, 25% of the best product",
        "500 us (-10% +20%)",
        "25 GB/s, 79% of the bus's 31.5 GB/s",
        "40 GB/s, 63% of the bus's 63.01 GB/s",
        "1.25 times their time alone",
        "not measured: the disk",
    ):
        assert expected in text, expected
    assert max(len(line) for line in text.splitlines()) <= 120


def test_an_empty_profile_names_all_that_is_missing() -> None:
    assert show_profile(EMPTY).endswith("not measured: reading RAM, routed experts, the device, the disk")
