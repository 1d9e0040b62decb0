"""Batch normalisation as PyTorch counts: its momentum, and an unbiased running variance."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.layers import along_last
from ldm_jax.types import Array


def scale_init(key: Array, shape: tuple[int], dtype: jnp.dtype = jnp.float32) -> Array:
    """N(1, 0.02), from which the published discriminators start."""
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """Normalises each channel over batch and space: (B, H, W, C) -> the same, float32 inside.

    With `train` by the batch's own statistics, else by the running ones in the collection
    'batch_stats' ('mean', 'var', each (C,)). A training call updates these if the collection is
    mutable. The batch is the whole one, however it is sharded.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        values = x.astype(jnp.float32)
        mean, variance = running_mean.value, running_var.value
        if train:
            mean = values.mean((0, 1, 2))
            variance = jnp.square(values - along_last(mean, 4)).mean((0, 1, 2))
        if train and self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = variance * (count / max(count - 1, 1))
            running_mean.value += self.momentum * (mean - running_mean.value)
            running_var.value += self.momentum * (unbiased - running_var.value)
        gain = jax.lax.rsqrt(variance + self.epsilon) * scale
        y = (values - along_last(mean, 4)) * along_last(gain, 4) + along_last(bias, 4)
        return y.astype(x.dtype)
