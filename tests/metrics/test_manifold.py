"""Precision, recall, density and coverage against sets that can be counted by hand."""

import tracemalloc

import numpy as np
import pytest

from ldm_jax.errors import UserError
from ldm_jax.metrics import manifold
from ldm_jax.metrics.manifold import density_coverage, precision_recall


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


# Their nearest others are at 1, 1, 2, 0.5 and 0.5.
REAL = column(0, 1, 3, 20, 20.5)
# And of these at 4, 4, 1 and 1.
FAKE = column(0.5, 4.5, 10, 11)


def test_points_on_a_line():
    # 0.5 lies in the balls of 0 and 1, 4.5 in that of 3; 10 and 11 in none.
    precision, recall = precision_recall(REAL, FAKE, k=1)
    assert (precision, recall) == (2 / 4, 3 / 5)
    density, coverage = density_coverage(REAL, FAKE, k=1)
    assert (density, coverage) == (3 / 4, 3 / 5)
    # The other way round: 0, 1 and 3 lie in the ball of 0.5, and 1 and 3 in that of 4.5.
    assert precision_recall(FAKE, REAL, k=1) == (recall, precision)
    assert density_coverage(FAKE, REAL, k=1) == (5 / 5, 2 / 4)


@pytest.mark.parametrize("tile", [24, 4096])
def test_tiles_change_nothing(monkeypatch, tile):
    monkeypatch.setattr(manifold, "TILE", tile)
    random = np.random.RandomState(0)
    real, fake = random.standard_normal((51, 5)), random.standard_normal((37, 5)) + 0.8

    def distances(x, y):
        return np.sqrt(np.square(x[:, None] - y[None]).sum(-1))

    def radii(x, k):
        return np.sort(distances(x, x))[:, k]  # the first is the point itself

    inside = distances(fake, real) <= radii(real, 3)
    want = inside.any(1).mean(), (distances(real, fake) <= radii(fake, 3)).any(1).mean()
    assert 0.5 < min(want) and max(want) < 1
    np.testing.assert_allclose(precision_recall(real, fake), want, rtol=1e-12)
    inside = distances(fake, real) <= radii(real, 5)
    want = inside.sum(1).mean() / 5, inside.any(0).mean()
    np.testing.assert_allclose(density_coverage(real, fake), want, rtol=1e-12)


def test_equal_sets():
    points = np.random.RandomState(1).standard_normal((30, 4)).astype(np.float32)
    assert precision_recall(points, points) == (1, 1)
    # Every ball holds its centre and k others.
    assert density_coverage(points, points, k=5) == (pytest.approx(6 / 5, rel=1e-12), 1)


def test_copies_are_at_distance_zero():
    """Far from the mean, where float32 leaves a rest of the squares."""
    points = np.repeat(np.random.RandomState(2).uniform(900, 1000, (4, 64)), 4, axis=0)
    assert precision_recall(points, points[::4].repeat(4, axis=0)) == (1, 1)
    assert precision_recall(points, points + 1.0) == (0, 0)


def test_far_sets_do_not_overlap():
    assert precision_recall(REAL, FAKE + 100, k=1) == (0, 0)
    assert density_coverage(REAL, FAKE + 100, k=1) == (0, 0)


def test_a_set_is_copied_once():
    """Two sets of float32 and their copies: what `bytes_needed` foresees."""
    real, fake = (np.ones((20_000, 200), np.float32) for _ in range(2))
    tracemalloc.start()
    manifold._prepare(real, fake, 3)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1.1 * (real.nbytes + fake.nbytes)


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        (REAL, FAKE, 4, "at least 5 images in each set, got 4"),
        (REAL, FAKE, 0, "must be 1 at least"),
        (REAL, np.zeros((9, 2)), 1, "another network"),
        (REAL, np.full((9, 1), np.nan), 1, "not finite"),
    ],
)
def test_bad_input_is_refused(real, fake, k, message):
    for metric in (precision_recall, density_coverage):
        with pytest.raises(UserError, match=message):
            metric(real, fake, k)
