"""Experts in VRAM slots behind a real engine: the same greedy tokens, and logprobs as far as rounding allows."""

from pathlib import Path

import pytest

from hybrid.batch import Batch, Row, Sampling, StepOutput
from hybrid.config import ConfigError, EngineConfig
from hybrid.engine import Engine
from hybrid.random_checkpoint import write_checkpoint
from offload.config import PoolConfig
from server.default_model import directory
from tests import families

GREEDY = Sampling(temperature=0.0, logprobs=3)
PAGE, PAGES = 16, 48
REQUESTS, NEW = 3, 40
NEAR = 2e-3  # of a logprob: the CPU rounds an expert's h to 16 bits, the device does not


def open_engine(model: Path, slots: tuple[int, ...]) -> Engine:
    return Engine(EngineConfig(model, "cpu", "float32", "native", PoolConfig(1, "a16"), PAGES, PAGE, vram_slots=slots))


def answers(engine: Engine) -> list[list[StepOutput]]:
    """Prompts in chunks beside requests that decode, then all of them decoding."""
    vocabulary = engine.model.vocab_size
    prompts = [tuple((37 * r + 11 * i * i + 5) % vocabulary for i in range(10 + 25 * r)) for r in range(REQUESTS)]
    places = [tuple(range(r * 8, r * 8 + 8)) for r in range(REQUESTS)]
    waiting, at = [list(prompt) for prompt in prompts], [0] * REQUESTS
    steps: list[StepOutput] = []
    for n in range(NEW):
        rows = []
        for r in range(min(REQUESTS, 1 + n // 4)):
            new = waiting[r][:20]
            del waiting[r][:20]
            rows.append(Row(r, tuple(new), at[r], places[r], None if waiting[r] else GREEDY))
            at[r] += len(new)
        steps.append(engine.step(Batch(tuple(rows))))
        for row in steps[-1].rows:
            if row.token is not None:
                waiting[row.request_id] = [row.token]
    return steps


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("vram") / "v2"
    write_checkpoint(families.deepseek_v2_lite(), made, seed=3, tokenizer=None)
    return {"nano": directory(), "bf16": made}


@pytest.mark.parametrize("name", ["nano", "bf16"])
def test_tokens_and_logprobs_are_those_without_slots(models: dict[str, Path], name: str) -> None:
    plain = open_engine(models[name], ())
    expected = answers(plain)
    n_layers, n_experts = len(plain.model.moe_layers), plain.model.n_routed_experts
    plain.close()
    assert plain.vram() is None
    split = open_engine(models[name], tuple(1 + (n_experts // 4 + i) % n_experts for i in range(n_layers)))
    found = answers(split)
    stats, choices = split.vram(), split.choices()
    split.close()
    assert stats is not None
    assert stats.hits > 20
    assert stats.uploads > 4
    assert choices.tokens == sum(choices.counts[0]) / plain.model.num_experts_per_tok
    for before, after in zip(expected, found, strict=True):
        for old, new in zip(before.rows, after.rows, strict=True):
            assert new.token == old.token
            if old.logprob is not None and new.logprob is not None:
                assert abs(new.logprob.logprob - old.logprob.logprob) < NEAR
    assert sum(s.expert_bytes for s in found) < sum(s.expert_bytes for s in expected)


def test_slots_for_other_layers_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="vram_slots: expected a number from 0 to"):
        open_engine(models["nano"], (1, 2, 3, 4, 5, 6, 7))


def test_a_step_that_fails_leaves_the_slots_usable(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(models["nano"], (4, 4, 4, 4))
    expected = engine.step(Batch((Row(1, (5, 6, 7), 0, (0,), GREEDY),))).rows

    def broken(*_: object) -> None:
        raise RuntimeError("in the middle of a step")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_answer", broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            engine.step(Batch((Row(1, (5, 6, 7), 0, (0,), GREEDY),)))
    assert engine.step(Batch((Row(1, (5, 6, 7), 0, (0,), GREEDY),))).rows == expected
    engine.close()


def test_kt_kernel_has_no_slots(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid.engine.choose", lambda *_: ("kt", ""))
    with pytest.raises(ConfigError, match="vram_slots: kt-kernel runs all experts by itself"):
        open_engine(models["nano"], (4, 4, 4, 4))
