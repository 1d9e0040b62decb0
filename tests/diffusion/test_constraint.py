"""Constraints on the image while it is sampled."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import random
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.constraint import LUMA, constrain, keep_luma, luma
from ldm_jax.diffusion.parameterization import to_prediction
from ldm_jax.diffusion.schedule import make_schedule


def test_luma_weights_sum_to_one():
    np.testing.assert_allclose(sum(LUMA), 1, atol=1e-12)
    np.testing.assert_allclose(luma(jnp.full((2, 3), 0.3)), 0.3, atol=1e-6)


def test_colours_stay_and_the_luma_becomes_the_given_one():
    image = 0.3 * jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    grey = jnp.clip(0.3 * jax.random.normal(jax.random.key(1), (2, 4, 4)), -0.3, 0.3)
    identity = lambda x: x  # noqa: E731
    out = keep_luma(grey, identity, identity)(0.2 * image)
    np.testing.assert_allclose(luma(out), grey, atol=1e-6)
    chroma = lambda x: x - luma(x)[..., None]  # noqa: E731
    np.testing.assert_allclose(chroma(out), chroma(0.2 * image), atol=1e-6)


def test_samples_have_the_luma_and_start_where_they_are_told():
    schedule = make_schedule("linear", (1e-4, 0.02), 1000)
    table = samplers.make_table("ddim", schedule, 20, 0.0, "trailing")
    keys = random.example_keys(jax.random.key(0), 3)
    noise = samplers.initial_noise(keys, (4, 4, 3))
    # The optimal denoiser of data N(0, 0.04).
    variance = 0.04

    def denoise(x_t, level):
        gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
        return to_prediction(gain * x_t, x_t, level, "x0")

    grey = jnp.full((3, 4, 4), 0.25)
    identity = lambda x: x  # noqa: E731
    held = constrain(denoise, keep_luma(grey, identity, identity))
    out = samplers.sample(held, noise, keys, table, samplers.SAMPLERS["ddim"])
    # The last level that is sampled still has a hundredth of noise.
    np.testing.assert_allclose(luma(out), grey, atol=0.03)


def test_a_weak_start_stays_near_the_image_and_a_strong_one_forgets_it():
    schedule = make_schedule("linear", (1e-4, 0.02), 1000)
    keys = random.example_keys(jax.random.key(0), 4)
    noise, x0 = samplers.initial_noise(keys, (4, 4, 3)), jnp.full((4, 4, 4, 3), 1.5)

    def denoise(x_t, level):  # data N(0, 1)
        return to_prediction(level.alpha * x_t, x_t, level, "x0")

    def distance(strength):
        table = samplers.make_table("ddim", schedule, 50, 0.0, "trailing", strength)
        assert len(table.rows["t"]) == max(1, round(50 * strength))
        out = samplers.sample(denoise, noise, keys, table, samplers.SAMPLERS["ddim"], x0=x0)
        return float(jnp.abs(out - x0).mean())

    near, middle, far = distance(0.02), distance(0.3), distance(1.0)
    assert near < 0.1 < middle < far
    # At full strength the first level is all noise, and the result is that of the noise alone.
    table = samplers.make_table("ddim", schedule, 50, 0.0, "trailing")
    plain = samplers.sample(denoise, noise, keys, table, samplers.SAMPLERS["ddim"])
    started = samplers.sample(denoise, noise, keys, table, samplers.SAMPLERS["ddim"], x0=x0)
    np.testing.assert_allclose(started, plain, atol=0.03)  # sqrt(alpha_bar) is 0.006 there
