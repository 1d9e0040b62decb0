"""The samplers, each a table of coefficients made beforehand in float64 and one step function.

A sampler is these functions and facts:
- `table(process, grid, eta) -> Table` from the visited noise levels;
- `init(x_T) -> carry`, a tuple that starts with x_t; what multistep samplers remember is behind;
- `step(denoise, carry, row, noise) -> carry` for one row of the table.
Every row makes exactly one network call, so a table has as many rows as sampling makes calls, and
the network is compiled once. x_t = alpha x0 + sigma eps throughout, with the alpha and sigma of
the process; alpha may be 0, pure noise, at the first level.
Rows always have t, alpha and sigma, the level at which the network is called. They have 'noise',
the factor of fresh noise, only if the sampler is stochastic; otherwise `step` gets None for it.
Rows with 'corrector' set improve on the step of the row before instead of making a new one.
Rows with 'forward' and 'renoise' make x_t noisier again after the step, see `resampling`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Denoise
from ldm_jax.diffusion.schedule import Level, Process
from ldm_jax.diffusion.spacing import SPACINGS, Grid
from ldm_jax.errors import UserError
from ldm_jax.types import Array

Row = dict[str, Array]


class Table(NamedTuple):
    """What a sampler runs through.

    Attributes:
        start: () factor that turns noise of unit variance into the first x_t.
        rows: arrays (N, ...) in the order of the steps, float32 and bool.
    """

    start: np.ndarray
    rows: dict[str, np.ndarray]


class Sampler(NamedTuple):
    """The functions of a sampler, as the module's docstring describes them, and its limits.

    Attributes:
        etas: smallest and largest eta that make sense.
        spacings: names of the spacings that make sense.
        blend: whether known parts are put into x_t 'before' or 'after' a step.
        multistep: whether a step uses what earlier rows predicted, so that none can be made again
            from a noisier x_t.
    """

    table: Callable[[Process, Grid, float], Table]
    init: Callable[[Array], tuple]
    step: Callable[[Denoise, tuple, Row, Array | None], tuple]
    etas: tuple[float, float] = (0.0, 0.0)
    spacings: tuple[str, ...] = SPACINGS
    blend: Literal["before", "after"] = "before"
    multistep: bool = False


def level_of(row: Row) -> Level:
    """The noise level at which a row calls the network."""
    return Level(row["t"], row["alpha"], row["sigma"])


def make_rows(grid: Grid, start: float | None = None, **columns: np.ndarray) -> Table:
    """Rounds a table to float32, once.

    By default it starts with noise of the standard deviation that latents of unit variance have at
    the first level: 1 where the process preserves the variance.
    """
    start = np.hypot(grid.alpha[0], grid.sigma[0]) if start is None else start
    rows = {
        name: column if column.dtype == bool else column.astype(np.float32)
        for name, column in (grid._asdict() | columns).items()
    }
    return Table(np.float32(start), rows)


def levels_after(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma (N,) after each step; the last ends in clean latents."""
    return np.append(grid.alpha[1:], 1.0), np.append(grid.sigma[1:], 0.0)


def _following(process: Process, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma (N,) after each step of DDIM and PLMS.

    As in the original code, the end of a discrete process is the least noisy level of training and
    not clean latents, unless that level itself is visited.
    """
    alpha, sigma = levels_after(grid)
    if process.discrete and grid.t[-1] > process.first:
        alpha[-1:], sigma[-1:] = process.marginal(np.asarray([process.first]))
    return alpha, sigma


def _kept(grid: Grid, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Share (N,) of sigma / alpha that is left at alpha and sigma, after each step: 0 to 1."""
    return np.minimum(sigma * grid.alpha / (grid.sigma * alpha), 1.0)


# One step, one prediction: DDIM, ancestral sampling, Euler


def ddim_table(process: Process, grid: Grid, eta: float) -> Table:
    """Coefficients of DDIM (Song et al. 2021, eqs. 12 and 16), for any alpha and sigma."""
    alpha, sigma = _following(process, grid)
    fresh = eta**2 * (1 - _kept(grid, alpha, sigma) ** 2)  # share of the new variance
    columns = {"x0": alpha, "eps": sigma * np.sqrt(1 - fresh)}
    return make_rows(grid, **columns, **({"noise": sigma * np.sqrt(fresh)} if eta > 0 else {}))


def euler_table(process: Process, grid: Grid, eta: float) -> Table:
    """Coefficients of Euler's method for the ODE in sigma / alpha (Karras et al. 2022), to sigma 0.

    It is the step of DDIM, which ends earlier in discrete processes, and Euler's method for the
    velocity of a flow. As in diffusers, sampling starts from pure noise of the process where the
    grid starts at its last level, and from the variance of unit latents elsewhere.
    """
    alpha, sigma = levels_after(grid)
    return make_rows(grid, _pure_noise(process, grid), x0=alpha, eps=sigma)


def euler_ancestral_table(process: Process, grid: Grid, eta: float) -> Table:
    """Coefficients of Euler's method with fresh noise (k-diffusion's `sample_euler_ancestral`).

    As ancestral sampling it is the posterior of DDPM, told by x0 and eps; like `euler_table` it
    starts from pure noise of the process and ends in clean latents.
    """
    alpha, sigma = levels_after(grid)
    fresh = 1 - _kept(grid, alpha, sigma) ** 2
    columns = {"x0": alpha, "eps": sigma * np.sqrt(1 - fresh), "noise": sigma * np.sqrt(fresh)}
    return make_rows(grid, _pure_noise(process, grid), **columns)


def _pure_noise(process: Process, grid: Grid) -> float | None:
    return grid.sigma[0] if grid.t[0] == process.last else None


def ddim_step(denoise: Denoise, carry: tuple, row: Row, noise: Array | None) -> tuple:
    """One step of DDIM: carry (x_t (B, ...),), noise (B, ...) or None."""
    (x_t,) = carry
    prediction = denoise(x_t, level_of(row))
    x_t = row["x0"] * prediction.x0 + row["eps"] * prediction.eps
    return (x_t if noise is None else x_t + row["noise"] * noise,)


def ddpm_table(process: Process, grid: Grid, eta: float) -> Table:
    """Coefficients of ancestral sampling: the posterior of DDPM (eqs. 6 and 7) between levels.

    With all T steps this is the original loop; with fewer, the same for the thinned process. For
    any alpha and sigma it is the posterior of Kingma et al. 2021, eq. 23 ff.
    """
    alpha, sigma = levels_after(grid)
    kept = _kept(grid, alpha, sigma)
    fresh = 1 - kept**2
    return make_rows(
        grid, x0=alpha * fresh, x_t=kept * sigma / grid.sigma, noise=sigma * np.sqrt(fresh)
    )


def ddpm_step(denoise: Denoise, carry: tuple, row: Row, noise: Array) -> tuple:
    """One ancestral step: carry (x_t (B, ...),), noise (B, ...)."""
    (x_t,) = carry
    x0 = denoise(x_t, level_of(row)).x0
    return (row["x0"] * x0 + row["x_t"] * x_t + row["noise"] * noise,)


# Sums of present and past predictions: PLMS, Heun


def linear_step(kind: str) -> Callable[[Denoise, tuple, Row, Array | None], tuple]:
    """Makes the step x -> row.x * x + sum of row.weights * (new, past predictions).

    `kind` is the prediction that is summed, 'x0', 'eps' or 'velocity'. The carry is x_t, the x_t
    from which the last step started (a corrector starts there once more) and the past predictions,
    newest first. Rows may have 'noise', and 'x0', the weight of a new x0 beside the sum: pure noise
    tells nothing of it.
    """

    def step(denoise: Denoise, carry: tuple, row: Row, noise: Array | None) -> tuple:
        x_t, base, *past = carry
        prediction = denoise(x_t, level_of(row))
        seen = (getattr(prediction, kind), *past)
        refine = row.get("corrector", False)
        base = jnp.where(refine, base, x_t)
        kept = (jnp.where(refine, *pair) for pair in zip(past, seen[:-1], strict=True))
        weighted = [row["weights"][i] * past for i, past in enumerate(seen)]
        if "x0" in row:
            weighted.append(row["x0"] * prediction.x0)
        if noise is not None:
            weighted.append(row["noise"] * noise)
        return (row["x"] * base + sum(weighted), base, *kept)

    return step


def linear_init(past: int) -> Callable[[Array], tuple]:
    """Makes the start of a `linear_step` that remembers `past` predictions."""
    return lambda x_T: (x_T, x_T, *(jnp.zeros_like(x_T) for _ in range(past)))


# Adams-Bashforth weights of PLMS (Liu et al. 2022, eq. 9), newest first.
ADAMS = np.array([[36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def plms_table(process: Process, grid: Grid, eta: float) -> Table:
    """Coefficients of PLMS: DDIM's step with a mean of the last four predicted noises.

    The first step is made twice, the second time with the mean of the noises at its two ends, so
    that S steps take S + 1 calls; a single step is DDIM's.
    """
    steps = len(grid.t)
    means = np.zeros((steps, 4))
    means[0, 0] = 1
    for i in range(1, steps):
        means[i] = ADAMS[min(i, 3) - 1]
    twice = np.arange(steps) < min(1, steps - 1)
    return steps_in_eps(grid, _following(process, grid), twice, means)


def heun_table(process: Process, grid: Grid, eta: float) -> Table:
    """Coefficients of Heun's method for the ODE in sigma / alpha (Karras et al. 2022, alg. 1).

    Each step is made twice, but for the last, to sigma 0: S steps take 2 S - 1 calls. It starts as
    Euler's method does.
    """
    steps = len(grid.t)
    twice, means = np.arange(steps) < steps - 1, np.tile([1.0, 0.0], (steps, 1))
    return steps_in_eps(grid, levels_after(grid), twice, means, _pure_noise(process, grid))


def flow_heun_table(process: Process, grid: Grid, eta: float) -> Table:
    """Coefficients of Heun's method for the velocity eps - x0 of a flow (Liu et al. 2023).

    Each step is made twice, but for the last, to clean latents: S steps take 2 S - 1 calls.

    Raises:
        UserError: the process is no flow, alpha + sigma = 1.
    """
    if not np.allclose(grid.alpha + grid.sigma, 1, rtol=0, atol=1e-6):
        raise UserError("sampler 'flow_heun' follows the velocity of the schedule 'flow': use heun")
    steps = len(grid.t)
    twice = np.arange(steps) < steps - 1
    step = np.repeat(np.arange(steps), 1 + twice)  # that a call serves
    corrector = np.append(False, step[1:] == step[:-1])
    means = np.where(corrector[:, None], [0.5, 0.5], [1.0, 0.0])
    change = (levels_after(grid)[1] - grid.sigma)[step]
    called = grid.at(step + corrector)
    weights = means * change[:, None]
    return make_rows(called, x=np.ones(len(step)), weights=weights, corrector=corrector)


def steps_in_eps(
    grid: Grid,
    then: tuple[np.ndarray, np.ndarray],
    twice: np.ndarray,
    means: np.ndarray,
    start: float | None = None,
) -> Table:
    """The table of steps x -> alpha' / alpha x + (sigma' - sigma alpha' / alpha) * mean of eps.

    Args:
        grid: (N,) levels.
        then: alpha' and sigma' (N,) after each step.
        twice: (N,) whether a step is made once more, with the mean of the noises at its ends. From
            pure noise it never is: it has no length in sigma / alpha, and is a step of DDIM.
        means: (N, P) weights of the predicted noises in the mean, newest first.
        start: of the table, as in `make_rows`.
    """
    noise = grid.alpha == 0
    twice = twice & ~noise
    gain = np.divide(then[0], grid.alpha, out=np.zeros(len(noise)), where=~noise)
    eps = then[1] - gain * grid.sigma
    step = np.repeat(np.arange(len(noise)), 1 + twice)  # that a call serves
    corrector = np.append(False, step[1:] == step[:-1])
    means = means[step]
    means[corrector] = 0.5 * np.eye(1, means.shape[1]) + 0.5 * np.eye(1, means.shape[1], 1)
    columns = {"x": gain[step], "weights": means * eps[step, None], "corrector": corrector}
    if noise.any():
        columns["x0"] = np.where(noise, then[0], 0.0)[step]
    return make_rows(grid.at(step + corrector), start, **columns)
