"""The training data: right answers, a clean split, the same from the same seed."""

import itertools
import json
import random
import re

import pytest

from hybrid.nano import mixture, words
from hybrid.nano.conversation import Conversation
from hybrid.nano.data import known_tool, unseen_tool
from hybrid.nano.sums import arithmetic, worked
from hybrid.nano.swarm_data import FIND, READ, sub_agent

FAMILIES = list(mixture.FULL.shares)


def texts(conversation: Conversation) -> str:
    return json.dumps([conversation.tools, conversation.messages])


@pytest.mark.parametrize("a", range(0, 100, 7))
def test_the_worked_sum_is_true_and_holds_the_answer(a: int) -> None:
    for b, plus in itertools.product(range(100), (True, False)):
        x, y = (a, b) if plus else (max(a, b), min(a, b))
        text = worked(x, y, plus)
        steps = re.findall(r"((?:\d+ [+-] )+\d+) = (\d+)", text)
        assert len(steps) == 2
        for expression, result in steps:
            assert eval(expression) == int(result), text
        (_, ones), (_, tens) = steps
        assert int(tens) * 10 + int(ones) % 10 == (x + y if plus else x - y)


def test_held_out_sums_are_never_trained_on() -> None:
    rng = random.Random(1)
    pairs = {True: set(), False: set()}  # type: dict[bool, set[tuple[str, ...]]]
    for held_out in (True, False):
        for _ in range(4000):
            asked = arithmetic(rng, held_out).messages[0]["content"]
            found = re.findall(r"\d+", asked)
            if re.search(r"\d \+ \d", asked):
                pairs[held_out].add(tuple(found))
    assert len(pairs[True]) > 200
    assert not pairs[True] & pairs[False]


@pytest.mark.parametrize("make", FAMILIES)
def test_the_same_seed_gives_the_same_conversation(make: mixture.Make) -> None:
    assert texts(make(random.Random(7), False)) == texts(make(random.Random(7), False))
    assert texts(make(random.Random(7), False)) != texts(make(random.Random(8), False))


@pytest.mark.parametrize("held_out", [False, True])
def test_names_stay_on_their_side(held_out: bool) -> None:
    rng = random.Random(3)
    assert all(words.is_held_out(words.name(rng, held_out)) == held_out for _ in range(300))
    assert all(words.is_held_out(words.thing(rng, held_out)) == held_out for _ in range(300))


def test_held_out_phrasings_never_train() -> None:
    rng = random.Random(4)
    unseen = ("Can you please find the ", "Can you please read ")
    assert unseen[0] in FIND.asked[-1]
    assert unseen[1] in READ.asked[-1]
    trained = [str(make(rng, False).messages) for make in FAMILIES for _ in range(60)]
    assert not any(start in text for start in unseen for text in trained)
    assert any(unseen[0] in str(mixture.named(2, 5)(rng, True).messages) for _ in range(30))


@pytest.mark.parametrize("held_out", [False, True])
def test_calls_fit_the_declared_tools(held_out: bool) -> None:
    rng = random.Random(5)
    for make in (known_tool, unseen_tool, sub_agent, mixture.named(2, 5), mixture.numbered(3, 12)):
        for _ in range(40):
            talk = make(rng, held_out)
            declared = {t["function"]["name"]: t["function"]["parameters"]["required"] for t in talk.tools}
            calls = [c["function"] for m in talk.messages for c in m.get("tool_calls", ())]
            assert calls
            for call in calls:
                assert list(json.loads(call["arguments"])) == sorted(declared[call["name"]])


def test_answers_come_from_the_prompt() -> None:
    """Every name and number of a merged answer stands in the results before it."""
    rng = random.Random(6)
    for _ in range(40):
        talk = mixture.named(2, 6)(rng, True)
        results = [m["content"] for m in talk.messages if m["role"] == "tool"][1:]
        lines = talk.messages[-1]["content"].split("\n")
        assert len(lines) == len(results)
        for line, result in zip(lines, results, strict=True):
            item, value = line.removeprefix("- ").split(": ", 1)
            assert item in result
            assert result.endswith(f" is {value}.")


def test_numbered_items_count_up() -> None:
    talk = mixture.numbered(30, 30)(random.Random(9), True)
    calls = [c for m in talk.messages for c in m.get("tool_calls", ())][1:]
    numbers = [int(re.findall(r"\d+", json.loads(c["function"]["arguments"])["prompt"])[-1]) for c in calls]
    assert numbers == list(range(1, 31))
    assert [c["id"] for c in calls] == [f"functions.assign_task:{i}" for i in range(1, 31)]
