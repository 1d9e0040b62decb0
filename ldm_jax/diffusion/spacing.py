"""Which noise levels a sampler visits, by name.

Times are those of the training process, 0 to T - 1. The grids here are ascending in time, as they
are usually written; `make_grid` turns them into the order of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ldm_jax.diffusion.schedule import Schedule
from ldm_jax.errors import UserError


class Grid(NamedTuple):
    """Visited noise levels in the order of the steps, from much noise to little; float64.

    Attributes:
        t: (N,) times that the network is told, in [0, T - 1]; they may be fractional.
        alpha_bar: (N,) squared factors of x0 in x_t.
    """

    t: np.ndarray
    alpha_bar: np.ndarray


def leading_steps(total: int, steps: int) -> np.ndarray:
    """Exactly `steps` evenly spread time steps; the first is 1, as in the original code."""
    if steps == total:
        return np.arange(total)
    return np.arange(steps) * total // steps + 1


def uniform_steps(total: int, steps: int) -> np.ndarray:
    """The original code's grid: more than `steps` steps where `steps` does not divide `total`."""
    return np.arange(0, total, total // steps) + 1


def quad_steps(total: int, steps: int) -> np.ndarray:
    """The original code's quadratic grid, up to 0.8 `total`; it may repeat small time steps."""
    return (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).astype(int) + 1


def linspace_steps(total: int, steps: int) -> np.ndarray:
    """Evenly spread from T - 1 down to 0, fractional; Euler's and Heun's in diffusers."""
    return np.linspace(total - 1, 0, steps)[::-1]


def linspace_open_steps(total: int, steps: int) -> np.ndarray:
    """Evenly spread from T - 1 down to 0 without 0, rounded; DPM-Solver's in diffusers."""
    if steps == total:  # it needs 0 to be free of repetitions
        return np.arange(total)
    return np.linspace(total - 1, 0, steps, endpoint=False).round().astype(int)[::-1]


def trailing_steps(total: int, steps: int) -> np.ndarray:
    """Evenly spread from T - 1, each the last of its share of T (Lin et al. 2024, table 2)."""
    return np.round(np.arange(1, steps + 1) * total / steps).astype(int) - 1


TIMES: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": leading_steps,
    "uniform": uniform_steps,
    "quad": quad_steps,
    "linspace": linspace_steps,
    "linspace_open": linspace_open_steps,
    "trailing": trailing_steps,
}
SPACINGS = (*TIMES, "karras")


def karras_grid(schedule: Schedule, steps: int, rho: float = 7.0) -> Grid:
    """From the largest to the smallest sigma / alpha of the process by eq. 5 of Karras et al. 2022.

    These levels lie between those of training; the network is told the nearest time step.
    """
    ratio = _noise_to_signal(schedule)
    ends = ratio[-1] ** (1 / rho), ratio[0] ** (1 / rho)
    visited = np.linspace(*ends, steps) ** rho
    t = np.interp(np.log(visited), np.log(ratio), np.arange(schedule.steps)).round()
    return Grid(t, 1 / (1 + visited**2))


def make_grid(spacing: str, schedule: Schedule, steps: int) -> Grid:
    """Finds the noise levels that `steps` steps of a spacing visit.

    Raises:
        UserError: an unknown spacing, steps outside [1, T], or a spacing that leaves [0, T).
    """
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing '{spacing}': choose one of {', '.join(SPACINGS)}")
    total = schedule.steps
    if not 1 <= steps <= total:
        raise UserError(f"sampling steps must be in 1..{total}, not {steps}")
    if spacing == "karras":
        return karras_grid(schedule, steps)
    t = TIMES[spacing](total, steps)
    if t.max() >= total:
        raise UserError(
            f"spacing '{spacing}' with {steps} steps visits time step {t.max()}, but the last is "
            f"{total - 1}: use spacing 'leading'"
        )
    if t.dtype.kind == "i":
        alpha_bar = schedule.alpha_bar[t]
    else:  # as in diffusers, sigma / alpha is interpolated linearly in time
        ratio = np.interp(t, np.arange(total), _noise_to_signal(schedule))
        alpha_bar = 1 / (1 + ratio**2)
    return Grid(t[::-1].astype(np.float64), alpha_bar[::-1])


def _noise_to_signal(schedule: Schedule) -> np.ndarray:
    """sigma / alpha (T,) float64, the noise level of the variance-exploding view of the process."""
    return np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
