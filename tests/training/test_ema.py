import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.errors import UserError
from ldm_jax.training.ema import Profile, ema_decay, ema_update, exponent, power_rate, subtree


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


def tracked(profile, values):
    """The average of values (T, ...) after each update: (T, ...)."""

    def step(ema, update):
        ema = profile.update(ema, update[1], update[0])
        return ema, ema

    numbers = jnp.arange(1, len(values) + 1)
    start = jnp.full_like(values[0], 7.0)  # initial weights, of which nothing must stay
    return jax.lax.scan(step, start, (numbers, values))[1]


@pytest.mark.parametrize("std", [0.001, 0.05, 0.1, 0.25, 0.288])
def test_exponent_solves_the_cubic(std):
    gamma = exponent(std)
    np.testing.assert_allclose((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3), std**2, rtol=1e-9)
    assert gamma > 0


def test_exponent_has_the_published_values():
    # Karras et al. 2024, section 3.1, to the two digits given there
    assert round(exponent(0.05), 2) == 16.97
    assert round(exponent(0.1), 2) == 6.94


@pytest.mark.parametrize("std", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_widths_that_no_power_function_has_are_refused(std):
    with pytest.raises(UserError, match=r"must lie between 0 and 0\.2887"):
        exponent(std)


@pytest.mark.parametrize("std", [0.02, 0.1, 0.25])
def test_weights_sum_to_one_and_have_the_width(std):
    count = 500
    # The average of the unit vectors is the weight of each update.
    weights = np.asarray(tracked(Profile("std", std), jnp.eye(count))[-1], np.float64)
    # 500 roundings in float32
    np.testing.assert_allclose(weights.sum(), 1, atol=2e-5)
    times = (np.arange(count) + 0.5) / count
    mean = weights @ times
    # Updates are whole steps: their width of 1/500 is missing, 1e-3 of the narrowest profile.
    np.testing.assert_allclose(np.sqrt(weights @ (times - mean) ** 2), std, rtol=2e-3)
    gamma = exponent(std)
    np.testing.assert_allclose(mean, (gamma + 1) / (gamma + 2), rtol=1e-4)


@pytest.mark.parametrize("std", [0.05, 0.2])
def test_average_of_the_step_number_is_the_closed_form(std):
    count, power = 300, exponent(std) + 1
    found = tracked(Profile("std", std), jnp.arange(1.0, count + 1))
    for t in (1, 2, 10, count):
        expected = t - sum((tau / t) ** power for tau in range(1, t))
        # 300 roundings in float32
        np.testing.assert_allclose(found[t - 1], expected, rtol=1e-5)


def test_rates_keep_their_digits_after_many_updates():
    exact = -np.expm1((exponent(0.1) + 1) * np.log1p(-1 / 5e6))
    np.testing.assert_allclose(power_rate(5_000_000, 0.1), exact, rtol=1e-6)


def test_a_decay_is_averaged_as_the_usual_one():
    values, ema = jnp.arange(20.0), jnp.float32(7)
    for n, value in enumerate(values, 1):
        ema = ema_update(ema, value, n, 0.5)
    # Compiled as a loop, products and sums may be fused.
    np.testing.assert_allclose(tracked(Profile("decay", 0.5), values)[-1], ema, rtol=1e-6)


def test_subtree_takes_what_has_the_same_names():
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    assert subtree(tree, {"a": {"c": 0}, "d": 0}) == {"a": {"c": 2}, "d": 3}
    assert subtree(tree, {"a": {}}) == {"a": {}}
