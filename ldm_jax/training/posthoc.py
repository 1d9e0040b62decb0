"""Averages of any width, made after training from stored ones of a few widths.

A stored average weighs the past by a power-function profile that ends at its step. The mix of such
profiles that is nearest to another one, in least squares, gives the factors with which to mix the
stored averages. (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3.2 and appendix C.) Here the factors are bound to sum to 1, so that a weight that
never moved stays as it is, however far off the profile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm_jax.checks import WIDEST_STD
from ldm_jax.training.ema import exponent

# Directions of the profiles' space that rounding decides are left out: of widths almost alike.
RANK_TOLERANCE = 1e-13
WIDTHS = 200  # tried, evenly in the logarithm, to find the range of what can be expressed
NARROWEST = 1e-3


class Mix(NamedTuple):
    """How stored averages make up another one.

    Attributes:
        weights: (..., K) float64 of the K stored averages, sum 1.
        residual: (...) float64, root of the integral of the squared difference of the profiles,
            over that of the profile asked for.
    """

    weights: np.ndarray
    residual: np.ndarray


def inner_product(
    step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray
) -> np.ndarray:
    """Integral of the product of two profiles, in 1/updates; arguments broadcast.

    With gamma that of the later one, it is (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1)
    * (earlier / later)**gamma / later.
    """
    later, earlier = np.maximum(step_a, step_b), np.minimum(step_a, step_b)
    gamma = np.where(step_a > step_b, gamma_a, gamma_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (earlier / later) ** gamma / later


def mix(steps: np.ndarray, stds: np.ndarray, step: int, targets: np.ndarray) -> Mix:
    """How averages stored at `steps` with widths `stds` make up those of widths `targets`.

    steps, stds: (K,), distinct pairs. step: at which the averages asked for end. targets: (M,).
    Returns weights (M, K) and residuals (M,). One that is stored is taken as it is.

    Raises:
        UserError: a width that no profile has.
    """
    # Times count in units of the last step; only ratios matter.
    at = np.asarray(steps, np.float64) / step
    gammas = np.array([exponent(std) for std in stds])
    wanted = np.array([exponent(std) for std in targets])
    gram = inner_product(at[:, None], gammas[:, None], at, gammas)  # (K, K)
    cross = inner_product(at, gammas, 1.0, wanted[:, None])  # (M, K)
    norm = np.sqrt(np.diag(gram))
    inverse = np.linalg.pinv(gram / norm / norm[:, None], RANK_TOLERANCE, hermitian=True)
    inverse = inverse / norm / norm[:, None]
    free = cross @ inverse
    # The multiplier of the sum's constraint.
    direction = inverse.sum(1) / inverse.sum()
    weights = free + (1 - free.sum(1, keepdims=True)) * direction
    stored = (np.asarray(steps) == step) & (np.asarray(stds) == np.asarray(targets)[:, None])
    weights = np.where(stored.any(1, keepdims=True), stored, weights)
    squared = np.einsum("mk,kl,ml->m", weights, gram, weights) - 2 * (weights * cross).sum(1)
    own = inner_product(1.0, wanted, 1.0, wanted)
    residual = np.sqrt(np.maximum(squared + own, 0) / own)
    return Mix(weights, np.where(stored.any(1), 0.0, residual))


def expressible(
    steps: np.ndarray, stds: np.ndarray, step: int, tolerance: float
) -> list[tuple[float, float]]:
    """Ranges (narrowest, widest) of widths whose residual is at most `tolerance`, in order.

    They end at widths that were tried, or stored.
    """
    tried = np.geomspace(NARROWEST, WIDEST_STD * (1 - 1e-6), WIDTHS)
    stored = [std for at, std in zip(steps, stds, strict=True) if at == step]
    tried = np.union1d(tried, stored)
    good = mix(steps, stds, step, tried).residual <= tolerance
    edges = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(int), [0]])))
    return [(float(tried[a]), float(tried[b - 1])) for a, b in edges.reshape(-1, 2)]
