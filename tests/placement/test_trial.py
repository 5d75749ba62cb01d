"""What the doctor runs: its plain arithmetic, what that would catch, the trial layer, and huge pages in smaps."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from offload.config import PROJECTIONS, ExpertFormat, Isa, PoolConfig, Precision
from offload.isa import available
from offload.repeated import random_expert
from placement.checks import TOLERANCE
from placement.measure_timing import Effort
from placement.trial import ACTIVE, CHECK_ROWS, CHECKED, TrialLayer, kernel_error, plain_layer, time_layers
from placement.trial import share_in_huge_pages as share
from tests.reference import experts as reference
from tests.reference.expert_memory import unpinned

TIERS = tuple(tier for tier in available() if tier != "amx")
SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                4096 kB
AnonHugePages:      2048 kB
7f0000400000-7f0000800000 rw-p 00000000 00:00 0 [heap]
Size:               4096 kB
Rss:                   0 kB
AnonHugePages:         0 kB
"""


def problem(rows: int) -> tuple[list, np.ndarray, np.ndarray, np.ndarray]:
    experts = [random_expert("int4", CHECKED, seed) for seed in range(CHECKED.n_experts)]
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(CHECKED.n_experts), (rows, 1)), axis=1)[:, :2]
    return experts, rng.standard_normal((rows, CHECKED.hidden), np.float32), ids, rng.random((rows, 2), np.float32)


def test_the_plain_arithmetic_agrees_with_the_reference() -> None:
    experts, x, ids, weights = problem(5)
    dense = {
        name: [reference.dense("int4", expert[name][0].view(np.uint8), expert[name][1]) for expert in experts]
        for name in PROJECTIONS
    }
    expected = reference.experts(reference.Layer("int4", **dense), x, ids, weights, "a16")  # rounds to 16 bits
    found = plain_layer("int4", experts, x, ids, weights)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_the_tolerance_catches_any_one_input_that_is_lost() -> None:
    experts, x, ids, weights = problem(max(CHECK_ROWS))
    expected = plain_layer("int4", experts, x, ids, weights)
    for lost in range(CHECKED.hidden):
        without = x.copy()
        without[:, lost] = 0
        error = np.linalg.norm(plain_layer("int4", experts, without, ids, weights) - expected) / np.linalg.norm(
            expected
        )
        assert error > 2 * TOLERANCE, lost


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("precision", ["a8", "a16"])
@pytest.mark.parametrize("fmt", ["int4", "int8", "fp8", "bf16"])
def test_every_tier_here_is_right(isa: Isa, precision: Precision, fmt: ExpertFormat) -> None:
    assert 0 < kernel_error(isa, precision, fmt) < TOLERANCE / 2


def test_a_tier_that_gives_garbage_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placement.trial.plain_layer", lambda fmt, experts, x, ids, weights: np.full(x.shape, np.nan))
    assert kernel_error("portable", "a8", "int4") == np.inf


def test_layers_take_turns_over_all_their_experts() -> None:
    with closing(TrialLayer(128, 64, "int4", 3, PoolConfig(isa="portable"), unpinned(1))) as layer:
        seconds = time_layers({"it": layer}, (1, 2), Effort(seconds=0.01))
        chosen = layer._experts.choices()
    assert set(seconds) == {("it", 1), ("it", 2)}
    assert all(value > 0 for values in seconds.values() for value in values)
    assert chosen.counts.shape == (1, 3 * ACTIVE)
    assert chosen.counts.min() > 0, "a set was never used"
    # Calls of one row and of two, one more for some sets than for others.
    assert chosen.counts.max() <= 2 * (chosen.counts.min() + 1)


def test_share_of_a_mapping_in_huge_pages(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(SMAPS)
    assert share(0x7F0000000000, smaps) == 0.5
    assert share(0x7F00003FFFFF, smaps) == 0.5
    assert share(0x7F0000400000, smaps) is None  # nothing of it is in memory
    assert share(0x7F0000800000, smaps) is None
    assert share(0x7F0000000000, tmp_path / "absent") is None
