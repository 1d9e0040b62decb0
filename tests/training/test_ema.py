import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.training.ema import ema_decay, ema_update


@pytest.mark.parametrize("n, expected", [(1, 2 / 11), (2, 3 / 12), (80, 0.9)])
def test_decay_warms_up(n, expected):
    np.testing.assert_allclose(ema_decay(n, 0.9999), expected, rtol=1e-6)
    np.testing.assert_allclose(ema_decay(n, 0.1), 0.1, rtol=1e-6)


def test_update_is_a_weighted_mean_of_every_array():
    ema = {"a": jnp.zeros(3), "b": {"c": jnp.ones((2, 2))}}
    params = {"a": jnp.ones(3), "b": {"c": jnp.full((2, 2), 3.0)}}
    out = jax.jit(ema_update)(ema, params, 1, 0.9999)
    np.testing.assert_allclose(out["a"], np.full(3, 9 / 11), rtol=1e-6)
    np.testing.assert_allclose(out["b"]["c"], np.full((2, 2), 2 / 11 + 9 / 11 * 3), rtol=1e-6)


@pytest.mark.parametrize("name", ["ema_default", "ema_lowdecay", "ema_noupdates"])
def test_ema_fixture(name):
    golden = load(name)
    config = golden.meta["config"]
    warm_up, decay = config.get("use_num_upates", True), config.get("decay", 0.9999)
    ema = {"w": jnp.asarray(golden["in.param_000"])}
    for n in range(1, 6):
        params = {"w": jnp.asarray(golden[f"in.param_{n:03d}"])}
        ema = ema_update(ema, params, n if warm_up else None, decay)
        np.testing.assert_allclose(ema["w"], golden[f"out.shadow_{n:03d}"], rtol=1e-6)
        assert golden[f"out.num_updates_{n:03d}"] == (n if warm_up else -1)
