"""Typed reading of JSON objects whose complaints name the file, the key, what was expected and what was found.

Knows no model. Called by `hybrid.config`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar

Word = TypeVar("Word", bound=str)


class ConfigError(ValueError):
    """A model directory or its JSON that cannot be used; one line for the user."""


def read_object(path: Path) -> Mapping[str, object]:
    """Parse one JSON file that must hold an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model is a Hugging Face checkpoint directory") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON (nested too deeply); fetch the file again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {_show(values)}")
    return values


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object. `where` is its file, `inside` the path of keys that leads to it. null counts as absent."""

    values: Mapping[str, object]
    where: str
    inside: str = ""

    def has(self, key: str) -> bool:
        """True where the key is there and not null."""
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> ConfigError:
        """A complaint about one key."""
        if key not in self.values:
            return ConfigError(f"{self.where}: key {self.inside}{key} is missing; expected {expected}")
        return ConfigError(f"{self.where}: {self.inside}{key} must be {expected}; found {_show(self.values[key])}")

    def integer(self, key: str, minimum: int = 1, default: int | None = None, multiple_of: int = 1) -> int:
        """An integer of at least `minimum`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not _is_int(value) or value < minimum or value % multiple_of:
            even = f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise self.error(key, f"an integer of at least {max(minimum, multiple_of)}{even}")
        return value

    def integer_or_null(self, key: str) -> int | None:
        """A positive integer; None where the file says null. The key itself must be there."""
        if key in self.values and self.values[key] is None:
            return None
        return self.integer(key)

    def integers(self, key: str) -> tuple[int, ...]:
        """An integer or a list of integers, none negative; empty where absent."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_int(item) and item >= 0 for item in found):
            raise self.error(key, "an integer of at least 0, or a list of them")
        return tuple(found)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        lowest = math.ulp(0.0) if default is None else 0.0
        if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value < math.inf:
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[Word, ...], default: Word | None = None) -> Word:
        """One word of `allowed`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        for word in allowed:
            if value == word:
                return word
        raise self.error(key, f"one of {', '.join(allowed)}" if len(allowed) > 1 else allowed[0])

    def section(self, key: str) -> "Fields":
        """A nested object."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, self.where, f"{self.inside}{key}.")

    def refuse_others(self, known: frozenset[str]) -> None:
        """Refuse keys that would change the result and that nobody here reads."""
        for key in self.values:
            if key not in known and self.has(key):
                raise ConfigError(
                    f"{self.where}: {self.inside}{key} is not supported; known: {', '.join(sorted(known))}"
                )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
