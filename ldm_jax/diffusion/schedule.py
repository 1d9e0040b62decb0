"""The forward process x_t = alpha_t x0 + sigma_t eps, and its schedules in discrete time.

Everything is built in NumPy float64 (float64 is silently float32 in JAX) and rounded once.
The schedules of continuous time are in `continuous`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.types import Array


def _cosine(start: float, end: float, steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17; has no use for `start` and `end`."""
    offset = 0.008
    phase = (np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2
    alpha_bar = np.cos(phase) ** 2
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)


# The original LDM code calls scaled_linear "linear", and linear "sqrt_linear".
BETAS = {
    "scaled_linear": lambda start, end, steps: np.linspace(start**0.5, end**0.5, steps) ** 2,
    "linear": lambda start, end, steps: np.linspace(start, end, steps),
    "sqrt": lambda start, end, steps: np.linspace(start, end, steps) ** 0.5,
    "cosine": _cosine,
}


class Level(NamedTuple):
    """A noise level, one for all of a batch or one per example.

    Attributes:
        t: () or (B,) time that the network is told, in [first, last] of the process.
        alpha: factor of x0 in x_t; a scalar, or (B, 1, ..., 1).
        sigma: factor of eps in x_t, likewise.
    """

    t: Array
    alpha: Array
    sigma: Array

    def noised(self, x0: Array, eps: Array) -> Array:
        """x_t (B, ...) from x0 and eps (B, ...)."""
        return self.alpha * x0 + self.sigma * eps


class Process(Protocol):
    """What objectives, spacings and samplers know of a forward process.

    There is one clock, t, which is also what the network is told. The noise-to-signal ratio
    sigma / alpha rises with it, and may be infinite at its end.

    Attributes:
        discrete: whether only the whole t are levels of training.
        steps: T, which counts the levels of a discrete process, and is otherwise the length of the
            clock.
        first: the t of the least noise.
        last: the t of the most noise.
    """

    discrete: bool

    @property
    def steps(self) -> int: ...

    @property
    def first(self) -> float: ...

    @property
    def last(self) -> float: ...

    def level(self, t: Array, ndim: int) -> Level:
        """The noise levels of t (B,), for x_t of rank `ndim`, within jit."""

    def marginal(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma (N,) float64 of t (N,), between the levels of training, too."""

    def time_of(self, log_ratio: np.ndarray | Array) -> np.ndarray | Array:
        """The t (N,) that the network is told at a finite log sigma / alpha (N,), of its type."""

    def snr_fall(self, t: Array) -> Array:
        """By how much the signal-to-noise ratio falls at t (B,), per T of the clock."""


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The betas of a forward process and what follows from them; hashed by identity.

    Its times are the whole numbers 0 to T - 1, and its levels preserve the variance.

    Attributes:
        betas: (T,) float64, in (0, 1]; the last is 1 where the process ends in pure noise.
        alpha_bar: (T,) float64, cumulative products of 1 - betas.
    """

    betas: np.ndarray
    alpha_bar: np.ndarray
    discrete = True

    @property
    def steps(self) -> int:
        """T, the number of time steps; t lies in [0, T)."""
        return len(self.betas)

    @property
    def first(self) -> int:
        """The time step of the least noise."""
        return 0

    @property
    def last(self) -> int:
        """The time step of the most noise."""
        return self.steps - 1

    @functools.cached_property
    def ratio(self) -> np.ndarray:
        """(T,) float64 sigma / alpha; infinite where nothing is left of x0."""
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    @functools.cached_property
    def alpha(self) -> np.ndarray:
        """(T,) float32 factor of x0 in x_t."""
        return np.sqrt(self.alpha_bar).astype(np.float32)

    @functools.cached_property
    def sigma(self) -> np.ndarray:
        """(T,) float32 factor of eps in x_t."""
        return np.sqrt(1 - self.alpha_bar).astype(np.float32)

    def level(self, t: Array, ndim: int) -> Level:
        """The noise levels of t (B,) int, for x_t of rank `ndim`; NaN for a t outside [0, T)."""
        return Level(t, at(self.alpha, t, ndim), at(self.sigma, t, ndim))

    def marginal(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma (N,) float64 of t (N,) in [0, T - 1].

        Between time steps, sigma / alpha is interpolated linearly, as in diffusers; before a last
        step without signal, its reciprocal is.
        """
        t, whole = np.asarray(t), np.arange(self.steps)
        if t.dtype.kind == "i":
            return np.sqrt(self.alpha_bar[t]), np.sqrt(1 - self.alpha_bar[t])
        finite = np.isfinite(self.ratio)
        noise_to_signal = np.interp(t, whole[finite], self.ratio[finite])
        signal_to_noise = np.interp(t, whole, 1 / self.ratio)
        flipped = t > whole[finite][-1]
        x = np.where(flipped, signal_to_noise, noise_to_signal)
        below, above = 1 / np.hypot(1, x), x / np.hypot(1, x)  # of the fraction that x is
        return np.where(flipped, above, below), np.where(flipped, below, above)

    def time_of(self, log_ratio: np.ndarray) -> np.ndarray:
        """The time step (N,) float64 whose log sigma / alpha is nearest to `log_ratio` (N,)."""
        finite = np.isfinite(self.ratio)
        levels = np.log(self.ratio[finite])
        return np.interp(log_ratio, levels, np.arange(self.steps)[finite]).round()

    def snr_fall(self, t: Array) -> Array:
        """T times the fall of alpha^2 / sigma^2 from t - 1 to t (B,) int -> (B,).

        Entry 0, which is infinite, copies entry 1, as in the original code's weights of the bound.
        """
        snr = self.alpha_bar / (1 - self.alpha_bar)
        fall = self.steps * (np.append(snr[:1], snr[:-1]) - snr)
        fall[0] = fall[min(1, self.last)]
        return at(fall.astype(np.float32), t, 1)

    def add_noise(self, x0: Array, eps: Array, t: Array) -> Array:
        """Draws x_t given x0 by eq. 4 of DDPM: x0, eps (B, ...), t (B,) int -> (B, ...)."""
        return self.level(t, x0.ndim).noised(x0, eps)


def make_schedule(
    kind: str = "scaled_linear",
    beta: tuple[float, float] = (0.0015, 0.0195),
    steps: int = 1000,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Builds a schedule from its name, the ends of the beta range and the number of time steps.

    'cosine' ignores `beta`. `zero_terminal_snr` makes the last time step pure noise.

    Raises:
        UserError: an unknown kind, or values outside their range.
    """
    if kind not in BETAS:
        raise UserError(f"unknown noise schedule '{kind}': choose one of {', '.join(BETAS)}")
    start, end = beta
    if not 0 < start <= end < 1:
        raise UserError(f"beta must satisfy 0 < start <= end < 1, but is ({start}, {end})")
    if steps < 1:
        raise UserError(f"a noise schedule needs at least 1 time step, not {steps}")
    betas = BETAS[kind](start, end, steps)
    alpha_bar = np.cumprod(1 - betas)
    return _end_in_noise(alpha_bar) if zero_terminal_snr else Schedule(betas, alpha_bar)


def _end_in_noise(alpha_bar: np.ndarray) -> Schedule:
    """Shifts and scales alpha so that it ends at 0 and starts where it did (Lin et al. 2024, 1)."""
    if len(alpha_bar) < 2:
        raise UserError("zero_terminal_snr needs at least 2 time steps")
    alpha = np.sqrt(alpha_bar)
    rescaled = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
    rescaled[0] = alpha_bar[0]
    return Schedule(1 - rescaled / np.append(1.0, rescaled[:-1]), rescaled)


def at(values: np.ndarray, t: Array, ndim: int) -> Array:
    """Looks values (T,) up at t (B,) int and appends axes: (B, 1, ..., 1) of rank `ndim`.

    A t outside [0, T) gives NaN: JAX would otherwise clamp it silently.
    """
    found = (
        jnp.asarray(values).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )
    return found.reshape(found.shape + (1,) * (ndim - found.ndim))


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x0) as (T,) float64 arrays, eqs. 6 and 7 of DDPM.

    The mean is `mean_x0 * x0 + mean_x_t * x_t`. The variance at t=0 is 0 unless beta is mixed in.
    """

    mean_x0: np.ndarray
    mean_x_t: np.ndarray
    variance: np.ndarray


def posterior(schedule: Schedule, variance_mix: float = 0.0) -> Posterior:
    """Coefficients of one ancestral step; `variance_mix` in [0, 1] blends in beta as variance."""
    betas, alpha_bar = schedule.betas, schedule.alpha_bar
    previous = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - previous) / (1 - alpha_bar)
    return Posterior(
        mean_x0=betas * np.sqrt(previous) / (1 - alpha_bar),
        mean_x_t=(1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
        variance=(1 - variance_mix) * variance + variance_mix * betas,
    )


def vlb_weights(schedule: Schedule, predict: str, variance_mix: float = 0.0) -> np.ndarray:
    """Weights (T,) float64 that turn a squared error of eps, x0 or v into a term of the bound.

    For eps this is eq. 12 of DDPM, and for v what follows from it; for x0 it is the expression of
    the original LDM code, which is not the exact bound. Entry 0, infinite for eps, copies entry 1.
    """
    betas, alpha_bar = schedule.betas, schedule.alpha_bar
    if predict == "x0":
        weights = 0.5 * np.sqrt(alpha_bar) / (2 - alpha_bar)
    else:
        variance = posterior(schedule, variance_mix).variance
        # An error of eps is alpha times that of v, and alpha_bar / (1 - beta) is that of t - 1.
        kept = np.append(1.0, alpha_bar[:-1]) if predict == "v" else 1 / (1 - betas)
        with np.errstate(divide="ignore"):
            weights = kept * betas**2 / (2 * variance * (1 - alpha_bar))
    weights[0] = weights[min(1, schedule.steps - 1)]
    return weights
