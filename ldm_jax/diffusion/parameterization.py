"""What the network predicts: the noise, the clean latents, or v = alpha eps - sigma x0."""

from __future__ import annotations

from ldm_jax.diffusion.schedule import Level
from ldm_jax.errors import UserError
from ldm_jax.types import Array, Prediction

PARAMETERIZATIONS = ("eps", "x0", "v")


def check_parameterization(predict: str) -> None:
    """Raises UserError unless `predict` names a known parameterization."""
    if predict not in PARAMETERIZATIONS:
        raise UserError(
            f"unknown parameterization '{predict}': choose one of {', '.join(PARAMETERIZATIONS)}"
        )


def to_prediction(raw: Array, x_t: Array, level: Level, predict: str) -> Prediction:
    """Turns network output into x0 and eps: raw, x_t (B, ...) of the noise level `level`.

    `predict` is 'eps', 'x0' or 'v' (Salimans & Ho 2022, appendix D). Raises UserError otherwise.
    """
    check_parameterization(predict)
    alpha, sigma = level.alpha, level.sigma
    if predict == "eps":
        return Prediction(x0=(x_t - sigma * raw) / alpha, eps=raw)
    if predict == "x0":
        return Prediction(x0=raw, eps=(x_t - alpha * raw) / sigma)
    return Prediction(x0=alpha * x_t - sigma * raw, eps=sigma * x_t + alpha * raw)


def regression_target(x0: Array, eps: Array, level: Level, predict: str) -> Array:
    """What the network output is regressed on: x0, eps (B, ...) -> (B, ...).

    The inverse of `to_prediction` for x_t = alpha x0 + sigma eps. Raises UserError likewise.
    """
    check_parameterization(predict)
    if predict == "eps":
        return eps
    if predict == "x0":
        return x0
    return level.alpha * eps - level.sigma * x0
