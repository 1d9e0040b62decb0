"""Gradients of a batch, one microbatch after the other, in the memory of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.types import Array

# (params, examples, number of the microbatch) -> (mean loss over the examples, aux), where
# `examples` is a tree of arrays (b, ...) and aux one of arrays (b, ...) or ().
Loss = Callable[[Any, Any, Array], tuple[Array, Any]]


def accumulated_grad(
    loss: Loss, params: Any, examples: Any, count: int
) -> tuple[tuple[Array, Any], Any]:
    """-> ((mean loss, aux), gradient) of the whole batch `examples` (B, ...), in `count` parts.

    The gradient is summed in float32 and divided once. A microbatch takes every `count`-th example,
    so that devices that hold a contiguous part of the batch keep their examples. Arrays of aux have
    the rows of all microbatches, one microbatch after the other, and numbers are their means.
    """
    run = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        return run(params, examples, jnp.int32(0))

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    def add(total: Any, part: tuple[Array, Any]) -> tuple[Any, tuple[Array, Any]]:
        value, grads = run(params, part[1], part[0])
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), value

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    parts = jnp.arange(count), jax.tree.map(split, examples)
    total, (losses, aux) = jax.lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda g, x: (g / count).astype(x.dtype), total, params)
    aux = jax.tree.map(lambda x: x.mean() if x.ndim == 1 else x.reshape(-1, *x.shape[2:]), aux)
    return (losses.mean(), aux), grads
