"""Profiles and plans as YAML that people read: dataclasses to plain values and back, with units and no guessing.

A figure is text with its unit ("34.5 GB/s"), a measured one may carry its spread ("34.5 GB/s [33.1 to 35.2]"). A key
that is missing, unknown or there twice, a value of another type or out of its bounds, a wrong unit or another version
is one line that names the file and the key. Knows no profile and no plan; `profile.py` and `plan.py` declare theirs
with the types below.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class DocumentError(ValueError):
    """A file that cannot be used. One line with the file, the key and the remedy."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What a number counts, and how it may be written. Exact units are whole numbers and are never rounded, positive
    ones are never 0."""

    name: str
    example: str
    factors: tuple[tuple[str, float], ...]  # suffix to factor, the largest last
    exact: bool = False
    positive: bool = False

    def parse(self, text: object) -> float:
        """The number of a text such as the example. Raises ValueError with what was expected."""
        match = _FIGURE.fullmatch(text) if isinstance(text, str) else None
        factor = dict(self.factors).get(match[2]) if match else None
        if match is None or factor is None:
            raise ValueError(f"expected {self.name} such as {self.example!r}, found {text!r}")
        value = float(match[1]) * factor
        if not math.isfinite(value) or value < 0 or (self.positive and value == 0):
            bound = "above 0" if self.positive else "of at least 0"
            raise ValueError(f"expected {self.name} {bound}, found {text!r}")
        return round(value) if self.exact else value

    def show(self, value: float) -> str:
        """The number with the largest suffix below it; an exact one with a suffix that loses nothing."""
        if self.exact:
            fitting = [(suffix, factor) for suffix, factor in self.factors if value and value % factor == 0]
            suffix, factor = fitting[-1] if fitting else self.factors[0]
            return f"{int(value / factor)} {suffix}"
        fitting = [(suffix, factor) for suffix, factor in self.factors if value >= factor]
        suffix, factor = fitting[-1] if fitting else self.factors[0]
        return f"{value / factor:.4g} {suffix}"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be beyond its type."""

    name: str  # as after "expected"
    holds: Callable[[Any], bool]


_FIGURE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z/]+)\s*")
_SPREAD = re.compile(r"(.*?([A-Za-z/]+))\s*\[\s*(\S+)\s+to\s+(\S+)\s*\]\s*")
_DECIMAL = tuple(zip(("B", "kB", "MB", "GB", "TB"), (1, 1e3, 1e6, 1e9, 1e12), strict=True))
_BINARY = tuple(zip(("KiB", "MiB", "GiB", "TiB"), (2**10, 2**20, 2**30, 2**40), strict=True))

BYTES = Unit("a size", "64 GiB", tuple(sorted((*_DECIMAL, *_BINARY), key=lambda pair: pair[1])), exact=True)
SECONDS = Unit("a time", "1.5 ms", (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0)))
DURATION = dataclasses.replace(SECONDS, positive=True)
BYTE_RATE = Unit("a rate", "34.5 GB/s", tuple((f"{suffix}/s", factor) for suffix, factor in _DECIMAL), positive=True)
FLOP_RATE = Unit(
    "an arithmetic rate",
    "2.1 TFLOP/s",
    tuple(
        (f"{prefix}FLOP/s", factor)
        for prefix, factor in zip(("", "k", "M", "G", "T"), (1, 1e3, 1e6, 1e9, 1e12), strict=True)
    ),
    positive=True,
)
COUNT = Rule("a whole number of at least 1", lambda value: value >= 1)
POSITIVE = Rule("a number above 0", lambda value: value > 0)
BY_COUNT = Rule("figures by number, one at least", bool)
BY_ROWS = Rule("figures by rows, those of 1 row among them", lambda value: 1 in value)


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure with its spread (fifth and ninety-fifth percentile); one from a datasheet has none."""

    value: float
    low: float | None = None
    high: float | None = None


Bytes = Annotated[int, BYTES]
Seconds = Annotated[float, SECONDS]
Duration = Annotated[float, DURATION]
Count = Annotated[int, COUNT]
Positive = Annotated[float, POSITIVE]
MeasuredSeconds = Annotated[Measured, SECONDS]
MeasuredByteRate = Annotated[Measured, BYTE_RATE]
MeasuredDuration = Annotated[Measured, DURATION]
MeasuredFlopRate = Annotated[Measured, FLOP_RATE]
SecondsByRows = Annotated[dict[Count, MeasuredDuration], BY_ROWS]
RatesByCount = Annotated[dict[Count, MeasuredByteRate], BY_COUNT]


def write_document(path: Path, kind: str, version: int, value: Any) -> None:
    """Write a dataclass under a header; the file is whole or not there. Raises OSError."""
    text = yaml.safe_dump({"document": kind, "version": version, **to_plain(value)}, sort_keys=False, width=120)
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        error.filename = str(path)  # the name that the caller knows
        raise


def read_document(path: Path, kind: str, version: int, cls: type[T]) -> T:
    """The dataclass in a file that `write_document` wrote. Raises DocumentError."""
    values = _mapping(path)
    found = values.pop("document", None)
    if found != kind:
        raise DocumentError(f"{path}: expected `document: {kind}`, found {found!r}; name the file of a {kind}")
    number = values.pop("version", None)
    if type(number) is not int or number != version:
        raise DocumentError(f"{path}: {kind} version {number!r}, this hybrid reads version {version}; make it anew")
    return from_plain(cls, values, str(path))


def to_plain(value: Any) -> dict[str, Any]:
    """A dataclass as mappings, lists, texts and numbers."""
    hints = get_type_hints(type(value), include_extras=True)
    return {field.name: _to_plain(getattr(value, field.name), hints[field.name]) for field in dataclasses.fields(value)}


def from_plain(cls: type[T], values: object, where: str) -> T:
    """A dataclass from plain values. Every key must be there unless its field has a default. Raises DocumentError."""
    try:
        return _read(values, cls, "")  # type: ignore[no-any-return]
    except _Wrong as error:
        raise DocumentError(f"{where}: {error}") from None


class _Wrong(ValueError):
    """A key and what is wrong with it."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice; YAML would take the last and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":  # that merges another mapping
                name = self.construct_object(key)
                if name in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {name} is there twice", problem_mark=key.start_mark)
                seen.add(name)
        return super().construct_mapping(node, deep)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise DocumentError(f"{path}: nested too deeply for a profile or a plan") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise DocumentError(f"{path}: not YAML{line}: {' '.join(problem.split())}") from None
    if not isinstance(values, dict):
        raise DocumentError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def _to_plain(value: Any, hint: Any) -> Any:
    hint, unit = _bare(hint)
    if value is None:
        return None
    if isinstance(unit, Unit):
        return _show_measured(value, unit) if isinstance(value, Measured) else unit.show(value)
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, Mapping):
        inner = get_args(hint)[1]
        return {key: _to_plain(item, inner) for key, item in value.items()}
    if isinstance(value, tuple):
        inner = get_args(hint)[0]
        return [_to_plain(item, inner) for item in value]
    return float(value) if isinstance(value, float) else value  # NumPy's float64 is a float that YAML refuses


def _bare(hint: Any) -> tuple[Any, Unit | Rule | None]:
    """The hint without `| None` and without its unit or rule, and that."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Annotated:
        return get_args(hint)[0], get_args(hint)[1]
    return hint, None


def _show_measured(value: Measured, unit: Unit) -> str:
    shown = unit.show(value.value)
    if value.low is None or value.high is None:
        return shown
    factor = dict(unit.factors)[shown.split()[1]]
    return f"{shown} [{value.low / factor:.4g} to {value.high / factor:.4g}]"


def _read(value: object, hint: Any, key: str) -> Any:
    bare, mark = _bare(hint)
    if value is None and get_origin(hint) in (Union, types.UnionType):
        return None
    if isinstance(mark, Unit):
        try:
            return _read_measured(value, mark) if bare is Measured else mark.parse(value)
        except ValueError as error:
            raise _Wrong(f"{key}: {error}") from None
    found = _read_bare(value, bare, key)
    if mark is not None and not mark.holds(found):
        raise _Wrong(f"{key}: expected {mark.name}, found {value!r}")
    return found


def _read_bare(value: object, bare: Any, key: str) -> Any:
    if dataclasses.is_dataclass(bare):
        return _read_fields(bare, value, key)  # type: ignore[arg-type]
    origin = get_origin(bare)
    if origin is dict:
        key_hint, item_hint = get_args(bare)
        return _read_mapping(value, key_hint, item_hint, key)
    if origin is tuple:
        if not isinstance(value, list):
            raise _Wrong(f"{key}: expected a list, found {value!r}")
        return tuple(_read(item, get_args(bare)[0], f"{key}[{i}]") for i, item in enumerate(value))
    return _read_scalar(value, bare, key)


def _read_scalar(value: object, hint: Any, key: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise _Wrong(f"{key}: expected one of {', '.join(map(str, get_args(hint)))}, found {value!r}")
        return value
    if hint is float and type(value) is int and 0 <= value < 1e300:
        value = float(value)
    # Nothing that a profile or a plan counts is below 0.
    if type(value) is not hint or (isinstance(value, int | float) and not 0 <= value < math.inf):
        names = {
            int: "a whole number of at least 0",
            float: "a number of at least 0",
            str: "text",
            bool: "true or false",
        }
        raise _Wrong(f"{key}: expected {names[hint]}, found {value!r}")
    return value


def _read_mapping(value: object, key_hint: Any, hint: Any, key: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{key}: expected keys and values, found {value!r}")
    return {_read(name, key_hint, f"{key}.{name}"): _read(item, hint, f"{key}.{name}") for name, item in value.items()}


def _read_fields(cls: type[Any], value: object, key: str) -> Any:
    if not isinstance(value, dict):
        raise _Wrong(f"{key}: expected keys and values, found {value!r}")
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise _Wrong(f"unknown key {prefix}{name}{_suggest(str(name), fields)}")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise _Wrong(f"key {prefix}{name} is missing")
    return cls(**{name: _read(item, hints[name], f"{prefix}{name}") for name, item in value.items()})


def _read_measured(value: object, unit: Unit) -> Measured:
    spread = _SPREAD.fullmatch(value) if isinstance(value, str) else None
    if spread is None:
        return Measured(unit.parse(value))
    middle, low, high = (
        unit.parse(text) for text in (spread[1], f"{spread[3]} {spread[2]}", f"{spread[4]} {spread[2]}")
    )
    if not low <= middle <= high:
        raise ValueError(f"expected the figure between the two ends of its spread, found {value!r}")
    return Measured(middle, low, high)


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
