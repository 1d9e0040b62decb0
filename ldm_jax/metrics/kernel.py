"""The kernel distance of two sets of features, KID (Binkowski et al. 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.order import permutation
from ldm_jax.errors import UserError
from ldm_jax.types import Array

SMALLEST = 40  # features in a set
_PER_BLOCK = 4  # a set has at least so many blocks that share no example


def check_counts(*counts: int) -> None:
    """Checks that sets of so many examples have a kernel distance with an error.

    Raises:
        UserError: one is too small.
    """
    if min(counts) < SMALLEST:
        raise UserError(
            f"the kernel distance (KID) needs at least {SMALLEST} images in each set, got "
            f"{min(counts)}; from 1,000 on its error is small"
        )


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, blocks: int = 100, block_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets, and its standard error.

    The kernel is (x.y / D + 1)^3. The estimate is unbiased (Gretton et al. 2012, equation 3), so it
    may be negative and its expectation depends on no size: the mean over blocks, which are drawn
    from each set without putting back.

    The error follows from the spread among blocks. Blocks drawn from N examples overlap: no more
    than N / block_size of them count as independent, and they are at most a quarter of the smaller
    set. It is that of the samples at hand, and leaves out that another training run gives others.

    Args:
        a: features (N, D).
        b: features (M, D).
        blocks: how many are drawn.
        block_size: examples of each set in a block; fewer of small sets.
        seed: of the draw.

    Raises:
        UserError: fewer than 40 examples, other widths, or features that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"expected features (N, D) and (M, D), got {a.shape} and {b.shape}: were they made "
            "with another network?"
        )
    smaller = min(len(a), len(b))
    check_counts(smaller)
    if blocks < 2 or block_size < 2:
        raise UserError(f"blocks={blocks} and block_size={block_size} must be 2 at least")
    size = min(block_size, smaller // _PER_BLOCK)
    values = []
    for block in range(blocks):
        x, y = (
            np.asarray(features[permutation(seed, block, len(features), part)[:size]], np.float32)
            for part, features in enumerate((a, b))
        )
        values.append(_block(x, y))
    values = np.array(jax.device_get(values), np.float64)
    if not np.isfinite(values).all():
        raise UserError("features are not finite: are there NaNs in the images?")
    independent = min(blocks, smaller / size)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(independent))


@jax.jit
def _block(x: Array, y: Array) -> Array:
    """Of (n, D) and (n, D): ()."""
    count, width = x.shape

    def excess(u: Array, v: Array) -> Array:
        # The kernel less 1, the same in each term: smaller numbers lose fewer digits.
        p = jnp.dot(u, v.T, precision=jax.lax.Precision.HIGHEST) / width
        return p * (3.0 + p * (3.0 + p))

    def others(k: Array) -> Array:
        return jnp.where(jnp.eye(count, dtype=bool), 0.0, k).sum() / (count * (count - 1))

    return others(excess(x, x)) + others(excess(y, y)) - 2.0 * excess(x, y).mean()
