"""The formula that makes the fixtures' weights, against those that are stored as arrays, too."""

import numpy as np
import pytest
from golden_utils import GOLDEN, load


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.weights.npz")), ids=lambda p: p.stem)
def test_formula_gives_the_stored_weights(path):
    made = load(path.name.removesuffix(".weights.npz")).weights()
    with np.load(path) as stored:
        assert made.keys() == set(stored.files)
        for key in stored.files:
            np.testing.assert_array_equal(made[key], stored[key], err_msg=key)
