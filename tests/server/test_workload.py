"""server.workload: what distributions draw, what a swarm shares, and traces line by line."""

import json
import math
import statistics
from pathlib import Path
from random import Random

import pytest

from server.workload import Distribution, Workload, WorkloadError, read_trace, swarm

LENGTH = Distribution.parse("40")


def counts(text: str, n: int = 20_000, least: int = 0) -> list[int]:
    random = Random(1)
    return [Distribution.parse(text).count(random, least) for _ in range(n)]


# Distributions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600", Distribution("fixed", 600.0)),
        (" 0.5 ", Distribution("fixed", 0.5)),
        ("400..800", Distribution("uniform", 400.0, 800.0)),
        ("0.5..2.5", Distribution("uniform", 0.5, 2.5)),
        ("600~200", Distribution("lognormal", 600.0, 200.0)),
    ],
)
def test_the_grammar(text: str, expected: Distribution) -> None:
    assert Distribution.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1..", "..1", "1...2", "800..400", "1~", "1~2~3", "1 .. 2", "nan", "inf", "1e3", "٣", "10000001"],
)
def test_what_is_no_distribution_is_named_with_the_grammar(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"write 600 \(always\), 400\.\.800") as error:
        Distribution.parse(text, "--private")
    assert str(error.value).startswith(f"--private {text!r} is ")
    assert "\n" not in str(error.value)


def test_a_fixed_number_is_always_itself() -> None:
    assert set(counts("7", 10)) == {7}
    assert Distribution.parse("0.25").draw(Random(1)) == 0.25


def test_even_counts_hit_both_ends_and_the_middle_alike() -> None:
    drawn = counts("2..5")
    assert set(drawn) == {2, 3, 4, 5}
    for value in (2, 3, 4, 5):
        # A quarter each; five standard deviations of a binomial of 20,000.
        assert abs(drawn.count(value) / len(drawn) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(drawn))


def test_even_numbers_stay_between_their_ends() -> None:
    random = Random(3)
    drawn = [Distribution.parse("0.5..2").draw(random) for _ in range(1000)]
    assert min(drawn) >= 0.5
    assert max(drawn) <= 2
    assert max(drawn) - min(drawn) > 1.4


def test_a_log_normal_has_the_mean_and_the_deviation_that_were_asked_for() -> None:
    random = Random(5)
    drawn = [Distribution.parse("600~200").draw(random) for _ in range(40_000)]
    # The mean of 40,000 has a standard deviation of 1; that of the deviation, from the fourth moment, is about 1.5.
    assert abs(statistics.fmean(drawn) - 600) < 5
    assert abs(statistics.stdev(drawn) - 200) < 8
    assert statistics.fmean(math.log(x) for x in drawn) < math.log(600) - 0.04  # skewed: half of ln(1 + 1/9) below


def test_no_deviation_and_no_mean_are_fixed() -> None:
    assert Distribution.parse("600~0").draw(Random(1)) == pytest.approx(600)
    assert Distribution.parse("0~5").draw(Random(1)) == 0


def test_a_count_has_a_least_value() -> None:
    assert min(counts("1~3", 2000, least=1)) == 1
    assert counts("0", 1, least=1) == [1]


# A swarm


@pytest.mark.parametrize("text", ["0", "0..3", "0.4", "0~2"])
@pytest.mark.parametrize("flag", ["--output", "--turns"])
def test_nothing_to_do_is_refused_by_name(flag: str, text: str) -> None:
    given = {"--output": LENGTH, "--turns": LENGTH} | {flag: Distribution.parse(text)}
    with pytest.raises(WorkloadError, match=rf"^{flag}: expected 1 or more, found 0"):
        swarm(1, 10, LENGTH, given["--output"], given["--turns"])


def test_a_prompt_of_nothing_is_refused_by_name() -> None:
    nothing = Distribution.parse("0")
    with pytest.raises(WorkloadError, match=r"^--private: expected 1 or more where nothing is shared, found 0"):
        swarm(1, 0, nothing, LENGTH)
    assert swarm(1, 10, nothing, LENGTH).agents[0].prompt_tokens(0) == 10


def test_agents_share_the_first_prompt_and_nothing_else() -> None:
    found = swarm(3, 100, LENGTH, Distribution.parse("5"))
    prompts = [agent.prompt(0) for agent in found.agents]
    assert [len(prompt) for prompt in prompts] == [140] * 3
    assert len({prompt[:100] for prompt in prompts}) == 1
    own = [set(prompt[100:]) | {agent.own_id} for prompt, agent in zip(prompts, found.agents, strict=True)]
    assert all(not (a & b) for i, a in enumerate(own) for b in own[i + 1 :])
    assert all(not ids & set(prompts[0][:100]) for ids in own)


def test_a_later_prompt_is_the_conversation_so_far_and_the_tools_result() -> None:
    found = swarm(
        2, 10, LENGTH, Distribution.parse("5"), Distribution.parse("3"), Distribution.parse("7"),
        Distribution.parse("2.5"),
    )  # fmt: skip
    for agent in found.agents:
        first, second, third = (agent.prompt(turn) for turn in range(3))
        assert second[: len(first)] == first
        assert second[len(first) : len(first) + 5] == (agent.own_id,) * 5  # the answer
        assert len(second) == len(first) + 5 + 7
        assert third[: len(second)] == second
        assert [agent.prompt_tokens(turn) for turn in range(3)] == [len(p) for p in (first, second, third)]
        assert [turn.wait for turn in agent.turns] == [0.0, 2.5, 2.5]
    assert found.n_requests == 6


def test_a_swarm_is_a_function_of_its_seed() -> None:
    def made(agents: int, seed: int) -> Workload:
        return swarm(
            agents, 100, Distribution.parse("40~20"), Distribution.parse("1..50"), Distribution.parse("1..4"),
            Distribution.parse("10~5"), Distribution.parse("1..9"), seed,
        )  # fmt: skip

    assert made(20, 4) == made(20, 4)
    assert made(20, 4) != made(20, 5)
    assert made(30, 4).agents[:20] == made(20, 4).agents
    lengths = {tuple((turn.output, turn.wait) for turn in agent.turns) for agent in made(20, 4).agents}
    assert len(lengths) > 10  # each draws its own; two with one turn may agree by chance


def test_there_is_always_something_to_ask_and_to_answer() -> None:
    """Log-normals with a mean of 1 and a tail: most draws round to 0."""
    skewed = Distribution.parse("1~30")
    found = swarm(100, 0, skewed, skewed, skewed)
    assert min(agent.prompt_tokens(0) for agent in found.agents) == 1
    assert min(turn.output for agent in found.agents for turn in agent.turns) == 1


@pytest.mark.parametrize(("agents", "shared"), [(0, 10), (-1, 10), (1, -1), (1, 10**9)])
def test_a_swarm_of_nobody_is_refused(agents: int, shared: int) -> None:
    with pytest.raises(WorkloadError, match=f"{agents} agents and {shared} shared"):
        swarm(agents, shared, LENGTH, LENGTH)


# Traces


def trace(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def line(**changes: object) -> dict[str, object]:
    return {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [4, 9]} | changes


def test_lines_of_the_published_format(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        '{"timestamp": 3000, "input_length": 915, "output_length": 355, "hash_ids": [0, 462]}',
        "",
        '{"timestamp": 5999, "input_length": 1053, "output_length": 26, "hash_ids": [0, 773, 774]}',
    )
    found = read_trace(path)
    first, second = found.agents
    assert [first.turns[0].wait, second.turns[0].wait] == [0.0, pytest.approx(2.999)]
    assert [first.turns[0].output, second.turns[0].output] == [355, 26]
    assert first.prompt(0) == (0,) * 512 + (462,) * 403
    assert second.prompt(0) == (0,) * 512 + (773,) * 512 + (774,) * 29


def test_seconds_where_the_key_says_so_and_any_order(tmp_path: Path) -> None:
    late, early = line(timestamp=12_500), {"timestamp_s": 10.25, "input_length": 5, "output_length": 1}
    assert [agent.turns[0].wait for agent in read_trace(trace(tmp_path, late, early)).agents] == [2.25, 0.0]


def test_without_hash_ids_nothing_is_shared(tmp_path: Path) -> None:
    plain = {"timestamp": 0, "input_length": 600, "output_length": 3}
    prompts = [agent.prompt(0) for agent in read_trace(trace(tmp_path, plain, plain, line())).agents]
    assert [len(prompt) for prompt in prompts] == [600, 600, 700]
    assert len({prompt[0] for prompt in prompts}) == 3


def test_an_answer_is_nobody_elses_prompt(tmp_path: Path) -> None:
    found = read_trace(trace(tmp_path, line(), line(hash_ids=[0, 1])))
    prompt_ids = {token for agent in found.agents for token in agent.prompt(0)}
    assert not prompt_ids & {agent.own_id for agent in found.agents}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        (line(type="text"), "unknown key 'type'; known are timestamp, timestamp_s,"),
        ({"input_length": 5, "output_length": 1}, "either timestamp (milliseconds) or timestamp_s (seconds)"),
        (line(timestamp_s=1), "either timestamp (milliseconds) or timestamp_s (seconds)"),
        (line(timestamp=-1), "timestamp must be a number from 0, not -1"),
        (line(timestamp="1"), 'timestamp must be a number from 0, not "1"'),
        (line(timestamp=True), "timestamp must be a number from 0, not true"),
        (line(timestamp=math.nan), "timestamp must be a number from 0, not NaN"),
        (line(timestamp=math.inf), "timestamp must be a number from 0, not Infinity"),
        (line(timestamp=10**400), "timestamp must be a number from 0, not 1000"),
        (line(input_length=0), "input_length must be a whole number of tokens from 1, not 0"),
        (line(input_length=1.5), "input_length must be a whole number of tokens from 1, not 1.5"),
        (line(input_length=10**12), "input_length must be a whole number of tokens from 1"),
        (line(output_length=None), "output_length must be a whole number of tokens from 1, not nothing"),
        (line(hash_ids=[4]), "1 hash_ids for 700 tokens; at 512 tokens each there must be 2"),
        (line(hash_ids=[4, -1]), "hash_ids must be a list of whole numbers from 0"),
        (line(hash_ids=[4, True]), "hash_ids must be a list of whole numbers from 0"),
        (line(hash_ids=[4, 2**63]), "hash_ids must be a list of whole numbers from 0"),
        (line(hash_ids="49"), "hash_ids must be a list of whole numbers from 0"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, bad: object, said: str) -> None:
    path = trace(tmp_path, line(), "", bad, line())
    with pytest.raises(WorkloadError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_trace_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"none\.jsonl: No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(WorkloadError, match="no requests"):
        read_trace(trace(tmp_path, "", " "))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"timestamp": "\xff"}\n')
    with pytest.raises(WorkloadError, match=r"trace\.jsonl:1: not JSON"):
        read_trace(path)
