"""Samplers that integrate a polynomial through past predictions over log-SNR: exponential ones.

In half of the log-SNR, l = log(alpha / sigma), x' = sigma' / sigma x + alpha' times the integral of
exp(-(l' - l)) x0 dl: what differs is which polynomial stands for x0 (DPM-Solver++, UniPC), or for
eps (DEIS). See `solvers` for what a sampler is.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Denoise
from ldm_jax.diffusion.schedule import Process
from ldm_jax.diffusion.solvers import Row, Table, level_of, levels_after, make_rows, steps_in_eps
from ldm_jax.diffusion.spacing import Grid
from ldm_jax.errors import UserError
from ldm_jax.types import Array

QUADRATURE = np.polynomial.legendre.leggauss(24)  # far beyond float64's need for polynomials


def _lengths(grid: Grid) -> np.ndarray:
    """Lengths (N,) of the steps in log-SNR / 2, above 0; inf from pure noise and to clean latents.

    Raises:
        UserError: levels that repeat.
    """
    lengths = np.append(np.diff(-np.log(grid.ratio)), np.inf)
    if not (lengths > 0).all():
        raise UserError("this sampler needs time steps that differ: use fewer steps")
    return lengths


def dpmpp_table(order: int) -> Callable[[Process, Grid, float], Table]:
    """Makes the table of DPM-Solver++ (Lu et al. 2022b) of order 2 (midpoint) or 3, multistep.

    The order rises over the first steps. The last step, to sigma 0, is of first order; with fewer
    than 15 steps the one before it is of second order at most, for stability. With eta 1 it solves
    the stochastic equation in place of the ODE, as k-diffusion's `sample_dpmpp_2m_sde` does, and
    its `_3m_sde` but for the steps of second order: steps count twice their length, and fresh noise
    makes up for it.
    """

    def table(process: Process, grid: Grid, eta: float) -> Table:
        alpha, sigma = levels_after(grid)
        lengths = _lengths(grid)
        steps = len(lengths)
        weights = np.zeros((steps, order))
        for i in range(steps):
            use = min(order, i + 1, 1 if i == steps - 1 else 2 if i == steps - 2 < 13 else order)
            h = (1 + eta) * lengths[i]
            # How much past values move the one in the middle of the step.
            gain = -np.expm1(-h)
            weights[i, 0] = gain
            if use == 2:
                slope = 0.5 * gain * lengths[i] / lengths[i - 1]
                weights[i, :2] += slope, -slope
            if use == 3:
                weights[i] += _third_order(h, *lengths[[i, i - 1, i - 2]])
        x = sigma / grid.sigma
        columns = {"x": x, "weights": alpha[:, None] * weights}
        if eta > 0:
            columns["x"] = x * np.exp(-eta * lengths)
            columns["noise"] = sigma * np.sqrt(-np.expm1(-2 * eta * lengths))
        return make_rows(grid, **columns)

    return table


def _third_order(h: float, step: float, before: float, earlier: float) -> np.ndarray:
    """What the quadratic through the last three predictions adds to the newest one's weight.

    `step`, `before` and `earlier` are the lengths of this step and the two before in log-SNR / 2;
    `h` is that of this step as it counts. As in the published code, the curvature counts half of
    what the quadratic's integral has: the order stays 2, with a smaller error.
    """
    recent = np.array([1, -1, 0]) * step / before  # differences per length of this step
    distant = np.array([0, 1, -1]) * step / earlier
    curve = (recent - distant) * step / (before + earlier)
    slope = recent + curve * before / step
    decay = np.expm1(-h)
    return (decay / h + 1) * slope - ((decay + h) / h**2 - 0.5) * curve


def deis_table(process: Process, grid: Grid, eta: float, order: int = 3) -> Table:
    """Coefficients of DEIS (Zhang & Chen 2023, tAB, with log(sigma / alpha) in the place of t).

    The noise is the polynomial through its last predictions, integrated over sigma / alpha. The
    order rises over the first steps, and the last step, to sigma 0, is Euler's.
    """
    with np.errstate(divide="ignore"):
        place = np.append(np.log(grid.ratio), -np.inf)
    steps = len(grid.t)
    _lengths(grid)  # refuses repeated levels
    means = np.zeros((steps, order))
    for i in range(steps):
        nodes = place[max(0, i + 1 - order) : i + 1][::-1]  # newest first
        nodes = nodes[np.isfinite(nodes)] if i < steps - 1 else nodes[:1]
        if len(nodes) < 2 or not np.isfinite(place[i]):
            means[i, 0] = 1
            continue
        middle, half = (place[i + 1] + place[i]) / 2, (place[i + 1] - place[i]) / 2
        at = middle + half * QUADRATURE[0]
        density = QUADRATURE[1] * np.exp(at)
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            basis = np.prod((at[:, None] - others) / (node - others), axis=1)
            means[i, j] = (density * basis).sum() / density.sum()
    never = np.zeros(steps, bool)
    return steps_in_eps(grid, levels_after(grid), never, means)


def unipc_table(process: Process, grid: Grid, eta: float, order: int = 3) -> Table:
    """Coefficients of UniPC (Zhao et al. 2023, alg. 5 and 6) with B(h) = exp(-h) - 1 ("bh2").

    Each call corrects the step that led to it and predicts the next, so S steps take S calls. Rows
    have, beside the predictor's 'x' and 'weights' of the present and past x0 (newest first),
    'last' and 'improve', the corrector's factors of the corrected x of the row before and of the
    same x0s; 'corrected' is False where nothing is. The last step, to sigma 0, has order 1.
    """
    alpha, sigma = levels_after(grid)
    lengths, steps = _lengths(grid), len(grid.t)
    place = -np.log(grid.ratio)  # of the predictions
    weights, improve = np.zeros((steps, order)), np.zeros((steps, order + 1))
    last, corrected = np.zeros(steps), np.zeros(steps, bool)
    for i in range(steps):
        past = np.isfinite(place[max(0, i + 1 - order) : i]).sum()  # besides the newest
        use = min(past + 1, steps - i, order)
        if not (np.isfinite(place[i]) and np.isfinite(lengths[i])):
            use = 1
        before = (place[i - 1 - np.arange(use - 1)] - place[i]) / lengths[i]
        weights[i, :use] = alpha[i] * _bh2(lengths[i], before, corrector=False)
        if i + 1 < steps and np.isfinite(lengths[i]):
            corrected[i + 1] = True
            last[i + 1] = sigma[i] / grid.sigma[i]
            improve[i + 1, : use + 1] = alpha[i] * _bh2(lengths[i], before, corrector=True)
    columns = {"x": sigma / grid.sigma, "weights": weights}
    return make_rows(grid, last=last, improve=improve, corrected=corrected, **columns)


def _bh2(h: float, before: np.ndarray, corrector: bool) -> np.ndarray:
    """Weights of the x0s in a step of length h: newest first, of the corrector with its end first.

    `before` are the places of the past predictions, relative to the start of the step and to h.
    """
    gain = -np.expm1(-h)
    places = np.append(before, 1.0) if corrector else before
    if not len(places):
        return np.array([gain])
    if len(places) == 1:
        rho = np.array([0.5])  # as published, for both
    else:
        powers = np.arange(len(places))
        phi, targets, factorial = -gain / -h - 1, [], 1
        for k in range(1, len(places) + 1):
            targets.append(phi * factorial / -gain)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve(places[None] ** powers[:, None], np.array(targets))
    difference = gain * rho / places  # of each x0 against the newest at the start
    start = gain - difference.sum()
    if corrector:
        return np.concatenate([difference[-1:], [start], difference[:-1]])
    return np.concatenate([[start], difference])


def unipc_init(x_T: Array, order: int = 3) -> tuple:
    """The carry of `unipc_step`: x_t, the corrected x of the row before, past x0s."""
    return (x_T, x_T, *(jnp.zeros_like(x_T) for _ in range(order)))


def unipc_step(denoise: Denoise, carry: tuple, row: Row, noise: Array | None) -> tuple:
    """Corrects x_t (B, ...) by what is predicted at it, and makes the next step from there."""
    x_t, before, *past = carry
    seen = (denoise(x_t, level_of(row)).x0, *past)
    mend = [row["improve"][i] * x0 for i, x0 in enumerate(seen)]
    x_t = jnp.where(row["corrected"], row["last"] * before + sum(mend), x_t)
    steps = [row["weights"][i] * x0 for i, x0 in enumerate(seen[:-1])]
    return (row["x"] * x_t + sum(steps), x_t, *seen[:-1])
