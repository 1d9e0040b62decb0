"""Random arrays in the place of abstract ones: a program takes as long with them as with trained
weights and real images."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.training.sharding import put
from ldm_jax.training.state import TrainState

ONES, ZEROS = ("scale", "var"), ("bias", "shift", "mean")  # what weights are called


def specs(tree: Any) -> Any:
    """The shapes, types and places of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def random_variables(tree: Any) -> Any:
    """Weights like abstract ones, of the spread that they start with.

    Values neither vanish nor overflow on the way through a network: on CPUs, operations on the
    smallest numbers would take longer.
    """
    rng = np.random.default_rng(0)

    def make(path: tuple, leaf: Any) -> jax.Array:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        if name in ONES or name in ZEROS:
            value = np.full(leaf.shape, float(name in ONES), np.float32)
        else:
            value = rng.standard_normal(leaf.shape, np.float32)
            if name == "kernel":
                value /= math.sqrt(math.prod(leaf.shape[:-1]))
        return _like(value, leaf)

    return jax.tree_util.tree_map_with_path(make, tree)


def random_state(state: TrainState) -> TrainState:
    """A state like an abstract one, before its first step."""
    return state.replace(
        step=_zero(state.step),
        params=random_variables(state.params),
        ema_params=random_variables(state.ema_params),
        opt_state=jax.tree.map(_zero, state.opt_state),
        stats=random_variables(state.stats),
        averages=random_variables(state.averages),
    )


def random_inputs(tree: Any) -> Any:
    """Images, latents, conditions and keys like abstract ones; whole numbers are 0, which every
    field allows, but for the bytes of images."""
    rng = np.random.default_rng(1)

    def make(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.jit(lambda: jax.random.key(0), out_shardings=leaf.sharding)()
        if leaf.dtype == jnp.uint8:
            return _like(rng.integers(0, 256, leaf.shape, np.uint8), leaf)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return _zero(leaf)
        return _like(rng.standard_normal(leaf.shape, np.float32), leaf)

    return jax.tree.map(make, tree)


def _zero(leaf: Any) -> jax.Array:
    return _like(np.zeros(leaf.shape, np.float32), leaf)


def _like(value: np.ndarray, leaf: Any) -> jax.Array:
    """An array of the type and in the place of an abstract one."""
    value = np.asarray(value).astype(leaf.dtype)
    return value if leaf.sharding is None else put(value, leaf.sharding)
