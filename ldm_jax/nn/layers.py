"""Linear, convolution, normalisation and dropout layers with the defaults of the original code.

They differ from the stock linen layers in three ways: kernels and biases start from the uniform
distribution that the published models were trained from, statistics of a normalisation are always
float32, and a dropout mask depends on the example alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import random
from ldm_jax.errors import UserError
from ldm_jax.nn.conv import conv3x3
from ldm_jax.types import Array

GROUPS = 32


def uniform_fan_in(fan_in: int) -> Callable:
    """Initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)), used for kernels and biases alike."""
    bound = 1.0 / np.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def along_last(values: Array, ndim: int) -> Array:
    """Reshapes (C,) to (1, ..., 1, C) with `ndim` axes, so that it broadcasts explicitly."""
    return values.reshape((1,) * (ndim - 1) + (-1,))


def spread(values: Array, x: Array) -> Array:
    """Repeats values (1 or B, ..., C) to the shape and type of x (B, ..., C).

    The gradient is a sum over all that shared a value. It is taken in float32: in bfloat16 it would
    stop growing after a few hundred terms.
    """
    return jnp.broadcast_to(values.astype(jnp.float32), x.shape).astype(x.dtype)


class Dense(nn.Module):
    """Linear map of the last axis: (..., K) -> (..., features); also every 1x1 convolution."""

    features: int
    use_bias: bool = True
    zero_init: bool = False
    kernel_init: Callable | None = None
    bias_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        init = nn.initializers.zeros if self.zero_init else uniform_fan_in(fan_in)
        shape = (fan_in, self.features)
        kernel = self.param("kernel", self.kernel_init or init, shape, jnp.float32)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        y = jax.lax.dot_general(x.astype(self.dtype), kernel.astype(self.dtype), contract)
        if self.use_bias:
            bias = self.param("bias", self.bias_init or init, (self.features,), jnp.float32)
            y = y + spread(along_last(bias, y.ndim), y)
        return y


class Conv(nn.Module):
    """3x3 convolution: (B, H, W, K) -> (B, H/stride, W/stride, features).

    `padding` is (before, after) and the same for both spatial axes.
    """

    features: int
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    zero_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        init = nn.initializers.zeros if self.zero_init else uniform_fan_in(9 * x.shape[-1])
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", init, (self.features,), jnp.float32)
        y = conv3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        return y + spread(along_last(bias, 4), y)


class GroupNorm(nn.Module):
    """Group normalisation over groups of channels: (B, ..., C) -> the same, in float32 inside.

    Statistics are gathered per channel before they are joined per group: a reduction that keeps
    the channel axis is the fast one with channels last.
    """

    epsilon: float
    groups: int = GROUPS

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, channels = x.shape[0], x.shape[-1]
        if channels % self.groups:
            raise UserError(
                f"GroupNorm needs a multiple of {self.groups} channels, got {channels}: "
                "choose `width` and `mult` so that width * mult is a multiple of it"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        values = x.astype(jnp.float32)
        axes = tuple(range(1, x.ndim - 1))
        mean = values.mean(axes, keepdims=True)
        # The derivative of the variance with respect to the mean is zero: stopping it is exact.
        variance = jnp.square(values - jax.lax.stop_gradient(mean)).mean(axes)
        grouped = mean.reshape(batch, self.groups, -1)
        group_mean = grouped.mean(-1, keepdims=True)
        between = jnp.square(grouped - group_mean)
        group_variance = (variance.reshape(grouped.shape) + between).mean(-1, keepdims=True)
        gain = jax.lax.rsqrt(group_variance + self.epsilon) * scale.reshape(1, self.groups, -1)
        centre = jnp.broadcast_to(group_mean, grouped.shape).reshape(mean.shape)
        y = (values - centre) * gain.reshape(mean.shape) + along_last(bias, x.ndim)
        return y.astype(x.dtype)


def standardize(x: Array, epsilon: float) -> Array:
    """Moves the last axis to mean 0 and variance 1: (..., C) -> (..., C) float32."""
    values = x.astype(jnp.float32)
    centred = values - values.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis, in float32 inside."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        y = standardize(x, self.epsilon) * along_last(scale, x.ndim) + along_last(bias, x.ndim)
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Divides the last axis by its root mean square (Zhang & Sennrich 2019), in float32 inside."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        values = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(values).mean(-1, keepdims=True) + self.epsilon)
        return (values * inverse * along_last(scale, x.ndim)).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and rescales the rest; identity unless `train`.

    The mask of an example is drawn from its own key, so that it does not depend on the batch size
    or on how the batch is sharded. Needs the 'dropout' stream when `train` and `rate` > 0.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if not train or self.rate == 0.0:
            return x
        keys = random.example_keys(self.make_rng("dropout"), x.shape[0])
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, x.shape[1:]))
        return jnp.where(draw(keys), x / (1.0 - self.rate), jnp.zeros_like(x))
