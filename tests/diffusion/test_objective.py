import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import random
from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.objective import (
    WAVES,
    log_variance_at,
    log_variance_size,
    make_loss,
    make_objective,
    quartile_means,
)
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.diffusion.times import Times
from ldm_jax.diffusion.weighting import Weighting
from ldm_jax.errors import UserError
from ldm_jax.training.sharding import batch_sharding, make_mesh

SCHEDULE = make_schedule(steps=40)


def latents(batch_size, seed=0):
    return jnp.asarray(np.random.RandomState(seed).randn(batch_size, 4, 4, 3), jnp.float32)


def network(x_t, t):
    return jnp.tanh(x_t) * (1 + t.reshape(-1, 1, 1, 1) / 40)


@pytest.mark.parametrize("loss, error", [("l2", 0.25), ("l1", 0.5)])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_loss_of_a_constant_error(predict, loss, error):
    z, noise, t = latents(3), latents(3, seed=1), jnp.array([0, 20, 39])
    alpha, sigma = (x[np.asarray(t)].reshape(3, 1, 1, 1) for x in (SCHEDULE.alpha, SCHEDULE.sigma))
    target = {"eps": noise, "x0": z, "v": alpha * noise - sigma * z}[predict]
    per_example, aux = make_loss(SCHEDULE, predict, loss)(lambda x, t: target - 0.5, z, t, noise)
    np.testing.assert_allclose(per_example, np.full(3, error), rtol=1e-5)
    assert set(aux) == {"t", "loss_simple"} and per_example.dtype == jnp.float32


def test_the_network_sees_the_noised_latents():
    z, noise, t = latents(2), latents(2, seed=1), jnp.array([3, 39])
    seen = []
    make_loss(SCHEDULE)(lambda x_t, t: seen.append((x_t, t)) or x_t, z, t, noise)
    alpha_bar = SCHEDULE.alpha_bar[np.asarray(t)].reshape(2, 1, 1, 1)
    expected = np.sqrt(alpha_bar) * z + np.sqrt(1 - alpha_bar) * noise
    np.testing.assert_allclose(seen[0][0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen[0][1], t)


def test_log_variance_and_vlb_terms():
    z, noise, t = latents(2), latents(2, seed=1), jnp.array([5, 30])
    loss_at = make_loss(SCHEDULE, vlb_weight=0.5, log_variance=0.25)
    per_example, aux = loss_at(network, z, t, noise)
    simple = aux["loss_simple"]
    expected = simple / np.exp(0.25) + 0.25 + 0.5 * aux["loss_vlb"]
    np.testing.assert_allclose(per_example, expected, rtol=1e-6)


def test_a_log_variance_per_time_step():
    z, noise, t = latents(3), latents(3, seed=1), jnp.array([5, 30, 30])
    values = jnp.linspace(-1, 1, 40)
    per_example, aux = make_loss(SCHEDULE, log_variance=values)(network, z, t, noise)
    expected = [
        make_loss(SCHEDULE, log_variance=float(values[i]))(network, z, t, noise)[0][n]
        for n, i in enumerate(t)
    ]
    np.testing.assert_allclose(per_example, expected, rtol=1e-6)
    np.testing.assert_array_equal(aux["log_variance"], values[t])
    np.testing.assert_array_equal(aux["loss_gamma"], per_example)

    def total(values):
        return make_loss(SCHEDULE, log_variance=values)(network, z, t, noise)[0].sum()

    slope = 1 - aux["loss_simple"] / jnp.exp(values[t])  # of e / exp(v) + v
    np.testing.assert_allclose(
        jax.grad(total)(values), jnp.zeros(40).at[t].add(slope), rtol=1e-5, atol=1e-6
    )


def test_vlb_term_of_v_equals_that_of_eps():
    z, noise, t = latents(4), latents(4, seed=1), jnp.array([1, 9, 20, 39])
    alpha, sigma = (x[np.asarray(t)].reshape(4, 1, 1, 1) for x in (SCHEDULE.alpha, SCHEDULE.sigma))
    eps_aux = make_loss(SCHEDULE, "eps", vlb_weight=1.0)(network, z, t, noise)[1]

    def as_v(x_t, t):
        eps = network(x_t, t)
        return alpha * eps - sigma * (x_t - sigma * eps) / alpha

    v_aux = make_loss(SCHEDULE, "v", vlb_weight=1.0)(as_v, z, t, noise)[1]
    np.testing.assert_allclose(v_aux["loss_vlb"], eps_aux["loss_vlb"], rtol=1e-4)


def test_an_example_does_not_depend_on_its_batch():
    keys, z = random.example_keys(jax.random.key(0), 8), latents(8)
    objective = jax.jit(
        lambda z, keys: make_objective(SCHEDULE, make_loss(SCHEDULE))(network, z, keys)
    )
    per_example, aux = objective(z, keys)
    for part in (slice(0, 1), slice(2, 5), slice(7, 8)):
        some, some_aux = objective(z[part], keys[part])
        np.testing.assert_array_equal(some_aux["t"], aux["t"][part])
        np.testing.assert_allclose(some, per_example[part], rtol=1e-6)


def test_sharding_does_not_change_the_losses():
    keys, z = random.example_keys(jax.random.key(0), 8), latents(8)
    objective = jax.jit(
        lambda z, keys: make_objective(SCHEDULE, make_loss(SCHEDULE))(network, z, keys)[0]
    )
    sharded = objective(*jax.device_put((z, keys), batch_sharding(make_mesh())))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, objective(z, keys), rtol=1e-6)


def test_time_steps_are_uniform_and_independent_of_the_noise():
    size = 4000
    keys, seen = random.example_keys(jax.random.key(1), size), []
    objective = make_objective(SCHEDULE, make_loss(SCHEDULE))
    z = jnp.zeros((size, 2))
    _, aux = objective(lambda x_t, t: seen.append(x_t) or x_t, z, keys)
    counts = np.bincount(aux["t"], minlength=40)
    assert len(counts) == 40 and 60 < counts.min() and counts.max() < 140  # 100 +- 4 sd
    noise = np.asarray(seen[0]) / SCHEDULE.sigma[np.asarray(aux["t"])][:, None]
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.04
    assert abs(np.corrcoef(noise[:, 0], aux["t"])[0, 1]) < 0.07


def test_bfloat16_network_output_is_compared_in_float32():
    z, keys = latents(2), random.example_keys(jax.random.key(0), 2)
    predict = lambda x_t, t: network(x_t, t).astype(jnp.bfloat16)  # noqa: E731
    per_example, _ = make_objective(SCHEDULE, make_loss(SCHEDULE))(predict, z, keys)
    assert per_example.dtype == jnp.float32


def test_quartile_means():
    means = quartile_means(jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.array([0, 9, 10, 39]), 40)
    assert list(means) == ["q0", "q1", "q2", "q3"]
    np.testing.assert_array_equal(list(means.values()), [2, 5, np.nan, 7])


def test_quartiles_of_a_continuous_clock_end_with_it():
    means = quartile_means(jnp.arange(4.0), jnp.array([0.01, 499.9, 500.0, 1000.0]), 1000)
    np.testing.assert_array_equal(list(means.values()), [0, 1, 2, 3])


def test_huber_is_square_where_small_and_linear_where_large():
    z, t = latents(3), jnp.array([0, 20, 39])
    for size, expected in ((1e-2, 1e-4), (1e3, 2 * 0.5 * (1e3 - 0.5))):
        loss_at = make_loss(SCHEDULE, "x0", "huber", huber_delta=0.5)
        per_example, _ = loss_at(lambda x, t, size=size: z + size, z, t, latents(3, seed=1))
        # float32: the small one is a difference of numbers near delta
        np.testing.assert_allclose(per_example, np.full(3, expected), rtol=2e-3)


@pytest.mark.parametrize("process", [Flow(), LogSNR()])
def test_a_log_variance_over_continuous_time(process):
    """A sum of cosines; its best value at a level is the logarithm of the weighted error."""
    z, noise, t = latents(3), latents(3, seed=1), jnp.array([5.0, 300.0, 800.0])
    values = jnp.asarray(np.random.RandomState(2).randn(WAVES), jnp.float32)
    assert log_variance_size(process) == WAVES
    u = np.asarray(t) / process.steps
    expected = sum(float(values[k]) * np.cos(np.pi * k * u) for k in range(WAVES))
    found = log_variance_at(values, process, t)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    options = dict(predict="v", weighting=Weighting("min_snr"))
    plain, _ = make_loss(process, **options)(network, z, t, noise)
    loss, aux = make_loss(process, log_variance=values, **options)(network, z, t, noise)
    np.testing.assert_allclose(loss, plain / jnp.exp(found) + found, rtol=1e-5)
    np.testing.assert_array_equal(aux["log_variance"], found)

    def total(values):
        return make_loss(process, log_variance=values, **options)(network, z, t, noise)[0].sum()

    waves = np.cos(np.pi * u[:, None] * np.arange(WAVES))
    best = jnp.asarray(np.linalg.lstsq(waves, np.log(plain), rcond=None)[0], jnp.float32)
    steepest = jnp.abs(jax.grad(total)(values)).max()
    assert jnp.abs(jax.grad(total)(best)).max() < 1e-3 * steepest


def test_continuous_times_reach_the_network_and_its_latents():
    keys, z, seen = random.example_keys(jax.random.key(0), 64), latents(64), []
    loss_at = make_loss(Flow(), "flow")
    objective = make_objective(Flow(), loss_at, Times("logit_normal"))
    _, aux = objective(lambda x_t, t: seen.append((x_t, t)) or x_t, z, keys)
    x_t, t = seen[0]
    assert t.dtype == jnp.float32 and 0 < t.min() and t.max() <= 1000 and len(np.unique(t)) == 64
    np.testing.assert_array_equal(aux["t"], t)
    u = (t / 1000).reshape(-1, 1, 1, 1)
    noise = (x_t - (1 - u) * z) / u
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


def test_edm_feeds_the_network_inputs_of_unit_variance():
    z, noise, seen = 0.5 * latents(64), latents(64, seed=1), []
    loss_at = make_loss(LogSNR(), "edm", sigma_data=0.5)
    loss_at(lambda x, t: seen.append(x) or x, z, jnp.linspace(0, 1000, 64), noise)
    np.testing.assert_allclose(np.std(seen[0], axis=(1, 2, 3)), 1, atol=0.3)  # of 48 numbers


@pytest.mark.parametrize(
    "options, message",
    [
        ({"huber_delta": 0.0}, "huber_delta must be above 0"),
        ({"predict": "edm", "sigma_data": -1.0}, "sigma_data must be above 0"),
        ({"predict": "flow", "vlb_weight": 1.0}, "weighting 'vlb'"),
        ({"predict": "noise"}, "eps, x0, v, flow, edm"),
        ({"loss": "l3"}, "l2, l1, huber"),
        ({"vlb_weight": -1.0}, ">= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        make_loss(SCHEDULE, **options)
