"""3x3 convolution, channels last, whose filter gradient is fast on CPUs too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ldm_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv3x3(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """Convolves x (B, H, W, K) with kernel (3, 3, K, C) -> (B, H', W', C).

    `padding` is (before, after) and the same for both spatial axes. Has no forward-mode derivative.
    """
    return _conv(x, kernel, stride, padding)


def _conv(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=(padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _forward(
    x: Array, kernel: Array, stride: int, padding: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: tuple[int, int], residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    _, vjp_x = jax.vjp(lambda x: _conv(x, kernel, stride, padding), x)
    stock = functools.partial(_kernel_grad, stride=stride, padding=padding)
    by_example = functools.partial(_kernel_grad_by_example, stride=stride, padding=padding)
    return *vjp_x(grad), jax.lax.platform_dependent(x, grad, cpu=by_example, default=stock)


def _kernel_grad(x: Array, grad: Array, *, stride: int, padding: tuple[int, int]) -> Array:
    shape = (3, 3, x.shape[-1], grad.shape[-1])
    # A convolution is linear in its kernel, so the place of the derivative does not matter.
    _, vjp = jax.vjp(lambda kernel: _conv(x, kernel, stride, padding), jnp.zeros(shape, x.dtype))
    return vjp(grad)[0]


def _kernel_grad_by_example(
    x: Array, grad: Array, *, stride: int, padding: tuple[int, int]
) -> Array:
    """The same sum, one example at a time as one matrix product of its patches.

    XLA:CPU computes the filter gradient as a convolution with a kernel as large as the image,
    which on large maps runs at a fifth to a tenth of the forward pass's speed; an example's
    patches fit the cache.
    """
    _, height, width, features = grad.shape
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1

    def add(total: Array, example: tuple[Array, Array]) -> tuple[Array, None]:
        image, out = example
        patches = [
            image[i : i + rows : stride, j : j + columns : stride]
            for i in range(3)
            for j in range(3)
        ]
        patches = jnp.concatenate(patches, axis=-1).reshape(height * width, -1)
        out = out.reshape(height * width, features)
        return total + jnp.matmul(patches.T, out, preferred_element_type=jnp.float32), None

    total = jnp.zeros((9 * x.shape[-1], features), jnp.float32)
    total, _ = jax.lax.scan(add, total, (x, grad))
    return total.reshape(3, 3, x.shape[-1], features).astype(x.dtype)


conv3x3.defvjp(_forward, _backward)
