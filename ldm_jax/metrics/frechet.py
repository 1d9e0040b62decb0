"""The Frechet distance of two sets of features, by their Gaussian fits (Heusel et al. 2017)."""

from __future__ import annotations

import numpy as np

from ldm_jax.errors import UserError


class FeatureStatistics:
    """Running mean and covariance of features, in float64, batch by batch."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = np.zeros(features)
        self.products = np.zeros((features, features))  # summed products of distances to the mean

    def add(self, features: np.ndarray) -> None:
        """Takes in a batch (N, D).

        Raises:
            UserError: other than D features per example, or values that are not finite.
        """
        batch = np.asarray(features, np.float64)
        if batch.ndim != 2 or batch.shape[1] != len(self.mean):
            raise UserError(f"expected features (N, {len(self.mean)}), got {batch.shape}")
        if not np.isfinite(batch).all():
            raise UserError("features are not finite: are there NaNs in the images?")
        if not len(batch):
            return
        mean, count = batch.mean(0), self.count + len(batch)
        distance, centred = mean - self.mean, batch - mean
        # Chan et al. 1983: joins two sets without the cancellation of a sum of products.
        self.products += centred.T @ centred
        self.products += np.outer(distance, distance) * (self.count * len(batch) / count)
        self.mean = self.mean + distance * len(batch) / count
        self.count = count

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean (D,) and the unbiased covariance (D, D).

        Raises:
            UserError: fewer than two examples were given.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 examples, got {self.count}")
        return self.mean, self.products / (self.count - 1)


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians, means (D,) and covariances (D, D).

    |m - m'|^2 + tr(S) + tr(S') - 2 tr((S S')^(1/2)). The last trace is taken from the eigenvalues
    of S^(1/2) S' S^(1/2), which is symmetric: singular covariances (fewer examples than features)
    need no offset and cost no more than about 1e-5.

    Raises:
        UserError: the shapes do not fit each other, or a value is not finite.
    """
    means = [np.asarray(m, np.float64) for m in (mean, other_mean)]
    covariances = [np.asarray(c, np.float64) for c in (covariance, other_covariance)]
    features = means[0].size
    for m, c in zip(means, covariances, strict=True):
        if m.shape != (features,) or c.shape != (features, features):
            raise UserError(
                f"statistics of {features} features do not fit a mean {m.shape} with a covariance "
                f"{c.shape}: were they made with another network?"
            )
        if not (np.isfinite(m).all() and np.isfinite(c).all()):
            raise UserError("the statistics are not finite: were there NaNs in the images?")
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = root @ covariances[1] @ root
    eigenvalues = np.linalg.eigvalsh(0.5 * (product + product.T))
    trace = 2.0 * np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
    distance = np.square(means[0] - means[1]).sum() - trace
    return float(distance + np.trace(covariances[0]) + np.trace(covariances[1]))
