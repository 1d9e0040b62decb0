"""Rounded latents: their values, numbers and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import random
from ldm_jax.first_stage.fsq import FSQModel, bound, code_numbers, round_through

LEVELS = (8, 5, 4, 3)


def test_every_value_is_reached_and_no_other():
    z = jnp.linspace(-20, 20, 4001)[:, None] * jnp.ones((1, len(LEVELS)))
    rounded = np.asarray(jnp.round(bound(z, LEVELS)))
    for channel, count in enumerate(LEVELS):
        wanted = np.arange(count) - count // 2
        np.testing.assert_array_equal(np.unique(rounded[:, channel]), wanted)


def test_zero_is_a_value_and_stays_there():
    # The shift inside the hyperbolic tangent makes up for the half step of even numbers of levels.
    np.testing.assert_allclose(bound(jnp.zeros((1, 4)), LEVELS), 0, atol=1e-6)


def test_codes_are_numbered_without_gaps():
    values = [np.arange(count) - count // 2 for count in LEVELS]
    every = jnp.asarray(list(itertools.product(*values)), jnp.float32)
    np.testing.assert_array_equal(np.sort(code_numbers(every, LEVELS)), np.arange(8 * 5 * 4 * 3))


def test_gradient_passes_the_rounding():
    x = jnp.float32([0.2, -1.7])
    np.testing.assert_array_equal(round_through(x), [0.0, -2.0])
    np.testing.assert_array_equal(jax.grad(lambda x: round_through(x).sum())(x), [1.0, 1.0])


@pytest.fixture(scope="module")
def model():
    net = FSQModel(
        width=8, mult=(1, 1), depth=1, attn_downsample=(), z_channels=4, channels=4,
        mid_attn=False, norm_groups=4, levels=LEVELS,
    )  # fmt: skip
    images = random.normal(random.example_keys(jax.random.key(1), 2), (8, 12, 3))
    return net, jax.jit(net.init)(jax.random.key(0), images, None), images


def test_decoding_the_latents_before_rounding_gives_the_reconstruction(model):
    net, variables, images = model
    reconstruction, aux = net.apply(variables, images, None, method="autoencode")
    latents = net.apply(variables, net.apply(variables, images, method="moments"), method="mode")
    assert latents.shape == (2, 4, 6, 4) and float(jnp.abs(latents).max()) <= 1.001
    np.testing.assert_array_equal(latents, aux["latents"])
    decoded = net.apply(variables, latents, method="decode")
    np.testing.assert_allclose(decoded, reconstruction, atol=1e-5)  # of the same rounded numbers
    assert aux["code_counts"].shape == (480,) and float(aux["code_counts"].sum()) == 2 * 4 * 6


def test_latents_beyond_the_values_are_clipped(model):
    net, variables, _ = model
    far = jnp.full((1, 4, 4, 4), 9.0)
    outermost = jnp.broadcast_to(jnp.float32([[[[3 / 4, 1.0, 1 / 2, 1.0]]]]), far.shape)
    decoded = net.apply(variables, jnp.concatenate([far, outermost]), method="decode")
    np.testing.assert_array_equal(decoded[0], decoded[1])
