"""Nearest vectors in parts, and distances beside those of new images."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.metrics.neighbours import calibrated, nearer, no_neighbours


def test_nearest_in_parts_are_those_of_all():
    random = np.random.RandomState(0)
    vectors = random.standard_normal((5, 7)).astype(np.float32)
    others = random.standard_normal((11, 7)).astype(np.float32)
    others[3] = vectors[4]
    best = no_neighbours(5, 3)
    for start in (0, 4, 8):  # the last part is filled up
        part = np.resize(others[start : start + 4], (4, 7))
        numbers = np.where(np.arange(start, start + 4) < 11, 100 + np.arange(start, start + 4), -1)
        best = nearer(best, vectors, part, numbers.astype(np.int32))
    squares = np.square(vectors[:, None] - others[None]).sum(-1)
    want = np.argsort(squares, axis=1)[:, :3]
    np.testing.assert_array_equal(best.numbers, 100 + want)
    assert best.numbers[4, 0] == 103
    # Of float32 sums of 7 numbers around 1.
    order = np.take_along_axis(squares, want, 1) - np.square(vectors).sum(1)[:, None]
    np.testing.assert_allclose(best.order, order, rtol=0, atol=1e-5)


def test_fewer_vectors_than_neighbours():
    best = nearer(no_neighbours(1, 3), jnp.zeros((1, 2)), jnp.ones((2, 2)), jnp.array([5, -1]))
    np.testing.assert_array_equal(best.numbers, [[5, -1, -1]])
    assert np.isinf(jax.device_get(best.order[0, 1:])).all()


def test_a_threshold_leaves_a_share_of_new_images_below():
    held_out = np.arange(1.0, 101.0)[::-1]
    threshold, below, as_near = calibrated(np.array([0.0, 5.0, 5.5, 200.0]), held_out, 0.05)
    assert threshold == 5.0 and (held_out <= threshold).mean() == 0.05
    assert below.tolist() == [True, True, False, False]
    assert as_near.tolist() == [0.0, 0.05, 0.05, 1.0]


def test_copies_count_where_new_images_are_copies_too():
    threshold, below, _ = calibrated(np.array([0.0, 0.1]), np.array([0.0] * 5 + [1.0] * 15), 0.05)
    assert threshold == 0 and below.tolist() == [True, False]
