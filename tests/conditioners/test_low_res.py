import jax
import numpy as np
import pytest

from ldm_jax.conditioners.low_res import LowRes
from ldm_jax.errors import UserError


def test_passes_the_image_on():
    images = np.random.RandomState(0).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
    variables = LowRes().init(jax.random.key(0), {"low_res": images})
    assert not jax.tree.leaves(variables)
    cond = LowRes().apply(variables, {"low_res": images})
    np.testing.assert_array_equal(cond.concat, images)
    assert len(jax.tree.leaves(cond)) == 1


def test_no_null():
    with pytest.raises(UserError, match="guidance_scale 1"):
        LowRes().apply({}, 2, method="null")
