"""How much an error counts at each noise level, for every parameterization.

A weighting is meant for the squared error of one quantity; `weight` gives it for the error of what
the network predicts, so that the loss is the same function of x0's prediction, whatever the
network returns. Only 'simple' differs between parameterizations, by definition. As each level's
best prediction stays the best, weightings move the effort between levels, not the optimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ldm_jax.diffusion.parameterization import x0_per_output
from ldm_jax.diffusion.schedule import Level, Process
from ldm_jax.errors import UserError
from ldm_jax.types import Array


class Weighting(NamedTuple):
    """A weighting's name, one of WEIGHTINGS, and its numbers.

    Attributes:
        name: see WEIGHTINGS.
        snr_gamma: of 'min_snr' and 'soft_min_snr', the signal-to-noise ratio above which the
            weight of an error of x0 rises no further.
        p2: k and gamma of 'p2'.
    """

    name: str = "simple"
    snr_gamma: float = 5.0
    p2: tuple[float, float] = (1.0, 1.0)


def _min_snr(level: Level, weighting: Weighting) -> Array:
    """Hang et al. 2023, eq. 7: min(SNR, gamma)."""
    return jnp.minimum((level.alpha / level.sigma) ** 2, weighting.snr_gamma)


def _soft_min_snr(level: Level, weighting: Weighting) -> Array:
    """SNR gamma / (SNR + gamma): Crowson et al. 2024, whose gamma is 1 / sigma_data^2 = 4.

    It is also the sigmoid weighting of Kingma & Gao 2023, of bias log gamma.
    """
    alpha, sigma, gamma = level.alpha**2, level.sigma**2, weighting.snr_gamma
    return alpha * gamma / (alpha + gamma * sigma)


def _p2(level: Level, weighting: Weighting) -> Array:
    """Choi et al. 2022, eq. 8: 1 / (k + SNR)^gamma of an error of eps."""
    k, gamma = weighting.p2
    snr = (level.alpha / level.sigma) ** 2
    return snr / (k + snr) ** gamma


# What an error of x0 counts.
_OF_X0: dict[str, Callable[[Level, Weighting], Array]] = {
    "min_snr": _min_snr,
    "soft_min_snr": _soft_min_snr,
    "p2": _p2,
}
WEIGHTINGS = ("simple", *_OF_X0, "edm", "vlb")


SIMPLE = Weighting()


def check_weighting(weighting: Weighting) -> None:
    """Raises UserError for an unknown name or a number outside its range."""
    if weighting.name not in WEIGHTINGS:
        raise UserError(
            f"unknown weighting '{weighting.name}': choose one of {', '.join(WEIGHTINGS)}"
        )
    if not weighting.snr_gamma > 0:
        raise UserError(f"snr_gamma must be above 0, not {weighting.snr_gamma}")
    if not (weighting.p2[0] > 0 and weighting.p2[1] >= 0):
        raise UserError(f"p2 must be k above 0 and gamma of at least 0, not {weighting.p2}")


def weight(
    weighting: Weighting, process: Process, level: Level, predict: str, sigma_data: float = 1.0
) -> Array:
    """The factor (B,) of each example's squared error of the network's output.

    'edm' is a unit weight of an error of F (Karras et al. 2022, table 1). 'vlb' makes the mean over
    uniform times the bound of Kingma et al. 2021 (eqs. 15 and 17), in nats per latent number,
    without its ends.

    Args:
        weighting: see its class.
        process: the forward process.
        level: with t (B,).
        predict: one of PARAMETERIZATIONS.
        sigma_data: standard deviation of the latents, of 'edm'.
    """
    if weighting.name == "simple":
        return jnp.ones(level.t.shape)
    per_output = jnp.ravel(x0_per_output(level, predict, sigma_data))
    if weighting.name == "edm":
        of_x0 = jnp.ravel(x0_per_output(level, "edm", sigma_data)) ** -2.0
    elif weighting.name == "vlb":
        of_x0 = 0.5 * process.snr_fall(level.t)
    else:
        of_x0 = jnp.ravel(_OF_X0[weighting.name](level, weighting))
    return of_x0 * per_output**2
