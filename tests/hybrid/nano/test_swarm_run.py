"""Swarms of `hybrid.nano.swarm_run`, decided by a scripted model that is right, or wrong in one way."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from hybrid.nano import words
from hybrid.nano.conversation import Json, call_of
from hybrid.nano.swarm_run import Refused, run_swarm, swarm_of

Choice = dict[str, Any]
CASES = [(4, False), (10, False), (30, True)]


def said(content: str = "", calls: tuple[Json, ...] | list[Json] = ()) -> Choice:
    message = {"role": "assistant", "content": content or None}
    return {"message": message | ({"tool_calls": list(calls)} if calls else {}), "finish_reason": "stop"}


class Model:
    """A model without fault. `spoil` sees (whether the orchestrator answers, number of the turn, choice)."""

    def __init__(
        self, spoil: Callable[[bool, int, Choice], Choice] = lambda orchestrates, turn, choice: choice
    ) -> None:
        self.spoil = spoil
        self.wanted = ""  # the property
        self.items: list[str] = []
        self.thinking: set[bool] = set()

    async def __call__(self, thinking: bool, tools: list[Json], messages: list[Json], max_tokens: int) -> Choice:
        self.thinking.add(thinking)
        orchestrates = any(tool["function"]["name"] == "assign_task" for tool in tools)
        turn = sum(message["role"] == "assistant" for message in messages)
        choice = self.orchestrate(messages, turn) if orchestrates else self.work(messages, turn)
        return self.spoil(orchestrates, turn, choice)

    def orchestrate(self, messages: list[Json], turn: int) -> Choice:
        if turn == 0:
            return said(calls=[call_of(0, "create_subagent", name="Finder", system_prompt="You find.")])
        if turn == 1:
            tasks = [f"Find it of {item}." for item in self.items]
            return said(calls=[call_of(i, "assign_task", agent="Finder", prompt=t) for i, t in enumerate(tasks, 1)])
        reports = [re.fullmatch(r"(.*) is (.*)", m["content"]) for m in messages if m["role"] == "tool"][1:]
        return said("\n".join(f"- {report[1]}: {report[2]}" for report in reports if report))

    def work(self, messages: list[Json], turn: int) -> Choice:
        item = messages[1]["content"].removeprefix("Find it of ").removesuffix(".")
        if turn == 0:
            return said(calls=[call_of(0, "search", query=f"{self.wanted} of {item}")])
        facts = dict(line.split(": ") for line in messages[-1]["content"].split("\n") if ": " in line)
        return said(f"{item} is {facts.get(f'{self.wanted} of {item}', 'unknown')}")


async def outcome(
    model: Model, n: int = 4, numbered: bool = False, seed: int = 11, thinking: bool = True
) -> str | None:
    swarm = swarm_of(seed, n, numbered, thinking)
    model.wanted, model.items = swarm.wanted, list(swarm.facts)
    return await run_swarm(swarm, model)


@pytest.mark.parametrize(("n", "numbered"), CASES)
@pytest.mark.parametrize("seed", range(12))
async def test_a_model_without_fault_succeeds(n: int, numbered: bool, seed: int) -> None:
    model = Model()
    assert await outcome(model, n, numbered, seed, thinking=bool(seed % 2)) is None
    assert model.thinking == {bool(seed % 2)}


@pytest.mark.parametrize(("n", "numbered"), CASES)
def test_swarms_are_held_out_and_always_the_same(n: int, numbered: bool) -> None:
    swarms = [swarm_of(seed, n, numbered, True) for seed in range(20)]
    assert swarms == [swarm_of(seed, n, numbered, True) for seed in range(20)]
    assert len({swarm.messages[-1]["content"] for swarm in swarms}) > 15
    for swarm in swarms:
        assert len(swarm.facts) == n
        names = [item for item in swarm.facts if item.isalpha()]
        assert all(words.is_held_out(name) for name in names)
        noun = next(iter(swarm.facts)).split(" ")[0]
        asked = [f"{noun}s", f"1 to {n}"] if numbered else [swarm.wanted, *swarm.facts]
        assert re.search(".*".join(map(re.escape, asked)), swarm.messages[-1]["content"], re.DOTALL)


def test_a_search_says_the_same_twice_and_at_times_more_than_was_asked() -> None:
    n_lines = set()
    for seed in range(40):
        swarm = swarm_of(seed, 3, False, True)
        for item, value in swarm.facts.items():
            query = f"{swarm.wanted} of {item}"
            found = swarm.found(query).split("\n")
            assert found == swarm.found(query).split("\n")
            assert [line for line in found if line.startswith(f"{query}:")] == [f"{query}: {value}"]
            n_lines.add(len(found))
    assert n_lines == {1, 2, 3}
    assert swarm.found(f"{swarm.wanted} of nothing") == swarm.found("hello") == "Nothing found."


def calls_of(choice: Choice) -> list[Json]:
    calls: list[Json] = choice["message"].get("tool_calls", [])
    return calls


def in_turn(wanted: int, orchestrator: bool, change: Callable[[Choice], object]) -> Model:
    """A model that is wrong in this turn only."""

    def spoil(orchestrates: bool, turn: int, choice: Choice) -> Choice:
        if (orchestrates, turn) == (orchestrator, wanted):
            change(choice)
        return choice

    return Model(spoil)


def argue(text: str) -> Callable[[Choice], object]:
    return lambda choice: calls_of(choice)[0]["function"].update(arguments=text)


def rename(choice: Choice) -> None:
    calls_of(choice)[0]["function"]["name"] = "delete_all"


def answer_wrongly(choice: Choice) -> None:
    choice["message"]["content"] = re.sub(r": (.*)$", r": x\1", choice["message"]["content"])


def swap_answers(choice: Choice) -> None:
    lines = [line.split(": ") for line in choice["message"]["content"].split("\n")]
    lines[0][1], lines[1][1] = lines[1][1], lines[0][1]
    choice["message"]["content"] = "\n".join(": ".join(line) for line in lines)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (in_turn(1, True, lambda choice: calls_of(choice).pop()), "too few tasks"),
        (in_turn(1, True, lambda choice: calls_of(choice).append(calls_of(choice)[0])), "too many tasks"),
        (in_turn(1, True, argue('{"agent": "Other", "prompt": "Find it."}')), "never created"),
        (in_turn(0, True, argue('{"name": "Finder"')), "not JSON"),
        (in_turn(0, True, argue("[]")), "no object"),
        (in_turn(0, True, argue('{"name": "Finder"}')), "does not have"),
        (in_turn(0, True, argue('{"name": "Finder", "system_prompt": 1}')), "does not have"),
        (in_turn(1, True, rename), "does not need"),
        (in_turn(0, False, rename), "does not need"),
        (in_turn(0, False, argue('{"query": "else"}')), "not in the final answer"),
        (in_turn(1, True, lambda choice: choice.update(finish_reason="length")), "did not end"),
        (in_turn(1, False, lambda choice: choice.update(finish_reason="length")), "did not end"),
        (in_turn(2, True, answer_wrongly), "not in the final answer"),
        (in_turn(2, True, swap_answers), "not in the final answer"),
        (in_turn(2, True, lambda choice: choice["message"].update(content=None)), "not in the final answer"),
    ],
)
async def test_what_goes_wrong_is_said(model: Model, why: str) -> None:
    found = await outcome(model)
    assert found is not None
    assert why in found


async def test_the_model_may_not_go_on_for_ever() -> None:
    model = Model(lambda orchestrates, turn, choice: said(calls=[call_of(turn, "search", query="x")]))
    assert await outcome(model) == "too many turns"


async def test_a_refused_turn_is_a_failure_but_a_broken_server_is_not() -> None:
    def refuse(orchestrates: bool, turn: int, choice: Choice) -> Choice:
        raise Refused("too long")

    def break_down(orchestrates: bool, turn: int, choice: Choice) -> Choice:
        raise ConnectionError

    assert "refused" in str(await outcome(Model(refuse)))
    with pytest.raises(ConnectionError):
        await outcome(Model(break_down))


async def test_a_page_is_not_taken_for_another_with_a_longer_number() -> None:
    swarm = swarm_of(5, 12, True, False)
    lines = [f"- {item}: {value}" for item, value in swarm.facts.items()]
    swarm.check("\n".join(lines))
    with pytest.raises(Exception, match="not in the final answer"):
        swarm.check("\n".join(lines[1:]))  # "page 1" is missing, "page 11" is there
