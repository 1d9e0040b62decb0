import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.schedule import at, make_schedule, posterior, vlb_weights
from ldm_jax.errors import UserError

NAMES = {"scaled_linear": "linear", "linear": "sqrt_linear", "sqrt": "sqrt", "cosine": "cosine"}


def test_scaled_linear_is_linear_in_the_root_of_beta():
    betas = make_schedule("scaled_linear", (0.01, 0.09), 3).betas
    np.testing.assert_allclose(betas, [0.01, 0.04, 0.09], rtol=1e-12)


def test_cumulative_products_by_hand():
    schedule = make_schedule("linear", (0.1, 0.3), 3)
    alpha_bar = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]
    np.testing.assert_allclose(schedule.alpha_bar, alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, np.ones(3), rtol=1e-6)
    assert schedule.alpha.dtype == schedule.sigma.dtype == np.float32


@pytest.mark.parametrize(
    "kind, beta",
    [
        ("scaled_linear", (0.0015, 0.0195)),
        ("scaled_linear", (0.00085, 0.012)),
        ("scaled_linear", (0.0015, 0.0205)),
        ("cosine", (0.0001, 0.02)),
        ("linear", (0.0015, 0.0195)),
        ("sqrt", (0.0015, 0.0195)),
    ],
)
def test_schedules_fixture(kind, beta):
    golden = load("schedules").arrays
    schedule = make_schedule(kind, beta, 1000)
    tag = f"{NAMES[kind]}_{beta[0]}_{beta[1]}_1000"
    np.testing.assert_allclose(schedule.betas, golden[f"{tag}.betas"], rtol=1e-10)
    np.testing.assert_allclose(schedule.alpha_bar, golden[f"{tag}.alphas_cumprod"], rtol=1e-10)


@pytest.mark.parametrize("variance_mix", [0, 0.3])
@pytest.mark.parametrize("predict, beta", [("eps", (0.0015, 0.0195)), ("x0", (0.00085, 0.012))])
def test_buffers_fixture(predict, beta, variance_mix):
    golden = load("schedules").arrays
    schedule = make_schedule("scaled_linear", beta, 1000)
    process = posterior(schedule, variance_mix)
    previous = np.append(1.0, schedule.alpha_bar[:-1])
    ours = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": schedule.alpha,
        "sqrt_one_minus_alphas_cumprod": schedule.sigma,
        "log_one_minus_alphas_cumprod": np.log(1 - schedule.alpha_bar),
        "sqrt_recip_alphas_cumprod": 1 / schedule.alpha,
        "sqrt_recipm1_alphas_cumprod": schedule.sigma / schedule.alpha,
        "posterior_variance": process.variance,
        "posterior_log_variance_clipped": np.log(np.maximum(process.variance, 1e-20)),
        "posterior_mean_coef1": process.mean_x0,
        "posterior_mean_coef2": process.mean_x_t,
        "lvlb_weights": vlb_weights(schedule, predict, variance_mix),
    }
    prefix = f"ddpm_{predict}_v{variance_mix}."
    assert set(ours) == {key.removeprefix("ddpm_eps_v0.3.") for key in golden if "eps_v0.3" in key}
    for name, value in ours.items():
        loose = name in ("posterior_log_variance_clipped", "lvlb_weights")
        np.testing.assert_allclose(
            value, golden[prefix + name], rtol=1e-4 if loose else 1e-5, err_msg=name
        )


def test_diffusion_ops_fixture():
    golden = {k: jnp.asarray(v) for k, v in load("diffusion_ops").arrays.items()}
    schedule = make_schedule("scaled_linear", (0.00085, 0.012), 1000)
    x0, eps, t = golden["in.x0"], golden["in.noise"], golden["in.t"]
    x_t = schedule.add_noise(x0, eps, t)
    process = posterior(schedule)
    mean = at(process.mean_x0, t, 4) * x0 + at(process.mean_x_t, t, 4) * x_t
    variance = at(process.variance, t, 4)
    ours = {
        "q_sample": x_t,
        "posterior_mean": mean,
        "posterior_var": variance,
        "posterior_logvar": jnp.log(jnp.maximum(variance, 1e-20)),
        "q_mean": at(schedule.alpha, t, 4) * x0,
        "q_var": at(1 - schedule.alpha_bar, t, 4),
        "q_logvar": at(np.log(1 - schedule.alpha_bar), t, 4),
    }
    for name, value in ours.items():
        np.testing.assert_allclose(value, golden[f"out.{name}"], rtol=1e-5, atol=1e-5, err_msg=name)


def test_posterior_is_the_product_of_gaussians():
    schedule = make_schedule("cosine", steps=20)
    process, t = posterior(schedule), 7
    previous, beta = schedule.alpha_bar[t - 1], schedule.betas[t]
    precision = 1 / (1 - previous) + (1 - beta) / beta
    np.testing.assert_allclose(process.variance[t], 1 / precision, rtol=1e-10)
    np.testing.assert_allclose(
        process.mean_x0[t], np.sqrt(previous) / (1 - previous) / precision, rtol=1e-10
    )
    np.testing.assert_allclose(
        process.mean_x_t[t], np.sqrt(1 - beta) / beta / precision, rtol=1e-10
    )


def test_lookup_appends_axes_and_never_clamps():
    values = np.arange(3, dtype=np.float32)
    found = at(values, jnp.array([2, 0, 3, -1]), 3)
    assert found.shape == (4, 1, 1)
    np.testing.assert_array_equal(found.ravel(), [2, 0, np.nan, np.nan])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sqrt_linear",), "scaled_linear, linear, sqrt, cosine"),
        (("linear", (0.2, 0.1)), "start <= end"),
        (("linear", (0.0, 0.1)), "0 < start"),
        (("linear", (0.1, 0.2), 0), "at least 1"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(UserError, match=message):
        make_schedule(*arguments)


@pytest.mark.parametrize("kind", ["scaled_linear", "cosine"])
def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_pure_noise(kind):
    before, after = (make_schedule(kind, steps=50, zero_terminal_snr=zero) for zero in (0, 1))
    assert after.alpha_bar[0] == before.alpha_bar[0] and after.alpha_bar[-1] == 0
    assert after.alpha[-1] == 0 and after.sigma[-1] == 1 and after.betas[-1] == 1
    assert (np.diff(after.alpha_bar) < 0).all()
    np.testing.assert_allclose(np.cumprod(1 - after.betas), after.alpha_bar, rtol=1e-9)
    # Affine in alpha: the differences keep their proportions.
    steps = [np.diff(np.sqrt(schedule.alpha_bar)) for schedule in (before, after)]
    np.testing.assert_allclose(steps[1] / steps[0], steps[1][5] / steps[0][5], rtol=1e-9)
    process = posterior(after)
    assert all(np.isfinite(values).all() for values in process)
    assert np.isfinite(vlb_weights(after, "v")).all()
    with pytest.raises(UserError, match="at least 2"):
        make_schedule(kind, steps=1, zero_terminal_snr=True)


@pytest.mark.parametrize("make", [lambda: Flow(1), lambda: LogSNR(steps=1)])
def test_a_clock_needs_two_steps(make):
    with pytest.raises(UserError, match="at least 2 steps"):
        make()


@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))])
def test_bad_ends_of_log_snr(ends):
    with pytest.raises(UserError, match="0 < first < last"):
        LogSNR(ends)
