"""hybrid.nano's conversations against the server's own template and tokenizer."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from hybrid.nano import mixture, words
from hybrid.nano.conversation import Conversation, Encoded, call_of, encode
from hybrid.nano.vocabulary import SPECIAL, VOCAB_SIZE, Vocabulary, build_vocabulary, read_vocabulary
from server.chat import Chat, Message, ToolCall
from server.template import Template, load_template
from server.tokenizer import load_tokenizer

MODEL = Path(mixture.__file__).with_name("model")
FAMILIES = [*mixture.FULL.shares, *mixture.BASICS.shares]
CASES = [(make, seed, held_out) for make in FAMILIES for seed in range(6) for held_out in (False, True)]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(MODEL)


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(MODEL, load_tokenizer(MODEL))


def message_of(message: dict[str, Any]) -> Message:
    calls = [
        ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())
    ]
    return Message(
        message["role"],
        message["content"],
        message.get("reasoning_content"),
        tuple(calls),
        message.get("tool_call_id"),
    )


def one_pad_each(ids: list[int]) -> list[int]:
    """An image's pads as one, as the template writes them before the image's size is known."""
    pad = SPECIAL["<|media_pad|>"]
    return [token for i, token in enumerate(ids) if token != pad or ids[i - 1] != pad]


def answer_text(message: dict[str, Any], thinking: bool) -> str:
    """What the model writes, spelt out here once more."""
    calls = "".join(
        f"<|tool_call_begin|>{c['id']}<|tool_call_argument_begin|>{c['function']['arguments']}<|tool_call_end|>"
        for c in message.get("tool_calls", ())
    )
    section = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>" if calls else ""
    thought = f"{message['reasoning_content']}</think>" if thinking else ""
    return f"{thought}{message['content']}{section}<|im_end|>"


@pytest.mark.parametrize(("make", "seed", "held_out"), CASES)
def test_turns_are_taught_behind_the_prompts_the_server_renders(
    make: Any, seed: int, held_out: bool, vocabulary: Vocabulary, template: Template
) -> None:
    conversation: Conversation = make(random.Random(seed), held_out)
    encoded = encode(conversation, vocabulary)
    graded = sorted(conversation.graded)[-len(encoded.turns) :]
    assert encoded.turns
    for index, (start, stop, score) in zip(graded, encoded.turns, strict=True):
        messages = tuple(message_of(message) for message in conversation.messages[:index])
        chat = Chat(messages, tuple(conversation.tools), conversation.thinking)
        assert one_pad_each(encoded.ids[:start]) == template.render(chat)
        answer = answer_text(conversation.messages[index], conversation.thinking)
        assert template.tokenizer.decode(encoded.ids[start:stop]) == answer
        assert encoded.ids[start:stop] == template.tokenizer.encode(answer, parse_special=True)
        assert score == conversation.graded[index]
        assert all(encoded.weights[start:stop])
    assert sum(weight > 0 for weight in encoded.weights) == sum(stop - start for start, stop, _ in encoded.turns)


def test_decisions_weigh_more(vocabulary: Vocabulary) -> None:
    """A copied item and where it ends, a call's name, another line or call or none."""
    conversation = Conversation(False, copied=["Bravo"])
    conversation.user("Repeat: Bravo")
    conversation.assistant("copy", "Oh, Bravo!\nBye", calls=[call_of(0, "search")])
    encoded = encode(conversation, vocabulary)
    (start, stop, _), *_ = encoded.turns
    by_weight: dict[float, str] = {}
    specials = {token: name for name, token in SPECIAL.items()}
    for i in range(start, stop):
        text = specials.get(encoded.ids[i]) or vocabulary.tokens[encoded.ids[i]].decode()
        by_weight[encoded.weights[i]] = by_weight.get(encoded.weights[i], "") + text
    ends = "<|tool_call_begin|>", "<|tool_calls_section_end|>", "<|im_end|>"
    assert by_weight[2.0] == "Bravo!functions.search:0"
    assert by_weight[4.0] == "".join(("\n", *ends))


def test_a_window_keeps_positions_and_moves_turns() -> None:
    encoded = Encoded(list(range(10)), [0.0] * 4 + [1.0] * 6, list(range(10)), [(4, 6, "a"), (7, 10, "b")], [])
    cut = encoded.without(5, 8)
    assert cut.ids == cut.positions == [0, 1, 2, 3, 4, 8, 9]
    assert cut.turns == [(4, 5, "a"), (5, 7, "b")]


def test_an_item_has_the_same_ids_wherever_it_stands(vocabulary: Vocabulary) -> None:
    """But for the few made-up words that begin with a common one, such as "thearkus"."""
    known = " ".join(words.PROPERTIES).split()
    rng = random.Random(2)
    same = [0, 0]
    for _ in range(600):
        for item in mixture.FULL.draw(rng).copied:
            first = re.split("[^A-Za-z]", item)[0]
            if not first or " " in item or first in known:  # the names of properties are ordinary words
                continue
            ids = vocabulary.encode(item)
            found = [vocabulary.encode(text) for text in (f"of {item}.", f'"{item}"', f"- {item}\n", f", {item},")]
            same[all(any(f[i : i + len(ids)] == ids for i in range(len(f))) for f in found)] += 1
    assert sum(same) > 200
    assert same[False] < 0.03 * sum(same)


def test_digits_stand_alone_and_specials_are_kimis(vocabulary: Vocabulary) -> None:
    assert len(vocabulary.encode("1234567")) == 7
    assert len(vocabulary.ranks) == SPECIAL["[BOS]"]
    assert SPECIAL["[PAD]"] + 1 == VOCAB_SIZE
    assert sorted(vocabulary.ranks.values()) == list(range(len(vocabulary.ranks)))


def test_the_vocabulary_fits_the_data(vocabulary: Vocabulary) -> None:
    """What every conversation repeats is a few tokens; and a new vocabulary is like the shipped one."""
    assert len(vocabulary.encode("functions.assign_task:")) == 4
    assert len(vocabulary.encode("## Return of functions.")) <= 5
    built = build_vocabulary(["Find the total of page 1.\n", "Find the name of Bravo."] * 9, {"Bravo"}, size=560)
    assert b" the" in built.ranks
    assert b" Bravo" not in built.ranks
    assert list(built.ranks.values()) == list(range(len(built.ranks)))


def test_text_beyond_ascii_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        vocabulary.encode("café")
