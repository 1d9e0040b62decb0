"""Normalisation, dropout and initialisation of the basic layers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.layers import Conv, Dense, Dropout, GroupNorm, LayerNorm

RNG = np.random.RandomState(0)


def group_norm(x, scale, bias, epsilon):
    groups = x.reshape(x.shape[0], -1, 32, x.shape[-1] // 32)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_group_norm_and_its_gradient(size, epsilon):
    x, cotangent = RNG.standard_normal((2, 2, 4, 5, 64))
    x = size * (x + RNG.standard_normal(64))
    params = {"scale": 1 + 0.1 * RNG.standard_normal(64), "bias": RNG.standard_normal(64)}
    params = jax.tree.map(np.float32, params)

    def apply(x):
        return GroupNorm(epsilon).apply({"params": params}, x)

    out, vjp = jax.vjp(jax.jit(apply), x.astype(np.float32))
    np.testing.assert_allclose(out, group_norm(x, **params, epsilon=epsilon), atol=2e-5)
    # The derivative along a direction, by central differences in float64.
    direction = size * RNG.standard_normal(x.shape)
    high, low = (group_norm(x + h * direction, **params, epsilon=epsilon) for h in (1e-5, -1e-5))
    want = ((high - low) * cotangent).sum() / 2e-5
    (grad,) = vjp(cotangent.astype(np.float32))
    np.testing.assert_allclose((grad * direction).sum(), want, rtol=1e-4)


def test_group_norm_survives_a_large_mean():
    x = RNG.standard_normal((1, 8, 8, 32)) + 3000
    params = {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)}
    out = GroupNorm(1e-6).apply({"params": params}, x.astype(np.float32))
    want = group_norm(x.astype(np.float32).astype(np.float64), 1, 0, 1e-6)
    np.testing.assert_allclose(out, want, atol=2e-3)


@pytest.mark.parametrize("norm", [GroupNorm(1e-5), LayerNorm()])
def test_statistics_are_float32_for_bfloat16_input(norm):
    x = jnp.asarray(RNG.standard_normal((2, 8, 64)) * 0.01 + 1, jnp.bfloat16)
    out, variables = norm.init_with_output(jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    full = norm.apply(variables, x.astype(jnp.float32))
    np.testing.assert_allclose(out.astype(jnp.float32), full, rtol=1e-2, atol=1e-6)


def test_layer_norm():
    x = 1e-2 * RNG.standard_normal((2, 3, 8))
    params = {"scale": RNG.standard_normal(8), "bias": RNG.standard_normal(8)}
    params = jax.tree.map(np.float32, params)
    out = LayerNorm().apply({"params": params}, x.astype(np.float32))
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize(("layer", "fan_in"), [(Dense(256), 64), (Conv(256), 9 * 64)])
def test_kernel_and_bias_start_uniform_in_the_fan_in(layer, fan_in):
    x = jnp.zeros((1, 4, 4, 64))
    params = layer.init(jax.random.key(0), x)["params"]
    for value in params.values():
        assert np.abs(value).max() <= 1 / np.sqrt(fan_in)
        np.testing.assert_allclose(np.std(value), 1 / np.sqrt(3 * fan_in), rtol=0.1)
    zero = layer.clone(zero_init=True).init(jax.random.key(0), x)["params"]
    assert not any(np.any(value) for value in zero.values())


def test_dropout_keeps_the_mean_and_each_example_has_its_own_mask():
    x = np.ones((3, 64, 64), np.float32)
    rngs = {"dropout": jax.random.key(1)}
    out = Dropout(0.25).apply({}, x, train=True, rngs=rngs)
    np.testing.assert_allclose(out.mean((1, 2)), np.ones(3), atol=0.05)
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)
    assert (out[0] != out[1]).any()
    fewer = Dropout(0.25).apply({}, x[:2], train=True, rngs=rngs)
    np.testing.assert_array_equal(fewer, out[:2])
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x, train=False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)
