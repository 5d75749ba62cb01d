"""JSON bodies read with suspicion: one `loads`, and typed access that names the field it dislikes.

Knows nothing about any endpoint. Standard `json` accepts NaN, infinities, lone surrogates and any depth; what comes
out of `loads` here has none of them. Of duplicate keys the last wins.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from server.chat import Json
from server.errors import invalid

MAX_DEPTH = 100  # nested containers: far below the interpreter's recursion limit, far above any real request


def loads(raw: bytes) -> Json:
    """The JSON object in `raw`, or ApiError 400 for everything that is not one."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_not_a_number, parse_float=_finite)
    except UnicodeDecodeError:
        raise invalid(None, "the body is not valid UTF-8") from None
    except RecursionError:
        raise invalid(None, f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # malformed, a byte order mark, or an integer of thousands of digits
        raise invalid(None, f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH or b"\\u" in raw:
        value = _cleaned(value, 0)
    assert isinstance(value, dict)
    return value


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _cleaned(value: Any, depth: int) -> Any:
    """`value` with lone surrogates (truncated JavaScript strings have them) replaced, and its depth checked."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if _broken(value) else value
    if depth > MAX_DEPTH:
        raise invalid(None, f"the body is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {_cleaned(key, depth): _cleaned(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [item if type(item) is int else _cleaned(item, depth + 1) for item in value]
    return value


def _broken(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


class Fields:
    """Typed access to one JSON object. A null counts as absent. `unknown()` lists what nobody asked for."""

    def __init__(self, data: Json, path: str = "") -> None:
        self._data = data
        self._prefix = f"{path}." if path else ""
        self._known: set[str] = set()

    def path(self, name: str) -> str:
        """The full path of field `name`, as errors show it."""
        return self._prefix + name

    def raw(self, name: str) -> Any:
        """The value as it came, None when absent."""
        self._known.add(name)
        return self._data.get(name)

    def unknown(self) -> list[str]:
        """Fields present that were never read, nulls excepted."""
        return sorted(key for key, value in self._data.items() if key not in self._known and value is not None)

    def ignore(self, *names: str) -> None:
        """Fields accepted without effect."""
        self._known.update(names)

    def text(self, name: str) -> str | None:
        """A string."""
        value: str | None = self._typed(name, str, "a string")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._typed(name, bool, "true or false")
        return default if value is None else value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in low..high."""
        value = self.raw(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise invalid(self.path(name), f"must be an integer from {low} to {high}, not {_shown(value)}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number in low..high."""
        value = self.raw(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            raise invalid(self.path(name), f"must be a number from {low:g} to {high:g}, not {_shown(value)}")
        return float(value)

    def choice(self, name: str, options: Sequence[str]) -> str | None:
        """One of `options`."""
        value = self.text(name)
        if value is not None and value not in options:
            raise invalid(self.path(name), f"must be one of {', '.join(options)}, not {_shown(value)}")
        return value

    def items(self, name: str) -> list[Any] | None:
        """An array."""
        value: list[Any] | None = self._typed(name, list, "an array")
        return value

    def fields(self, name: str) -> "Fields | None":
        """An object, as Fields of its own."""
        value = self._typed(name, dict, "an object")
        return None if value is None else Fields(value, self.path(name))

    def _typed(self, name: str, kind: type, described: str) -> Any:
        value = self.raw(name)
        if value is not None and type(value) is not kind:
            raise invalid(self.path(name), f"must be {described}, not {_shown(value)}")
        return value


def as_fields(value: Any, path: str) -> Fields:
    """`value` must be an object; Fields of it."""
    if not isinstance(value, dict):
        raise invalid(path, f"must be an object, not {_shown(value)}")
    return Fields(value, path)


def _shown(value: Any) -> str:
    """A value as an error message shows it: short, and never a client's whole payload."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    return json.dumps(value)[:60]
