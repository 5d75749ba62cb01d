"""hybrid.nano.load on drawn records, against counting by sets and against the laws of probability."""

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


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = record([20] * 9)
    write_record(tmp_path / "r.npz", some)
    main([str(tmp_path / "r.npz")])
    printed = capsys.readouterr().out
    assert printed == report(some) + "\n"
    assert printed.startswith("180 tokens of 9 conversations, 153 of them decode steps; 3 of 16 experts for a token;")
    busiest = some.counts().max(axis=1) / (180 * K / E)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows if len(row) == 7][2:] == [["1", f"{busiest[0]:.2f}"], ["2", f"{busiest[1]:.2f}"]]
    batches = [row for row in rows if len(row) == 6][2:]
    assert [row[:2] for row in batches] == [["1", "8"], ["2", "8"], ["1", "32"], ["2", "32"]]
    assert [row[2] for row in batches] == ["13.0", "13.0", "16.0", "16.0"]
    assert [row[4:] for row in batches[2:]] == [["–", "–"], ["–", "–"]]  # 32 conversations are not there


def test_a_file_that_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.npz")])
    assert f"error: {tmp_path}/none.npz: cannot be read: No such file" in capsys.readouterr().err
