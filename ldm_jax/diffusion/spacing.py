"""Which noise levels a sampler visits, by name.

Times are those of the process that was trained. The grids here are ascending in time, as they are
usually written; `make_grid` turns them into the order of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ldm_jax.diffusion.schedule import Process
from ldm_jax.errors import UserError


class Grid(NamedTuple):
    """Visited noise levels in the order of the steps, from much noise to little; float64.

    Attributes:
        t: (N,) times that the network is told, in [first, last] of the process; they may be
            fractional.
        alpha: (N,) factors of x0 in x_t; 0 at the first level of some processes, never later.
        sigma: (N,) factors of eps in x_t, above 0.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """(N,) sigma / alpha, infinite at pure noise."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    def at(self, place: np.ndarray | slice) -> Grid:
        """The levels at some places, an index or a slice."""
        return Grid(*(column[place] for column in self))


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
# The same in continuous time: T, the first and the last t are the process's own.
CONTINUOUS_TIMES: dict[str, Callable[[Process, int], np.ndarray]] = {
    "leading": lambda process, steps: np.arange(steps) * process.steps / steps + 1,
    "linspace": lambda process, steps: np.linspace(process.last, process.first, steps)[::-1],
    "trailing": lambda process, steps: np.arange(1, steps + 1) * process.steps / steps,
}


def karras_ratios(most: float, least: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Falling sigma / alpha (N,) by eq. 5 of Karras et al. 2022."""
    return np.linspace(most ** (1 / rho), least ** (1 / rho), steps) ** rho


# Levels that lie between those of a discrete schedule, by sigma / alpha; falling.
RATIOS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "karras": karras_ratios,
    "log_snr": np.geomspace,
}
SPACINGS = (*TIMES, *RATIOS)
CONTINUOUS_SPACINGS = (*CONTINUOUS_TIMES, *RATIOS)


def ratio_grid(spacing: str, process: Process, steps: int) -> Grid:
    """From the largest to the smallest sigma / alpha of the process by a spacing of RATIOS.

    Of a discrete process, the network is told the nearest time step. One that ends in pure noise
    starts there, and goes on from the largest finite ratio, one step of its clock below.
    """
    alpha, _ = process.marginal(np.asarray([process.last]))
    noise_first = bool(alpha[0] == 0)
    ends = np.asarray([process.last - noise_first, process.first])
    ends_alpha, ends_sigma = process.marginal(ends)
    most, least = ends_sigma / ends_alpha
    ratio = RATIOS[spacing](most, least, steps - noise_first)
    t = process.time_of(np.log(ratio))
    if process.discrete:  # t is rounded, the level is not
        alpha, sigma = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
    else:
        alpha, sigma = process.marginal(t)
    grid = Grid(t, alpha, sigma)
    if noise_first:
        grid = Grid(np.append(process.last, t), np.append(0.0, alpha), np.append(1.0, sigma))
    return grid


def make_grid(spacing: str, process: Process, steps: int) -> Grid:
    """Finds the noise levels that `steps` steps of a spacing visit.

    Raises:
        UserError: an unknown spacing, one that the process has not, steps outside [1, T], or a
            spacing that leaves [0, T).
    """
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing '{spacing}': choose one of {', '.join(SPACINGS)}")
    total = process.steps
    if not 1 <= steps <= total:
        raise UserError(f"sampling steps must be in 1..{total}, not {steps}")
    if spacing in RATIOS:
        return ratio_grid(spacing, process, steps)
    if not process.discrete:
        if spacing not in CONTINUOUS_TIMES:
            raise UserError(
                f"spacing '{spacing}' counts the time steps of a discrete schedule: choose one of "
                f"{', '.join(CONTINUOUS_SPACINGS)}"
            )
        t = CONTINUOUS_TIMES[spacing](process, steps)
    else:
        t = TIMES[spacing](total, steps)
    if t.max() > process.last:
        raise UserError(
            f"spacing '{spacing}' with {steps} steps visits time step {t.max()}, but the last is "
            f"{process.last}: use spacing 'leading'"
        )
    alpha, sigma = process.marginal(t)
    return Grid(t.astype(np.float64), alpha, sigma).at(slice(None, None, -1))
