"""The output parser on the golden completions, on every way to cut them, and on what models get wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.parse import OutputParser, StopStrings
from server.tokenizer import Tokenizer, load_tokenizer
from tests.reference.golden import cases, fold
from tests.reference.small_tokenizer import OFFSETS, byte_level, write_json, write_kimi

Folded = tuple[str, str, list[dict[str, str]]]

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose marks of reasoning are plain text."""
    return load_tokenizer(write_json(tmp_path_factory.mktemp("json"), byte_level("<|end|>"), eos_token="<|end|>"))


def run(tokenizer: Tokenizer, ids: list[int], in_reasoning: bool = False, tools: bool = True) -> tuple[Folded, bool]:
    parser = OutputParser(tokenizer, in_reasoning, tools)
    deltas = [delta for i in ids for delta in parser.feed(i)] + parser.finish()
    assert parser.finish() == [] and parser.feed(ids[0] if ids else 0) == [], "nothing comes after the end"
    return fold(deltas), parser.saw_tool_calls


def parsed(tokenizer: Tokenizer, text: str, in_reasoning: bool = False, tools: bool = True) -> Folded:
    return run(tokenizer, tokenizer.encode(text, parse_special=True), in_reasoning, tools)[0]


def made(name: str, arguments: str, index: int = 0) -> dict[str, str]:
    return {"id": f"functions.{name}:{index}", "name": name, "arguments": arguments}


def test_golden(kimi_dir: Path) -> None:
    tokenizer = load_tokenizer(kimi_dir)
    for case in cases(kimi_dir, "toolcalls"):
        (reasoning, content, calls), complete = run(tokenizer, case["ids"], case["thinking"])
        # A call without arguments is "{}" to clients, where the published parser leaves an empty string.
        assert calls == [call | {"arguments": call["arguments"] or "{}"} for call in case["tool_calls"]], case["id"]
        assert complete == bool(case["tool_calls"])
        if "content" in case:
            assert (reasoning, content) == (case["reasoning_content"], case["content"]), case["id"]


def test_golden_cut_anywhere(kimi_dir: Path) -> None:
    tokenizer = load_tokenizer(kimi_dir)
    for case in cases(kimi_dir, "toolcalls"):
        whole, _ = run(tokenizer, case["ids"], case["thinking"])
        for end in range(len(case["ids"])):
            (reasoning, content, calls), _ = run(tokenizer, case["ids"][:end], case["thinking"])
            shown = reasoning + content + "".join("".join(call.values()) for call in calls)
            assert not any(name in shown for name in tokenizer.specials), (case["id"], end)
            assert whole[0].startswith(reasoning)
            complete = [call for call in calls if call in whole[2]]
            assert complete == whole[2][: len(complete)] and len(calls) - len(complete) <= 1


def test_characters_are_whole(small: Tokenizer) -> None:
    parser = OutputParser(small, False, False)
    assert [fold(parser.feed(b))[1] for b in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert parser.feed(0xF0) == []
    assert fold(parser.finish()) == ("", "\ufffd", [])


def test_reasoning_then_content(small: Tokenizer) -> None:
    assert parsed(small, "why</think>so", in_reasoning=True) == ("why", "so", [])
    assert parsed(small, "why", in_reasoning=True) == ("why", "", [])
    assert parsed(small, "so") == ("", "so", [])
    assert parsed(small, "<think>why</think>so") == ("why", "so", []), "the model opens it itself"
    assert parsed(small, "\n<think>why</think>\n\nso") == ("why", "\n\nso", [])


def test_no_special_token_shows(small: Tokenizer) -> None:
    text = "a<|im_user|>b</think>[PAD]c<|media_pad|>d<|tool_call_end|>e<|reserved_token_900|>"
    assert parsed(small, text) == ("", "abcde", [])
    assert parsed(small, "x<|im_end|>y<|im_user|>") == ("", "x", []), "nothing after the end"
    assert parsed(small, "x[EOS]y", in_reasoning=True) == ("x", "", [])
    assert run(small, [0x78, 300, 0x79]) == (("", "xy", []), False), "an id without a token"


def test_calls_of_every_shape(small: Tokenizer) -> None:
    def calls(*bodies: str) -> str:
        return SECTION + "".join(CALL + body + END_CALL for body in bodies) + END_SECTION

    two = calls(f"functions.f:0{ARGS}{{}}", f' functions.g.h-i:1\n{ARGS} {{"a": " b "}} \n')
    assert parsed(small, "A " + two) == ("", "A ", [made("f", "{}"), made("g.h-i", '{"a": " b "}', 1)])
    assert parsed(small, "\n" + two + "\n")[1] == "", "white space around calls is layout"
    assert parsed(small, calls(f"functions.f:0{ARGS}"))[2] == [made("f", "{}")]
    assert parsed(small, calls("functions.f:0"))[2] == [made("f", "{}")]
    assert parsed(small, calls(f"get:7{ARGS}1"))[2] == [{"id": "get:7", "name": "get", "arguments": "1"}]
    assert parsed(small, calls() + "done") == ("", "done", [])
    assert parsed(small, two + " and on")[1] == " and on"


def test_a_section_ends_the_reasoning(small: Tokenizer) -> None:
    text = f"hm{SECTION}{CALL}functions.f:0{ARGS}{{}}{END_CALL}{END_SECTION}"
    assert parsed(small, text, in_reasoning=True) == ("hm", "", [made("f", "{}")])
    assert parsed(small, text.replace(SECTION, ""), in_reasoning=True) == ("hm", "", [made("f", "{}")])


def test_marks_left_out(small: Tokenizer) -> None:
    text = f"{CALL}functions.f:0{ARGS}{{}}{CALL}functions.g:1{ARGS}[]{END_SECTION}"
    assert run(small, small.encode(text, parse_special=True)) == (("", "", [made("f", "{}"), made("g", "[]", 1)]), True)


@pytest.mark.parametrize(
    ("text", "content", "calls", "complete"),
    [
        (f"{SECTION}{CALL}functions.ge", "functions.ge", [], False),
        (f"{SECTION}{CALL}functions.f:0<|im_end|>", "functions.f:0", [], False),
        (f'{SECTION}{CALL}functions.f:0{ARGS}{{"a', "", [made("f", '{"a')], False),
        (f"{SECTION}{CALL}functions.f:0{ARGS}", "", [made("f", "")], False),
        (f"{SECTION}{CALL}no id{ARGS}{{}}{END_CALL}{END_SECTION}", "no id{}", [], False),
        (f"{SECTION}{CALL}functions.f{ARGS} 1 {END_CALL}{END_SECTION}", "functions.f 1 ", [], False),
        (f"{SECTION}{CALL}no id{END_CALL}{END_SECTION}", "no id", [], False),
        (f"{SECTION}{CALL} {ARGS}x{END_CALL}{END_SECTION}", " x", [], False),
        (f"{SECTION} stray {CALL}functions.f:0{ARGS}1{END_CALL}", " stray ", [made("f", "1")], True),
        (f"{SECTION}{CALL}", "", [], False),
        (f"a{SECTION}\n", "a", [], False),
    ],
)
def test_what_is_no_call_is_content(
    small: Tokenizer, text: str, content: str, calls: list[dict[str, str]], complete: bool
) -> None:
    assert run(small, small.encode(text, parse_special=True)) == (("", content, calls), complete)


def test_without_tools_calls_are_content(small: Tokenizer) -> None:
    text = f"hm{SECTION}{CALL}functions.f:0{ARGS}{{}}{END_CALL}{END_SECTION}"
    assert parsed(small, text, in_reasoning=True, tools=False) == ("hm", "functions.f:0{}", [])


def test_the_singular_marks(tmp_path: Path) -> None:
    renamed = {name.replace("calls_section", "call_section"): k for name, k in OFFSETS.items()}
    tokenizer = load_tokenizer(write_kimi(tmp_path, offsets=renamed))
    text = f"<|tool_call_section_begin|>{CALL}functions.f:0{ARGS}{{}}{END_CALL}<|tool_call_section_end|>x"
    assert parsed(tokenizer, text) == ("", "x", [made("f", "{}")])


def test_arguments_stream_as_they_come(small: Tokenizer) -> None:
    parser = OutputParser(small, False, True)
    for token in small.encode(f"{SECTION}{CALL}functions.f:0", parse_special=True):
        assert parser.feed(token) == []
    (named,) = parser.feed(small.special_id(ARGS) or 0)
    assert named.tool is not None and (named.tool.id, named.tool.name, named.tool.arguments) == (
        "functions.f:0",
        "f",
        "",
    )
    pieces = [[d.tool.arguments for d in parser.feed(b) if d.tool] for b in b' {"a" : 1} ']
    assert pieces == [[], ["{"], ['"'], ["a"], ['"'], [], [" :"], [], [" 1"], ["}"], []]
    assert parser.feed(small.special_id(END_CALL) or 0) == [] and parser.saw_tool_calls


def test_marks_of_reasoning_that_are_plain_text(spelled: Tokenizer) -> None:
    assert parsed(spelled, "why</think>so", in_reasoning=True) == ("why", "so", [])
    assert parsed(spelled, " <think>why</think>so<|end|>") == ("why", "so", [])
    assert parsed(spelled, "a </ b </thin k", in_reasoning=True) == ("a </ b </thin k", "", [])
    assert parsed(spelled, "why </thi", in_reasoning=True) == ("why ", "", []), "never half a mark"
    assert parsed(spelled, "1 <", in_reasoning=True) == ("1 <", "", [])
    assert parsed(spelled, "<thi") == ("", "", [])
    assert parsed(spelled, "<this>") == ("", "<this>", [])
    assert parsed(spelled, "a <think>b") == ("", "a <think>b", []), "only in front"


@given(data=st.data())
def test_any_ids_parse_without_a_leak(small: Tokenizer, data: st.DataObject) -> None:
    specials = st.sampled_from([*(small.specials[name] for name in OFFSETS), 900, 500])
    text = st.sampled_from([*b"functions.f:0 {}\n", 0xC3, 0xA9])
    ids = data.draw(st.lists(specials | text, max_size=40))
    (reasoning, content, calls), complete = run(small, ids, data.draw(st.booleans()), data.draw(st.booleans()))
    assert not complete or calls
    assert not set("<|>[]") & set(reasoning + content + "".join(c["id"] + c["name"] + c["arguments"] for c in calls))


@given(text=st.text("ab\n", max_size=30), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_those_of_the_whole_text(text: str, stops: list[str]) -> None:
    found = [text.find(stop) for stop in stops if stop in text]
    stopper = StopStrings(tuple(stops))
    shown = ""
    for i, char in enumerate(text):
        piece, stopped = stopper.feed(char)
        shown += piece
        assert stopped == any(stop in text[: i + 1] for stop in stops)
        held = text[len(shown) : i + 1]
        assert stopped or not held or any(stop.startswith(held) for stop in stops), "holds back no more than it must"
        if stopped:
            assert (
                shown == text[: min(found)]
                or shown == text[: i + 1][: min(text.find(s) for s in stops if s in text[: i + 1])]
            )
            return
    assert shown + stopper.flush() == text and not found


def test_stop_strings_in_one_piece() -> None:
    assert StopStrings(("xx", "b")).feed("aabxx") == ("aa", True)
    assert StopStrings(()).feed("any") == ("any", False)
    assert StopStrings(("",)).feed("any") == ("any", False)
    assert StopStrings(("?.", "ab")).feed("z?") == ("z", False)
