"""The packed file: written once, resumed after a kill, and used only for the very shards it was made from."""

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offload import packed, store
from offload.checkpoint import Checkpoint, CheckpointError
from offload.config import MATRICES
from offload.sources import Target
from offload.store import ExpertStore, open_store, pack_store
from tests.reference.expert_files import (
    GEOMETRY,
    LAYERS,
    Tensors,
    check_bytes,
    expert_tensors,
    prefix,
    save,
    silent,
)

MANY = tuple(range(6))  # layers of the runs that are cut off
# Packs, and says after every expert how far it is; waits to be killed after `argv[2]` of them.
CUT_OFF = """
import sys, time
from pathlib import Path
from offload.checkpoint import Checkpoint
from offload.config import ExpertGeometry
from offload.store import pack_store
geometry = ExpertGeometry(n_experts=3, hidden=192, inner=160)
each = geometry.expert_bytes(sys.argv[3])
def prefix(layer, expert, projection):
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
def progress(stage, done, total):
    print(done // each, flush=True)
    if done // each == int(sys.argv[2]):
        time.sleep(600)
pack_store(Checkpoint(Path(sys.argv[1])), prefix, geometry, range(6), sys.argv[4], progress)
"""


def pack(checkpoint: Checkpoint, target: Target = "native", layers: tuple[int, ...] = LAYERS) -> tuple[Path, list[str]]:
    return pack_store(checkpoint, prefix, GEOMETRY, layers, target, silent)


def reopen(checkpoint: Checkpoint, target: Target = "native", nodes: tuple[int, ...] = (0,)) -> ExpertStore:
    return open_store(checkpoint, prefix, GEOMETRY, LAYERS, target, silent, nodes)


@pytest.fixture
def int4(tmp_path: Path) -> tuple[Tensors, Checkpoint, Path]:
    tensors = expert_tensors("int4")
    checkpoint = save(tensors, tmp_path)
    return tensors, checkpoint, pack(checkpoint)[0]


@pytest.mark.parametrize("source", ["int4", "fp8", "bf16"])
def test_the_file_is_mapped(tmp_path: Path, source: str) -> None:
    tensors = expert_tensors(source)
    checkpoint = save(tensors, tmp_path)
    path, notices = pack(checkpoint)
    assert (path, notices) == (tmp_path / f"hybrid-experts-{source}.packed", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", path.name]
    for nodes in ((0,), (0, 0, 0)):
        found = reopen(checkpoint, nodes=nodes)
        assert (found.format, found.pager, found.notices) == (source, None, ())
        assert str(path) in Path("/proc/self/maps").read_text()
        check_bytes(found, tensors)
        found.close()
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_another_format_keeps_its_error_notice(tmp_path: Path) -> None:
    tensors = expert_tensors("bf16")
    checkpoint = save(tensors, tmp_path)
    in_memory = reopen(checkpoint, "int4")
    path, notices = pack(checkpoint, "int4")
    assert path.name == "hybrid-experts-int4.packed" and tuple(notices) == in_memory.notices
    found = reopen(checkpoint, "int4")
    assert str(path) in Path("/proc/self/maps").read_text() and found.notices == in_memory.notices
    check_bytes(found, tensors)
    native = reopen(checkpoint)  # the file is of another format: not this store's
    assert (native.format, native.notices) == ("bf16", ())


def test_reading_ahead_counts_every_byte(int4: tuple[Tensors, Checkpoint, Path]) -> None:
    calls: list[tuple[str, int, int]] = []
    open_store(int4[1], prefix, GEOMETRY, LAYERS, "native", lambda *call: calls.append(call))
    size = 6 * GEOMETRY.expert_bytes("int4")
    assert calls[0] == ("reading packed experts", 0, size) and calls[-1] == ("reading packed experts", size, size)


def test_a_file_larger_than_memory_is_paged_in(int4: tuple[Tensors, Checkpoint, Path]) -> None:
    """Slots hold just the file's bytes, each expert at the address that the kernels are given."""
    expert = GEOMETRY.expert_bytes("int4")
    found = open_store(int4[1], prefix, GEOMETRY, LAYERS, "native", silent, budget=3 * (expert + 8192))
    pager = found.pager
    assert pager is not None and 3 <= pager.n_slots < 6 and not found.addresses.any()
    assert len(found.notices) == 1 and re.search(r"% are kept there, the others come from the disk", found.notices[0])
    assert str(int4[2]) not in Path("/proc/self/maps").read_text()
    whole = reopen(int4[1])
    for index in range(len(LAYERS)):
        for e in range(GEOMETRY.n_experts):
            pager.start(index, np.array([e]))
            for _ in pager.parts():
                for matrix in (0, 1):
                    n_bytes = GEOMETRY.n_units(MATRICES[matrix]) * GEOMETRY.unit_bytes(MATRICES[matrix], "int4")
                    here, there = (int(s.addresses[index, e, 0, matrix]) for s in (found, whole))
                    assert ctypes.string_at(here, n_bytes) == ctypes.string_at(there, n_bytes)
            pager.finish()
    pager.check()
    found.close()


def test_less_room_than_two_experts_is_refused(int4: tuple[Tensors, Checkpoint, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"packed: 0\.00 GB of RAM are free and two experts, .* free memory$"):
        open_store(int4[1], prefix, GEOMETRY, LAYERS, "native", silent, budget=1000)


def touch(path: Path) -> None:
    os.utime(path.with_name("1.safetensors"), ns=(0, 0))


def rename_shard(path: Path) -> None:
    path.with_name("1.safetensors").rename(path.with_name("2.safetensors"))


def rewrite_header(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


STALE = {
    "a changed shard": (touch, "the shards are others, or newer, than those it was made from"),
    "another name": (rename_shard, "the shards are others"),
    "another version": (lambda path: rewrite_header(path, b'"version": 1', b'"version": 0'), "its version is 0, "),
    "other sizes": (lambda path: rewrite_header(path, b'"inner": 160', b'"inner": 192'), "its inner is 192"),
    "other layers": (lambda path: rewrite_header(path, b"[1, 4]", b"[1, 5]"), "its layers is [1, 5]"),
}  # fmt: skip


@pytest.mark.parametrize("case", STALE)
def test_a_file_of_something_else_is_not_used(int4: tuple[Tensors, Checkpoint, Path], case: str) -> None:
    tensors, _, path = int4
    change, why = STALE[case]
    change(path)
    checkpoint = Checkpoint(path.parent)
    found = reopen(checkpoint)
    assert len(found.notices) == 1
    assert found.notices[0].startswith(f"{path.name} is not used: {why}")
    assert found.notices[0].endswith(f"; `hybrid pack {path.parent}` writes it anew")
    assert str(path) not in Path("/proc/self/maps").read_text()
    check_bytes(found, tensors)
    assert pack(checkpoint) == (path, [])
    again = reopen(checkpoint)
    assert again.notices == ()
    check_bytes(again, tensors)


DAMAGE = {
    "magic": (lambda data: b"x" + data[1:], "its header is not that of a packed file"),
    "json": (lambda data: data[:16] + b"x" + data[17:], "its header is not that of a packed file"),
    "empty": (lambda data: b"", "its header is not that of a packed file"),
    "truncated": (lambda data: data[:-1], r"it has \d+ bytes and should have \d+"),
    "longer": (lambda data: data + b"x", r"it has \d+ bytes and should have \d+"),
    "a layer": (lambda data: data[:4096] + bytes(32) + data[4128:], "a layer is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused(int4: tuple[Tensors, Checkpoint, Path], case: str) -> None:
    _, checkpoint, path = int4
    change, why = DAMAGE[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"\.packed: damaged, {why}; .*`hybrid pack {path.parent}`$"):
        reopen(checkpoint)
    good = pack(checkpoint)[0]
    check_bytes(reopen(checkpoint), int4[0])
    assert good == path


def test_packing_again_does_nothing(int4: tuple[Tensors, Checkpoint, Path]) -> None:
    before = int4[2].stat()
    assert pack(int4[1]) == (int4[2], [])
    assert int4[2].stat() == before


@pytest.mark.parametrize(("source", "target", "fmt"), [("int4", "native", "int4"), ("bf16", "int8", "int8")])
def test_a_killed_run_is_resumed(tmp_path: Path, source: str, target: Target, fmt: str) -> None:
    tensors = expert_tensors(source, MANY)
    checkpoint = save(tensors, tmp_path)
    path, notices = pack(checkpoint, target, MANY)
    whole = path.read_bytes()
    path.unlink()
    partial = path.with_name(path.name + ".partial")
    for n_experts in (4, 11, 12):
        child = subprocess.Popen(
            [sys.executable, "-c", CUT_OFF, str(tmp_path), str(n_experts), fmt, target],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert child.stdout is not None
        reached = []
        for line in child.stdout:
            reached.append(int(line))
            if reached[-1] == n_experts:
                break
        # A second run is refused while the first one lives.
        with pytest.raises(CheckpointError, match=r"\.partial: another `hybrid pack` is writing it"):
            pack(checkpoint, target, MANY)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert partial.exists() and not path.exists()
        assert reached[0] == {4: 0, 11: 3, 12: 9}[n_experts]  # whole layers of three experts are kept
    counts: list[int] = []
    pack_store(checkpoint, prefix, GEOMETRY, MANY, target, lambda stage, done, total: counts.append(done))
    assert counts[0] == 12 * GEOMETRY.expert_bytes(fmt)  # type: ignore[arg-type]
    assert path.read_bytes() == whole
    assert not partial.exists()
    assert pack(checkpoint, target, MANY) == (path, notices)


def test_what_a_run_of_other_shards_left_is_begun_anew(int4: tuple[Tensors, Checkpoint, Path]) -> None:
    tensors, _, path = int4
    path.rename(path.with_name(path.name + ".partial"))
    touch(path)
    checkpoint = Checkpoint(path.parent)
    assert pack(checkpoint)[0] == path
    check_bytes(reopen(checkpoint), tensors)


def test_records_of_an_earlier_run_do_not_outlive_its_header(int4: tuple[Tensors, Checkpoint, Path]) -> None:
    """Else a second run that is cut off would find the first one's layers, of other shards, done."""
    path = int4[2]
    partial = path.with_name(path.name + ".partial")
    path.rename(partial)
    touch(path)
    contents = store._contents(Checkpoint(path.parent), prefix, GEOMETRY, LAYERS, "native")
    file = os.open(partial, os.O_RDWR)
    assert packed._finished_layers(file, contents) == set()
    assert packed._finished_layers(file, contents) == set()
    os.close(file)


def test_a_run_that_ended_just_now(int4: tuple[Tensors, Checkpoint, Path]) -> None:
    """The lock was waited for on a file that has its final name by now."""
    path = int4[2]
    file = os.open(path, os.O_RDWR)
    with pytest.raises(CheckpointError, match="another `hybrid pack`"):
        packed._lock(file, path.with_name(path.name + ".partial"))
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(expert_tensors("bf16"), tmp_path)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda directory: SimpleNamespace(free=2_000_000))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"take 0\.00 GB and 0\.00 GB of the disk are free; make room"):
        pack(checkpoint)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    checkpoint = save(expert_tensors("bf16"), tmp_path)
    monkeypatch.setattr(packed.os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"\.partial: cannot be written \(No space left on device\)"):
        pack(checkpoint)


def test_refusals_are_those_of_the_store(tmp_path: Path) -> None:
    tensors = expert_tensors("bf16")
    tensors[f"{prefix(4, 1, 'up')}.weight"] = torch.ones(3, 3)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight: expected BF16"):
        pack(save(tensors, tmp_path))
    assert not list(tmp_path.glob("*.packed*"))
