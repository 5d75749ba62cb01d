"""Decoding one answer: stop strings, and tokens whose texts join to the text that was sent."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.batch import TokenLogprob
from server.choice import Choice, Piece, PlainText
from server.parse import OutputParser
from server.tokenizer import Tokenizer, load_tokenizer

STOP_IDS = frozenset({257, 258})


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


def plain(tokenizer: Tokenizer, stops: tuple[str, ...] = (), show_specials: bool = False) -> Choice:
    return Choice(tokenizer, PlainText(tokenizer, show_specials), stops, STOP_IDS)


def chat(tokenizer: Tokenizer, stops: tuple[str, ...] = (), thinking: bool = False) -> Choice:
    return Choice(tokenizer, OutputParser(tokenizer, thinking, True), stops, STOP_IDS)


def run(choice: Choice, ids: list[int]) -> list[Piece]:
    pieces: list[Piece] = []
    for token in ids:
        pieces += choice.feed(token, TokenLogprob(token, -float(token)))
        if choice.stopped:
            break
    return pieces + choice.finish()


def content(pieces: list[Piece]) -> str:
    return "".join(piece.delta.content for piece in pieces)


def reasoning(pieces: list[Piece]) -> str:
    return "".join(piece.delta.reasoning for piece in pieces)


def joined(pieces: list[Piece]) -> str:
    return "".join(token.text for piece in pieces for token in piece.tokens)


@given(st.lists(st.sampled_from([*b"abc \xe2\x82\xac\xf0\x9f", 256, 300]), max_size=40))
def test_token_texts_join_to_the_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = run(plain(tokenizer), ids)
    assert content(pieces) == joined(pieces)
    assert content(pieces) == "".join(part.decode("utf-8", "replace") for part in split_at_specials(ids))
    assert [token.token for piece in pieces for token in piece.tokens] == ids


def split_at_specials(ids: list[int]) -> list[bytes]:
    parts = [bytearray()]
    for token in ids:
        if token < 256:
            parts[-1].append(token)
        else:
            parts.append(bytearray())
    return [bytes(part) for part in parts]


@given(
    st.text("abc\u20ac", max_size=30),
    st.lists(st.text("abc\u20ac", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
)
def test_stop_strings_cut_exactly(tokenizer: Tokenizer, text: str, stops: tuple[str, ...]) -> None:
    choice = plain(tokenizer, stops)
    pieces = run(choice, list(text.encode()))
    # Character by character: the answer ends where the first stop string is complete.
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(stops)]
    assert choice.stopped == bool(ends)
    shown = text
    if ends:
        met = [stop for stop in stops if text[: ends[0]].endswith(stop)]
        shown = text[: ends[0] - max(map(len, met))]
    assert content(pieces) == joined(pieces) == shown


def test_a_stop_string_inside_a_character_sequence_is_held_back(tokenizer: Tokenizer) -> None:
    choice = plain(tokenizer, ("<end>",))
    assert content(choice.feed(ord("a"), None)) == "a"
    assert [content(choice.feed(token, None)) for token in b"<en"] == ["", "", ""]
    assert content(choice.feed(ord("x"), None)) == "<enx"
    assert not choice.stopped


def test_reasoning_and_content_have_their_own_tokens(tokenizer: Tokenizer) -> None:
    choice = chat(tokenizer, thinking=True)
    pieces = run(choice, [*b"why", 279, *b"so"])
    assert (reasoning(pieces), content(pieces)) == ("why", "so")
    assert joined([p for p in pieces if p.delta.reasoning]) == "why"
    assert joined([p for p in pieces if p.delta.content]) == "so"
    assert (choice.n_tokens, choice.n_reasoning) == (6, 3)


def test_a_stop_string_ends_reasoning_too(tokenizer: Tokenizer) -> None:
    choice = chat(tokenizer, ("STOP",), thinking=True)
    pieces = run(choice, list(b"one STOP two"))
    assert choice.stopped and reasoning(pieces) == "one "


def test_text_held_back_comes_before_the_tool_call(tokenizer: Tokenizer) -> None:
    pieces = run(chat(tokenizer, ("so long",)), [*b"so", 267, 269, *b"functions.f:0", 270, *b"{}", 271, 268])
    assert [piece.delta.content for piece in pieces][:1] == ["so"]
    assert [piece.delta.tool.name for piece in pieces if piece.delta.tool][:1] == ["f"]


def test_stop_ids_show_nothing_but_count(tokenizer: Tokenizer) -> None:
    choice = plain(tokenizer)
    pieces = [*choice.feed(97, TokenLogprob(97, -1.0)), *choice.feed(98, TokenLogprob(98, -2.0), last=True)]
    pieces += choice.finish()
    assert (content(pieces), choice.n_tokens) == ("a", 2)
    assert [token.text for piece in pieces for token in piece.tokens] == ["a", ""]
    assert [token.text for piece in run(chat(tokenizer), [97, 258]) for token in piece.tokens] == ["a"]


def test_an_ignored_end_does_not_end_the_text(tokenizer: Tokenizer) -> None:
    for choice in (plain(tokenizer), chat(tokenizer)):
        assert content(run(choice, [97, 258, 98])) == "ab"


def test_special_tokens_are_shown_where_asked_for(tokenizer: Tokenizer) -> None:
    assert content(run(plain(tokenizer), [97, 278, 98])) == "ab"
    assert content(run(plain(tokenizer, show_specials=True), [97, 278, 98])) == "a<think>b"
