"""hybrid.rope against complex rotations and the published YaRN boundaries."""

import numpy as np
import pytest
import torch

from hybrid.config import RopeScaling
from hybrid.rope import Rope, yarn_frequencies
from tests.reference import mla as reference

YARN = RopeScaling(64.0, 4096, 32.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("theta", "factor", "beta_fast", "low", "high"),
    [(5e4, 64.0, 32.0, 8, 20), (5e4, 32.0, 1.0, 19, 20), (1e4, 40.0, 32.0, 10, 23)],
)
def test_yarn_boundaries_of_the_published_models(
    theta: float, factor: float, beta_fast: float, low: int, high: int
) -> None:
    found = yarn_frequencies(64, theta, RopeScaling(factor, 4096, beta_fast, 1.0, 1.0, 1.0)).numpy()
    trained = theta ** (-np.arange(0, 64, 2) / 64)
    share = found / trained
    np.testing.assert_allclose(share[: low + 1], 1, rtol=1e-12)
    np.testing.assert_allclose(share[high:], 1 / factor, rtol=1e-12)
    assert ((share[low + 1 : high] < 1) & (share[low + 1 : high] > 1 / factor)).all()
    np.testing.assert_allclose(found, reference.frequencies(64, theta, factor, 4096, beta_fast, 1.0), rtol=1e-12)


def test_no_scaling_keeps_the_trained_frequencies() -> None:
    np.testing.assert_allclose(yarn_frequencies(16, 1e4, None).numpy(), 1e4 ** (-np.arange(0, 16, 2) / 16), rtol=1e-12)


def test_equal_boundaries_do_not_divide_by_zero() -> None:
    scaling = RopeScaling(8.0, 64, 1.0, 1.0, 1.0, 1.0)  # beta_fast = beta_slow; 64 / 2 pi turns: floor 3, ceil 4 of 8
    assert torch.isfinite(yarn_frequencies(8, 1e4, scaling)).all()


def test_rotation_is_a_complex_product() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 3, 16))
    angles = reference.frequencies(16, 5e4, 64.0, 4096, 32.0, 1.0)
    rope = Rope(torch.tensor(angles, dtype=torch.float32), 1.0, interleaved=True)
    positions = [0, 1, 7, 100, 4000]
    cos, sin = rope.table(torch.tensor(positions))
    found = rope.rotate(torch.tensor(x, dtype=torch.float32), cos[:, None], sin[:, None])
    expected = [[reference.rotate(x[t, h], p, angles) for h in range(3)] for t, p in enumerate(positions)]
    np.testing.assert_allclose(found.numpy(), np.array(expected), atol=2e-3)  # float32 angles at 4000: 4000 * 2^-24
    np.testing.assert_allclose(found[:3].numpy(), np.array(expected)[:3], atol=2e-6)


def test_half_layout_is_the_same_rotation_of_other_pairs() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    frequencies = yarn_frequencies(8, 1e4, None).float()
    pairs, halves = Rope(frequencies, 1.5, interleaved=True), Rope(frequencies, 1.5, interleaved=False)
    cos, sin = pairs.table(torch.arange(4))
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # neighbours brought to x_i, x_(i + 4)
    torch.testing.assert_close(halves.rotate(x[:, order], cos, sin), pairs.rotate(x, cos, sin)[:, order])
    assert (halves.rotate(x, cos, sin) - pairs.rotate(x, cos, sin)).abs().max() > 0.1


def test_scores_depend_on_distance_only() -> None:
    rope = Rope(yarn_frequencies(16, 1e4, YARN).float(), 1.0, interleaved=True)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(3)).unbind()
    cos, sin = rope.table(torch.tensor([3, 10, 53, 60]))
    at = [rope.rotate(torch.stack((q, k)), cos[i], sin[i]) for i in range(4)]
    assert float(at[1][0] @ at[0][1]) == pytest.approx(float(at[3][0] @ at[2][1]), abs=1e-4)
    assert float(at[1][0] @ at[0][1]) != pytest.approx(float(at[2][0] @ at[0][1]), abs=1e-2)


def test_bfloat16_is_rotated_in_float32() -> None:
    rope = Rope(yarn_frequencies(16, 1e4, None).float(), 1.0, interleaved=True)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    cos, sin = rope.table(torch.tensor([5, 500, 5000]))
    torch.testing.assert_close(rope.rotate(x, cos, sin), rope.rotate(x.float(), cos, sin).bfloat16(), rtol=0, atol=0)
