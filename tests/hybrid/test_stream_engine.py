"""Streaming behind a real engine, alone and with the other ways to run experts: tokens and logprobs stay."""

from dataclasses import replace
from pathlib import Path

import pytest

import hybrid.inputs
import hybrid.layers
from hybrid.batch import Batch, Row, RowOutput, Sampling
from hybrid.config import ConfigError, EngineConfig
from hybrid.engine import Engine
from hybrid.random_checkpoint import write_checkpoint
from offload.config import PoolConfig
from offload.stream_split import StreamRates
from server.default_model import directory
from tests import families

GREEDY = Sampling(temperature=0.0, logprobs=3)
PAGE, PAGES = 16, 48
REQUESTS, STEPS = 4, 16
NEAR = 2e-3  # of a logprob: the CPU rounds an expert's h to 16 bits, the device does not
# An upload takes as long as four rows on the CPU.
RATES = StreamRates(4.0, 0.01, (1.0, 100.0), (1.0, 100.0), 1.0, 0.0, 0.01)


def config(model: Path) -> EngineConfig:
    return EngineConfig(model, "cpu", "float32", "native", PoolConfig(1, "a16"), PAGES, PAGE)


def answers(engine: Engine) -> list[RowOutput]:
    """Prompts that come one after another, in chunks, beside requests that decode."""
    vocabulary = engine.model.vocab_size
    prompts = [[(37 * r + 11 * i * i + 5) % vocabulary for i in range(30 + 25 * r)] for r in range(REQUESTS)]
    at, rows_of = [0] * REQUESTS, list[RowOutput]()
    for n in range(STEPS):
        rows = []
        for r in range(min(REQUESTS, 1 + n // 3)):
            new, prompts[r] = prompts[r][:40], prompts[r][40:]
            targets = tuple(new[1:]) if len(new) > 1 else None
            where = tuple(range(r * 10, r * 10 + 10))
            rows.append(Row(r, tuple(new), at[r], where, None if prompts[r] else GREEDY, targets=targets))
            at[r] += len(new)
        for row in engine.step(Batch(tuple(rows))).rows:
            rows_of.append(row)
            if row.token is not None:
                prompts[row.request_id] = [row.token]
    return rows_of


def assert_same(found: list[RowOutput], expected: list[RowOutput]) -> None:
    for old, new in zip(expected, found, strict=True):
        assert new.token == old.token
        logprobs = [(old.logprob, new.logprob), *zip(old.scored, new.scored, strict=True)]
        assert all(a is None or b is None or abs(a.logprob - b.logprob) < NEAR for a, b in logprobs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("stream") / "v2"
    write_checkpoint(families.deepseek_v2_lite(), made, seed=3, tokenizer=None)
    return {"nano": directory(), "bf16": made}


@pytest.mark.parametrize("name", ["nano", "bf16"])
def test_tokens_and_logprobs_are_those_without_streaming(
    models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine(config(models[name]))
    expected = answers(plain)
    plain.close()
    assert plain.streamed() is None
    model = plain.model
    one = model.expert_geometry.expert_bytes(model.expert_format)
    ring = replace(config(models[name]), ring_bytes=4 * one + 1, stream_rates=RATES)
    slots = (model.n_routed_experts // 4,) * len(model.moe_layers)
    for changed, piece in (
        (ring, 2048),
        (replace(ring, vram_slots=slots), 2048),
        (replace(ring, vram_slots=slots, ping_pong="on"), 24),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(hybrid.inputs, "PIECE_TOKENS", piece)
            patched.setattr(hybrid.layers, "PIECE_TOKENS", piece)
            engine = Engine(changed)
            found = answers(engine)
            stats = engine.streamed()
            engine.close()
        assert_same(found, expected)
        assert stats is not None and stats.experts > 20 and stats.bytes >= stats.experts * one
        assert stats.ahead > 0 or changed.ping_pong == "on"  # halves take turns: what was foreseen gives way


def test_a_ring_without_rates_or_too_small_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="ring_bytes: which experts to stream needs stream_rates"):
        Engine(replace(config(models["nano"]), ring_bytes=10**6))
    with pytest.raises(ValueError, match="streaming needs 2"):
        Engine(replace(config(models["nano"]), ring_bytes=10, stream_rates=RATES))


def test_kt_kernel_streams_nothing_and_says_so(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """kt-kernel cannot be had here, so that the start ends after the notice."""
    monkeypatch.setattr("hybrid.engine.choose", lambda *_: ("kt", ""))
    told: list[str] = []
    with pytest.raises(Exception, match=r"kt"):
        Engine(replace(config(models["nano"]), ring_bytes=10**6, stream_rates=RATES), notice=told.append)
    assert "prompts do not stream experts to the device: kt-kernel runs all of them" in told
