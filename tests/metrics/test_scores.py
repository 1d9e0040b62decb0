"""The Inception score and the distance at infinity against known answers."""

import numpy as np
import pytest

from ldm_jax.errors import UserError
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_jax.metrics.scores import (
    extrapolate,
    fid_at_infinity,
    inception_score,
    smallest_for_infinity,
)


def test_images_of_no_class_score_one():
    assert inception_score(np.full((40, 7), 3.0)) == (pytest.approx(1.0, abs=1e-12), 0.0)


def test_images_of_one_class_each_score_their_number():
    logits = 1e4 * np.eye(8)[np.arange(80) % 8]
    assert inception_score(logits) == (pytest.approx(8.0, rel=1e-12), pytest.approx(0, abs=1e-9))
    assert inception_score(logits + 500.0)[0] == pytest.approx(8.0, rel=1e-12)  # a common level


def test_parts_are_in_the_order_of_the_images():
    # The first half is all of one class, the second of two.
    classes = np.array([0] * 10 + [0, 1] * 5)
    mean, deviation = inception_score(1e4 * np.eye(3)[classes], splits=2)
    assert (mean, deviation) == (pytest.approx(1.5, rel=1e-12), pytest.approx(0.5, rel=1e-12))


def test_score_of_shares():
    shares = np.array([[0.9, 0.1], [0.2, 0.8]])
    overall = shares.mean(0)
    want = np.exp((shares * np.log(shares / overall)).sum(1).mean())
    assert inception_score(np.log(shares), splits=1)[0] == pytest.approx(want, rel=1e-12)


def test_a_line_ends_at_its_value():
    counts = np.linspace(500, 5000, 15)
    value, error = extrapolate(counts, 2.5 + 300 / counts)
    assert value == pytest.approx(2.5, rel=1e-9) and error < 1e-9


def test_the_value_is_that_of_least_squares():
    counts = np.linspace(500, 5000, 15)
    distances = 2.5 + 300 / counts + 0.1 * np.random.RandomState(0).standard_normal(15)
    want = np.polyfit(1 / counts, distances, 1)[1]
    assert extrapolate(counts, distances)[0] == pytest.approx(want, rel=1e-9)


def many_distances(shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 40 sets of 600: the distance to a shifted Gaussian, that at infinity, and its error."""
    mean, width, found = np.full(6, shift), 6, []
    for seed in range(40):
        features = np.random.RandomState(seed).standard_normal((600, width))
        statistics = FeatureStatistics(width)
        statistics.add(features)
        biased = frechet_distance(mean, np.eye(width), *statistics.result())
        found.append((biased, *fid_at_infinity(features, mean, np.eye(width), seed=seed)))
    return tuple(np.array(found).T)


def test_the_bias_is_gone_at_infinity():
    biased, values, _ = many_distances(0.0)
    # To first order D / N of the mean and D (D + 1) / 4N of the covariance: 0.0275.
    assert biased.mean() == pytest.approx(0.0275, rel=0.2)
    mistake = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * mistake < 0.4 * 0.0275


def test_the_error_at_infinity_is_that_of_the_value():
    _, values, errors = many_distances(0.5)
    assert values.mean() == pytest.approx(6 * 0.25, rel=0.05)
    # Least squares alone would say half as much: the sets share samples.
    assert 0.7 < errors.mean() / values.std(ddof=1) < 1.4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inception_score(np.zeros((19, 4))), "at least 20 images, got 19"),
        (lambda: inception_score(np.zeros((9, 4)), splits=0), "splits=0"),
        (lambda: inception_score(np.zeros(9)), r"\(N, K\), got \(9,\)"),
        (lambda: inception_score(np.full((20, 4), np.inf)), "not finite"),
        (
            lambda: fid_at_infinity(np.zeros((9, 4)), np.zeros(4), np.eye(4)),
            "at least 10 samples for features of 4 numbers, got 9",
        ),
        (lambda: extrapolate([10, 10, 20], [1, 1, 1]), "three at least, got 2 sizes"),
        (lambda: extrapolate([10, 20, 30], [1, 1]), "3 sizes for 2 distances"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_smallest_number_is_enough():
    features = np.random.RandomState(0).standard_normal((smallest_for_infinity(4), 4))
    assert np.isfinite(fid_at_infinity(features, np.zeros(4), np.eye(4))).all()
