"""The nearest of many vectors, which come in parts, to each of a few."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array


class Neighbours(NamedTuple):
    """What is nearest so far to each of N vectors, nearest first.

    Attributes:
        order: (N, k) float32, squared distances less the vector's own square.
        numbers: (N, k) int32, of what is nearest; -1 where there is none yet.
    """

    order: Array
    numbers: Array


def no_neighbours(count: int, k: int) -> Neighbours:
    """Before anything was seen: for `count` vectors and the k nearest to each."""
    return Neighbours(jnp.full((count, k), jnp.inf), jnp.full((count, k), -1, jnp.int32))


@jax.jit
def nearer(best: Neighbours, vectors: Array, part: Array, numbers: Array) -> Neighbours:
    """Takes a part of what is searched into account.

    Products are full ones in float32. That decides which is nearest; a distance is to be computed
    from the two vectors, as a difference of squares has lost the digits of a small one.

    Args:
        best: of what was seen before.
        vectors: (N, D) float32, around 0 where that can be had.
        part: (M, D) float32.
        numbers: (M,) int32, at least 0; -1 for rows that do not count.
    """
    products = jnp.dot(vectors, part.T, precision=jax.lax.Precision.HIGHEST)
    order = jnp.square(part).sum(-1)[None, :] - 2.0 * products
    order = jnp.where(numbers[None, :] < 0, jnp.inf, order)
    order = jnp.concatenate([best.order, order], axis=-1)
    numbers = jnp.broadcast_to(numbers[None, :], (len(vectors), len(numbers)))
    numbers = jnp.concatenate([best.numbers, numbers], axis=-1)
    smallest, places = jax.lax.top_k(-order, best.order.shape[-1])
    chosen = jnp.take_along_axis(numbers, places, axis=-1)
    return Neighbours(-smallest, jnp.where(jnp.isinf(smallest), -1, chosen))


def calibrated(
    distances: np.ndarray, held_out: np.ndarray, taken: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """How distances of samples to their nearest training images compare with those of new images.

    Args:
        distances: (N,) of samples.
        held_out: (M,) of real images that were not trained on.
        taken: the share of real images that may be taken for copies.

    Returns:
        The threshold, the largest distance such that about `taken` of the held-out images have no
        more (at least one has); which samples have no more, (N,) bool; and of each sample the share
        of held-out images that are as near as it is, (N,).
    """
    threshold = float(np.quantile(held_out, taken, method="lower"))
    as_near = np.searchsorted(np.sort(held_out), distances, side="right") / len(held_out)
    return threshold, distances <= threshold, as_near
