"""The Frechet distance against the reference values and against known answers."""

import numpy as np
import pytest
from golden_utils import load

from ldm_jax.errors import UserError
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance

CASES = (
    "full_rank",
    "identical",
    "ill_conditioned",
    "rank_deficient",
    "one_zero_cov",
    "diagonal",
    "from_features",
)


def statistics(features: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    found = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), batch):
        found.add(features[start : start + batch])
    return found.result()


@pytest.mark.parametrize("case", CASES)
def test_distance_is_that_of_the_reference(case):
    golden = load("frechet_distance")
    assert golden.meta["cases"] == list(CASES)
    given = [golden[f"{case}.{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    atol = golden.meta["tolerance"][case]["suggested_atol"]
    value = frechet_distance(*given)
    np.testing.assert_allclose(value, golden[f"{case}.fid"], rtol=0, atol=atol)
    np.testing.assert_allclose(frechet_distance(*given[2:], *given[:2]), value, rtol=0, atol=1e-7)
    # Their own value from eigenvalues, which singular covariances hardly disturb.
    np.testing.assert_allclose(value, golden[f"{case}.fid_eigh"], rtol=0, atol=1e-7)


def test_distance_with_fewer_examples_than_features_is_exact():
    rng, scale = np.random.RandomState(0), np.exp(-np.arange(64) / 20)
    sets = [rng.standard_normal((n, 64)) * scale + 0.1 * n for n in (20, 30)]
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in sets]
    # The trace of the root is the sum of the singular values of the product of the factors.
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    want = np.square(sets[0].mean(0) - sets[1].mean(0)).sum() - 2 * overlap
    want += sum(np.square(x).sum() for x in centred)
    value = frechet_distance(*statistics(sets[0], 20), *statistics(sets[1], 30))
    np.testing.assert_allclose(value, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_statistics_do_not_depend_on_the_batches(batch):
    golden = load("frechet_distance")
    for features, number in (("A", 1), ("B", 2)):
        mean, covariance = statistics(golden[f"from_features.{features}"], batch)
        want_mean = golden[f"from_features.mu{number}"]
        np.testing.assert_allclose(mean, want_mean, rtol=0, atol=1e-14)
        want = golden[f"from_features.sigma{number}"]
        np.testing.assert_allclose(covariance, want, rtol=0, atol=1e-13)


def test_statistics_survive_a_large_offset():
    features = np.random.RandomState(0).standard_normal((64, 3)) + 1e7
    _, covariance = statistics(features, 10)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-6)


def test_a_shift_of_the_mean_gives_its_square():
    features = np.random.RandomState(0).standard_normal((50, 64))
    shift = np.linspace(-1, 1, 64)
    mean, covariance = statistics(features, 50)
    value = frechet_distance(mean, covariance, mean + shift, covariance)
    np.testing.assert_allclose(value, np.square(shift).sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureStatistics(4).add(np.zeros((2, 5))), r"\(N, 4\), got \(2, 5\)"),
        (lambda: FeatureStatistics(2).add(np.full((3, 2), np.nan)), "not finite"),
        (lambda: statistics(np.zeros((1, 4)), 1), "at least 2 examples, got 1"),
        (
            lambda: frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)),
            "another network",
        ),
        (
            lambda: frechet_distance(np.zeros(3), np.eye(3), np.full(3, np.inf), np.eye(3)),
            "not finite",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
