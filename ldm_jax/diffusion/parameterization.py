"""What the network predicts, and the exact ways from there to x0 and eps and back.

All hold for any alpha and sigma of x_t = alpha x0 + sigma eps, where `alpha^2 + sigma^2` is 1 or
not:
- 'eps', the noise, and 'x0', the clean latents;
- 'v', alpha eps - sigma x0 (Salimans & Ho 2022, appendix D);
- 'flow', eps - x0, the velocity of a straight path (Liu et al. 2023);
- 'edm', the F of Karras et al. 2022, table 1, in whose scale x_t is x_t / alpha: both what the
  network sees and what it is to return have unit variance for latents of standard deviation
  `sigma_data`.
At pure noise, alpha = 0, 'eps' says nothing of x0, which is then not finite; all others do.
"""

from __future__ import annotations

import jax.numpy as jnp

from ldm_jax.diffusion.schedule import Level
from ldm_jax.errors import UserError
from ldm_jax.types import Array, Prediction

PARAMETERIZATIONS = ("eps", "x0", "v", "flow", "edm")


def check_parameterization(predict: str, sigma_data: float = 1.0) -> None:
    """Raises UserError for an unknown parameterization or a sigma_data that is not above 0."""
    if predict not in PARAMETERIZATIONS:
        raise UserError(
            f"unknown parameterization '{predict}': choose one of {', '.join(PARAMETERIZATIONS)}"
        )
    if not sigma_data > 0:
        raise UserError(f"sigma_data must be above 0, not {sigma_data}")


def network_input(x_t: Array, level: Level, predict: str, sigma_data: float = 1.0) -> Array:
    """What the network sees of x_t (B, ...): of unit variance for 'edm', else x_t itself."""
    return x_t / _std(level, sigma_data) if predict == "edm" else x_t


def to_prediction(
    raw: Array, x_t: Array, level: Level, predict: str, sigma_data: float = 1.0
) -> Prediction:
    """Turns network output into x0 and eps: raw, x_t (B, ...) of the noise level `level`.

    Args:
        raw: the network's output.
        x_t: noisy latents, before `network_input`.
        level: of x_t.
        predict: one of PARAMETERIZATIONS.
        sigma_data: standard deviation of x0, for 'edm'.

    Raises:
        UserError: an unknown parameterization, or a sigma_data that is not above 0.
    """
    check_parameterization(predict, sigma_data)
    alpha, sigma = level.alpha, level.sigma
    if predict == "eps":
        return Prediction(x0=(x_t - sigma * raw) / alpha, eps=raw)
    if predict == "x0":
        return Prediction(x0=raw, eps=(x_t - alpha * raw) / sigma)
    if predict == "v":
        square = alpha**2 + sigma**2
        x0, eps = alpha * x_t - sigma * raw, sigma * x_t + alpha * raw
        return Prediction(x0=x0 / square, eps=eps / square)
    if predict == "flow":
        total = alpha + sigma
        return Prediction(x0=(x_t - sigma * raw) / total, eps=(x_t + alpha * raw) / total)
    std = _std(level, sigma_data)
    seen = x_t / std
    return Prediction(
        x0=sigma_data / std * (alpha * sigma_data * seen + sigma * raw),
        eps=(sigma * seen - alpha * sigma_data * raw) / std,
    )


def regression_target(
    x0: Array, eps: Array, level: Level, predict: str, sigma_data: float = 1.0
) -> Array:
    """What the network output is regressed on: x0, eps (B, ...) -> (B, ...).

    The inverse of `to_prediction` for x_t = alpha x0 + sigma eps. Raises UserError likewise.
    """
    check_parameterization(predict, sigma_data)
    alpha, sigma = level.alpha, level.sigma
    if predict == "eps":
        return eps
    if predict == "x0":
        return x0
    if predict == "v":
        return alpha * eps - sigma * x0
    if predict == "flow":
        return eps - x0
    return (sigma / sigma_data * x0 - alpha * sigma_data * eps) / _std(level, sigma_data)


def x0_per_output(level: Level, predict: str, sigma_data: float = 1.0) -> Array:
    """By how much x0 moves, up to sign, where the output moves by 1: of the level's shape."""
    alpha, sigma = level.alpha, level.sigma
    if predict == "eps":
        return sigma / alpha
    if predict == "x0":
        return jnp.ones_like(alpha)
    if predict == "v":
        return sigma / (alpha**2 + sigma**2)
    if predict == "flow":
        return sigma / (alpha + sigma)
    return sigma * sigma_data / _std(level, sigma_data)


def _std(level: Level, sigma_data: float) -> Array:
    """The standard deviation of x_t."""
    return jnp.sqrt(level.sigma**2 + (sigma_data * level.alpha) ** 2)
