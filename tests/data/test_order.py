import numpy as np
import pytest

from ldm_jax.data.order import epoch_order, uniforms_at

ORDER = [0, 3, 7, 5, 1, 2, 6, 4]
UNIFORMS = [[0.8103360625371984, 0.9905561710021576, 0.13636000107455715, 0.15422726164799372]]


@pytest.mark.parametrize("count", [1, 2, 7, 5000])
def test_an_epoch_is_a_permutation(count):
    for epoch in range(3):
        order = epoch_order(0, epoch, count)
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(seed, epoch, 30)) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100


def test_every_place_is_equally_likely():
    firsts = [epoch_order(0, epoch, 4)[0] for epoch in range(2000)]
    assert np.abs(np.bincount(firsts, minlength=4) - 500).max() < 90  # 4.6 standard deviations


def test_numbers_belong_to_their_position():
    rows = uniforms_at(3, 0, 50, 4)
    assert rows.shape == (50, 4) and rows.min() >= 0 and rows.max() < 1
    for start, count in ((0, 1), (7, 10), (49, 1)):
        np.testing.assert_array_equal(uniforms_at(3, start, count, 4), rows[start : start + count])
    np.testing.assert_array_equal(uniforms_at(3, 0, 50, 2), rows[:, :2])
    assert len(np.unique(rows)) == 200


def test_numbers_are_uniform():
    rows = uniforms_at(1, 10**9, 20000, 4)
    assert np.abs(rows.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(rows, rowvar=False) - np.eye(4)).max() < 0.03


def test_known_values():
    """A run that is resumed after an upgrade must find the same order and the same crops."""
    np.testing.assert_array_equal(epoch_order(0, 0, 8), ORDER)
    np.testing.assert_array_equal(uniforms_at(0, 5, 1, 4), UNIFORMS)
