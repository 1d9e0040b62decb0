"""The loop over a table: noise, known parts and independence of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax import random
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.guidance import make_denoise
from ldm_jax.diffusion.samplers import SAMPLERS, Known, make_step, make_table, sample
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.training.sharding import batch_sharding, make_mesh
from ldm_jax.types import Prediction

ANYWHERE = tuple(name for name in SAMPLERS if name != "flow_heun")  # whatever the process
DDIM = SAMPLERS["ddim"]
SHORT = make_schedule(steps=28, beta=(0.05, 0.6))  # few time steps, yet nearly pure noise


def analytic(x_t, t, cond=None):
    """A stand-in for a network on images (B, H, W, C)."""
    clock = 0.4 * jnp.sin(0.01 * t.reshape(-1, 1, 1, 1))
    return 0.9 * jnp.tanh(0.6 * x_t + clock + 0.2 * jnp.roll(x_t, 1, axis=2)) + 0.05 * x_t


@functools.cache
def run_analytic(steps=10, eta=1.0, name="ddim"):
    """A compiled sampler of the analytic model: (x_T, keys, known) -> samples."""
    table = make_table(name, make_schedule(), steps, eta)
    denoise = make_denoise(analytic, "eps")
    sampler = SAMPLERS[name]

    @jax.jit
    def run(x_T, keys, known=None):
        return sample(denoise, x_T, keys, table, sampler, known=known)

    return run


# Known parts


def test_known_parts_with_an_empty_mask_change_nothing():
    keys = random.example_keys(jax.random.key(3), 2)
    x_T = samplers.initial_noise(keys, (4, 4, 2))
    known = Known(jnp.full_like(x_T, 5.0), jnp.zeros((2, 4, 4, 1)))
    for name, eta in (("ddim", 1.0), ("heun", 0.0)):
        run = run_analytic(4, eta, name)
        np.testing.assert_allclose(run(x_T, keys, known), run(x_T, keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ANYWHERE)
def test_known_parts_are_noised_to_the_level_of_each_step(name):
    """The network sees x0 with the noise of its level, but in the middle of a step."""
    table, sampler = make_table(name, SHORT, 5), SAMPLERS[name]
    x0, target = jnp.full((1, 2), 0.5), jnp.array([[0.5, -0.5]])
    noise = np.arange(1.0, 1 + len(table.rows["t"]), dtype=np.float32)[:, None, None]
    mask, seen = jnp.array([[1.0, 0.0]]), []

    def denoise(x_t, level):
        seen.append((x_t, level))
        return Prediction(x0=target, eps=(x_t - level.alpha * target) / level.sigma)

    step = make_step(denoise, None, sampler, Known(x0, mask, noise))
    carry, befores = sampler.init(table.start * jnp.ones((1, 2))), []
    for i in range(len(noise)):
        row = {key: column[i] for key, column in table.rows.items()}
        befores.append(carry[0])
        carry = step(carry, (i, row, jnp.zeros((1, 2)), noise[i]))
    for i, (x_t, level) in enumerate(seen):
        np.testing.assert_array_equal(x_t[0, 1], befores[i][0, 1])
        middle = "corrector" in table.rows and table.rows["corrector"][i]
        if middle or name == "ddpm":
            np.testing.assert_array_equal(x_t, befores[i])
        else:
            np.testing.assert_allclose(x_t[0, 0], level.noised(0.5, 1.0 + i), rtol=1e-5)
    if name == "ddpm":  # replaced after each step, with the noise of the level before it
        last = samplers.level_of({key: column[-1] for key, column in table.rows.items()})
        np.testing.assert_allclose(carry[0][0, 0], last.noised(0.5, len(noise)), rtol=1e-5)


def test_noise_of_known_parts_is_a_stream_of_its_own():
    keys = random.example_keys(jax.random.key(0), 2)
    draws = [samplers.initial_noise(keys, (50,))]
    for draw in (samplers.step_noise, samplers.known_noise):
        draws += [draw(keys, i, (50,)) for i in range(3)]
    flat = np.concatenate(draws).reshape(14, 50)
    assert np.abs(np.corrcoef(flat) - np.eye(14)).max() < 0.6


# One sample does not depend on its batch.


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_does_not_depend_on_its_batch(masked):
    keys = random.example_keys(jax.random.key(3), 8)
    x_T = samplers.initial_noise(keys, (4, 4, 2))
    known = Known(2 * x_T, jnp.ones((8, 4, 4, 1)).at[:, :2].set(0)) if masked else None
    expected = run_analytic()(x_T, keys, known)
    for part in (slice(4, 5),) if masked else (slice(0, 1), slice(4, 7), slice(7, 8)):
        np.testing.assert_array_equal(samplers.initial_noise(keys[part], (4, 4, 2)), x_T[part])
        some = jax.tree.map(lambda x, part=part: x[part], known)
        out = run_analytic()(x_T[part], keys[part], some)
        np.testing.assert_allclose(out, expected[part], rtol=1e-5, atol=1e-5)


def test_sharding_does_not_change_a_sample():
    keys = random.example_keys(jax.random.key(3), 8)
    x_T = samplers.initial_noise(keys, (4, 4, 2))
    out = run_analytic()(*jax.device_put((x_T, keys), batch_sharding(make_mesh())))
    assert len(out.sharding.device_set) == 8
    np.testing.assert_allclose(out, run_analytic()(x_T, keys), rtol=1e-5, atol=1e-5)


def test_noise_is_drawn_only_if_the_table_asks_for_it():
    keys = random.example_keys(jax.random.key(0), 2)
    x_T = jnp.zeros((2, 4, 4, 2))
    for name, eta, drawn in (("ddim", 0.0, False), ("ddim", 1.0, True), ("plms", 0.0, False)):
        program = str(jax.make_jaxpr(run_analytic(10, eta, name))(x_T, keys))
        assert ("random_bits" in program) == drawn


def test_given_noise_replaces_the_draws():
    table, denoise = make_table("ddim", make_schedule(), 5, 1.0), make_denoise(analytic, "eps")
    keys = random.example_keys(jax.random.key(0), 2)
    x_T = samplers.initial_noise(keys, (4, 4, 2))
    noise, drawn = (
        jnp.stack([draw(keys, i, (4, 4, 2)) for i in range(5)])
        for draw in (samplers.step_noise, samplers.known_noise)
    )
    known = Known(jnp.ones((2, 4, 4, 2)), jnp.ones((2, 4, 1, 1)).at[:, 1:].set(0))
    out = jax.jit(
        lambda noise, drawn: sample(
            denoise, x_T, keys, table, DDIM, noise, known._replace(noise=drawn)
        )
    )
    np.testing.assert_allclose(
        out(noise, drawn), run_analytic(5)(x_T, keys, known), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ANYWHERE)
def test_the_network_is_traced_once_and_other_values_do_not_compile_again(name):
    schedule, calls = make_schedule(), []
    keys = random.example_keys(jax.random.key(0), 1)

    def network(x_t, t, cond):
        calls.append(t)
        return x_t

    denoise = make_denoise(network, "eps")
    run = jax.jit(lambda table: sample(denoise, jnp.ones((1, 2)), keys, table, SAMPLERS[name]))
    eta = 0.5 if name == "ddim" else None
    run(make_table(name, schedule, 6, eta))
    run(make_table(name, schedule, 6, eta and 1.0, "trailing"))
    assert len(calls) == 1 and calls[0].shape == (1,) and calls[0].dtype == jnp.float32


def test_ddim_with_eta_one_and_all_steps_is_ancestral_sampling():
    keys = random.example_keys(jax.random.key(0), 2)
    x_T, denoise = samplers.initial_noise(keys, (4, 4, 2)), make_denoise(analytic, "eps")
    outs = []
    for name in ("ddim", "ddpm"):
        table = make_table(name, SHORT, SHORT.steps, 1.0)
        run = functools.partial(sample, denoise, sampler=SAMPLERS[name])
        outs.append(quick_jit(run)(x_T, keys, table))
    np.testing.assert_allclose(*outs, rtol=1e-4, atol=1e-4)
