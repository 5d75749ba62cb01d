"""Reading JSON with suspicion."""

import json

import pytest

from server.errors import ApiError
from server.validation import MAX_DEPTH, Fields, loads


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        ('{"a": "ä"}'.encode("latin-1"), "not valid UTF-8"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested deeper"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "nested deeper"),
    ],
)
def test_everything_else_is_a_400(raw: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as error:
        loads(raw)
    assert error.value.status == 400


def test_what_is_accepted() -> None:
    nested = json.dumps({"a": [[1]] * 200}).encode()
    assert loads(nested) == {"a": [[1]] * 200}
    assert loads(b'{"a": 1, "a": 2}') == {"a": 2}
    deep = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b', "b": ' + b"[[]]" + b"}"
    assert loads(deep)["b"] == [[]]


def test_lone_surrogates_are_replaced() -> None:
    assert loads(rb'{"a": ["x\ud83d", {"\udc00": "\ud83d\ude00"}]}') == {"a": ["x\ufffd", {"\ufffd": "\U0001f600"}]}


FIELDS = {"text": "t", "yes": True, "int": 3, "float": 0.5, "list": [1], "object": {"in": "x"}, "null": None}


@pytest.mark.parametrize(
    ("method", "name", "arguments"),
    [
        ("text", "int", ()),
        ("boolean", "int", ()),
        ("boolean", "text", ()),
        ("integer", "yes", (0, 9)),
        ("integer", "float", (0, 9)),
        ("integer", "text", (0, 9)),
        ("integer", "int", (4, 9)),
        ("number", "yes", (0, 9)),
        ("number", "int", (0, 2)),
        ("choice", "text", (("a", "b"),)),
        ("items", "object", ()),
        ("fields", "list", ()),
    ],
)
def test_a_wrong_value_names_its_field(method: str, name: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(ApiError) as error:
        getattr(Fields(FIELDS, "outer"), method)(name, *arguments)
    assert error.value.param == f"outer.{name}" and error.value.message.startswith(f"outer.{name}: must be")


def test_right_values_and_absent_ones() -> None:
    fields = Fields(FIELDS)
    assert (fields.text("text"), fields.integer("int", 0, 3), fields.number("int", 0, 3)) == ("t", 3, 3.0)
    assert (fields.boolean("yes"), fields.boolean("null", True), fields.integer("absent", 0, 1)) == (True, True, None)
    inner = fields.fields("object")
    assert inner is not None and inner.text("in") == "x" and inner.path("in") == "object.in"
    assert fields.unknown() == ["float", "list"]
