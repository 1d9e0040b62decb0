"""Samplers: tables of coefficients made beforehand, and one step function each.

A sampler is three functions:
- `table(schedule, t, eta) -> Table` from the visited time steps t (N,), ascending;
- `init(x_T) -> carry`, a tuple that starts with x_t; multistep samplers keep their history behind;
- `step(denoise, carry, row, noise) -> carry`, where `row` is one row of the table; it may call
  `denoise(x_t, t) -> Prediction` more than once.
A table is a dict of arrays (N,) in the order of the steps. It has the entry 'noise', the factor of
fresh noise, only if the sampler is stochastic; otherwise `step` receives None for the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import random
from ldm_jax.diffusion.guidance import Denoise
from ldm_jax.diffusion.schedule import Schedule
from ldm_jax.errors import UserError
from ldm_jax.types import Array

Table = dict[str, np.ndarray]


class Sampler(NamedTuple):
    """The three functions of a sampler, as the module's docstring describes them."""

    table: Callable[[Schedule, np.ndarray, float], Table]
    init: Callable[[Array], tuple]
    step: Callable[[Denoise, tuple, dict[str, Array], Array | None], tuple]


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


SPACINGS = {"leading": leading_steps, "uniform": uniform_steps, "quad": quad_steps}


def ddim_table(schedule: Schedule, t: np.ndarray, eta: float) -> Table:
    """Coefficients of DDIM (Song et al. 2021, eqs. 12 and 16), from large t to small.

    The last step ends at alpha_bar[0], not at 1, as in the original code.
    """
    alpha_bar = schedule.alpha_bar[t]
    previous = np.append(schedule.alpha_bar[0], alpha_bar[:-1])
    noise = eta * np.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
    columns = {"x0": np.sqrt(previous), "eps": np.sqrt(1 - previous - noise**2)}
    if eta > 0:
        columns["noise"] = noise
    table = {name: column[::-1].astype(np.float32) for name, column in columns.items()}
    return table | {"t": t[::-1].astype(np.int32)}


def ddim_step(denoise: Denoise, carry: tuple, row: dict, noise: Array | None) -> tuple:
    """One step of DDIM: carry (x_t (B, ...),), noise (B, ...) or None."""
    (x_t,) = carry
    prediction = denoise(x_t, jnp.full(x_t.shape[:1], row["t"]))
    x_t = row["x0"] * prediction.x0 + row["eps"] * prediction.eps
    return (x_t if noise is None else x_t + row["noise"] * noise,)


SAMPLERS = {"ddim": Sampler(ddim_table, lambda x_T: (x_T,), ddim_step)}


def make_table(
    name: str, schedule: Schedule, steps: int, eta: float = 0.0, spacing: str = "leading"
) -> Table:
    """Makes the table of a sampler: what `sample` runs through.

    Args:
        name: a key of SAMPLERS.
        schedule: the forward process with T time steps.
        steps: number of steps in [1, T].
        eta: in [0, 1]; 0 is deterministic, 1 has the variance of ancestral sampling.
        spacing: a key of SPACINGS.

    Raises:
        UserError: for an unknown name, a value outside its range, or a spacing that leaves [0, T).
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing '{spacing}': choose one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= schedule.steps:
        raise UserError(f"sampling steps must be in 1..{schedule.steps}, not {steps}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta must be in [0, 1], not {eta}")
    t = SPACINGS[spacing](schedule.steps, steps)
    if t.max() >= schedule.steps:
        raise UserError(
            f"spacing '{spacing}' with {steps} steps visits time step {t.max()}, but the last is "
            f"{schedule.steps - 1}: use spacing 'leading'"
        )
    return SAMPLERS[name].table(schedule, t, eta)


def initial_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """x_T (B, *shape) of the samples that own `keys` (B,)."""
    return random.normal(random.fold_in(keys, 0), shape)


def step_noise(keys: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
    """The noise (B, *shape) of step `index` of the samples that own `keys` (B,)."""
    return random.normal(random.fold_in(keys, index + 1), shape)  # 0 is the initial noise


def sample(
    denoise: Denoise,
    x_T: Array,
    keys: Array,
    table: Table,
    sampler: Sampler,
    noise: Array | None = None,
) -> Array:
    """Runs a sampler from x_T (B, ...) to the latents (B, ...), as one `lax.scan` over the table.

    Args:
        denoise: `(x_t, t) -> Prediction`.
        x_T: initial noise, usually `initial_noise(keys, shape)`.
        keys: (B,), one per sample; unused if the table has no 'noise'.
        table: of the same sampler, from `make_table`.
        sampler: an entry of SAMPLERS.
        noise: (N, B, ...) in the order of the steps, instead of draws from `keys`.
    """
    draws = "noise" in table and noise is None

    def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        index, row, given = xs
        if draws:
            given = step_noise(keys, index, x_T.shape[1:])
        return sampler.step(denoise, carry, row, given), None

    indices = jnp.arange(len(table["t"]))
    carry, _ = jax.lax.scan(body, sampler.init(x_T), (indices, table, noise))
    return carry[0]
