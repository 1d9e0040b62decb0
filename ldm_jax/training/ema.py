"""Exponential moving average of the parameters, with the warm-up of the original code."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.types import Array


def ema_decay(n: int | Array, decay: float) -> Array:
    """Decay of update number n, counted from 1: min(decay, (1 + n) / (10 + n))."""
    return jnp.minimum(decay, (1 + n) / (10 + n))


def ema_update(ema: Any, params: Any, n: int | Array | None, decay: float) -> Any:
    """Moves every array of `ema` towards `params`, a tree of the same structure.

    n: the number of updates including this one, or None for a constant decay without warm-up.
    """
    rate = 1 - (decay if n is None else ema_decay(n, decay))
    return jax.tree.map(lambda old, new: old - rate * (old - new), ema, params)
