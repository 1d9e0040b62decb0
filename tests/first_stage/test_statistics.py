"""Streaming statistics of latents against NumPy on the whole set."""

import json

import numpy as np
import pytest

from ldm_jax.errors import UserError
from ldm_jax.first_stage.statistics import LatentStatistics

Z = np.random.RandomState(0).standard_normal((10, 4, 5, 3)) * [1, 2, 5] + [100, -3, 0]
Z = Z.astype(np.float32)


def accumulate(z, sizes):
    statistics = LatentStatistics(z.shape[-1])
    for batch in np.split(z, np.cumsum(sizes)):
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("sizes", [[], [3], [1, 4, 4], [0, 10]])
def test_channel_statistics_do_not_depend_on_batches(sizes):
    shift, scale = accumulate(Z, sizes).result("channel")
    assert shift.dtype == scale.dtype == np.float32
    flat = Z.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(shift, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scale, 1 / flat.std(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("sizes", [[], [3, 6]])
@pytest.mark.parametrize("rule", ["first_batch", "scalar"])
def test_one_scale_for_all_channels_shifts_nothing(sizes, rule):
    shift, scale = accumulate(Z, sizes).result(rule)
    np.testing.assert_array_equal(shift, np.zeros(3))
    np.testing.assert_allclose(scale, np.full(3, 1 / Z.astype(np.float64).std(ddof=1)), rtol=1e-6)


@pytest.mark.parametrize("sizes", [[], [3, 0, 6]])
def test_summary_is_that_of_numpy_in_float64(sizes):
    flat = Z.reshape(-1, 3).astype(np.float64)
    expected = {
        "images": 10,
        "mean": flat.mean(),
        "std": flat.std(ddof=1),
        "channel_mean": flat.mean(0).tolist(),
        "channel_std": flat.std(0, ddof=1).tolist(),
    }
    found = accumulate(Z, sizes).summary()
    assert found.keys() == expected.keys()
    for name, value in json.loads(json.dumps(found)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12)


def test_latents_without_spread_are_refused():
    with pytest.raises(UserError, match="no latents"):
        LatentStatistics(3).result("scalar")
    with pytest.raises(UserError, match="constant"):
        accumulate(np.ones((2, 4, 4, 3)), []).result("channel")
    with pytest.raises(UserError, match="not finite"):
        accumulate(np.full((2, 4, 4, 3), np.nan), []).result("scalar")
    with pytest.raises(UserError, match="choose first_batch, scalar, channel"):
        accumulate(Z, []).result("pixel")
