"""hybrid.nano.load on drawn records, against counting by sets and against the laws of probability."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.nano.load import apart, balance, in_step, law, main, mean_distinct, report
from hybrid.routes import Record, write_record

L, E, K = 2, 16, 3


def record(lengths: list[int], seed: int = 5, alike: bool = False) -> Record:
    """Random choices, all different for a token. Each document but for its first two tokens is one turn; `alike`
    tokens at the same place of a document choose the same."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths[:-1]])
    places = np.concatenate([np.arange(n) for n in lengths])
    rows = rng.random((max(lengths) if alike else sum(lengths), L, E)).argsort(axis=2)[..., :K]
    experts = np.sort(rows[places] if alike else rows, axis=2)
    return Record(
        "0", np.arange(1, L + 1), np.zeros((L, E), np.float32), np.zeros(sum(lengths), np.int64), starts,
        np.full(len(lengths), "sub-agent"), np.stack((starts + 2, starts + lengths), 1),
        np.full(len(lengths), "sub-agent call"), experts, np.zeros((0, L, E), np.float16),
    )  # fmt: skip


def test_balance() -> None:
    found = balance(np.array([[2, 2, 2, 2], [0, 6, 0, 2]]))
    assert found.busiest.tolist() == [1.0, 3.0]
    assert found.idlest.tolist() == [1.0, 0.0]
    assert found.dead.tolist() == [0, 2]


def test_distinct_experts_are_those_of_a_set() -> None:
    some = record([40, 30])
    batches = np.random.default_rng(1).integers(0, 70, (25, 6))
    for layer, mean in enumerate(mean_distinct(some, batches)):
        sizes = [len({e for token in batch for e in some.experts[token, layer].tolist()}) for batch in batches]
        assert mean == pytest.approx(sum(sizes) / len(sizes))
        assert min(sizes) > K


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_the_law_and_batches_of_unrelated_tokens(batch: int) -> None:
    """Independent uniform choices: 400 batches' mean has a standard error below 2 / 20 experts."""
    some = record([50] * 30)
    shares = some.counts() / len(some.tokens)
    uniform = E * (1 - (1 - K / E) ** batch)
    assert law(np.full(E, K / E), batch) == pytest.approx(uniform)
    assert np.allclose(law(shares, batch), uniform, atol=0.1)
    found = apart(some, batch)
    assert found is not None
    assert np.allclose(found, uniform, atol=0.4)
    together = in_step(some, batch)  # nothing is alike here, so neither is lock-step
    assert together is not None
    assert np.allclose(together, uniform, atol=0.4)


def test_lock_step_of_conversations_that_are_alike() -> None:
    some = record([20 + i for i in range(12)], alike=True)
    together, scattered = in_step(some, 8), apart(some, 8)
    assert together is not None and scattered is not None
    assert together.tolist() == [K, K]
    assert (scattered > 2 * K).all()


def test_only_decode_steps_of_different_conversations_count() -> None:
    """The given tokens and the end tokens choose experts 13 to 15 here, all others do not."""
    some = record([9] * 10)
    given = ~some.decoded
    some.experts[:] = some.experts % 13  # may repeat, which does not matter here
    some.experts[given] = [13, 14, 15]
    for found in (apart(some, 10), in_step(some, 10)):
        assert found is not None
        assert (found <= 13).all()
    assert apart(some, 11) is None
    assert in_step(some, 11) is None
    assert in_step(some, 2, "merge") is None


def test_a_batch_holds_each_conversation_once() -> None:
    """Each of five has three experts of its own."""
    some = record([9] * 5)
    some.experts[:] = 3 * some.documents[:, None, None] + np.arange(K)
    for found in (apart(some, 5), in_step(some, 5)):
        assert found is not None
        assert found.tolist() == [15, 15]


def test_several_turns_of_one_conversation_count_once() -> None:
    some = record([9, 9])
    twice = Record(
        some.model, some.layers, some.bias, some.tokens, some.starts, some.families,
        np.array([[2, 5], [5, 9], [11, 18]]), np.full(3, "sub-agent call"), some.experts, some.scores,
    )  # fmt: skip
    assert in_step(twice, 2) is not None
    assert in_step(twice, 3) is None


def skewed() -> Record:
    """Ten conversations that choose by Zipf's law, alike at the same place, and the answers from the other end; one
    expert is never chosen."""
    some = record([20 + i for i in range(10)])
    some = replace(some, turns=some.turns + np.array([8, 0]))
    rng = np.random.default_rng(8)
    weights = np.append(np.log(np.arange(1.0, E)), np.inf)
    other_end = weights[[*range(E - 2, -1, -1), E - 1]]
    cost = np.where(some.decoded[:, None, None], other_end, weights) - rng.gumbel(size=(29, L, E))[some.positions]
    some.experts[:] = np.sort(cost.argsort(axis=2)[..., :K], axis=2)
    return some


def loads(record: Record, layer: int, tokens: list[int]) -> list[str]:
    """Three cells, counted one by one."""
    tally = Counter(expert for token in tokens for expert in record.experts[token, layer].tolist())
    mean = len(tokens) * K / E
    each = [tally[expert] / mean for expert in range(E)]
    return [f"{max(each):.2f}", f"{min(each):.2f}", str(each.count(0.0))]


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = skewed()
    write_record(tmp_path / "r.npz", some)
    main([str(tmp_path / "r.npz")])
    printed = capsys.readouterr().out
    assert printed == report(some) + "\n"
    assert printed.startswith("245 tokens of 10 conversations, 135 of them decode steps; 3 of 16 experts for a token;")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    written = [token for start, stop in some.turns.tolist() for token in range(start, stop - 1)]
    first = [row for row in rows if len(row) == 7][2:]
    assert first == [[f"{i + 1}", *loads(some, i, [*range(245)]), *loads(some, i, written)] for i in range(L)]
    assert first[0][1:4] != first[0][4:7]
    scattered, together = apart(some, 8), in_step(some, 8)
    assert scattered is not None and together is not None
    expected = []
    for batch in (8, 32):
        for i in range(L):
            tally = Counter(some.experts[:, i].ravel().tolist())
            total = sum(tally.values()) + E / 2
            shares = [(tally[expert] + 0.5) / total * K for expert in range(E)]
            laws = [E - E * (1 - K / E) ** batch, sum(1 - (1 - q) ** batch for q in shares)]
            # 32 conversations are not there
            measured = [f"{one[i]:.1f}" for one in (scattered, together)] if batch == 8 else ["–", "–"]
            expected.append([f"{i + 1}", f"{batch}", *(f"{one:.1f}" for one in laws), *measured])
    assert [row for row in rows if len(row) == 6][2:] == expected
    assert all(len(set(row[2:])) == 4 for row in expected[:2])  # no two columns could be mixed up


def test_lock_step_takes_every_place() -> None:
    """All choose the same at place 0 of their turn, and three experts of their own at the four others."""
    some = record([8] * 5)
    place = some.positions[:, None, None] - 2
    some.experts[:] = np.where(place == 0, 0, 3 * some.documents[:, None, None]) + np.arange(K)
    found = in_step(some, 5)
    assert found is not None
    assert np.allclose(found, (3 + 4 * 15) / 5, atol=5 * 4.8 / 20)  # five standard errors of 400 batches


def test_a_record_without_answers() -> None:
    some = record([20] * 9)
    bare = replace(some, turns=some.turns[:0], kinds=some.kinds[:0])
    lines = report(bare).splitlines()
    assert lines[0].startswith("180 tokens of 9 conversations, 0 of them decode steps;")
    assert [line.split(" | ", 4)[4] for line in lines[4:6]] == ["– | – | – |"] * 2
    assert all(line.endswith(" | – | – |") for line in lines[9:])


def test_a_file_that_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.npz")])
    assert f"error: {tmp_path}/none.npz: cannot be read: No such file" in capsys.readouterr().err
