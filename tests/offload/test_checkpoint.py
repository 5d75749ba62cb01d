"""The reader against files of the safetensors library, and against damage of every kind."""

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from offload.checkpoint import INDEX_NAME, Checkpoint, CheckpointError

TENSORS = {
    "bf16": torch.randn(3, 5).bfloat16(),
    "fp8": torch.randn(4, 7).to(torch.float8_e4m3fn),
    "f32": torch.randn(2, 3, 4),
    "f16": torch.randn(6).half(),
    "i32": torch.arange(-4, 4, dtype=torch.int32).reshape(2, 4),
    "i64": torch.tensor([7, 9]),
    "u8": torch.arange(9, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
}


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and an index."""
    names = list(TENSORS)
    shards = {"model-00001-of-000002.safetensors": names[:4], "model-00002-of-000002.safetensors": names[4:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return tmp_path


def expected(tensor: torch.Tensor) -> np.ndarray:
    views = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return tensor.view(views.get(tensor.dtype, tensor.dtype)).numpy()


def read_all(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    for name in checkpoint.tensors:
        checkpoint.array(name).tobytes()
    checkpoint.close()


def test_reads_what_safetensors_wrote(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        array = checkpoint.array(name)
        info = checkpoint.info(name)
        assert info.shape == tuple(tensor.shape) == array.shape
        assert info.n_bytes == tensor.nbytes
        assert array.dtype == expected(tensor).dtype
        assert np.array_equal(array, expected(tensor))
        assert not array.flags.writeable
        raw = info.path.read_bytes()[info.offset : info.offset + info.n_bytes]
        assert raw == array.tobytes() == ctypes.string_at(checkpoint.address(name), info.n_bytes)
    assert checkpoint.info("fp8").dtype == "F8_E4M3"
    assert checkpoint.info("bf16").dtype == "BF16"
    assert "f32" in checkpoint and "f33" not in checkpoint
    checkpoint.close()


def test_single_file_and_loose_shards(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    assert set(Checkpoint(sharded).tensors) == set(TENSORS)
    (sharded / "model-00001-of-000002.safetensors").unlink()
    assert set(Checkpoint(sharded).tensors) == set(list(TENSORS)[4:])


def test_unaligned_tensors_are_readable(tmp_path: Path) -> None:
    # An odd byte in front of float32 data: legal, and some writers produce it.
    data = np.array([1.5, -2.5], "<f4")
    entries = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    (tmp_path / "x.safetensors").write_bytes(header(entries) + b"\x07" + data.tobytes())
    array = Checkpoint(tmp_path).array("b")
    assert array.flags.aligned
    assert np.array_equal(array, data)


def test_arrays_outlive_close(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    array = checkpoint.array("f32")
    checkpoint.close()
    assert np.array_equal(array, TENSORS["f32"].numpy())
    with pytest.raises(CheckpointError):
        checkpoint.array("f32")


def test_close_unmaps(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert str(sharded) in Path("/proc/self/maps").read_text()
    checkpoint.close()
    assert str(sharded) not in Path("/proc/self/maps").read_text()
    assert not any(str(sharded) in file.path for file in psutil.Process().open_files())


def test_read_ahead_brings_pages_in(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    info = checkpoint.info("f32")
    checkpoint.read_ahead(info.path, info.offset, info.offset + info.n_bytes)
    checkpoint.read_ahead(info.path, 0, info.path.stat().st_size)
    with pytest.raises(CheckpointError):
        checkpoint.read_ahead(sharded / "other.safetensors", 0, 1)


def test_stray_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    save_file({"a.rotary_emb.inv_freq": torch.ones(2), "a.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert set(Checkpoint(tmp_path).tensors) == {"a.weight"}


def test_missing_tensor_is_named(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        Checkpoint(sharded).info("model.norm.weight")


def edit_index(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        index = json.loads((directory / INDEX_NAME).read_text())
        (directory / INDEX_NAME).write_text(json.dumps(change(index)))

    return apply


def overwrite(content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / "model-00001-of-000002.safetensors").write_bytes(content) and None


def truncate(directory: Path) -> None:
    path = directory / "model-00002-of-000002.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def only_pickle(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"PK")


def twice(directory: Path) -> None:
    (directory / INDEX_NAME).unlink()
    shutil.copy(directory / "model-00001-of-000002.safetensors", directory / "z.safetensors")


FIRST, SECOND = "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "no such directory"),
    "nothing": (lambda d: [p.unlink() for p in d.iterdir()], r"no \*\.safetensors file"),
    "pickle": (only_pickle, "pickle"),
    "missing shard": (lambda d: (d / SECOND).unlink(), f"1 of 2 shards.*{SECOND}"),
    "truncated": (truncate, f"{SECOND}.*truncated"),
    "empty": (overwrite(b""), f"{FIRST}.*0 bytes"),
    "lfs": (overwrite(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"), "git lfs pull"),
    "html": (overwrite(b"\n<!DOCTYPE html><html>Sign in</html>"), "web page"),
    "noise": (overwrite(bytes(range(200, 256)) * 9), "not a safetensors file"),
    "not json": (overwrite((4).to_bytes(8, "little") + b"{no}"), "not JSON"),
    "list": (overwrite(header([1])), "not a JSON object"),
    "deep": (overwrite((90000).to_bytes(8, "little") + b"[" * 90000), "not JSON"),
    "dtype": (overwrite(header({"a": entry("F4", [2], 0, 1)}) + b"\0"), "dtype 'F4'"),
    "sizes": (overwrite(header({"a": entry("F32", [2, 3], 0, 20)}) + bytes(20)), "takes 24 bytes.*hold 20"),
    "negative": (overwrite(header({"a": entry("F32", [-1, -1], 0, 4)}) + bytes(4)), "shape"),
    "huge": (overwrite(header({"a": entry("U8", [0, 1 << 61, 1 << 61], 0, 0)})), "plausible"),
    "overlap": (
        overwrite(header({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}) + bytes(6)),
        "'a' and 'b' overlap",
    ),
    "beyond": (overwrite(header({"a": entry("U8", [4], 96, 100)}) + bytes(6)), "truncated"),
    "offsets": (overwrite(header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}) + bytes(4)), "data_off"),
    "no index": (lambda d: (d / INDEX_NAME).write_text("{"), "not a readable JSON index"),
    "index list": (edit_index(lambda index: [index]), "no weight_map"),
    "index empty": (edit_index(lambda index: {"weight_map": {}}), "no weight_map"),
    "index path": (edit_index(lambda index: {"weight_map": {"a": "../secret"}}), "not a file name"),
    "index number": (edit_index(lambda index: {"weight_map": {"a": 3}}), "not a file name"),
    "index moved": (edit_index(lambda index: {"weight_map": {"f16": FIRST, "bf16": SECOND}}), "does not hold it"),
    "index absent": (edit_index(lambda index: {"weight_map": {"bf16": FIRST, "new": FIRST}}), "'new'.*does not hold"),
    "twice": (twice, f"both {FIRST} and z.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(sharded: Path, damage: str) -> None:
    apply, message = DAMAGES[damage]
    apply(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(sharded)
    assert "\n" not in str(caught.value) and str(sharded) in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_random_corruption_is_never_another_error(sharded: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    paths = sorted(sharded.iterdir())
    originals = {path: path.read_bytes() for path in paths}
    failures = 0
    for _ in range(150):
        path = paths[rng.integers(len(paths))]
        path.write_bytes(corrupt(originals[path], rng))
        try:
            read_all(sharded)
        except CheckpointError as error:
            failures += 1
            assert "\n" not in str(error)
        path.write_bytes(originals[path])
    assert failures > 30
    read_all(sharded)


def corrupt(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, a piece cut out, doubled or inserted, the file cut short; mostly in the header."""
    data = bytearray(content)
    at = int(rng.integers(min(len(data), 700)))
    kind = rng.integers(6)
    if kind == 0:
        data[at] = rng.integers(256)
    elif kind == 1:
        for _ in range(8):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del data[at : at + int(rng.integers(1, 40))]
    elif kind == 3:
        data[at:at] = data[at : at + int(rng.integers(1, 40))]
    elif kind == 4:
        del data[int(rng.integers(len(data))) :]
    else:
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        place = digits[int(rng.integers(len(digits)))]
        data[place : place + 1] = rng.choice([b"9", b"-1", b"1e9", b"99999999999999999999", b"null", b"[]", b"0.5"])
    return bytes(data)


def test_header_length_that_looks_like_a_page(tmp_path: Path) -> None:
    # 0x3C20 bytes of header: the file then starts with " <", and is fine.
    text = json.dumps({"a": entry("U8", [1], 0, 1)}).encode().ljust(0x3C20)
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\5")
    assert Checkpoint(tmp_path).array("a").tolist() == [5]


def test_huge_integers_in_the_header(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)
