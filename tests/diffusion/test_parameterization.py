import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.parameterization import (
    PARAMETERIZATIONS,
    network_input,
    regression_target,
    to_prediction,
)
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import UserError

SCHEDULE = make_schedule()
T = jnp.array([0, 1, 300, 700, 999])
LEVEL = SCHEDULE.level(T, 4)


def draw(seed):
    return jnp.asarray(np.random.RandomState(seed).randn(5, 2, 3, 4), jnp.float32)


@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
def test_round_trip(predict):
    x0, eps = draw(0), draw(1)
    x_t = SCHEDULE.add_noise(x0, eps, T)
    raw = regression_target(x0, eps, LEVEL, predict)
    prediction = to_prediction(raw, x_t, LEVEL, predict)
    # Rounding of x_t is amplified by sigma/alpha (84 at t=999) and alpha/sigma (26 at t=0).
    np.testing.assert_allclose(prediction.x0, x0, atol=1e-4)
    np.testing.assert_allclose(prediction.eps, eps, atol=1e-4)
    again = regression_target(prediction.x0, prediction.eps, LEVEL, predict)
    np.testing.assert_allclose(again, raw, atol=1e-4)


@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
def test_any_output_is_consistent_with_x_t(predict):
    raw, x_t = draw(2), draw(3)
    prediction = to_prediction(raw, x_t, LEVEL, predict)
    np.testing.assert_allclose(
        SCHEDULE.add_noise(prediction.x0, prediction.eps, T), x_t, rtol=1e-5, atol=1e-5
    )


def test_v_is_alpha_eps_minus_sigma_x0():
    x0, eps = draw(0), draw(1)
    alpha_bar = SCHEDULE.alpha_bar[np.asarray(T)].reshape(5, 1, 1, 1)
    expected = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0
    np.testing.assert_allclose(
        regression_target(x0, eps, LEVEL, "v"), expected, rtol=1e-5, atol=1e-5
    )


def test_predict_start_fixture():
    golden = {k: jnp.asarray(v) for k, v in load("diffusion_ops").arrays.items()}
    schedule = make_schedule("scaled_linear", (0.00085, 0.012), 1000)
    t, eps = golden["in.t"], golden["in.noise"]
    x0 = to_prediction(eps, golden["out.q_sample"], schedule.level(t, 4), "eps").x0
    expected = golden["out.predict_start"]
    np.testing.assert_allclose(x0[:-1], expected[:-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x0[-1], expected[-1], rtol=1e-3)


def test_unknown_parameterization():
    x = draw(0)
    with pytest.raises(UserError, match="eps, x0, v, flow, edm"):
        to_prediction(x, x, LEVEL, "noise")
    with pytest.raises(UserError, match="eps, x0, v, flow, edm"):
        regression_target(x, x, LEVEL, "noise")


# Known answers: for x0 ~ N(MEAN, STD^2) the best network is E[target | x_t].

MEAN, STD = 0.7, 0.3
ZERO = make_schedule(zero_terminal_snr=True)
PROCESSES = {
    "discrete": (SCHEDULE, np.array([0, 300, 999])),
    "flow": (Flow(), np.array([10.0, 400.0, 990.0])),
    "log_snr": (LogSNR((0.02, 50.0)), np.array([0.0, 400.0, 1000.0])),
    "pure_noise": (ZERO, np.array([999])),
    "end_of_flow": (Flow(), np.array([1000.0])),
}


def best_network(predict, x_t, alpha, sigma):
    """The best output in float64 by each definition, and E[x0 | x_t] and E[eps | x_t]."""
    variance = alpha**2 * STD**2 + sigma**2
    rest = x_t - alpha * MEAN
    x0 = MEAN + alpha * STD**2 / variance * rest
    eps = sigma / variance * rest
    if predict == "edm":  # table 1 of Karras et al. 2022, times alpha where x_t / alpha is infinite
        skip = alpha * STD**2 / variance  # c_skip / alpha
        out = sigma * STD / np.sqrt(variance)
        return (x0 - skip * x_t) / out, x0, eps
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[predict], x0, eps


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
def test_the_best_network_of_gaussian_latents(predict, kind):
    process, t = PROCESSES[kind]
    alpha, sigma = (x[:, None] for x in process.marginal(t))
    if predict == "eps" and (alpha == 0).any():
        pytest.skip("refused: eps says nothing of x0 there")
    x_t = alpha * MEAN + np.linspace(-2, 2, 5) * np.sqrt(alpha**2 * STD**2 + sigma**2)
    raw, x0, eps = best_network(predict, x_t, alpha, sigma)
    given = jnp.asarray(t, jnp.int32 if process.discrete else jnp.float32)
    level = process.level(given, 2)
    found = to_prediction(*(jnp.asarray(a, jnp.float32) for a in (raw, x_t)), level, predict, STD)
    # eps and x0 lose the digits of sigma / alpha (up to 84) and alpha / sigma (up to 99) in float32
    np.testing.assert_allclose(found.x0, x0, atol=1e-4)
    np.testing.assert_allclose(found.eps, eps, atol=1e-4)
    back = regression_target(found.x0, found.eps, level, predict, STD)
    # edm's is x0 minus what x_t tells of it, and is divided by sigma_data and sigma.
    np.testing.assert_allclose(back, raw, atol=1e-3 if predict == "edm" else 1e-4)


@pytest.mark.parametrize("predict", ["x0", "v", "flow", "edm"])
@pytest.mark.parametrize("kind", ["pure_noise", "end_of_flow"])
def test_any_output_at_pure_noise(predict, kind):
    """The noise is x_t itself, and x0 goes with the output, one to one."""
    process, t = PROCESSES[kind]
    given = jnp.asarray(np.repeat(t, 5), jnp.int32 if process.discrete else jnp.float32)
    level, raw, x_t = process.level(given, 4), draw(2), draw(3)
    found = to_prediction(raw, x_t, level, predict, STD)
    np.testing.assert_allclose(found.eps, x_t, rtol=1e-6)
    sign = {"x0": raw, "v": -raw, "flow": x_t - raw, "edm": STD * raw}[predict]
    np.testing.assert_allclose(found.x0, sign, rtol=1e-5, atol=1e-6)
    again = regression_target(found.x0, found.eps, level, predict, STD)
    np.testing.assert_allclose(again, raw, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("predict", ["v", "flow", "edm"])
def test_no_noise_is_no_trouble(predict):
    level = Flow().level(jnp.zeros(5), 4)
    found = to_prediction(draw(2), draw(3), level, predict, STD)
    np.testing.assert_allclose(found.x0, draw(3), rtol=1e-6)
    assert jnp.isfinite(found.eps).all()


@pytest.mark.parametrize("kind", PROCESSES)
def test_edm_has_inputs_and_targets_of_unit_variance(kind):
    process, t = PROCESSES[kind]
    given = jnp.asarray(t, jnp.int32 if process.discrete else jnp.float32)
    level = process.level(given, 2)
    # Exact second moments, from x0 and eps as basis vectors of standard deviation STD and 1.
    x0, eps = jnp.array([[STD, 0.0]]), jnp.array([[0.0, 1.0]])
    seen = network_input(level.noised(x0, eps), level, "edm", STD)
    target = regression_target(x0, eps, level, "edm", STD)
    np.testing.assert_allclose((seen**2).sum(1), np.ones(len(t)), rtol=1e-5)
    np.testing.assert_allclose((target**2).sum(1), np.ones(len(t)), rtol=1e-5)
    np.testing.assert_allclose((seen * target).sum(1), np.zeros(len(t)), atol=1e-5)  # not told yet


def test_input_is_x_t_otherwise():
    for predict in PARAMETERIZATIONS[:-1]:
        np.testing.assert_array_equal(network_input(draw(3), LEVEL, predict, STD), draw(3))


def test_sigma_data_must_be_above_zero():
    with pytest.raises(UserError, match="sigma_data must be above 0"):
        to_prediction(draw(0), draw(0), LEVEL, "edm", 0.0)
