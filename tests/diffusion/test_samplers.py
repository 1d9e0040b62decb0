import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax import random
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.guidance import make_denoise
from ldm_jax.diffusion.samplers import SAMPLERS, make_table, sample
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import UserError
from ldm_jax.training.sharding import batch_sharding, make_mesh

DDIM = SAMPLERS["ddim"]


def analytic(x_t, t, cond=None):
    """A stand-in for a network on images (B, H, W, C)."""
    clock = 0.4 * jnp.sin(0.01 * t.reshape(-1, 1, 1, 1))
    return 0.9 * jnp.tanh(0.6 * x_t + clock + 0.2 * jnp.roll(x_t, 1, axis=2)) + 0.05 * x_t


@functools.cache
def run_analytic(steps=10, eta=1.0):
    """A compiled sampler of the analytic model: (x_T, keys) -> samples."""
    schedule = make_schedule()
    table = make_table("ddim", schedule, steps, eta)
    denoise = make_denoise(analytic, schedule, "eps")
    return jax.jit(lambda x_T, keys: sample(denoise, x_T, keys, table, DDIM))


# Tables


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97, 1000])
def test_leading_has_exactly_as_many_steps_as_asked_for(total):
    for steps in range(1, total + 1):
        t = samplers.leading_steps(total, steps)
        assert len(t) == steps and t[0] >= 0 and t[-1] < total
        assert (np.diff(t) >= 1).all()
        if total % steps == 0 and steps < total:
            np.testing.assert_array_equal(t, samplers.uniform_steps(total, steps))


@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_original_spacings_stay_inside_or_raise(spacing):
    schedule = make_schedule()
    for steps in range(1, 1001):
        try:
            t = make_table("ddim", schedule, steps, 0.0, spacing)["t"]
        except UserError as error:
            assert spacing == "uniform" and (steps > 500 or 999 % (1000 // steps) == 0), steps
            assert "visits time step 1000" in str(error) and "leading" in str(error)
        else:
            assert 1 <= t.min() and t.max() <= 999


@pytest.mark.parametrize("steps, visited", [(30, 31), (64, 67)])
def test_uniform_has_more_steps_where_it_does_not_divide(steps, visited):
    assert len(samplers.uniform_steps(1000, steps)) == visited
    assert len(samplers.leading_steps(1000, steps)) == steps


@pytest.mark.parametrize("steps", [20, 50, 100, 200, 250])
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_ddim_parameters_fixture(spacing, steps):
    golden = load("ddim_parameters")
    schedule, tag = make_schedule(), f"{spacing}_{steps}"
    for eta, name in ((0.0, "eta0"), (0.5, "eta0.5"), (1.0, "eta1")):
        table = {k: v[::-1] for k, v in make_table("ddim", schedule, steps, eta, spacing).items()}
        np.testing.assert_array_equal(table["t"], golden[f"{tag}.timesteps"])
        np.testing.assert_allclose(
            schedule.alpha[table["t"]] ** 2, golden[f"{tag}.alphas"], rtol=1e-6
        )
        np.testing.assert_allclose(table["x0"] ** 2, golden[f"{tag}.alphas_prev"], rtol=1e-6)
        sigmas = table.get("noise", np.zeros(steps))
        np.testing.assert_allclose(sigmas, golden[f"{tag}.{name}.sigmas"], rtol=2e-5, atol=1e-7)


def test_table_is_float32_in_the_order_of_the_steps():
    table = make_table("ddim", make_schedule(), 7, 1.0)
    assert {name: column.dtype.name for name, column in table.items()} == {
        "t": "int32",
        "x0": "float32",
        "eps": "float32",
        "noise": "float32",
    }
    assert (np.diff(table["t"]) < 0).all()
    assert "noise" not in make_table("ddim", make_schedule(), 7, 0.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("euler", 10), "ddim"),
        (("ddim", 0), r"1\.\.1000"),
        (("ddim", 1001), r"1\.\.1000"),
        (("ddim", 10, -0.1), r"\[0, 1\]"),
        (("ddim", 10, float("nan")), r"\[0, 1\]"),
        (("ddim", 10, 0.0, "even"), "leading, uniform, quad"),
        (("ddim", 300, 0.0, "uniform"), "leading"),
        (("ddim", 1000, 0.0, "uniform"), "leading"),
    ],
)
def test_bad_requests(arguments, message):
    name, *rest = arguments
    with pytest.raises(UserError, match=message):
        make_table(name, make_schedule(), *rest)


# Known answers: for x0 ~ N(MEAN, STD^2) the best prediction is a known affine function of x_t.

MEAN, STD = 0.7, 0.3


def gaussian_network(schedule, predict):
    """The optimal network: `apply` for `make_denoise`, on x_t (B, 1)."""

    def apply(x_t, t, cond):
        alpha, sigma = (jnp.asarray(c)[t][:, None] for c in (schedule.alpha, schedule.sigma))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x_t - alpha * MEAN)
        eps = (x_t - alpha * x0) / sigma
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[predict]

    return apply


def final_moments(schedule, steps, eta, predict="eps"):
    """Exact (mean, standard deviation) of the samples if x_T has its true marginal.

    Every step is affine, so unit inputs give the factor of x_T and of the noise of each step.
    """
    table = make_table("ddim", schedule, steps, eta)
    denoise = make_denoise(gaussian_network(schedule, predict), schedule, predict)
    size = 2 + (steps if eta else 0)
    x_T = jnp.zeros((size, 1)).at[1].set(1.0)
    noise = jnp.eye(steps, size, 2)[..., None] if eta else None
    keys = random.example_keys(jax.random.key(0), size)
    run = jax.jit(lambda x, n: sample(denoise, x, keys, table, DDIM, n))
    out = np.asarray(run(x_T, noise), np.float64)[:, 0]
    factors = out[1:] - out[0]
    start = schedule.alpha_bar[table["t"][0]]
    factors[0] *= np.sqrt(start * STD**2 + 1 - start)
    mean = out[0] + (out[1] - out[0]) * np.sqrt(start) * MEAN
    return mean, np.sqrt((factors**2).sum())


def true_moments(schedule):
    """The marginal that the last step ends at, alpha_bar[0]."""
    end = schedule.alpha_bar[0]
    return np.sqrt(end) * MEAN, np.sqrt(end * STD**2 + 1 - end)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_ddim_reaches_the_exact_marginal(kind, predict):
    schedule = make_schedule(kind, (0.0015, 0.0195), 1000)
    mean, std = final_moments(schedule, 1000, 0.0, predict)
    true_mean, true_std = true_moments(schedule)
    np.testing.assert_allclose(mean, true_mean, rtol=2e-3)
    np.testing.assert_allclose(std, true_std, rtol=1e-2)


def test_ddim_is_of_first_order():
    schedule = make_schedule(steps=4000, beta=(0.0004, 0.005))
    errors = [
        abs(final_moments(schedule, n, 0.0, "x0")[1] - true_moments(schedule)[1])
        for n in (50, 100, 200)
    ]
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4


def ancestral_std(schedule, t):
    """Exact standard deviation of ancestral sampling down the steps t, from DDPM's posterior."""
    end = schedule.alpha_bar[t[-1]]
    variance = end * STD**2 + 1 - end
    for now, then in itertools.pairwise(schedule.alpha_bar[[*t[::-1], 0]]):
        ratio = now / then  # the posterior of x_then given x_now and x0, eq. 7 of DDPM
        gain = np.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)
        factor = np.sqrt(then) * (1 - ratio) * gain + np.sqrt(ratio) * (1 - then)
        variance = (factor / (1 - now)) ** 2 * variance + (1 - then) * (1 - ratio) / (1 - now)
    return np.sqrt(variance)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_eta_one_reproduces_the_variance(predict):
    schedule, errors = make_schedule(), []
    true_mean, true_std = true_moments(schedule)
    for steps in (50, 200, 1000):
        mean, std = final_moments(schedule, steps, 1.0, predict)
        expected = ancestral_std(schedule, samplers.leading_steps(1000, steps))
        np.testing.assert_allclose(std, expected, rtol=1e-3)
        errors.append(abs(std / true_std - 1))
    np.testing.assert_allclose(mean, true_mean, rtol=2e-3)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.025  # 0.0213 by the recursion


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_perfect_denoiser_keeps_the_marginal_of_every_step(eta):
    """With x0 known, x_t keeps the law N(alpha x0, sigma^2) after each step, whatever eta."""
    schedule = make_schedule()
    table = make_table("ddim", schedule, 13, eta)
    previous = schedule.alpha_bar[np.append(table["t"][1:], 0)]
    np.testing.assert_allclose(table["x0"] ** 2, previous, rtol=1e-6)
    total = table["eps"] ** 2 + (table["noise"] ** 2 if eta else 0)
    np.testing.assert_allclose(total, 1 - previous, rtol=1e-5)


# One sample does not depend on its batch.


def test_a_sample_does_not_depend_on_its_batch():
    keys = random.example_keys(jax.random.key(3), 8)
    x_T = samplers.initial_noise(keys, (4, 4, 2))
    expected = run_analytic()(x_T, keys)
    for part in (slice(0, 1), slice(4, 7), slice(7, 8)):
        np.testing.assert_array_equal(samplers.initial_noise(keys[part], (4, 4, 2)), x_T[part])
        out = run_analytic()(x_T[part], keys[part])
        np.testing.assert_allclose(out, expected[part], rtol=1e-5, atol=1e-5)


def test_sharding_does_not_change_a_sample():
    keys = random.example_keys(jax.random.key(3), 8)
    x_T = samplers.initial_noise(keys, (4, 4, 2))
    out = run_analytic()(*jax.device_put((x_T, keys), batch_sharding(make_mesh())))
    assert len(out.sharding.device_set) == 8
    np.testing.assert_allclose(out, run_analytic()(x_T, keys), rtol=1e-5, atol=1e-5)


def test_noise_differs_between_steps_and_from_the_initial_noise():
    keys = random.example_keys(jax.random.key(0), 2)
    draws = [samplers.initial_noise(keys, (50,))]
    draws += [samplers.step_noise(keys, i, (50,)) for i in range(3)]
    flat = np.concatenate(draws).reshape(8, 50)
    assert np.abs(np.corrcoef(flat) - np.eye(8)).max() < 0.6


def test_noise_is_drawn_only_if_the_table_asks_for_it():
    keys = random.example_keys(jax.random.key(0), 2)
    x_T = jnp.zeros((2, 4, 4, 2))
    for eta, drawn in ((0.0, False), (1.0, True)):
        assert ("random_bits" in str(jax.make_jaxpr(run_analytic(10, eta))(x_T, keys))) == drawn


def test_given_noise_replaces_the_draws():
    schedule = make_schedule()
    table, denoise = make_table("ddim", schedule, 5, 1.0), make_denoise(analytic, schedule, "eps")
    keys = random.example_keys(jax.random.key(0), 2)
    x_T = samplers.initial_noise(keys, (4, 4, 2))
    noise = jnp.stack([samplers.step_noise(keys, i, (4, 4, 2)) for i in range(5)])
    out = jax.jit(lambda n: sample(denoise, x_T, keys, table, DDIM, n))
    np.testing.assert_allclose(out(noise), run_analytic(5)(x_T, keys), rtol=1e-5, atol=1e-5)


def test_the_denoiser_is_traced_once_and_eta_does_not_compile_again():
    schedule, calls = make_schedule(), []
    keys = random.example_keys(jax.random.key(0), 1)

    def network(x_t, t, cond):
        calls.append(t)
        return x_t

    denoise = make_denoise(network, schedule, "eps")
    run = jax.jit(lambda table: sample(denoise, jnp.ones((1, 2)), keys, table, DDIM))
    run(make_table("ddim", schedule, 6, 0.5))
    run(make_table("ddim", schedule, 6, 1.0, "quad"))
    assert len(calls) == 1 and calls[0].shape == (1,) and calls[0].dtype == jnp.int32
