"""The grader: what it draws, what it takes for right, and how it talks to a server (here a scripted one)."""

import asyncio
import copy
import json
import math
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hybrid.nano import evaluate
from hybrid.nano.conversation import Json, encode
from hybrid.nano.data import known_tool
from hybrid.nano.evaluate import EvaluationError, Turn, connected, families, grade, serving, turns_of, wilson
from hybrid.nano.mixture import named
from hybrid.nano.sums import arithmetic
from hybrid.nano.swarm_run import Refused
from hybrid.nano.talk import talk
from hybrid.nano.vocabulary import read_vocabulary


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (8, 10), (190, 200), (1, 1)])
def test_the_interval_solves_wilsons_equation(right: int, n: int) -> None:
    z, share = 1.959964, right / n
    for bound in wilson(right, n):
        assert math.isclose((bound - share) ** 2, z * z * bound * (1 - bound) / n, abs_tol=1e-12)
    low, high = wilson(right, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


def test_the_interval_of_eight_in_ten() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # as statsmodels has it


def test_every_row_gets_its_turns_and_no_turn_twice() -> None:
    counts: Counter[str] = Counter()
    for make, names, n in families(8):
        turns = turns_of(make, names, n)
        assert len({(turn.row, turn.key) for turn in turns}) == len(turns)
        assert {turn.row for turn in turns} == set(names)
        assert turns == turns_of(make, names, n)
        counts.update(turn.row for turn in turns)
    long = {"fan-out numbered 30", "merge numbered 30", "fan-out numbered 100"}
    assert {row for row, n in counts.items() if n != 8} == long
    assert {counts[row] for row in long} == {2}
    wanted = {f"fan-out {n}" for n in (2, 3, 4, 6, 8, 10, 12)} | {"tool unseen", "sum think", "sum direct", "chat"}
    assert wanted <= set(counts)


def test_a_turn_is_asked_for_with_room_for_its_answer() -> None:
    vocabulary = read_vocabulary(Path(evaluate.__file__).with_name("model"))
    for make, _, _ in families(1):
        made = make(random.Random(4), True)
        spans = {name: stop - start for start, stop, name in encode(made, vocabulary).turns}
        for at, name in made.graded.items():
            turn = Turn(name, made.thinking, made.tools, made.messages[:at], made.messages[at])
            assert spans.get(name, 0) <= turn.max_tokens


def test_arithmetic_has_two_digits_and_differences_that_training_never_asks() -> None:
    rng, drawn = random.Random(9), random.Random(10)
    pairs: Counter[str] = Counter()
    trained = {tuple(re.findall(r"\d+", arithmetic(drawn, False).messages[0]["content"])) for _ in range(60_000)}
    for _ in range(150):
        made = evaluate.two_digits(rng, True)
        a, b = re.findall(r"\d+", made.messages[0]["content"])
        assert len(a) == len(b) == 2
        minus = made.messages[-1]["content"] == str(int(a) - int(b))
        pairs["minus" if minus else "plus"] += 1
        assert not {(a, b), (b, a)} & trained
    assert pairs["minus"] > 3


def test_chat_is_split_by_whether_training_asks_the_same() -> None:
    rng = random.Random(77)
    trained = {m["content"] for _ in range(3000) for m in talk(rng, False).messages if m["role"] == "user"}
    turns = turns_of(evaluate.split_talk(), ("chat", "chat, trained"), 60)
    asked = {row: {t.before[-1]["content"] for t in turns if t.row == row} for row in ("chat", "chat, trained")}
    assert not asked["chat"] & trained
    assert len(asked["chat, trained"] & trained) > len(asked["chat, trained"]) / 2  # others have a rare "Thanks."


def turns() -> list[Turn]:
    return [*turns_of(known_tool, ("tools parallel",), 6), *turns_of(named(3, 3), ("merge 3",), 6)]


class Answering:
    """An `Ask` that gives the right answer of every turn, changed by `change`."""

    def __init__(self, change: Callable[[Json], object] = lambda choice: None) -> None:
        self.right = {turn.key: turn.right for turn in turns()}
        self.change = change

    async def __call__(self, thinking: bool, tools: list[Json], messages: list[Json], max_tokens: int) -> Json:
        message = copy.deepcopy(self.right[json.dumps([thinking, tools, messages])])
        # As a server says it: no empty fields, null beside calls.
        message["content"] = message["content"] or None
        if not message.get("reasoning_content"):
            message.pop("reasoning_content", None)
        choice = {"message": message, "finish_reason": "tool_calls" if message.get("tool_calls") else "stop"}
        self.change(choice)
        return choice


async def test_right_answers_are_exact() -> None:
    rows = await grade(Answering(), turns())
    assert [(row.name, row.n, row.right, row.misses) for row in rows] == [
        ("tools parallel", 6, 6, []),
        ("merge 3", 6, 6, []),
    ]
    assert rows[0].report()["share"] == 1.0
    assert "tools parallel" in rows[0].line() and "1.000" in rows[0].line()


def on_calls(change: Callable[[list[Json]], object]) -> Callable[[Json], object]:
    return lambda choice: change(choice["message"]["tool_calls"]) if "tool_calls" in choice["message"] else None


def space(calls: list[Json]) -> None:
    calls[0]["function"]["arguments"] = calls[0]["function"]["arguments"].replace(": ", ":", 1)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda choice: choice["message"].update(reasoning_content="I think."), [0, 0]),
        (lambda choice: choice["message"].update(content=(choice["message"]["content"] or "") + "."), [0, 0]),
        (lambda choice: choice.update(finish_reason="length"), [0, 0]),
        (on_calls(space), [0, 6]),
        (on_calls(lambda calls: calls.reverse()), [0, 6]),
        (on_calls(lambda calls: calls.pop()), [0, 6]),
        (on_calls(lambda calls: calls.append(calls[0])), [0, 6]),
        (on_calls(lambda calls: calls[0].update(id="functions.x:7")), [0, 6]),
        (on_calls(lambda calls: calls[0]["function"].update(name="x")), [0, 6]),
    ],
)
async def test_any_other_answer_is_not(change: Callable[[Json], object], right: list[int]) -> None:
    rows = await grade(Answering(change), turns())
    assert [row.right for row in rows] == right
    assert [len(row.misses) for row in rows] == [min(3, row.n - row.right) for row in rows]


@asynccontextmanager
async def scripted(answer: Callable[[Json], tuple[int, Any]]) -> AsyncIterator[str]:
    """The URL of a server whose chat endpoint answers `answer(body)`: status and JSON."""

    async def chat(request: web.Request) -> web.Response:
        status, said = answer(await request.json())
        return web.json_response(said, status=status)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "nano"}, {"id": "nano-instant"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def test_what_is_sent_and_read() -> None:
    bodies: list[Json] = []

    def answer(body: Json) -> tuple[int, Any]:
        bodies.append(body)
        return 200, {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}

    user = {"role": "user", "content": "Hello"}
    async with scripted(answer) as url, connected(url) as (model, ask):
        assert model == "nano"
        assert (await ask(True, [], [user], 7))["message"] == {"content": "yes"}
        await asyncio.gather(*(ask(False, [{"type": "function"}], [user], 8) for _ in range(40)))
    same = {"model": "nano", "messages": [user], "temperature": 0}
    assert bodies[0] == same | {"max_tokens": 7, "chat_template_kwargs": {"thinking": True}}
    tools = {"tools": [{"type": "function"}]}
    assert bodies[1:] == [same | tools | {"max_tokens": 8, "chat_template_kwargs": {"thinking": False}}] * 40


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        ((400, {"error": "too long"}), Refused, "400.*too long"),
        ((500, {"error": "broken"}), EvaluationError, "500.*broken"),
        ((200, {"choices": []}), EvaluationError, "no OpenAI-compatible server"),
    ],
)
async def test_other_answers_are_named(answer: tuple[int, Any], error: type[Exception], says: str) -> None:
    async with scripted(lambda body: answer) as url, connected(url) as (_, ask):
        with pytest.raises(error, match=says):
            await ask(True, [], [{"role": "user", "content": "Hello"}], 7)


async def test_nobody_there() -> None:
    async with scripted(lambda body: (200, {})) as url:
        pass
    with pytest.raises(EvaluationError, match="is the server running"):
        async with connected(url):
            pass


def test_a_server_that_does_not_start_is_shown(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"(?s)not ready.*exit status.*log ends with.*config.json"):
        with serving(tmp_path):
            pass


def test_the_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, says in [
        (["--url", "http://x/v1", "--model", str(tmp_path)], "--model"),
        (["--items", "0"], "--items"),
        (["--out", str(tmp_path / "no" / "x.json")], "--out"),
    ]:
        with pytest.raises(SystemExit) as ended:
            evaluate.main(arguments)
        assert ended.value.code == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
