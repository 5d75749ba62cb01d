"""Tool declarations as TypeScript, the form in which Kimi-K2.5 was taught its tools.

Takes OpenAI tool objects whose keys are already sorted, gives the text. JSON-schema features without a TypeScript
counterpart (formats, multiples, titles) vanish; a schema that cannot be expressed raises `SchemaError` and the
template falls back to JSON. Knows nothing about chats or tokens; `template.py` calls it.
"""

import json
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

_INDENT = "  "
_NAMES = {"integer": "number"}
_UNION_NAMES = {
    **{name: name for name in ("string", "number", "boolean", "null")},
    "integer": "number",
    "object": "{}",
    "array": "Array<any>",
}
_ENUM_KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}
_LIMITS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}


class SchemaError(ValueError):
    """A tool's schema has no TypeScript form."""


def declare(tools: Sequence[Json]) -> str:
    """The declaration of all function tools; "" if none can be declared. SchemaError if a schema has no such form."""
    try:
        functions = [
            _Function().declare(t["function"]) for t in tools if t.get("type") == "function" and t.get("function")
        ]
    except (TypeError, AttributeError, LookupError) as error:  # a schema of the wrong shape, at whatever depth
        raise SchemaError(f"not a JSON schema: {error!r}") from error
    if not functions:
        return ""
    return "\n".join(("# Tools\n", "## functions\nnamespace functions {", *functions, "}\n"))


class _Function:
    """One function's declaration; remembers the definitions met on the way, which become interfaces."""

    def __init__(self) -> None:
        self._definitions: Json = {}
        self._refers_to_itself = False

    def declare(self, function: Json) -> str:
        schema = function.get("parameters") or {}
        extra = self._additional(schema, "")
        members = self._members(schema, "")
        argument = _braces(_ordered(members) + extra, "")
        lines = []
        if self._refers_to_itself:  # the whole parameter object needs a name
            argument = "parameters"
            body = ",\n".join(text for _, _, text in members)
            lines.append(f"interface parameters {{\n{body}\n}}" if body else "interface parameters {}")
        lines += [self._interface(name, definition) for name, definition in list(self._definitions.items())]
        if function.get("description"):
            lines.append(_comment(function["description"], ""))
        lines.append(f"type {function.get('name', 'function')} = (_: {argument}) => any;")
        return "\n".join(lines)

    def _interface(self, name: str, schema: Json) -> str:
        text = f"interface {name} {self._type(schema, '')}"
        description = schema.get("description")
        return f"{_comment(description, '')}\n{text}" if description else text

    def _object(self, schema: Json, indent: str) -> str:
        extra = self._additional(schema, indent)
        return _braces(_ordered(self._members(schema, indent)) + extra, indent)

    def _members(self, schema: Json, indent: str) -> list[tuple[bool, str, str]]:
        """(optional, name, declaration) of each property, in the order of the schema."""
        inner = indent + _INDENT
        required = set(schema.get("required", ()))
        members = []
        for name, value in schema.get("properties", {}).items():
            optional = name not in required
            comments = self._comments(value, inner) + _default(value, inner)
            text = f"{comments}{inner}{name}{'?' if optional else ''}: {self._type(value, inner)}"
            members.append((optional, name, text))
        return members

    def _additional(self, schema: Json, indent: str) -> list[str]:
        """The index signature, if any. Definitions are taken in here, for this runs first on every object."""
        self._definitions |= schema.get("$defs") or {}
        value = schema.get("additionalProperties")
        inner = indent + _INDENT
        if value is None:
            return []
        if not isinstance(value, (bool, dict)):
            raise SchemaError(f"additionalProperties is neither a boolean nor a schema: {value!r}")
        kind = self._type(value, inner) if isinstance(value, dict) else "any" if value else "never"
        return [f"{inner}[k: string]: {kind}"]

    def _type(self, schema: Json | bool, indent: str) -> str:
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join(self._type(choice, indent) for choice in schema["anyOf"])
        if "enum" in schema:
            return _enum(schema)
        if not schema:
            return "any"
        if "type" not in schema:
            raise SchemaError(f"a schema without a type: {schema!r}")
        kind = schema["type"]
        if isinstance(kind, list):
            return " | ".join(_UNION_NAMES[name] for name in kind)
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            return self._array(schema, indent)
        return _NAMES.get(kind, str(kind))

    def _reference(self, target: str) -> str:
        if target == "#":
            self._refers_to_itself = True
            return "parameters"
        name = target.rpartition("/")[2]
        if not target.startswith("#/$defs/") or name not in self._definitions:
            raise SchemaError(f"$ref {target} points nowhere; only # and #/$defs/NAME are followed")
        return name

    def _array(self, schema: Json, indent: str) -> str:
        items = schema.get("items") or True
        inner = indent + _INDENT
        comments = self._comments(items, inner)
        if comments:
            return f"Array<\n{comments}{inner}{self._type(items, inner)}\n{indent}>"
        return f"Array<{self._type(items, indent)}>"

    def _comments(self, schema: Json | bool, indent: str) -> str:
        """Description and limits, a line each."""
        if isinstance(schema, bool):
            return ""
        lines = [_comment(schema["description"], indent)] if schema.get("description") else []
        limits = [f"{key}: {schema[key]}" for key in _LIMITS.get(_plain_kind(schema), ()) if key in schema]
        if limits:
            lines.append(f"{indent}// {', '.join(limits)}")
        return "".join(line + "\n" for line in lines)


def _plain_kind(schema: Json) -> str:
    """The schema's type where that alone decides its form; limits of anything else are not shown."""
    kind = schema.get("type")
    return kind if isinstance(kind, str) and not {"$ref", "anyOf", "enum"} & schema.keys() else ""


def _ordered(members: list[tuple[bool, str, str]]) -> list[str]:
    """Required ones first, each group by name."""
    return [text for _, _, text in sorted(members)]


def _braces(members: list[str], indent: str) -> str:
    return "{\n" + ",\n".join(members) + f"\n{indent}}}" if members else "{}"


def _comment(text: str, indent: str) -> str:
    """Every line as a comment; empty lines stay empty."""
    return "\n".join(f"{indent}// {line}" if line else "" for line in text.split("\n"))


def _default(schema: Json | bool, indent: str) -> str:
    value = None if isinstance(schema, bool) else schema.get("default")
    if value is None:
        return ""
    # Numbers and booleans are printed as Python does (True, 1000000.0): so the model saw them.
    text = repr(value) if isinstance(value, (int, float)) else json.dumps(value, ensure_ascii=False)
    return f"{indent}// Default: {text}\n"


def _enum(schema: Json) -> str:
    """The values, strings in quotes but not escaped. A value outside the declared type is refused."""
    kind = schema.get("type")
    if isinstance(kind, list):
        named = [name for name in kind if name != "null"] or ["null"]
        if len(kind) > 2 or (len(kind) == 2 and "null" not in kind):
            raise SchemaError(f"an enum of several types: {kind}")
        kind = named[0]
    allowed = _ENUM_KINDS.get(kind, object) if kind is not None else object
    for value in schema["enum"]:
        if value is not None and not isinstance(value, allowed):
            raise SchemaError(f"enum value {value!r} is not of type {kind}")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])
