"""Sinusoidal embedding of the diffusion time and the small network behind it."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ldm_jax.nn.layers import Dense
from ldm_jax.types import Array


def timestep_embedding(t: Array, dim: int, max_period: float = 10000.0) -> Array:
    """Embeds times: (B,) int or float -> (B, dim) float32, cosines first, then sines.

    Frequency i is max_period^(-i / (dim // 2)); an odd `dim` ends in a zero column.
    """
    half = dim // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half, dtype=np.float64) / half)
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimeEmbedding(nn.Module):
    """Sinusoids of width `dim` and a two-layer network: (B,) -> (B, features) float32.

    It stays in float32: it is a negligible share of the work, and 1000 neighbouring times differ
    by less than a bfloat16 can tell apart. Without `features`, there are 4 * dim of them.
    """

    dim: int
    features: int | None = None

    @nn.compact
    def __call__(self, t: Array) -> Array:
        features = self.features or 4 * self.dim
        h = Dense(features, name="dense_0")(timestep_embedding(t, self.dim))
        return Dense(features, name="dense_1")(nn.silu(h))
