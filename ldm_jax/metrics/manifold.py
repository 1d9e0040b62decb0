"""How two sets of features overlap, by nearest neighbours: precision, recall, density, coverage.

A ball around each example of a set reaches to its k-th nearest neighbour in the same set, and
covers that point too. All neighbours are exact: distances of all pairs are taken, in tiles, in
float32 with full products, on the devices of this process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.errors import UserError
from ldm_jax.types import Array

TILE = 4096  # examples of a set at a time: a tile of distances has 64 MiB
# A square of a distance is the difference of numbers as large as the examples' squares: below this
# share of them float32 cannot tell it from that of two equal examples.
_EQUAL = 2e-6


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision is the share of fake examples within any ball of the real ones, recall the share of
    real examples within any ball of the fake ones. Both depend on the sizes of the sets: published
    values are of 50,000 each, or of 10,000 real ones with the ADM suite. They also depend on the
    network: the paper took features of VGG-16, the ADM suite those of Inception.

    Args:
        real: features (N, D).
        fake: features (M, D).
        k: which neighbour the balls reach to.

    Raises:
        UserError: no more than k examples in a set, other widths, or features that are not finite.
    """
    real, fake = _prepare(real, fake, k)
    precision = (_balls_around(fake, real, _radii(real, k)) > 0).mean()
    recall = (_balls_around(real, fake, _radii(fake, k)) > 0).mean()
    return float(precision), float(recall)


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 4 and 5).

    Density is how many balls of the real examples hold a fake one, on average, divided by k: about
    1 for equal distributions, more where fakes crowd. Coverage is the share of the real balls that
    hold any fake. The paper took features of VGG-16: of another network values are others.

    Args and Raises: as for `precision_recall`.
    """
    real, fake = _prepare(real, fake, k)
    radii = _radii(real, k)
    density = _balls_around(fake, real, radii).mean() / k
    coverage = (_nearest(real, fake, 1)[:, 0] <= radii).mean()
    return float(density), float(coverage)


def check_counts(k: int, *counts: int) -> None:
    """Checks that sets of so many examples have k-th neighbours.

    Raises:
        UserError: one has not.
    """
    if k < 1:
        raise UserError(f"the number of neighbours must be 1 at least, got {k}")
    if min(counts) <= k:
        raise UserError(
            f"the {k}-th nearest neighbours (precision, recall, density, coverage) need at least "
            f"{k + 1} images in each set, got {min(counts)}; thousands are customary"
        )


def _prepare(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Checks both and moves them to the mean of the real ones, where squares are smaller."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise UserError(
            f"expected features (N, D) and (M, D), got {real.shape} and {fake.shape}: were they "
            "made with another network?"
        )
    check_counts(k, len(real), len(fake))
    # In float32 throughout: there is no other copy of a set than the one that is moved.
    mean = real.mean(0, dtype=np.float64).astype(np.float32)
    moved = tuple(np.subtract(features, mean, dtype=np.float32) for features in (real, fake))
    if not all(np.isfinite(features.sum(dtype=np.float64)) for features in moved):
        raise UserError("features are not finite: are there NaNs in the images?")
    return moved


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each of (N, D) to its k-th nearest other: (N,)."""
    return _nearest(features, features, k, others=True)[:, -1]


def _nearest(rows: np.ndarray, columns: np.ndarray, k: int, others: bool = False) -> np.ndarray:
    """Squared distances of (N, D) to the k nearest of (M, D), ascending: (N, k).

    `others` leaves out those of the same number.
    """
    found = []
    for first, part, count in _tiles(rows, split=True):
        best = jnp.full((len(part), k), jnp.inf)
        for start, other, valid in _tiles(columns):
            best = _merge(best, part, other, first, start, valid, others)
        found.append(np.asarray(best)[:count])
    return np.concatenate(found)


def _balls_around(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How many balls around (M, D) with squared radii (M,) hold each of (N, D): (N,) int."""
    found = []
    for _, part, count in _tiles(rows, split=True):
        total = 0
        tiles = zip(_tiles(centres), _tiles(radii), strict=True)
        for (_, other, valid), (_, reach, _) in tiles:
            total = total + _count(part, other, reach, valid)
        found.append(np.asarray(total)[:count])
    return np.concatenate(found)


def _tiles(x: np.ndarray, split: bool = False) -> Iterator[tuple[int, Array, int]]:
    """Parts of (N, ...), all of one size: number of the first row, the rows, how many are valid.

    `split` divides the rows of each over the devices; otherwise each device has all.
    """
    devices = np.array(jax.local_devices())
    parts = devices.size if split else 1
    size = -(-min(TILE, len(x)) // parts) * parts
    spec = PartitionSpec("rows") if split else PartitionSpec()
    sharding = NamedSharding(Mesh(devices, ("rows",)), spec)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        padded = np.pad(part, ((0, size - len(part)), *((0, 0),) * (x.ndim - 1)))
        yield start, jax.device_put(padded, sharding), len(part)


def _squares(x: Array, y: Array) -> Array:
    """Squared distances of (N, D) to (M, D): (N, M)."""
    sizes = jnp.square(x).sum(-1)[:, None] + jnp.square(y).sum(-1)[None, :]
    found = sizes - 2.0 * jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(found <= _EQUAL * sizes, 0.0, found)


@functools.partial(jax.jit, static_argnames="others")
def _merge(
    best: Array, x: Array, y: Array, first: int, start: int, valid: int, others: bool
) -> Array:
    """The k smallest of `best` (N, k) and the squared distances to the `valid` first rows of y."""
    squares, numbers = _squares(x, y), jnp.arange(len(y))[None, :]
    left_out = numbers >= valid
    if others:
        left_out |= start + numbers == first + jnp.arange(len(x))[:, None]
    squares = jnp.where(left_out, jnp.inf, squares)
    together = jnp.concatenate([best, squares], -1)
    return -jax.lax.top_k(-together, best.shape[-1])[0]


@jax.jit
def _count(x: Array, y: Array, reach: Array, valid: int) -> Array:
    """How many of the first `valid` balls around y, with squared radii, hold each of x: (N,)."""
    within = (_squares(x, y) <= reach[None, :]) & (jnp.arange(len(y)) < valid)[None, :]
    return within.sum(-1)
