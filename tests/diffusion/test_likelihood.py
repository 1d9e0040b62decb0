"""Likelihoods against closed forms: the best prediction for Gaussian data is affine in x_t."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax import random
from ldm_jax.diffusion import likelihood
from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.parameterization import (
    PARAMETERIZATIONS,
    regression_target,
    to_prediction,
)
from ldm_jax.diffusion.schedule import make_schedule, posterior
from ldm_jax.errors import UserError
from ldm_jax.types import Prediction

SHAPE = (1, 2, 2)
DIMS = math.prod(SHAPE)
PROCESSES = {
    "scaled_linear": make_schedule(),
    "zero_snr": make_schedule(zero_terminal_snr=True),
    "flow": Flow(),
    "log_snr": LogSNR(),
}

# Data N(MEAN, AXES diag(STDS^2) AXES^T): its dimensions depend on one another.
RANDOM = np.random.RandomState(0)
MEAN = np.array([0.3, -0.2, 0.1, 0.0])
STDS = np.array([0.3, 0.6, 1.0, 1.5])
AXES = np.linalg.qr(RANDOM.standard_normal((DIMS, DIMS)))[0]


def draw_data(count):
    z = RANDOM.standard_normal((count, DIMS)) * STDS
    return (MEAN + z @ AXES.T).astype(np.float32).reshape(count, *SHAPE)


DATA = draw_data(6)


def best(x_t, level):
    """The optimal prediction at any level, for x_t (B, *SHAPE)."""
    alpha, sigma = (jnp.broadcast_to(x, (len(x_t), 1, 1, 1)).reshape(-1, 1) for x in level[1:])
    mean, stds = (jnp.asarray(x, jnp.float32)[None] for x in (MEAN, STDS))
    axes = jnp.asarray(AXES, jnp.float32)
    rows = (x_t.reshape(-1, DIMS) - alpha * mean) @ axes
    gain = alpha * stds**2 / (alpha**2 * stds**2 + sigma**2)
    x0 = (mean + (gain * rows) @ axes.T).reshape(x_t.shape)
    eps = sigma / (alpha**2 * stds**2 + sigma**2) * rows  # no cancellation at little noise
    return Prediction(x0=x0, eps=(eps @ axes.T).reshape(x_t.shape))


def log_normal(rows, mean, stds):
    """Log-density (B,) in nats, float64, of rows (B, D)."""
    scaled = ((rows - mean) / stds) ** 2
    return -0.5 * (scaled + np.log(2 * np.pi) + 2 * np.log(stds)).sum(1)


def exact_bits(x0):
    """Of the data themselves."""
    rows = (np.asarray(x0, np.float64).reshape(-1, DIMS) - MEAN) @ AXES
    return -log_normal(rows, 0, STDS) / (DIMS * np.log(2))


def exact_ode_bits(process, x0):
    """Of what the ODE makes of N(0, 1) at the last level, at the first one: also Gaussian."""
    alpha, sigma = process.marginal(np.array([process.first, process.last]))
    size = np.hypot(alpha, sigma)
    spread = [np.hypot(a * STDS, s) / r for a, s, r in zip(alpha, sigma, size, strict=True)]
    x0 = np.asarray(x0, np.float64).reshape(-1, DIMS) @ AXES
    mean = MEAN @ AXES
    growth = spread[1] / spread[0]
    at_noise = alpha[1] / size[1] * mean + alpha[0] / size[0] * (x0 - mean) * growth
    log_p = log_normal(at_noise, 0, 1) + np.log(growth).sum() + DIMS * np.log(alpha[0] / size[0])
    return -log_p / (DIMS * np.log(2))


@functools.cache
def ode_runner(denoise=best):
    run = functools.partial(likelihood.ode_nll, denoise)
    return quick_jit(lambda x0, probes, rows: run(x0, probes, rows))


def ode_bits(process, steps, x0=DATA, denoise=best):
    rows = likelihood.ode_rows(process, steps)
    bits = ode_runner(denoise)(x0, likelihood.unit_probes(SHAPE), rows)
    return np.asarray(bits, np.float64)


# The ODE


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_ode_is_exact_and_of_second_order(kind):
    process = PROCESSES[kind]
    exact = exact_ode_bits(process, DATA)
    bits = [ode_bits(process, n) for n in (20, 40, 80, 320)]
    errors = [np.abs(found - exact).max() for found in bits]
    np.testing.assert_allclose(np.divide(errors[:2], errors[1:3]), 4, rtol=0.2)
    assert errors[3] < 3e-4  # 1 / 16 of the one at 80; float32 adds about 1e-5
    # The data's own density, but for the noise at the first level, 0.039 in a schedule of betas:
    # a variance of 0.0015 beside 0.09 and more; and for the mean that the last one keeps: 0.3 / 80.
    atol = 2e-2 if process.discrete else 5e-3
    np.testing.assert_allclose(bits[3], exact_bits(DATA), atol=atol, rtol=0)


def test_all_parameterizations_agree():
    """Each turns its raw output into the same x0 and eps, up to rounding."""
    process = LogSNR((0.02, 80.0))
    want = ode_bits(process, 20)
    for predict in PARAMETERIZATIONS:

        def denoise(x_t, level, predict=predict):
            found = best(x_t, level)
            raw = regression_target(found.x0, found.eps, level, predict, 0.5)
            return to_prediction(raw, x_t, level, predict, 0.5)

        found = ode_bits(process, 20, denoise=denoise)
        # float32 divided by the least sigma, 0.02, or the least alpha, 1 / 80
        np.testing.assert_allclose(found, want, atol=1e-4, rtol=0, err_msg=predict)


def test_hutchinsons_mean_is_the_trace():
    count, steps = 2000, 10
    rows = likelihood.ode_rows(PROCESSES["log_snr"], steps)
    keys = random.example_keys(jax.random.key(0), count)
    probes = likelihood.rademacher(keys, 1, SHAPE)
    assert set(np.unique(probes)) == {-1, 1}
    found = np.asarray(ode_runner()(jnp.repeat(DATA[:1], count, 0), probes, rows), np.float64)
    want = ode_bits(PROCESSES["log_snr"], steps)[0]
    error = found.std(ddof=1) / np.sqrt(count)
    assert found.std() > 0.05  # there is something to average
    assert abs(found.mean() - want) < 3 * error
    # Several probes of one example are averaged.
    several = likelihood.rademacher(keys[:2], 5, SHAPE)
    alone = [ode_runner()(DATA[:2], several[i : i + 1], rows) for i in range(5)]
    together = ode_runner()(DATA[:2], several, rows)
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-5)


def test_the_ode_visits_the_ends_of_a_process_and_times_between():
    for process in PROCESSES.values():
        grid = likelihood.ode_grid(process, 30)
        assert (grid.t[0], grid.t[-1]) == (process.first, process.last)
        alpha, sigma = process.marginal(grid.t)
        np.testing.assert_array_equal([grid.alpha, grid.sigma], [alpha, sigma])
        assert (np.diff(np.arctan2(sigma, alpha)) > 0).all()
    with pytest.raises(UserError, match="at least 1 step, not 0"):
        likelihood.ode_grid(Flow(), 0)


# The bound


def vlb(schedule, x0, seed=0, times=None, variance="beta", decoder=None, denoise=best):
    keys = random.example_keys(jax.random.key(seed), len(x0))
    times = schedule.steps - 1 if times is None else times
    run = quick_jit(
        lambda x0, keys: likelihood.variational_bound(
            denoise, x0, keys, schedule, times, variance, decoder
        )
    )
    return run(x0, keys)


def normal_kl(mean, variance, mean_q, variance_q):
    terms = np.log(variance_q / variance) + (variance + (mean - mean_q) ** 2) / variance_q - 1
    return 0.5 * terms.reshape(len(mean), -1).sum(1)


def bound_parts(schedule, x0, keys, variance):
    """The parts (B,) by their definition, in float64 from the same draws of noise."""
    true = posterior(schedule)
    model = likelihood.reverse_variance(schedule, variance)
    end = schedule.alpha_bar[-1]
    prior = normal_kl(np.sqrt(end) * x0, 1 - end, 0, 1)
    kl = np.zeros(len(x0))
    for t in range(schedule.steps):
        noise = likelihood.noise_of(keys, jnp.full(len(x0), t), SHAPE)
        level = schedule.level(jnp.full(len(x0), t), 4)
        x_t = level.noised(x0, noise)
        mean_of = lambda x, x_t=x_t, t=t: true.mean_x0[t] * x + true.mean_x_t[t] * x_t  # noqa: E731
        found = np.asarray(mean_of(np.asarray(best(x_t, level).x0, np.float64)), np.float64)
        if t == 0:
            decoder = -log_normal(
                (x0 - found).reshape(-1, DIMS), 0, np.full(DIMS, np.sqrt(model[0]))
            )
        else:
            kl += normal_kl(np.asarray(mean_of(x0), np.float64), true.variance[t], found, model[t])
    return [part / (DIMS * np.log(2)) for part in (prior, kl, decoder)]


@pytest.mark.parametrize("variance", likelihood.VARIANCES)
def test_the_parts_of_the_bound_match_their_definition(variance):
    for schedule in (
        make_schedule("linear", (0.01, 0.3), 12),
        make_schedule("linear", (0.01, 0.3), 12, zero_terminal_snr=True),
        make_schedule("linear", (0.01, 0.3), 1),
    ):
        found = vlb(schedule, DATA, variance=variance)
        keys = random.example_keys(jax.random.key(0), len(DATA))
        want = bound_parts(schedule, DATA, keys, variance)
        # float32 against float64; the prior of pure noise is 0.
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.total, sum(want), rtol=1e-4)
    assert found.kl.sum() == 0  # of one time step


def expected_bound(schedule, variance):
    """The bound's exact mean over data and noise, in float64, from the optimum's mean error."""
    alpha, sigma = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    errors = (STDS * sigma[:, None]) ** 2 / ((STDS * alpha[:, None]) ** 2 + sigma[:, None] ** 2)
    constant, weight = likelihood.kl_terms(schedule, variance)
    kl = (DIMS * constant + weight * errors.sum(1)).sum()
    model = likelihood.reverse_variance(schedule, variance)[0]
    decoder = 0.5 * (DIMS * np.log(2 * np.pi * model) + errors[0].sum() / model)
    kept = schedule.alpha_bar[-1]
    # The sum of x0^2 is the same in any axes.
    prior = 0.5 * (kept * (MEAN**2 + STDS**2 - 1) - np.log1p(-kept)).sum()
    return (prior + kl + decoder) / (DIMS * np.log(2))


def test_the_bound_closes_with_more_time_steps():
    """It is above the entropy, and above that of the best model ever less so."""
    entropy = (0.5 * np.log(2 * np.pi * np.e) + np.log(STDS).mean()) / np.log(2)
    gaps = {name: [] for name in likelihood.VARIANCES}
    for steps in (50, 200, 1000, 5000):
        # DDPM's range of noise, at any number of steps; less noise at the first one of more.
        schedule = make_schedule("linear", (0.1 / steps, 20 / steps), steps)
        for name, found in gaps.items():
            found.append(expected_bound(schedule, name) - entropy)
    assert min(gaps["beta"] + gaps["posterior"]) > 0
    beta = np.array(gaps["beta"])
    assert (beta[:-1] > 2 * beta[1:]).all() and beta[2] < 0.01, beta
    # The smallest variances are too small for data that are smooth at the scale of the noise.
    assert min(gaps["posterior"]) > 0.1
    # What is computed has this mean.
    schedule, data = make_schedule("linear", (0.002, 0.4), 50), draw_data(4000)
    for name in likelihood.VARIANCES:
        found = np.asarray(vlb(schedule, data, variance=name).total, np.float64)
        difference = found - exact_bits(data) - (expected_bound(schedule, name) - entropy)
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        assert abs(difference.mean()) < 3 * error and error < 0.05


def test_fewer_time_steps_give_the_same_mean():
    schedule = make_schedule("linear", (0.005, 0.2), 60)
    data, means, errors = jnp.repeat(DATA[:2], 1500, 0), [], []
    for times in (59, 1, 4, 15):
        kl = np.asarray(vlb(schedule, data, times=times, seed=times).kl).reshape(2, -1)
        means.append(kl.mean(1))
        errors.append(kl.std(1, ddof=1) / np.sqrt(kl.shape[1]))
    distances = np.abs(np.array(means) - means[0])[1:]
    assert (distances < 3 * np.hypot(errors[0], errors[1:])).all()
    assert (np.array(errors) < 0.07 * means[0]).all()


def test_strata_hold_each_time_step_once():
    for schedule in (make_schedule(), make_schedule(steps=3), PROCESSES["zero_snr"]):
        most = schedule.steps - 1
        for times in (1, 2, min(50, most), most):
            edges = likelihood.strata(schedule, times)
            assert len(edges) == times + 1 and (edges[0], edges[-1]) == (1, schedule.steps)
            assert (np.diff(edges) >= 1).all()
    levels = np.log(make_schedule().ratio[likelihood.strata(make_schedule(), 10)[:-1]])
    np.testing.assert_allclose(np.diff(levels), np.diff(levels).mean(), rtol=0.5)


def test_examples_do_not_depend_on_their_batch():
    schedule = make_schedule("linear", (0.01, 0.3), 12)
    found = [
        part.total for part in (vlb(schedule, DATA, times=3), vlb(schedule, DATA[:2], times=3))
    ]
    np.testing.assert_allclose(found[0][:2], found[1], rtol=1e-5)


def test_settings_outside_their_range_are_refused():
    schedule = make_schedule(steps=10)
    for times in (0, 10):
        with pytest.raises(UserError, match=f"1 to 9 time steps, not {times}"):
            likelihood.variational_bound(best, DATA, None, schedule, times)
    with pytest.raises(UserError, match="unknown variance 'learned': choose one of beta, post"):
        likelihood.variational_bound(best, DATA, None, schedule, 9, "learned")
    with pytest.raises(UserError, match="of a discrete schedule: take the ODE's"):
        likelihood.variational_bound(best, DATA, None, Flow(), 9)


# Scales and pixels


def test_the_scale_of_latents_changes_bits_by_its_logarithm():
    """A model of s z gives every z the bits of a model of z, once its scale is undone."""
    scale, stds = np.array([0.5, 4.0]), np.array([0.3, 0.2])  # of the two channels

    def gaussian(stds):
        def denoise(x_t, level):
            std = jnp.asarray(stds, jnp.float32).reshape(1, 1, 1, 2)
            total = level.alpha**2 * std**2 + level.sigma**2
            return Prediction(level.alpha * std**2 / total * x_t, level.sigma / total * x_t)

        return denoise

    z = 0.2 * DATA
    plain = ode_bits(PROCESSES["log_snr"], 200, z, gaussian(stds))
    scaled = z * scale.astype(np.float32)
    found = ode_bits(PROCESSES["log_snr"], 200, scaled, gaussian(scale * stds))
    # Heun's error, and the first noise of 0.002 beside 0.15. 0.5 is the mean of log2(scale).
    np.testing.assert_allclose(found - plain, 0.5, atol=1e-3)
    np.testing.assert_allclose(likelihood.unscaled(found, scale), plain, atol=1e-3)


def test_pixels_under_a_gaussian_cut_into_levels():
    values = np.arange(256, dtype=np.float64)
    pixels = (values / 127.5 - 1).astype(np.float32)[:, None]
    normal = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    edges = np.concatenate([[-np.inf], (values[:-1] + 0.5) / 127.5 - 1, [np.inf]])
    for mean, std in ((0.0, 0.3), (-0.99, 0.02), (1.5, 0.2)):
        nll = likelihood.pixel_nll(pixels, jnp.full((256, 1), mean), std)
        np.testing.assert_allclose(np.exp(-np.asarray(nll, np.float64)).sum(), 1, rtol=1e-4)
        cdf = normal((edges - mean) / std)
        share, likely = np.diff(cdf), np.diff(cdf) > 1e-6
        np.testing.assert_allclose(np.exp(-nll[likely]), share[likely], rtol=1e-3)
    far = likelihood.pixel_nll(pixels, jnp.full((256, 1), 0.0), 0.01)
    # Beyond what float32 or float64 can say as a probability: -log of the density times the width.
    want = 0.5 * (0.7 / 0.01) ** 2
    assert np.isfinite(far).all() and abs(far[217] / want - 1) < 0.05  # pixel 0.702


def test_dequantized_pixels_stay_in_their_level():
    values = np.arange(256, dtype=np.uint8).repeat(40)
    pixels = (values / np.float32(127.5) - 1).astype(np.float32)[:, None]
    keys = random.example_keys(jax.random.key(0), len(pixels))
    noisy = np.asarray(likelihood.dequantized(keys, pixels))[:, 0]
    np.testing.assert_array_equal(np.round((noisy + 1) * 127.5), values)
    spread = (noisy - pixels[:, 0]) * 127.5
    assert abs(spread.mean()) < 0.02 and abs(spread.std() - 12**-0.5) < 0.01
    # A uniform density over all levels, 256 of width 1 / 127.5, is 8 bits.
    assert math.isclose(math.log2(256 / 127.5) + likelihood.LEVEL_BITS, 8)
