"""Tool declarations against the published encoder's golden vectors, and the corners they leave out."""

from pathlib import Path
from typing import Any

import pytest

from server.tool_types import SchemaError, declare
from tests.reference.golden import cases


def function(parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


def body(parameters: Any, **more: Any) -> str:
    """The declaration without its frame."""
    text = declare([function(parameters, **more)])
    frame = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(frame[0]) and text.endswith(frame[1])
    return text[len(frame[0]) : -len(frame[1])]


def field(schema: Any) -> str:
    """The declared type of one required field."""
    text = body({"properties": {"x": schema}, "required": ["x"]})
    return text.removeprefix("type f = (_: {\n").removesuffix("\n}) => any;")


def sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list) else value


def test_golden(kimi_dir: Path) -> None:
    for case in cases(kimi_dir, "tools_ts"):
        tools = sorted_keys(case["tools"])
        if case["declaration"] is None:
            with pytest.raises(SchemaError):
                declare(tools)
        else:
            assert declare(tools) == case["declaration"], case["id"]


def test_fields_are_ordered_and_commented() -> None:
    properties = {
        "b": {"type": "integer", "minimum": 1, "maximum": 7, "default": 3},
        "a": {"type": "string", "description": "First.\n\nSecond."},
    }
    assert body({"properties": properties, "required": ["b"]}, description="Does it.") == (
        "// Does it.\ntype f = (_: {\n  // maximum: 7, minimum: 1\n  // Default: 3\n  b: number,\n"
        "  // First.\n\n  // Second.\n  a?: string\n}) => any;"
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (True, "  x: any"),
        (False, "  x: null"),
        ({}, "  x: any"),
        ({"type": ["integer", "null", "object"]}, "  x: number | null | {}"),
        ({"enum": ["a", 'b"c', None, True, 2.5]}, '  x: "a" | "b"c" | None | True | 2.5'),
        ({"enum": ["a", None], "type": ["string", "null"]}, '  x: "a" | None'),
        ({"enum": [1], "type": ["integer"]}, "  x: 1"),
        ({"type": "array", "items": False}, "  x: Array<any>"),
        (
            {"type": "array", "items": {"type": "string", "pattern": "a+"}},
            "  x: Array<\n    // pattern: a+\n    string\n  >",
        ),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}, "  x: string | null"),
        ({"type": "object", "additionalProperties": {"type": "array"}}, "  x: {\n    [k: string]: Array<any>\n  }"),
        ({"type": "array", "items": {"$ref": "#"}}, None),
    ],
)
def test_types(schema: Any, text: str | None) -> None:
    if text is None:
        assert body({"properties": {"x": schema}}) == (
            "interface parameters {\n  x?: Array<parameters>\n}\ntype f = (_: parameters) => any;"
        )
    else:
        assert field(schema) == text


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [1], "type": "string"},
        {"enum": ["1"], "type": "number"},
        {"enum": [1.5], "type": "integer"},
        {"enum": [0], "type": "boolean"},
        {"enum": ["a"], "type": ["string", "integer"]},
        {"enum": ["a"], "type": ["string", "integer", "null"]},
        {"type": ["string", "odd"]},
        {"type": "object", "additionalProperties": "yes"},
        {"description": "no type"},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "other.json"},
        {"type": "string", "description": 5},
        "string",
        None,
        {"type": "object", "properties": ["x"]},
        {"anyOf": 3},
    ],
)
def test_what_has_no_such_form_is_refused(schema: Any) -> None:
    with pytest.raises(SchemaError):
        field(schema)


def test_definitions_of_an_inner_object_serve_those_after_it() -> None:
    inner = {"type": "object", "$defs": {"D": {"type": "string"}}, "properties": {"y": {"$ref": "#/$defs/D"}}}
    text = body({"properties": {"a": inner, "b": {"$ref": "#/$defs/D"}}, "required": ["b"]})
    assert text == "interface D string\ntype f = (_: {\n  b: D,\n  a?: {\n    y?: D\n  }\n}) => any;"


def test_nothing_to_declare() -> None:
    assert declare([]) == ""
    assert declare([{"type": "builtin_function", "function": {"name": "$web_search"}}, {"type": "function"}]) == ""
