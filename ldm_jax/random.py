"""Random draws with one key per example.

A draw for a batch takes `keys` (B,), one typed key per example, never one key for the whole
array. So a draw depends on its example alone: not on the batch size, the order within a batch or
the number of devices over which the batch is sharded.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ldm_jax.types import Array


def example_keys(key: Array, batch_size: int) -> Array:
    """Derives one key per example of a global batch: (B,) typed keys."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch_size))


def seed_keys(seeds: Array) -> Array:
    """Makes one key per sample from its integer seed: (B,) uint32 -> (B,) typed keys."""
    return jax.vmap(jax.random.key)(seeds)


def fold_in(keys: Array, data: int | Array) -> Array:
    """Derives a new key from each key: (B,) -> (B,)."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def normal(keys: Array, shape: Sequence[int]) -> Array:
    """Standard normal draws (B, *shape) float32 from (B,) keys."""
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape), jnp.float32))(keys)


def uniform(keys: Array) -> Array:
    """Uniform draws (B,) float32 in [0, 1)."""
    return jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)


def randint(keys: Array, low: int, high: int) -> Array:
    """Uniform integers (B,) int32 in [low, high)."""
    return jax.vmap(lambda key: jax.random.randint(key, (), low, high))(keys)


def bernoulli(keys: Array, p: float) -> Array:
    """Booleans (B,) that are True with probability `p`."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, p))(keys)
