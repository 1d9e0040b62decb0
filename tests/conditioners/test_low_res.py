import jax
import numpy as np
import pytest

from ldm_jax.conditioners.low_res import LowRes
from ldm_jax.errors import UserError


def test_passes_the_image_on():
    images = np.random.RandomState(0).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
    variables = LowRes(4, 4).init(jax.random.key(0), {"low_res": images})
    assert not jax.tree.leaves(variables)
    cond = LowRes(4, 4).apply(variables, {"low_res": images})
    np.testing.assert_array_equal(cond.concat, images)
    assert len(jax.tree.leaves(cond)) == 1


def test_pixels_of_a_larger_image_become_channels():
    images = np.arange(2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
    concat = LowRes(2, 4).apply({}, {"low_res": images}).concat
    assert concat.shape == (2, 4, 4, 12)
    window = images[1, 2:4, 4:6].ravel()
    np.testing.assert_array_equal(np.sort(concat[1, 1, 2]), np.sort(window))


def test_a_smaller_image_is_enlarged():
    images = np.full((1, 2, 3, 3), 0.25, np.float32)
    concat = LowRes(8, 2).apply({}, {"low_res": images}).concat
    assert concat.shape == (1, 8, 12, 3)
    np.testing.assert_allclose(concat, 0.25, atol=1e-6)


def test_no_null():
    with pytest.raises(UserError, match="guidance_scale 1"):
        LowRes(4, 4).apply({}, 2, method="null")
