"""One option, three sources: a flag, an environment variable, a key of the YAML file.

The options are the fields of `ServerSettings`, so a new field is at once a flag, a variable and a key. Knows what a
field's type accepts and how to say what was wrong with a value; knows no subcommands. Called by `args.py`.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from server.settings import ServerSettings

Kind = Literal["text", "texts", "path", "file", "integer", "bytes", "number", "switch", "choice"]

PREFIX = "HYBRID_"
LAST_PORT = 65535
EXPECTED: dict[Kind, str] = {
    "text": "text",
    "texts": "text that is not empty, or a list of such texts",
    "path": "a path (after ~, of a user with a home directory)",
    "file": "a path (after ~, of a user with a home directory)",
    "integer": "a whole number above 0",
    "bytes": "a size such as 8GiB, 500MB or a number of bytes",
    "number": "a number",
    "switch": "true or false",
}
UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}{b}": k ** (i + 1) for b, k in (("B", 1000), ("iB", 1024)) for i, p in enumerate("KMGT")},
}
SETTLED = (  # by a plan; `planned.py` takes them from there
    "device", "dtype", "expert_format", "expert_precision", "experts", "isa", "threads", "max_model_len", "kv_memory",
    "kv_ram", "kv_dtype", "page_size", "max_batch_tokens", "max_running",
)  # fmt: skip
MAY_BE_NONE = ("port", "kv_ram")  # 0 means something
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class SettingsError(ValueError):
    """A bad environment variable or configuration file. One line; it ends the command with status 78."""


@dataclass(frozen=True, slots=True)
class Option:
    """A field of ServerSettings as the operator sees it."""

    field: str
    kind: Kind
    help: str
    default: Any
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The YAML key."""
        return self.field.replace("_", "-")

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return f"--{self.key}"

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.field.upper()

    @property
    def expected(self) -> str:
        """What a value must be, for error messages."""
        if self.field == "port":
            return f"a whole number from 0 to {LAST_PORT}"
        return "one of " + ", ".join(self.choices) if self.kind == "choice" else EXPECTED[self.kind]

    def from_text(self, text: str) -> Any:
        """The value of a flag or a variable. Raises ValueError without a message of its own."""
        match self.kind:
            case "texts":
                return _filled(text.split(","))
            case "path" | "file":
                return _path(text)
            case "switch":
                return SWITCH[text.lower()] if text.lower() in SWITCH else _refuse()
            case "integer":
                return self._bounded(int(text))
            case "number":
                return self._bounded(float(text))
            case "bytes":
                return self._bounded(_size(text))
            case "choice":
                return text if text in self.choices else _refuse()
            case _:
                return text

    def from_yaml(self, value: Any) -> Any:
        """The value of a key. Types must match: 8000 is no text and "8000" is no number."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        match self.kind:
            case "texts" if isinstance(value, list) and all(isinstance(part, str) for part in value):
                return _filled(value)
            case "texts" if isinstance(value, str):
                return _filled([value])
            case "switch" if isinstance(value, bool):
                return value
            case "integer" | "bytes" if whole:
                return self._bounded(value)
            case "number" if whole or isinstance(value, float):
                return self._bounded(float(value))
            case "text" | "path" | "file" | "choice" | "bytes" if isinstance(value, str):
                return self.from_text(value)
        return _refuse()

    def _bounded(self, value: float) -> float:
        low, high = 0 if self.kind == "number" or self.field in MAY_BE_NONE else 1, math.inf
        if self.field == "port":
            high = LAST_PORT
        return value if low <= value <= high else _refuse()


def server_options() -> tuple[Option, ...]:
    """One option for each field of ServerSettings, in its order."""
    hints = get_type_hints(ServerSettings)
    return tuple(_option(field, hints[field.name]) for field in dataclasses.fields(ServerSettings))


def read_environment(environ: Mapping[str, str], options: Iterable[Option]) -> dict[str, Any]:
    """Values of the HYBRID_… variables that are set and not empty. Unknown ones raise SettingsError."""
    known = {option.variable: option for option in options}
    values = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == f"{PREFIX}CONFIG" or not text:
            continue
        if variable not in known:
            raise SettingsError(f"unknown environment variable {variable}{_suggest(variable, known)}")
        option = known[variable]
        try:
            values[option.field] = option.from_text(text)
        except ValueError:
            raise SettingsError(f"{variable}={text}: expected {option.expected}") from None
    return values


def read_file(path: Path, options: Iterable[Option]) -> dict[str, Any]:
    """Values of a YAML file of keys. Raises SettingsError naming the file and the key."""
    known = {option.key: option for option in options}
    values = {}
    for key, value in _mapping(path).items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise SettingsError(f"{path}: unknown key {key}{_suggest(name, known)}")
        if value is None:  # `key:` alone leaves the default
            continue
        try:
            values[known[name].field] = known[name].from_yaml(value)
        except ValueError:
            raise SettingsError(f"{path}: {key}: expected {known[name].expected}, found {value!r}") from None
    return values


def refuse_settled(values: Mapping[str, Any]) -> None:
    """Raises SettingsError for an option that was given though a plan, also given, settles it. `values` by field."""
    twice = [option.flag for option in server_options() if option.field in SETTLED and option.field in values]
    if "plan" in values and twice:
        raise SettingsError(f"{twice[0]} is settled by --plan {values['plan']}; leave one out")


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}: not YAML{where}: {getattr(error, 'problem', error)}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: expected keys and values, found {type(document).__name__}")
    return document


def _option(field: "dataclasses.Field[Any]", hint: Any) -> Option:
    if get_origin(hint) in (Union, types.UnionType):  # X | None
        hint = next(part for part in get_args(hint) if part is not type(None))
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        kind: Kind = "choice"
    elif field.name.endswith(("_memory", "_ram")):
        kind = "bytes"
    elif "file" in field.metadata:
        kind = "file"
    else:
        kinds: dict[Any, Kind] = {int: "integer", float: "number", bool: "switch", Path: "path", str: "text"}
        kind = kinds.get(hint, "texts")
    default = None if field.default is dataclasses.MISSING else field.default
    return Option(field.name, kind, field.metadata["help"], default, choices)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~NAME of nobody, or ~ of a user without a home
        raise ValueError from None


def _size(text: str) -> int:
    digits = text.rstrip("BKMGTi ")
    unit = text[len(digits) :].strip()
    size = float(digits) * UNITS[unit] if unit in UNITS else math.inf
    return int(size) if math.isfinite(size) else _refuse()


def _filled(texts: Sequence[str]) -> tuple[str, ...]:
    """The `texts` that are not empty. Nothing but empty ones is a mistake: an empty API key would let everyone in."""
    filled = tuple(text for text in texts if text)
    return filled if filled or not texts else _refuse()


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _refuse() -> Any:
    raise ValueError
