"""hybrid.routes: what follows from a record, the way to the disk and back, and files that are none."""

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.routes import Record, RecordError, read_record, shares_of, write_record

# Two layers of six experts, two of them for a token; documents of 4, 1 and 5 tokens, of which two hold turns.
EXPERTS = [
    [[0, 1], [2, 3]], [[0, 2], [2, 4]], [[0, 5], [4, 5]], [[1, 5], [0, 1]],
    [[3, 4], [0, 3]],
    [[0, 1], [1, 2]], [[0, 1], [1, 2]], [[2, 5], [3, 5]], [[4, 5], [0, 5]], [[0, 3], [0, 4]],
]  # fmt: skip
AHEAD = np.random.default_rng(2).random((5, 2, 2, 6)).astype(np.float16)
RECORD = Record(
    model="cafe",
    layers=np.array([1, 3]),
    bias=np.linspace(-0.1, 0.1, 12, dtype=np.float32).reshape(2, 6),
    tokens=np.array([7, 8, 9, 2, 5, 7, 7, 300, 9, 2], np.uint16),
    starts=np.array([0, 4, 5], np.int32),
    families=np.array(["talk", "tool", "fan-out"]),
    turns=np.array([[2, 4], [6, 8], [8, 10]], np.int32),
    kinds=np.array(["chat", "create", "merge 2"]),
    experts=np.array(EXPERTS, np.uint8),
    scores=np.random.default_rng(1).random((5, 2, 6)).astype(np.float16),
    ahead=AHEAD,
)


def test_what_follows_from_a_record() -> None:
    assert RECORD.n_experts == 6
    assert RECORD.lengths.tolist() == [4, 1, 5]
    assert RECORD.documents.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert RECORD.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
    # all of a turn but its end token
    assert np.flatnonzero(RECORD.decoded).tolist() == [2, 6, 8]


def test_counts() -> None:
    tally = np.zeros((2, 6), np.int64)
    for token in EXPERTS:
        for layer, chosen in enumerate(token):
            for expert in chosen:
                tally[layer, expert] += 1
    assert np.array_equal(RECORD.counts(), tally)
    assert RECORD.counts(RECORD.decoded).tolist() == [[2, 1, 0, 0, 1, 2], [1, 1, 1, 0, 1, 2]]


def test_shares_are_of_half_a_choice_more() -> None:
    # 1.5, 0.5 and 2.5 of 4.5; 0.5 each
    assert np.allclose(shares_of(np.array([[1, 0, 2], [0, 0, 0]]), 2), [[6 / 9, 2 / 9, 10 / 9], [2 / 3, 2 / 3, 2 / 3]])


def test_a_record_of_unsigned_ids_counts_too(tmp_path: Path) -> None:
    write_record(tmp_path / "a.npz", replace(RECORD, experts=RECORD.experts.astype(np.uint64)))
    assert np.array_equal(read_record(tmp_path / "a.npz").counts(), RECORD.counts())


def test_to_the_disk_and_back(tmp_path: Path) -> None:
    write_record(tmp_path / "a.npz", RECORD)
    back = read_record(tmp_path / "a.npz")
    for field in fields(Record):
        ours, theirs = getattr(RECORD, field.name), getattr(back, field.name)
        assert np.array_equal(ours, theirs), field.name
    assert back.experts.dtype == np.uint8 and back.scores.dtype == np.float16
    write_record(tmp_path / "b.npz", back)
    write_record(tmp_path / "c.npz", back)
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "c.npz"]


def test_a_record_without_scores_or_turns(tmp_path: Path) -> None:
    bare = replace(RECORD, scores=RECORD.scores[:0], ahead=AHEAD[:0], turns=RECORD.turns[:0], kinds=RECORD.kinds[:0])
    write_record(tmp_path / "a.npz", bare)
    back = read_record(tmp_path / "a.npz")
    assert back.scores.shape == (0, 2, 6)
    assert not back.decoded.any()


def test_a_record_without_look_ahead_of_either_version(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_record(path, replace(RECORD, ahead=None))
    assert read_record(path).ahead is None
    path.write_bytes(archive(lambda arrays: (arrays.pop("ahead"), arrays.update(version=np.array(1)))))
    back = read_record(path)
    assert back.ahead is None
    assert np.array_equal(back.scores, RECORD.scores)


def refusal(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        read_record(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


def changed(array: np.ndarray[Any, Any], index: Any, value: Any) -> np.ndarray[Any, Any]:
    other = array.copy()
    other[index] = value
    return other


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": RECORD.experts[:-1]}, "experts: expected T to be 10 as elsewhere, found 9"),
        ({"experts": RECORD.experts[0]}, "experts: expected integers of shape (T, L, K)"),
        ({"experts": RECORD.experts.astype(float)}, "experts: expected integers of shape (T, L, K)"),
        ({"experts": changed(RECORD.experts, (3, 1), [1, 6])}, "experts: expected ids from 0 to 5"),
        ({"experts": changed(RECORD.experts, (3, 1), [1, 1])}, "experts: expected different experts for a token"),
        ({"experts": changed(RECORD.experts, (3, 1), [2, 1])}, "experts: expected different experts for a token"),
        ({"experts": RECORD.experts[..., :0]}, "experts: expected ids from 0 to 5"),
        ({"turns": RECORD.turns[:, :1]}, "turns: expected 2 to be 2 as elsewhere, found 1"),
        ({"turns": changed(RECORD.turns, (0, 1), 5)}, "turns: expected each within one document"),
        ({"turns": changed(RECORD.turns, (2, 1), 11)}, "turns: expected start and stop from 0 to 10"),
        ({"turns": changed(RECORD.turns, 0, [3, 3])}, "turns: expected start and stop from 0 to 10"),
        ({"turns": changed(RECORD.turns, 0, [-2, 1])}, "turns: expected start and stop from 0 to 10"),
        ({"starts": np.array([1, 4, 5])}, "starts: expected 0 and then ascending numbers of tokens"),
        ({"starts": np.array([0, 5, 5], np.uint64)}, "starts: expected 0 and then ascending numbers of tokens"),
        ({"starts": np.array([0, 5, 4], np.uint64)}, "starts: expected 0 and then ascending numbers of tokens"),
        ({"starts": np.array([0, 4, 10])}, "starts: expected 0 and then ascending numbers of tokens"),
        ({"scores": RECORD.scores[:3], "ahead": None}, "scores: expected those of whole documents"),
        ({"scores": RECORD.scores[..., :5], "ahead": None}, "scores: expected E to be 6 as elsewhere, found 5"),
        ({"ahead": AHEAD[:4]}, "ahead: expected S to be 5 as elsewhere, found 4"),
        ({"ahead": AHEAD[:, :, :1]}, "ahead: expected 2 to be 2 as elsewhere, found 1"),
        ({"ahead": changed(AHEAD, (4, 1, 1, 5), np.nan)}, "ahead: expected finite numbers"),
        ({"layers": np.array([3, 3])}, "layers: expected numbers from 0, ascending"),
        ({"layers": np.array([-1, 3])}, "layers: expected numbers from 0, ascending"),
        ({"tokens": changed(RECORD.tokens.astype(np.int32), 4, -1)}, "tokens: expected ids from 0"),
        ({"bias": changed(RECORD.bias, (1, 5), np.nan)}, "bias: expected finite numbers"),
        ({"scores": changed(RECORD.scores, (4, 1, 5), np.inf)}, "scores: expected finite numbers"),
        ({"turns": RECORD.turns[::-1]}, "turns: expected them in order, none within another"),
        ({"turns": changed(RECORD.turns, 2, [7, 10])}, "turns: expected them in order, none within another"),
        ({"families": np.array([1, 2, 3])}, "families: expected text of shape (D)"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_record(tmp_path / "a.npz", replace(RECORD, **changes))
    assert refusal(tmp_path / "a.npz").startswith(said)


def archive(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A record's file with other members."""
    arrays: dict[str, Any] = {field.name: getattr(RECORD, field.name) for field in fields(Record)}
    arrays |= {"format": np.array("hybrid routing record"), "version": np.array(2)}
    change(arrays)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_other_members(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(archive(lambda arrays: arrays.update(extra=np.zeros(3))))
    assert read_record(path).model == "cafe"
    path.write_bytes(archive(lambda arrays: arrays.update(version=np.array(3))))
    assert refusal(path) == "not a routing record of this version; make one with python -m hybrid.nano.record"
    path.write_bytes(archive(lambda arrays: arrays.pop("format")))
    assert refusal(path) == "not a routing record of this version; make one with python -m hybrid.nano.record"
    path.write_bytes(archive(lambda arrays: arrays.pop("kinds")))
    assert refusal(path) == "kinds: expected text of shape (M)"


class Bomb:
    """Unpickling it would be seen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(archive(lambda arrays: arrays.update(kinds=np.array([Bomb()], object))))
    assert "not an .npz file of plain arrays" in refusal(path)
    path.write_bytes(pickle.dumps(Bomb()))
    assert "not an .npz file of plain arrays" in refusal(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.npz") == "cannot be read: No such file or directory"
    path = tmp_path / "a.npz"
    write_record(path, RECORD)
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], b"{}"):
        path.write_bytes(content)
        assert refusal(path).startswith("not an .npz file of plain arrays, or a damaged one: ")
    with zipfile.ZipFile(path, "w") as file:  # a member that is no array
        file.writestr("format", "hybrid routing record")
    assert refusal(path).startswith("not a routing record of this version")


HEADER = "{'descr': '<i8', 'fortran_order': False, 'shape': (10,), }"
DAMAGED = "not an .npz file of plain arrays, or a damaged one: "


@pytest.mark.parametrize(
    "header",
    [
        HEADER.replace("(10,)", "(10"),  # tokenize's error
        HEADER.replace("<i8", ",i8"),  # SyntaxError
        HEADER.replace("(10,)", "(99999999999999999999,)"),  # OverflowError
        HEADER.replace("(10,)", "(True,)"),  # TypeError
        HEADER.replace("'<i8'", "()"),  # IndexError
        HEADER.replace("'<i8'", "[3]"),
        HEADER.replace("(10,)", "(10L,)").replace("8'", "9'"),  # Python 2's, of which NumPy warns
        HEADER.replace("}", "'x': '\\d', }"),  # of which Python warns
        HEADER.replace("}", f"'{'x' * 5000}': 1, }}"),
        "-" * 9000 + "1",
    ],
)
def test_another_header_of_an_array(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.npz"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(80)
    packed(path, members() | {"tokens.npy": content})
    assert refusal(path).startswith(DAMAGED)
    assert len(refusal(path)) < 200


def members() -> dict[str, bytes]:
    """What a record's file packs."""
    with zipfile.ZipFile(io.BytesIO(archive(lambda arrays: None))) as file:
        return {name: file.read(name) for name in file.namelist()}


def packed(path: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, member in content.items():
            file.writestr(name, member)


def test_changed_headers_are_read_or_refused(tmp_path: Path) -> None:
    """Members whose bytes changed before they were packed, so that no checksum tells."""
    path, rng = tmp_path / "a.npz", random.Random(1)
    whole, refused = members(), 0
    for _ in range(120):
        name = rng.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(rng.choice((1, 1, 2, 4))):
            content[rng.randrange(min(len(content), 128))] = rng.choice(b"()'{},-0123456789L[]#\\<>|OUif\xff\x00")
        packed(path, whole | {name: bytes(content)})
        try:
            read_record(path).counts()
        except RecordError as error:
            refused += 1
            assert len(str(error)) < 300 and "\n" not in str(error)
    assert 40 < refused < 120


def test_a_member_packed_otherwise(tmp_path: Path) -> None:
    """One that says it is packed by LZMA or bzip2, and is not."""
    path = tmp_path / "a.npz"
    write_record(path, RECORD)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        local = file.getinfo("tokens.npy").header_offset
    central = whole.index(b"tokens.npy", local + 40) - 46
    for method in (12, 14):
        content = bytearray(whole)
        content[local + 8] = content[central + 10] = method
        path.write_bytes(content)
        assert "None" not in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("tokens.npy", bytes(range(256)) * 8)
    content = bytearray(path.read_bytes())
    content[60:200] = b"\xff" * 140  # behind the head of what is packed
    path.write_bytes(content)
    assert refusal(path).startswith(DAMAGED)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as caught:
        write_record(tmp_path / "folder", RECORD)
    assert caught.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(OSError) as caught:
        write_record(tmp_path / "none" / "a.npz", RECORD)
    assert caught.value.filename == str(tmp_path / "none" / "a.npz")


def test_one_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_record(path, RECORD)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        member = file.getinfo("scores.npy")
    content[member.header_offset + 30 + len("scores.npy") + member.compress_size // 2] ^= 0xFF
    path.write_bytes(content)
    assert refusal(path).startswith("not an .npz file of plain arrays, or a damaged one: ")
