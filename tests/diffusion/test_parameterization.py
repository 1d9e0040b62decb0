import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.diffusion.parameterization import (
    PARAMETERIZATIONS,
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
    with pytest.raises(UserError, match="eps, x0, v"):
        to_prediction(x, x, LEVEL, "noise")
    with pytest.raises(UserError, match="eps, x0, v"):
        regression_target(x, x, LEVEL, "noise")
