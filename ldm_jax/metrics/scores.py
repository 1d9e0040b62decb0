"""The Inception score, and the Frechet distance of infinitely many samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ldm_jax.data.order import permutation
from ldm_jax.errors import UserError
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance

SIZES = 15  # sets of samples that a line is laid through
_ROWS = 4096  # features at a time


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Exponential of the mean divergence of each image's classes from those of all.

    Salimans et al. 2016, section 4: from 1, where all images are alike, to the number of classes.
    It is taken of each of `splits` parts in the order of the images.

    Args:
        logits: (N, K), such as the output 'logits' of an `Extractor`.
        splits: number of parts.

    Returns:
        Mean over the parts, and their standard deviation, as it is published: no standard error,
        and over the parts of 5,000 of which 50,000 images have ten.

    Raises:
        UserError: fewer than two images a part, or logits that are not finite.
    """
    if logits.ndim != 2:
        raise UserError(f"expected logits (N, K), got {logits.shape}")
    check_splits(len(logits), splits)
    if not np.isfinite(logits).all():
        raise UserError("logits are not finite: are there NaNs in the images?")
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [_score(logits[i:j]) for i, j in itertools.pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: np.ndarray) -> float:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_shares = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    shares = np.exp(log_shares)
    overall = shares.mean(0)
    # A class that no image has counts nothing, as 0 log 0 does.
    overall = np.log(np.where(overall > 0, overall, 1.0))
    return float(np.exp((shares * (log_shares - overall)).sum(-1).mean()))


def check_splits(count: int, splits: int = 10) -> None:
    """Checks that so many images have an Inception score.

    Raises:
        UserError: they have not.
    """
    if splits < 1:
        raise UserError(f"the Inception score needs one part at least, got splits={splits}")
    if count < 2 * splits:
        raise UserError(
            f"the Inception score of {splits} parts needs at least {2 * splits} images, got "
            f"{count}; it falls short of its value below 5,000 a part"
        )


def smallest_for_infinity(width: int) -> int:
    """The fewest samples that `fid_at_infinity` takes, for features of so many numbers."""
    return 2 * (width + 1)


def fid_at_infinity(
    features: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
    *,
    sizes: int = SIZES,
    seed: int = 0,
) -> tuple[float, float]:
    """The Frechet distance that infinitely many samples would have, and its standard error.

    Chong & Forsyth 2020, section 4: the distance is biased by an amount in proportion to 1 / N, to
    first order. A line in 1 / N is laid through those of `distances_by_count`, which has the
    arguments and raises UserError. The bias of the reference's own size stays.
    """
    return extrapolate(*distances_by_count(features, mean, covariance, sizes=sizes, seed=seed))


def distances_by_count(
    features: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
    *,
    sizes: int = SIZES,
    seed: int = 0,
) -> tuple[list[int], list[float]]:
    """Frechet distances of sets of several sizes, and these sizes first.

    The sets are drawn without putting back, from a tenth of all (5,000 of 50,000), but more than
    the width, to all.

    Args:
        features: of the samples, (N, D).
        mean: of the reference, (D,).
        covariance: of the reference, (D, D).
        sizes: number of sets.
        seed: of the draw.

    Raises:
        UserError: fewer than 2 (D + 1) samples, or what `frechet_distance` refuses.
    """
    count, width = features.shape
    if count < smallest_for_infinity(width):
        raise UserError(
            f"the distance at infinity (FID) needs at least {smallest_for_infinity(width):,} "
            f"samples for features of {width:,} numbers, got {count:,}"
        )
    least = max(count // 10, width + 1)
    counts = np.linspace(least, count, sizes).round().astype(int).tolist()
    distances = []
    for number, n in enumerate(counts):
        statistics = FeatureStatistics(width)
        chosen = np.sort(permutation(seed, number, count)[:n])
        for start in range(0, n, _ROWS):  # which are moved to float64
            statistics.add(features[chosen[start : start + _ROWS]])
        distances.append(frechet_distance(mean, covariance, *statistics.result()))
    return counts, distances


def extrapolate(counts: Sequence[int], distances: Sequence[float]) -> tuple[float, float]:
    """Where a line in 1 / N through distances of N samples ends at 1 / N = 0.

    The line is that of least squares. Sets of n samples that are drawn from the same N share some,
    and so their distances err together: with a variance in proportion to 1 / N for all, and to
    1 / n - 1 / N for each by itself, whose size follows from how far they lie off the line.

    Args:
        counts: of samples, at least three, not all alike; the largest is all there are.
        distances: of each.

    Returns:
        The value, and its standard error.

    Raises:
        UserError: fewer than three sizes.
    """
    x, y = 1.0 / np.asarray(counts, np.float64), np.asarray(distances, np.float64)
    if len(np.unique(x)) < 3 or x.shape != y.shape:
        raise UserError(
            f"a line through distances of several sizes needs three at least, got "
            f"{len(np.unique(x))} sizes for {len(y)} distances"
        )
    line = np.stack([np.ones_like(x), x], -1)
    solve = np.linalg.pinv(line)  # (2, sizes)
    (value, _), residual = solve @ y, y - line @ (solve @ y)
    own = x - x.min()  # variances of the part that is not shared, in units of that of one sample
    left = np.eye(len(x)) - line @ solve
    unit = np.square(residual).sum() / (np.square(left) @ own).sum()
    return float(value), float(np.sqrt(unit * (np.square(solve[0]) @ own + x.min())))
