"""Weightings against formulas by hand, and against what they must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.objective import make_loss
from ldm_jax.diffusion.parameterization import (
    PARAMETERIZATIONS,
    network_input,
    regression_target,
    to_prediction,
)
from ldm_jax.diffusion.schedule import make_schedule, vlb_weights
from ldm_jax.diffusion.weighting import WEIGHTINGS, Weighting, weight
from ldm_jax.errors import UserError
from ldm_jax.types import Prediction

STD = 0.6  # of the latents, and sigma_data
PROCESSES = {"discrete": make_schedule(), "flow": Flow(), "log_snr": LogSNR((0.01, 40.0))}
T = {
    "discrete": np.array([0, 10, 400, 999], np.int32),
    "flow": np.array([5, 200, 600, 990], np.float32),
    "log_snr": np.array([0, 200, 600, 1000], np.float32),
}


def weights_of(kind, weighting, predict):
    process = PROCESSES[kind]
    level = process.level(jnp.asarray(T[kind]), 3)
    return np.asarray(weight(weighting, process, level, predict, STD), np.float64)


def factors(kind):
    """alpha, sigma and the signal-to-noise ratio of T in float64."""
    alpha, sigma = PROCESSES[kind].marginal(T[kind])
    return alpha, sigma, (alpha / sigma) ** 2


@pytest.mark.parametrize("kind", PROCESSES)
def test_weights_as_published(kind):
    alpha, sigma, snr = factors(kind)
    ratio, square = sigma / alpha, alpha**2 + sigma**2
    expected = {
        # Hang et al. 2023, section 3.4; v there is of processes with square 1
        ("min_snr", "x0"): np.minimum(snr, 5),
        ("min_snr", "eps"): np.minimum(snr, 5) / snr,
        ("min_snr", "v"): np.minimum(snr, 5) / (snr + 1) / square,
        ("min_snr", "flow"): np.minimum(snr, 5) / (np.sqrt(snr) + 1) ** 2,
        ("soft_min_snr", "x0"): 1 / (1 / snr + 1 / 5),
        ("p2", "eps"): 1 / (2 + snr) ** 0.5,
        # Karras et al. 2022, table 1
        ("edm", "edm"): np.ones(4),
        ("edm", "x0"): (ratio**2 + STD**2) / (ratio * STD) ** 2,
    }
    for (name, predict), values in expected.items():
        given = Weighting(name, snr_gamma=5.0, p2=(2.0, 0.5))
        # float32; 1 - alpha_bar loses digits at the first levels
        np.testing.assert_allclose(weights_of(kind, given, predict), values, rtol=2e-3)


@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
@pytest.mark.parametrize("kind", PROCESSES)
def test_simple_weighs_nothing(kind, predict):
    np.testing.assert_array_equal(weights_of(kind, Weighting(), predict), np.ones(4))


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_vlb_is_the_bound_of_ddpm(predict):
    schedule, t = PROCESSES["discrete"], T["discrete"]
    expected = 1000 * vlb_weights(schedule, predict)[t]
    # The first is infinite, and copied in another way.
    given = weights_of("discrete", Weighting("vlb"), predict)
    np.testing.assert_allclose(given[1:], expected[1:], rtol=2e-3)


@pytest.mark.parametrize("kind", ["flow", "log_snr"])
def test_vlb_depends_on_the_ends_of_the_process_only(kind):
    """Its integral of the best error of Gaussian latents is log-SNR's, whatever the path."""
    process = PROCESSES[kind]
    ends = process.time_of(np.log(np.array([0.05, 20.0])))
    t = np.linspace(*ends, 20001)
    level = process.level(jnp.asarray(t, jnp.float32), 1)
    alpha, sigma = process.marginal(t)
    best = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # E (x0 - E[x0 | x_t])^2
    inner = weight(Weighting("vlb"), process, level, "x0") * best
    bound = np.trapezoid(np.asarray(inner, np.float64), t / process.steps)
    expected = 0.5 * np.log((1 + STD**2 / 0.05**2) / (1 + STD**2 / 20.0**2))
    np.testing.assert_allclose(bound, expected, rtol=1e-3)  # of the rule and of float32


def errors(kind, weighting, predict):
    """The loss of one and the same prediction of x0, brought into each parameterization."""
    process, t = PROCESSES[kind], jnp.asarray(T[kind])
    rng = np.random.default_rng(0)
    z, noise = (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(2))
    level = process.level(t, 2)
    x_t = level.noised(z, noise)
    guess = jnp.tanh(x_t) + 0.3
    eps = to_prediction(guess, x_t, level, "x0").eps

    def network(seen, t):
        np.testing.assert_array_equal(seen, network_input(x_t, level, predict, STD))
        return regression_target(guess, eps, level, predict, STD)

    loss_at = make_loss(process, predict, weighting=weighting, sigma_data=STD)
    return np.asarray(loss_at(network, z, t, noise)[0]), jnp.square(guess - z).mean(1)


@pytest.mark.parametrize("name", WEIGHTINGS[1:])
@pytest.mark.parametrize("kind", PROCESSES)
def test_a_weighted_loss_is_the_same_in_every_parameterization(kind, name):
    losses = {predict: errors(kind, Weighting(name), predict) for predict in PARAMETERIZATIONS}
    expected = weights_of(kind, Weighting(name), "x0") * losses["x0"][1]
    for predict, (loss, _) in losses.items():
        # Where there is hardly any noise or signal, differences of float32 lose digits.
        np.testing.assert_allclose(loss, expected, rtol=5e-3, err_msg=predict)


@pytest.mark.parametrize("predict", ["eps", "v", "flow", "edm"])
def test_all_weightings_have_the_same_minimum(predict):
    """For Gaussian latents the best network at a level is affine, and the loss is flat there."""
    process, mean = Flow(), 0.4
    nodes, mass = np.polynomial.hermite_e.hermegauss(8)  # exact for squares
    mass = np.outer(mass, mass).ravel() / mass.sum() ** 2
    x, noise = (a.reshape(-1, 1) for a in np.meshgrid(mean + STD * nodes, nodes))
    x, noise, mass = (jnp.asarray(a, jnp.float32) for a in (x, noise, mass))

    def total(change, weighting, t):
        """The expected loss of the best network plus an affine change of its input."""
        level = process.level(jnp.full(64, t), 2)

        def network(seen, _):
            std = jnp.sqrt(level.alpha**2 * STD**2 + level.sigma**2)
            x_t = seen * std if predict == "edm" else seen
            gain = level.alpha * STD**2 / std**2
            x0 = mean + gain * (x_t - level.alpha * mean)
            best = Prediction(x0, (x_t - level.alpha * x0) / level.sigma)
            raw = regression_target(best.x0, best.eps, level, predict, STD)
            return raw + change[0] + change[1] * seen

        loss_at = make_loss(process, predict, weighting=weighting, sigma_data=STD)
        return (mass * loss_at(network, x, jnp.full(64, t), noise)[0]).sum()

    slope = jax.jit(jax.value_and_grad(total), static_argnums=1)
    for name in WEIGHTINGS:
        for t in (100.0, 500.0, 900.0):
            value, gradient = slope(jnp.zeros(2), Weighting(name), t)
            away = slope(jnp.full(2, 0.1), Weighting(name), t)[1]
            assert value > 0 and np.abs(gradient).max() < 1e-3 * np.abs(away).max(), (name, t)


@pytest.mark.parametrize("predict", ["x0", "v", "flow", "edm"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_finite_at_pure_noise(name, predict):
    zero = make_schedule(zero_terminal_snr=True)
    for process, t in ((zero, jnp.array([0, 999])), (Flow(), jnp.array([1.0, 1000.0]))):
        given = weight(Weighting(name), process, process.level(t, 2), predict, STD)
        assert np.isfinite(given).all() and (given >= 0).all() and given[0] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="snr"), "simple, min_snr, soft_min_snr, p2, edm, vlb"),
        (dict(snr_gamma=0.0), "snr_gamma must be above 0"),
        (dict(p2=(0.0, 1.0)), "k above 0"),
    ],
)
def test_bad_weightings(options, message):
    with pytest.raises(UserError, match=message):
        make_loss(PROCESSES["flow"], "v", weighting=Weighting(**options))
