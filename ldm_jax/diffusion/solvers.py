"""The samplers, each a table of coefficients made beforehand in float64 and one step function.

A sampler is these functions and facts:
- `table(schedule, grid, eta) -> Table` from the visited noise levels;
- `init(x_T) -> carry`, a tuple that starts with x_t; what multistep samplers remember is behind;
- `step(denoise, carry, row, noise) -> carry` for one row of the table.
Every row makes exactly one network call, so a table has as many rows as sampling makes calls, and
the network is compiled once. x_t is variance preserving throughout, x_t = alpha x0 + sigma eps.
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
from ldm_jax.diffusion.schedule import Level, Schedule
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

    table: Callable[[Schedule, Grid, float], Table]
    init: Callable[[Array], tuple]
    step: Callable[[Denoise, tuple, Row, Array | None], tuple]
    etas: tuple[float, float] = (0.0, 0.0)
    spacings: tuple[str, ...] = SPACINGS
    blend: Literal["before", "after"] = "before"
    multistep: bool = False


def level_of(row: Row) -> Level:
    """The noise level at which a row calls the network."""
    return Level(row["t"], row["alpha"], row["sigma"])


def _make(grid: Grid, start: float = 1.0, **columns: np.ndarray) -> Table:
    """Rounds a table to float32, once."""
    alpha_bar = grid.alpha_bar
    levels = {"t": grid.t, "alpha": np.sqrt(alpha_bar), "sigma": np.sqrt(1 - alpha_bar)}
    rows = {
        name: column if column.dtype == bool else column.astype(np.float32)
        for name, column in (levels | columns).items()
    }
    return Table(np.float32(start), rows)


# One step, one prediction: DDIM, ancestral sampling, Euler


def _following(schedule: Schedule, grid: Grid) -> np.ndarray:
    """alpha_bar (N,) after each step of DDIM and PLMS.

    As in the original code, the end is the least noisy level of training and not clean latents,
    unless that level itself is visited.
    """
    end = schedule.alpha_bar[0] if grid.t[-1] > 0 else 1.0
    return np.append(grid.alpha_bar[1:], end)


def ddim_table(schedule: Schedule, grid: Grid, eta: float) -> Table:
    """Coefficients of DDIM (Song et al. 2021, eqs. 12 and 16)."""
    now, then = grid.alpha_bar, _following(schedule, grid)
    noise = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
    columns = {"x0": np.sqrt(then), "eps": np.sqrt(1 - then - noise**2)}
    return _make(grid, **columns, **({"noise": noise} if eta > 0 else {}))


def euler_table(schedule: Schedule, grid: Grid, eta: float) -> Table:
    """Coefficients of Euler's method for the ODE in sigma / alpha (Karras et al. 2022), to sigma 0.

    It is the step of DDIM, which ends earlier. As in diffusers, sampling starts from pure noise of
    the process where the grid starts at T - 1, and from unit variance elsewhere.
    """
    then = np.append(grid.alpha_bar[1:], 1.0)
    columns = {"x0": np.sqrt(then), "eps": np.sqrt(1 - then)}
    return _make(grid, _pure_noise(schedule, grid), **columns)


def _pure_noise(schedule: Schedule, grid: Grid) -> float:
    return np.sqrt(1 - grid.alpha_bar[0]) if grid.t[0] == schedule.steps - 1 else 1.0


def ddim_step(denoise: Denoise, carry: tuple, row: Row, noise: Array | None) -> tuple:
    """One step of DDIM: carry (x_t (B, ...),), noise (B, ...) or None."""
    (x_t,) = carry
    prediction = denoise(x_t, level_of(row))
    x_t = row["x0"] * prediction.x0 + row["eps"] * prediction.eps
    return (x_t if noise is None else x_t + row["noise"] * noise,)


def ddpm_table(schedule: Schedule, grid: Grid, eta: float) -> Table:
    """Coefficients of ancestral sampling: the posterior of DDPM (eqs. 6 and 7) between levels.

    With all T steps this is the original loop; with fewer, the same for the thinned process.
    """
    now, then = grid.alpha_bar, np.append(grid.alpha_bar[1:], 1.0)
    beta = 1 - now / then
    return _make(
        grid,
        x0=beta * np.sqrt(then) / (1 - now),
        x_t=(1 - then) * np.sqrt(1 - beta) / (1 - now),
        noise=np.sqrt(beta * (1 - then) / (1 - now)),
    )


def ddpm_step(denoise: Denoise, carry: tuple, row: Row, noise: Array) -> tuple:
    """One ancestral step: carry (x_t (B, ...),), noise (B, ...)."""
    (x_t,) = carry
    x0 = denoise(x_t, level_of(row)).x0
    return (row["x0"] * x0 + row["x_t"] * x_t + row["noise"] * noise,)


# Sums of present and past predictions: PLMS, DPM-Solver++, Heun


def linear_step(kind: str) -> Callable[[Denoise, tuple, Row, Array | None], tuple]:
    """Makes the step x -> row.x * x + sum of row.weights * (new, past predictions).

    `kind` is the prediction that is summed, 'x0' or 'eps'. The carry is x_t, the x_t from which the
    last step started (a corrector starts there once more) and the past predictions, newest first.
    """

    def step(denoise: Denoise, carry: tuple, row: Row, noise: Array | None) -> tuple:
        x_t, base, *past = carry
        seen = (getattr(denoise(x_t, level_of(row)), kind), *past)
        refine = row.get("corrector", False)
        base = jnp.where(refine, base, x_t)
        kept = (jnp.where(refine, *pair) for pair in zip(past, seen[:-1], strict=True))
        weighted = [row["weights"][i] * prediction for i, prediction in enumerate(seen)]
        return (row["x"] * base + sum(weighted), base, *kept)

    return step


def linear_init(past: int) -> Callable[[Array], tuple]:
    """Makes the start of a `linear_step` that remembers `past` predictions."""
    return lambda x_T: (x_T, x_T, *(jnp.zeros_like(x_T) for _ in range(past)))


# Adams-Bashforth weights of PLMS (Liu et al. 2022, eq. 9), newest first.
ADAMS = np.array([[36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def plms_table(schedule: Schedule, grid: Grid, eta: float) -> Table:
    """Coefficients of PLMS: DDIM's step with a mean of the last four predicted noises.

    The first step is made twice, the second time with the mean of the noises at its two ends, so
    that S steps take S + 1 calls; a single step is DDIM's.
    """
    steps, then = len(grid.t), _following(schedule, grid)
    x = np.sqrt(then / grid.alpha_bar)
    eps = np.sqrt(1 - then) - x * np.sqrt(1 - grid.alpha_bar)
    means = np.zeros((steps, 4))
    means[0, 0] = 1
    for i in range(1, steps):
        means[i] = ADAMS[min(i, 3) - 1]
    place, step = np.arange(steps), np.arange(steps)  # of the call, and which step it serves
    if steps > 1:
        place, step = np.insert(place, 1, 1), np.insert(step, 1, 0)
        means = np.insert(means, 1, [0.5, 0.5, 0, 0], axis=0)
    corrector = (np.arange(len(place)) == 1) & (steps > 1)
    called = Grid(grid.t[place], grid.alpha_bar[place])
    return _make(called, x=x[step], weights=means * eps[step, None], corrector=corrector)


def heun_table(schedule: Schedule, grid: Grid, eta: float) -> Table:
    """Coefficients of Heun's method for the ODE in sigma / alpha (Karras et al. 2022, alg. 1).

    Each step is made twice, but for the last, to sigma 0: S steps take 2 S - 1 calls. It starts as
    Euler's method does.
    """
    ratio = np.sqrt((1 - grid.alpha_bar) / grid.alpha_bar)
    then = np.append(grid.alpha_bar[1:], 1.0)
    change = np.append(ratio[1:], 0.0) - ratio
    calls = np.arange(2 * len(grid.t) - 1)
    place, step = (calls + 1) // 2, calls // 2  # of the call, and which step it serves
    corrector = calls % 2 == 1
    means = np.where(corrector[:, None], [0.5, 0.5], [1.0, 0.0])
    called = Grid(grid.t[place], grid.alpha_bar[place])
    return _make(
        called,
        _pure_noise(schedule, grid),
        x=np.sqrt(then / grid.alpha_bar)[step],
        weights=means * (np.sqrt(then) * change)[step, None],
        corrector=corrector,
    )


def dpmpp_table(order: int) -> Callable[[Schedule, Grid, float], Table]:
    """Makes the table of DPM-Solver++ (Lu et al. 2022b) of order 2 (midpoint) or 3, multistep.

    The order rises over the first steps. The last step, to sigma 0, is of first order; with fewer
    than 15 steps the one before it is of second order at most, for stability.
    """

    def table(schedule: Schedule, grid: Grid, eta: float) -> Table:
        then = np.append(grid.alpha_bar[1:], 1.0)
        half_log_snr = 0.5 * np.log(grid.alpha_bar / (1 - grid.alpha_bar))
        h = np.append(np.diff(half_log_snr), np.inf)
        if not (h > 0).all():
            raise UserError("DPM-Solver++ needs time steps that differ: use fewer steps")
        steps = len(h)
        weights = np.zeros((steps, order))
        for i in range(steps):
            use = min(order, i + 1, 1 if i == steps - 1 else 2 if i == steps - 2 < 13 else order)
            # How much past values move the one in the middle of the step.
            gain = -np.expm1(-h[i])
            weights[i, 0] = gain
            if use == 2:
                slope = 0.5 * gain * h[i] / h[i - 1]
                weights[i, :2] += slope, -slope
            if use == 3:
                weights[i] += _third_order(h[i], h[i - 1], h[i - 2])
        return _make(
            grid,
            x=np.sqrt((1 - then) / (1 - grid.alpha_bar)),
            weights=np.sqrt(then)[:, None] * weights,
        )

    return table


def _third_order(h: float, before: float, earlier: float) -> np.ndarray:
    """What the quadratic through the last three predictions adds to the newest one's weight.

    `h`, `before` and `earlier` are the lengths of this step and the two before in log-SNR / 2. As
    in the published code, the curvature counts half of what the quadratic's integral has: the order
    stays 2, with a smaller error.
    """
    recent = np.array([1, -1, 0]) * h / before  # differences per length of this step
    distant = np.array([0, 1, -1]) * h / earlier
    curve = (recent - distant) * h / (before + earlier)
    slope = recent + curve * before / h
    decay = np.expm1(-h)
    return (decay / h + 1) * slope - ((decay + h) / h**2 - 0.5) * curve


SAMPLERS = {
    "ddim": Sampler(ddim_table, lambda x_T: (x_T,), ddim_step, etas=(0.0, 1.0)),
    "ddpm": Sampler(ddpm_table, lambda x_T: (x_T,), ddpm_step, etas=(1.0, 1.0), blend="after"),
    "plms": Sampler(
        plms_table,
        linear_init(3),
        linear_step("eps"),
        # Its weights are those of equal steps.
        spacings=("leading", "uniform", "linspace", "linspace_open", "trailing"),
        multistep=True,
    ),
    "dpmpp_2m": Sampler(
        dpmpp_table(2),
        linear_init(1),
        linear_step("x0"),
        # The quadratic spacing repeats time steps.
        spacings=tuple(name for name in SPACINGS if name != "quad"),
        multistep=True,
    ),
    "dpmpp_3m": Sampler(
        dpmpp_table(3),
        linear_init(2),
        linear_step("x0"),
        spacings=tuple(name for name in SPACINGS if name != "quad"),
        multistep=True,
    ),
    "euler": Sampler(euler_table, lambda x_T: (x_T,), ddim_step),
    "heun": Sampler(heun_table, linear_init(1), linear_step("eps"), multistep=True),
}
