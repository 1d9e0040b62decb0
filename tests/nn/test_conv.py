"""The convolution's own gradients equal the stock ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.conv import _conv, _kernel_grad, conv3x3


@pytest.mark.parametrize("size", [(8, 12), (16, 24), (24, 36)])  # products, mixed, convolutions
@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1)), (2, (1, 1)), (2, (0, 1))])
def test_it_equals_the_stock_convolution(stride, padding, size):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, *size, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 5, 7))
    out, vjp = jax.vjp(lambda x, k: conv3x3(x, k, stride, padding), x, kernel)
    convolve = functools.partial(_conv, stride=stride, padding=padding)
    stock, stock_vjp = jax.vjp(convolve, x, kernel)
    cotangent = jax.random.normal(keys[2], out.shape)
    # Sums of up to 3 * 864 float32 products of size 1 in another order: 1e-4 is tens of roundings.
    for ours, theirs in zip((out, *vjp(cotangent)), (stock, *stock_vjp(cotangent)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)
    # The branch of the other platforms, which a CPU does not run by itself.
    default = _kernel_grad(x, cotangent, stride=stride, padding=padding)
    np.testing.assert_allclose(default, stock_vjp(cotangent)[1], atol=1e-4, rtol=1e-5)


def test_second_derivative_in_reverse_mode():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.full((3, 3, 2, 2), 0.1)

    def norm(conv):
        inner = jax.grad(lambda k: jnp.sin(conv(x, k)).sum())
        return jax.grad(lambda k: jnp.square(inner(k)).sum())(kernel)

    ours = norm(lambda x, k: conv3x3(x, k, 1, (1, 1)))
    theirs = norm(lambda x, k: _conv(x, k, stride=1, padding=(1, 1)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
