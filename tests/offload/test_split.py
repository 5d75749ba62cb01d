"""Experts divided between CPU and device against the CPU alone, uploads and evictions going on between the steps."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.config import ExpertFormat, ExpertGeometry, PoolConfig
from offload.copies import PlainCopies, PlainEvent
from offload.device_product import DeviceProduct
from offload.experts import Experts
from offload.slots import EMPTY, MISS, Move, Rules
from offload.split import FEW_TOKENS, SplitExperts
from offload.stopwatch import PlainStopwatch
from offload.uploads import Upload, Uploads
from offload.vram import VramSlots
from tests.reference.expert_memory import MemoryStore, memory_store, paged, unpinned

GEOMETRY = ExpertGeometry(10, 96, 64)
LAYERS = (1, 4, 5)
SLOTS = (3, 0, 5)
EAGER = Rules(horizon=4, tax=0, margin=0, dwell=0, uploads=4)
CPU = torch.device("cpu")


class LaggingCopies(PlainCopies):
    """Copies that are made when the test says so, and a record of who may read or write which slot when."""

    def __init__(self) -> None:
        self.slots: torch.Tensor | None = None
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.begun = self.made = 0
        self.now = 0  # position in the device's work
        self.last_read: dict[int, int] = {}  # by slot
        self.after = 0
        self.races: list[int] = []  # slots that were written while they might be read

    def memory(self, n: int, n_bytes: int) -> torch.Tensor:
        self.slots = super().memory(n, n_bytes)
        return self.slots

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        slot = self.slot_of(target)
        if self.last_read.get(slot, -1) >= self.after:
            self.races.append(slot)
        self.waiting.append((target, source.clone()))
        self.begun += 1

    def copied(self) -> "Lagging":
        return Lagging(self, self.begun)

    def computed(self) -> int:
        return self.now

    def copy_after(self, event: object) -> None:
        assert isinstance(event, int)
        self.after = max(self.after, event)

    def host_after(self, event: object) -> None:
        assert isinstance(event, Lagging)
        self.make(event.number - self.made)

    def make(self, n: int) -> None:
        """The next n copies."""
        for target, source in self.waiting[:n]:
            target.copy_(source)
        self.made += len(self.waiting[:n])
        del self.waiting[:n]

    def read(self, slot: int) -> None:
        self.last_read[slot] = self.now
        self.now += 1

    def slot_of(self, data: torch.Tensor) -> int:
        assert self.slots is not None
        return (data.data_ptr() - self.slots.data_ptr()) // self.slots.stride(0)


class Lagging:
    def __init__(self, copies: LaggingCopies, number: int) -> None:
        self.copies, self.number = copies, number

    def query(self) -> bool:
        return self.copies.made >= self.number


class WatchedProduct(DeviceProduct):
    copies: LaggingCopies

    def add(
        self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, shares: torch.Tensor, data: torch.Tensor
    ) -> None:
        self.copies.read(self.copies.slot_of(data))
        super().add(out, x, rows, shares, data)

    def add_few(
        self, out: torch.Tensor, x: torch.Tensor, shares: torch.Tensor, memory: torch.Tensor, places: torch.Tensor
    ) -> None:
        for slot in places.tolist():
            self.copies.read(slot)
        super().add_few(out, x, shares, memory, places)


class Case:
    """A split and the CPU alone on the same experts."""

    def __init__(self, store: MemoryStore, alone: MemoryStore, copies: PlainCopies, seed: int = 0) -> None:
        topology = unpinned(1, store.n_nodes)
        config = PoolConfig(1, "a16")
        self.alone = Experts(alone, config, topology)  # type: ignore[arg-type]
        host = Experts(store, config, topology)  # type: ignore[arg-type]
        uploads = Uploads(copies, store.geometry.expert_bytes(store.format), staged=False)
        self.vram = VramSlots(store, SLOTS, copies, uploads, pytest.fail, EAGER)  # type: ignore[arg-type]
        product = WatchedProduct if isinstance(copies, LaggingCopies) else DeviceProduct
        made = product(store.geometry, store.format, torch.float32, CPU)
        if isinstance(copies, LaggingCopies) and isinstance(made, WatchedProduct):
            made.copies = copies
        self.split = SplitExperts(host, self.vram, made, PlainStopwatch())
        self.rng = np.random.default_rng(seed)
        self.favourites = [self.rng.permutation(GEOMETRY.n_experts) for _ in LAYERS]

    def step(self, tokens: int, teaches: bool = True) -> float:
        """All layers; the largest error as a share of the largest value."""
        self.split.begin()
        error = max(self.layer(layer, tokens) for layer in LAYERS)
        self.split.end(teaches)
        self.split.check()
        return error

    def layer(self, layer: int, tokens: int) -> float:
        rng, favourites = self.rng, self.favourites[LAYERS.index(layer)]
        ranks = np.array([rng.choice(len(favourites), 3, replace=False, p=SKEW) for _ in range(tokens)])
        ids = favourites[ranks]
        ids[rng.random(ids.shape) < 0.1] = -1
        if rng.random() < 0.1:  # taste changes
            rng.shuffle(favourites)
        x = torch.from_numpy(rng.standard_normal((tokens, GEOMETRY.hidden)).astype(np.float32))
        weights = torch.from_numpy(rng.uniform(0.1, 1, ids.shape).astype(np.float32))
        question = layer, x, torch.from_numpy(ids), weights
        expected, found = (experts.submit(*question).wait() for experts in (self.alone, self.split))
        return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))

    def close(self) -> None:
        self.alone.close()
        self.split.close()


SKEW = 0.6 ** np.arange(GEOMETRY.n_experts)
SKEW /= SKEW.sum()
SAME = 1e-3  # a16 rounds h to 16 bits for the CPU and not for the device


@pytest.fixture
def lagging() -> Iterator[tuple[Case, LaggingCopies]]:
    copies = LaggingCopies()
    store = memory_store("int8", GEOMETRY, LAYERS)
    case = Case(store, store, copies)
    yield case, copies
    case.close()


@pytest.mark.parametrize(("fmt", "n_nodes"), [("int4", 1), ("int8", 2), ("bf16", 1), ("fp8", 2)])
def test_the_sum_is_that_of_the_cpu_alone(fmt: ExpertFormat, n_nodes: int) -> None:
    store = memory_store(fmt, GEOMETRY, LAYERS, n_nodes=n_nodes)
    case = Case(store, store, PlainCopies())
    for _ in range(60):
        tokens = int(case.rng.choice([1, 2, 5, FEW_TOKENS, FEW_TOKENS + 7]))
        assert case.step(tokens, teaches=bool(case.rng.random() < 0.9)) < SAME
    stats = case.split.vram()
    assert stats.hits > 100
    assert stats.misses > 100
    assert stats.uploads > 20
    assert 0 < stats.used <= stats.uploads
    assert stats.bytes == stats.uploads * GEOMETRY.expert_bytes(fmt)
    ours, alone = case.split.choices(), case.alone.choices()
    assert np.array_equal(ours.counts, alone.counts)
    assert ours.tokens == alone.tokens
    assert case.split.stats().bytes_read < case.alone.stats().bytes_read
    case.split = case.split.with_pool(PoolConfig(2, "a16"), unpinned(2, n_nodes))
    assert case.step(3) < SAME
    case.close()


def test_uploads_that_take_their_time_change_nothing(lagging: tuple[Case, LaggingCopies]) -> None:
    case, copies = lagging
    for _ in range(80):
        assert case.step(int(case.rng.integers(1, 6))) < SAME
        copies.make(int(case.rng.integers(0, 5)))
    assert copies.races == []
    assert case.split.vram().uploads > 10
    assert case.split.vram().skipped > 0  # slots whose upload was still under way


def test_a_slot_overwritten_before_its_last_reader_ended_is_noticed(
    lagging: tuple[Case, LaggingCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, copies = lagging
    monkeypatch.setattr(LaggingCopies, "copy_after", lambda self, event: None)
    for _ in range(80):
        case.step(3)
        copies.make(5)
    assert copies.races


def test_a_slot_read_before_its_upload_is_over_gives_other_numbers(
    lagging: tuple[Case, LaggingCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _ = lagging
    monkeypatch.setattr(Upload, "over", property(lambda upload: True))
    assert max(case.step(3) for _ in range(20)) > 10 * SAME


def test_nothing_changes_within_a_step(lagging: tuple[Case, LaggingCopies]) -> None:
    case, copies = lagging
    while case.vram.table.held(0)[0] == EMPTY:
        case.step(4)
        copies.make(100)
    case.split.begin()
    table = case.vram.table.where.copy()
    held = int(case.vram.table.held(0)[0])
    spare = int(np.flatnonzero(table[0] == MISS)[0])
    with pytest.raises(RuntimeError, match="within a step"):
        case.vram._upload([Move(0, 0, held, spare)], 0)
    assert np.array_equal(case.vram.table.where, table)
    case.split.end(False)


def test_ids_that_are_no_experts_are_refused_as_ever(lagging: tuple[Case, LaggingCopies]) -> None:
    case, _ = lagging
    x, weights = torch.zeros((1, GEOMETRY.hidden)), torch.ones((1, 1))
    for wrong in (-2, GEOMETRY.n_experts):
        with pytest.raises(ValueError, match="ids: experts are 0 to 9"):
            case.split.submit(LAYERS[0], x, torch.tensor([[wrong]]), weights)
    with pytest.raises(ValueError, match="layer: 2 has no routed experts"):
        case.split.submit(2, x, torch.tensor([[1]]), weights)


def test_experts_on_the_disk_are_uploaded_from_ram_or_not_at_all(tmp_path: Path) -> None:
    """The pager's slots hold a part of the experts; one that is being uploaded keeps its place meanwhile."""
    store, copies = memory_store("int8", GEOMETRY, LAYERS), LaggingCopies()
    behind = paged(store, tmp_path / "packed", 24)
    case = Case(behind, store, copies)
    assert behind.pager is not None
    most = 0
    for _ in range(80):
        assert case.step(int(case.rng.integers(1, 4))) < SAME
        most = max(most, len(case.vram._under_way))
        copies.make(int(case.rng.integers(0, 5)))
        behind.pager.check()
    stats = case.split.vram()
    assert stats.uploads > 10
    assert stats.hits > 50
    assert 0 < most <= 2  # a twelfth of the pager's slots
    case.close()


def test_the_pager_lends_only_what_is_there(tmp_path: Path) -> None:
    behind = paged(memory_store("int8", GEOMETRY, LAYERS), tmp_path / "packed", 24)
    pager = behind.pager
    assert pager is not None
    assert not pager.hold(0, 3)
    pager.start(0, np.array([3, 4]))
    assert not pager.hold(0, 3)  # on its way
    list(pager.parts())
    pager.finish()
    assert pager.hold(0, 3)
    assert pager.hold(0, 4)
    for _ in range(3):
        for layer in (1, 2):  # 20 experts that push out whatever may go
            pager.start(layer, np.arange(10))
            list(pager.parts())
            pager.finish()
    assert behind.addresses[0, 3].all()
    pager.release(0, 3)
    pager.release(0, 4)
    pager.close()


def test_a_thread_brings_bytes_through_pinned_memory() -> None:
    uploads = Uploads(PlainCopies(), 64, staged=True)
    target = torch.zeros((5, 64), dtype=torch.uint8)
    parts = [[torch.full((40,), i, dtype=torch.uint8), torch.full((24,), i + 100, dtype=torch.uint8)] for i in range(5)]
    begun = [uploads.begin(some, row, PlainEvent("step")) for some, row in zip(parts, target, strict=True)]
    wrong = uploads.begin(parts[0][:1], target[0], None)
    uploads.close()
    assert all(upload.over for upload in begun)
    assert torch.equal(target, torch.stack([torch.cat(some) for some in parts]))
    with pytest.raises(RuntimeError, match="upload to the device failed"):
        _ = wrong.over


def test_slots_that_do_not_fit_the_model_are_refused() -> None:
    store = memory_store("int8", GEOMETRY, LAYERS)
    for slots in ((1, 2), (1, 2, 11)):
        with pytest.raises(ValueError, match="vram_slots: expected a number from 0 to 10 for each of 3 MoE layers"):
            VramSlots(store, slots, PlainCopies(), Uploads(PlainCopies(), 64, staged=False), print)  # type: ignore[arg-type]
