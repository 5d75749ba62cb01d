"""placement.document: what is written is read again, and whatever else is in a file is one line about a key of it."""

import errno
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from placement.document import (
    BYTE_RATE,
    BYTES,
    FLOP_RATE,
    SECONDS,
    Bytes,
    DocumentError,
    Measured,
    MeasuredByteRate,
    Seconds,
    Unit,
    from_plain,
    read_document,
    to_plain,
    write_document,
)

# Written out once more, by hand: powers of ten and of two.
POWERS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    size: Bytes
    kind: Literal["fast", "slow"]
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """One field of everything that a profile or a plan has."""

    name: str
    cores: int
    quota: float | None
    is_new: bool
    wait: Seconds
    rates: dict[int, MeasuredByteRate]
    parts: tuple[Part, ...]
    nearest: Part | None = None
    limit: Annotated[int, BYTES] | None = None
    notes: tuple[str, ...] = ()


WHOLE = Whole(
    "a box",
    2,
    1.5,
    True,
    0.0015,
    {1: Measured(20e9, 19e9, 21e9), 4: Measured(30e9)},
    (Part(4096, "fast", 16),),
    notes=("×",),
)
TEXT = """
document: box
version: 3
name: a box
cores: 2
quota: 1.5
is_new: true
wait: 1.5 ms
rates:
  1: 20 GB/s [19 to 21]
  4: 30 GB/s
parts:
- size: 4 KiB
  kind: fast
  width: 16
notes: [×]
"""


def read(path: Path, text: str) -> Whole:
    path.write_text(text, encoding="utf-8")
    return read_document(path, "box", 3, Whole)


def refusal(path: Path, text: str) -> str:
    """What is said of such a file: one line that begins with its name."""
    with pytest.raises(DocumentError) as caught:
        read(path, text)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


def changed(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


class TestUnits:
    @given(st.sampled_from(sorted(POWERS)), st.integers(0, 2**12))
    def test_a_size_is_its_number_times_its_suffix(self, suffix: str, number: int) -> None:
        assert BYTES.parse(f"{number} {suffix}") == number * POWERS[suffix]
        assert BYTES.parse(f" {number}{suffix} ") == number * POWERS[suffix]

    @given(
        st.integers(0, 2**53)
        | st.builds(lambda n, power: n * power, st.integers(0, 2**12), st.sampled_from(list(POWERS.values())))
    )
    def test_a_size_is_never_rounded(self, size: int) -> None:
        shown = BYTES.show(size)
        number, suffix = shown.split()
        assert int(number) * POWERS[suffix] == size
        parsed = BYTES.parse(shown)
        assert type(parsed) is int
        assert parsed == size
        larger = [power for power in POWERS.values() if power > POWERS[suffix] and size and size % power == 0]
        assert larger == [], "a larger suffix would have lost nothing"

    @given(st.sampled_from([SECONDS, BYTE_RATE, FLOP_RATE]), st.floats(1e-12, 1e18))
    def test_a_figure_keeps_four_digits(self, unit: Unit, value: float) -> None:
        assert math.isclose(unit.parse(unit.show(value)), value, rel_tol=5.1e-4)
        if unit is SECONDS:
            assert unit.parse(unit.show(0.0)) == 0

    @pytest.mark.parametrize(
        ("unit", "text", "value"),
        [
            (BYTES, "595.147654321 GB", 595_147_654_321),
            (BYTES, "1.5 KiB", 1536),
            (SECONDS, "80 us", 80e-6),
            (SECONDS, "2 s", 2.0),
            (SECONDS, "25 ns", 25e-9),
            (BYTE_RATE, "34.5 GB/s", 34.5e9),
            (BYTE_RATE, "1e3 MB/s", 1e9),
            (FLOP_RATE, "2.1 TFLOP/s", 2.1e12),
            (FLOP_RATE, "7 FLOP/s", 7.0),
        ],
    )
    def test_figures(self, unit: Unit, text: str, value: float) -> None:
        assert unit.parse(text) == pytest.approx(value, rel=1e-15)

    @pytest.mark.parametrize(
        ("unit", "value", "text"),
        [
            (BYTES, 0, "0 B"),
            (BYTES, 24_772_608, "24192 KiB"),
            (BYTES, 70_272, "70272 B"),
            (BYTES, 96 * 10**9, "96 GB"),
            (BYTES, 64 * 2**30, "64 GiB"),
            (SECONDS, 0.0015, "1.5 ms"),
            (SECONDS, 90.0, "90 s"),
            (BYTE_RATE, 34.56789e9, "34.57 GB/s"),
            (FLOP_RATE, 2.1e12, "2.1 TFLOP/s"),
        ],
    )
    def test_what_is_shown(self, unit: Unit, value: float, text: str) -> None:
        assert unit.show(value) == text

    @pytest.mark.parametrize("unit", [BYTES, SECONDS, BYTE_RATE, FLOP_RATE])
    @pytest.mark.parametrize(
        "text",
        ["", "3", 3, 3.5, True, None, [], "GB", "3 furlongs", "-3 s", "nan s", "inf s", "3 s s", "3,5 s", "0x3 s"],
    )
    def test_anything_else_is_refused_with_an_example(self, unit: Unit, text: object) -> None:
        with pytest.raises(ValueError, match=re.escape(f"such as {unit.example!r}, found {text!r}")):
            unit.parse(text)

    @pytest.mark.parametrize(
        ("unit", "text"), [(BYTES, "3 gb"), (BYTES, "3 GB/s"), (BYTE_RATE, "3 GB"), (SECONDS, "3 min")]
    )
    def test_another_unit_is_refused(self, unit: Unit, text: str) -> None:
        with pytest.raises(ValueError, match=re.escape(f"found {text!r}")):
            unit.parse(text)

    def test_more_than_a_number_can_hold_is_refused(self) -> None:
        with pytest.raises(ValueError, match="found '1e400 s'"):
            SECONDS.parse("1e400 s")


@dataclass(frozen=True, slots=True)
class Rate:
    rate: MeasuredByteRate


class TestSpread:
    @given(st.lists(st.floats(1e-3, 1e15), min_size=3, max_size=3))
    def test_it_comes_back_to_four_digits(self, values: list[float]) -> None:
        low, middle, high = sorted(values)
        found = from_plain(Rate, to_plain(Rate(Measured(middle, low, high))), "file").rate
        assert found.low is not None
        assert found.high is not None
        assert np.allclose([found.low, found.value, found.high], [low, middle, high], rtol=5.1e-4, atol=0)

    @pytest.mark.parametrize(
        "text",
        [
            "20 GB/s [19 to 21]",
            "20GB/s [19 to 21]",
            "20 GB/s[19 to 21]",
            " 20 GB/s [ 19  to 21.0 ] ",
            "2e1 GB/s [1.9e1 to 21]",
        ],
    )
    def test_ways_to_write_it(self, text: str) -> None:
        assert from_plain(Rate, {"rate": text}, "file").rate == Measured(20e9, 19e9, 21e9)

    def test_without_one(self) -> None:
        assert from_plain(Rate, {"rate": "20 GB/s"}, "file").rate == Measured(20e9)
        assert to_plain(Rate(Measured(20e9))) == {"rate": "20 GB/s"}
        assert to_plain(Rate(Measured(20e9, 950e6, 21e9))) == {"rate": "20 GB/s [0.95 to 21]"}

    @pytest.mark.parametrize(
        "text",
        [
            "[19 to 21]", " [19 to 21]", "20 [19 to 21]", "20 GB [19 to 21]", "20 GB/s [19]", "20 GB/s [19 to 21",
            "20 GB/s [x to 21]", "20 GB/s [-1 to 21]", "20 GB/s [19 GB/s to 21 GB/s]", "20 GB/s [19 to 21] [1 to 2]",
            "20 GB/s [21 to 22]", "20 GB/s [18 to 19]", "20 GB/s [21 to 19]",
        ],
    )  # fmt: skip
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(DocumentError, match=r"^file: rate: expected .*found '"):
            from_plain(Rate, {"rate": text}, "file")


class TestRoundTrip:
    def test_by_hand(self, tmp_path: Path) -> None:
        assert read(tmp_path / "box.yaml", TEXT) == WHOLE

    def test_through_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "box.yaml"
        write_document(path, "box", 3, WHOLE)
        assert read_document(path, "box", 3, Whole) == WHOLE
        assert list(tmp_path.iterdir()) == [path]
        values = yaml.safe_load(path.read_text())
        assert list(values)[:3] == ["document", "version", "name"]
        assert (values["wait"], values["rates"][1], values["parts"][0]["size"]) == (
            "1.5 ms",
            "20 GB/s [19 to 21]",
            "4 KiB",
        )

    @given(
        st.builds(
            Whole,
            name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])),
            cores=st.integers(0, 2**40),
            quota=st.none() | st.floats(0, 1e9),
            is_new=st.booleans(),
            wait=st.sampled_from([0.0, 2e-6, 0.015, 3.0]),
            rates=st.dictionaries(st.integers(0, 512), st.sampled_from([Measured(2e9), Measured(3e9, 2.5e9, 3.25e9)])),
            parts=st.lists(
                st.builds(Part, st.integers(0, 2**50), st.sampled_from(["fast", "slow"]), st.none() | st.integers(0, 9))
            ).map(tuple),
            nearest=st.none() | st.just(Part(7, "slow")),
            limit=st.none() | st.integers(0, 2**50),
            notes=st.lists(st.text()).map(tuple),
        )
    )
    def test_anything(self, whole: Whole) -> None:
        text = yaml.safe_dump(to_plain(whole), sort_keys=False)
        assert from_plain(Whole, yaml.safe_load(text), "file") == whole

    def test_numbers_of_numpy(self, tmp_path: Path) -> None:
        path = tmp_path / "box.yaml"
        quota, wait = np.float64(1.5), np.float64(0.25)
        write_document(path, "box", 3, Whole("n", 1, quota, False, wait, {1: Measured(np.float64(1e9))}, ()))
        assert read_document(path, "box", 3, Whole).quota == 1.5

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "box.yaml"
        write_document(path, "box", 3, WHOLE)
        with pytest.raises(yaml.YAMLError):
            write_document(path, "box", 3, Whole("n", object(), None, False, 1.0, {}, ()))  # type: ignore[arg-type]
        assert read_document(path, "box", 3, Whole) == WHOLE

    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "box.yaml"
        write_document(path, "box", 3, WHOLE)

        def write_half(self: Path, text: str, encoding: str) -> int:
            self.write_bytes(text.encode(encoding)[: len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="No space left on device"):
            write_document(path, "box", 3, WHOLE)
        assert read_document(path, "box", 3, Whole) == WHOLE

    def test_a_directory_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            write_document(tmp_path / "none" / "box.yaml", "box", 3, WHOLE)


class TestRefusals:
    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("1.5 ms", "1.5 GB/s", "wait: expected a time such as '1.5 ms', found '1.5 GB/s'"),
            ("1.5 ms", "1.5", "wait: expected a time such as '1.5 ms', found 1.5"),
            ("1.5 ms", "-1.5 ms", "wait: expected a time such as '1.5 ms', found '-1.5 ms'"),
            ("4: 30 GB/s", "4: 30 Gb/s", "rates.4: expected a rate such as '34.5 GB/s', found '30 Gb/s'"),
            ("size: 4 KiB", "size: 4096", "parts[0].size: expected a size such as '64 GiB', found 4096"),
            ("size: 4 KiB", "size:", "parts[0].size: expected a size such as '64 GiB', found None"),
            ("cores: 2\n", "", "key cores is missing"),
            ("  kind: fast\n", "", "key parts[0].kind is missing"),
            ("cores: 2", "core: 2", "unknown key core; did you mean cores?"),
            ("cores: 2", "cores: 2\nzebra: 1", "unknown key zebra"),
            ("  width: 16", "  widht: 16", "unknown key parts[0].widht; did you mean width?"),
            ("cores: 2", "cores: 2\n7: 1", "unknown key 7"),
            ("cores: 2", "cores: two", "cores: expected a whole number of at least 0, found 'two'"),
            ("cores: 2", "cores: 2.0", "cores: expected a whole number of at least 0, found 2.0"),
            ("cores: 2", "cores: true", "cores: expected a whole number of at least 0, found True"),
            ("cores: 2", "cores: -2", "cores: expected a whole number of at least 0, found -2"),
            ("cores: 2", "cores:", "cores: expected a whole number of at least 0, found None"),
            ("cores: 2", "cores: [2]", "cores: expected a whole number of at least 0, found [2]"),
            ("quota: 1.5", "quota: .nan", "quota: expected a number of at least 0, found nan"),
            ("quota: 1.5", "quota: .inf", "quota: expected a number of at least 0, found inf"),
            ("quota: 1.5", "quota: -0.5", "quota: expected a number of at least 0, found -0.5"),
            ("quota: 1.5", "quota: -1", "quota: expected a number of at least 0, found -1"),
            ("quota: 1.5", "quota: false", "quota: expected a number of at least 0, found False"),
            ("quota: 1.5", "quota: '1.5'", "quota: expected a number of at least 0, found '1.5'"),
            ("is_new: true", "is_new: 1", "is_new: expected true or false, found 1"),
            ("name: a box", "name: 7", "name: expected text, found 7"),
            ("kind: fast", "kind: quick", "parts[0].kind: expected one of fast, slow, found 'quick'"),
            ("kind: fast", "kind: [fast]", "parts[0].kind: expected one of fast, slow, found ['fast']"),
            ("notes: [×]", "notes: ×", "notes: expected a list, found '×'"),
            ("notes: [×]", "notes: [a, 2]", "notes[1]: expected text, found 2"),
            ("notes: [×]", "nearest: fast", "nearest: expected keys and values, found 'fast'"),
            ("notes: [×]", "nearest: {size: 1 B}", "key nearest.kind is missing"),
            ("- size: 4 KiB", "- 3\n- size: 4 KiB", "parts[0]: expected keys and values, found 3"),
            ("  1: 20", "  one: 20", "rates.one: expected a whole number of at least 0, found 'one'"),
            ("  1: 20", "  true: 20", "rates.True: expected a whole number of at least 0, found True"),
            ("version: 3", "version: 2", "box version 2, this hybrid reads version 3; make it anew"),
            ("version: 3", "version: '3'", "box version '3', this hybrid reads version 3; make it anew"),
            ("version: 3\n", "", "box version None, this hybrid reads version 3; make it anew"),
            ("document: box", "document: plan", "expected `document: box`, found 'plan'; name the file of a box"),
            ("document: box\n", "", "expected `document: box`, found None; name the file of a box"),
        ],
    )
    def test_one_line_names_the_key(self, tmp_path: Path, old: str, new: str, said: str) -> None:
        assert refusal(tmp_path / "box.yaml", changed(old, new)) == said

    def test_true_is_not_version_one(self, tmp_path: Path) -> None:
        path = tmp_path / "box.yaml"
        path.write_text("document: box\nversion: true\n")
        with pytest.raises(DocumentError, match="box version True, this hybrid reads version 1"):
            read_document(path, "box", 1, Whole)

    def test_a_list_where_keys_are_expected(self, tmp_path: Path) -> None:
        lines = TEXT.splitlines()
        rates = lines.index("rates:")
        text = "\n".join([*lines[:rates], "rates: [20 GB/s]", *lines[rates + 3 :]])
        assert refusal(tmp_path / "b", text) == "rates: expected keys and values, found ['20 GB/s']"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "expected keys and values, found NoneType"),
            ("- 1\n- 2", "expected keys and values, found list"),
            ("just words", "expected keys and values, found str"),
            ("name: [1\n", "not YAML in line 2: expected ',' or ']'"),
            ("name: a\n\tcores: 2", "not YAML in line 2: found character"),
            ("? [a]\n: 1", "not YAML in line 1: found unhashable key"),
            ("a: *b", "not YAML in line 1: found undefined alias 'b'"),
            ("a: !!python/object:os.x {}", "not YAML in line 1: could not determine a constructor"),
            ("a: \x01", "not YAML: unacceptable character #x0001"),
            ("name: a\ncores: 2\nname: b", "not YAML in line 3: key name is there twice"),
            ("parts:\n- {size: 1, 'size': 2}", "not YAML in line 2: key size is there twice"),
            ("a: " + 2000 * "[", "nested too deeply"),
            ("a: 2026-13-45", "not YAML: month must be in 1..12"),
        ],
    )
    def test_other_files(self, tmp_path: Path, text: str, said: str) -> None:
        assert refusal(tmp_path / "box.yaml", text).startswith(said)

    def test_a_mapping_that_is_merged_is_no_key(self, tmp_path: Path) -> None:
        assert (
            refusal(tmp_path / "box.yaml", "a: &a {b: 1}\nc: {<<: *a, d: 1}\ne: {<<: *a}")
            == "expected `document: box`, found None; name the file of a box"
        )

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "box.yaml"
        path.write_bytes(b"name: \xff\xfe")
        with pytest.raises(DocumentError, match=r"box.yaml: not YAML: .*can't decode byte 0xff"):
            read_document(path, "box", 3, Whole)

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(DocumentError, match=r"none.yaml: cannot be read: No such file or directory$"):
            read_document(tmp_path / "none.yaml", "box", 3, Whole)
        with pytest.raises(DocumentError, match="cannot be read: Is a directory"):
            read_document(tmp_path, "box", 3, Whole)

    def test_a_user_can_catch_it_as_a_wrong_value(self) -> None:
        assert issubclass(DocumentError, ValueError)
