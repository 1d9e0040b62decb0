"""The kernel distance against what follows from its definition."""

import numpy as np
import pytest

from ldm_jax.errors import UserError
from ldm_jax.metrics.kernel import kernel_distance


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def test_sets_of_one_point_each_differ_by_the_kernel_alone():
    a, b = np.full((40, 2), 0.5, np.float32), np.full((50, 2), 2.0, np.float32)
    # (x.y / D + 1)^3, all exact in float32: x.x / D = 0.25, y.y / D = 4, x.y / D = 1.
    want = 1.25**3 + 5.0**3 - 2 * 2.0**3
    assert kernel_distance(a, b) == (pytest.approx(want, rel=1e-6), 0.0)
    assert kernel_distance(a, a[:40]) == (pytest.approx(0.0, abs=1e-6), 0.0)


def test_the_value_is_that_of_all_pairs():
    """The mean over many blocks is close to the unbiased estimate of the whole sets."""
    a, b = normal(0, 64, 4), normal(1, 64, 4) + 1.0

    def kernel(x, y):
        return (x.astype(np.float64) @ y.T / 4 + 1) ** 3

    def others(k):
        return (k.sum() - np.trace(k)) / (64 * 63)

    want = others(kernel(a, a)) + others(kernel(b, b)) - 2 * kernel(a, b).mean()
    value, error = kernel_distance(a, b, blocks=400)
    # Blocks of 16 each: the draw of 400 leaves error * sqrt(4 / 400), a tenth of the error.
    assert abs(value - want) < 3 * 0.1 * error < 0.1 * want


def test_it_is_unbiased_and_its_error_is_that_of_the_value():
    found, shifted = [], []
    for seed in range(60):
        a, b = normal(seed, 80, 6), normal(1000 + seed, 80, 6)
        found.append(kernel_distance(a, b, blocks=10, seed=seed))
        shifted.append(kernel_distance(a, b + 1.0, blocks=10, seed=seed))
    values, errors = np.array(found).T
    spread = values.std(ddof=1)
    # With the diagonal, blocks of 20 would be off by 2 E[k(x, x) - k(x, y)] / 20, about 0.8.
    assert abs(values.mean()) < 3 * spread / np.sqrt(60) < 0.1
    values, errors = np.array(shifted).T
    assert 0.6 < np.sqrt(np.square(errors).mean()) / values.std(ddof=1) < 1.6
    assert values.mean() > 10 * spread


def test_the_draw_is_that_of_the_seed():
    a, b = normal(0, 60, 3), normal(1, 60, 3)
    assert kernel_distance(a, b, blocks=5) == kernel_distance(a, b, blocks=5)
    assert kernel_distance(a, b, blocks=5) != kernel_distance(a, b, blocks=5, seed=1)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ((39, 4), (80, 4), {}, "at least 40 images in each set, got 39"),
        ((40, 4), (40, 5), {}, "another network"),
        ((40, 4), (40, 4), {"blocks": 1}, "must be 2 at least"),
    ],
)
def test_bad_input_is_refused(a, b, options, message):
    with pytest.raises(UserError, match=message):
        kernel_distance(normal(0, *a), normal(1, *b), **options)


def test_features_that_are_not_finite_are_refused():
    a = normal(0, 40, 2)
    a[:, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        kernel_distance(a, normal(1, 40, 2), blocks=2)
