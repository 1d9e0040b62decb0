"""Forward processes in continuous time: rectified flow, and log-SNR as the clock.

Their clock runs to T like that of a discrete schedule, so that the time embedding of a network
resolves it as well. See `schedule.Process` for what their methods stand for.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.schedule import Level
from ldm_jax.errors import UserError
from ldm_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Flow:
    """Straight paths from latents to noise (Liu et al. 2023; Lipman et al. 2023).

    With u = t / T in (0, 1], alpha = 1 - u and sigma = u: it ends in pure noise.

    Attributes:
        steps: T, what the network is told at pure noise.
    """

    steps: int = 1000
    discrete = False

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    @property
    def first(self) -> float:
        """The t of the least noise that grids visit: 1 of T; there is none at 0 itself."""
        return 1.0

    @property
    def last(self) -> float:
        """The t of pure noise."""
        return float(self.steps)

    def level(self, t: Array, ndim: int) -> Level:
        """The noise levels of t (B,) float in (0, T], for x_t of rank `ndim`."""
        u = _append_axes(t / self.steps, ndim)
        return Level(t, 1 - u, u)

    def marginal(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma (N,) float64 of t (N,)."""
        u = np.asarray(t, np.float64) / self.steps
        return 1 - u, u

    def time_of(self, log_ratio: np.ndarray | Array) -> np.ndarray | Array:
        """t (N,) of log sigma / alpha (N,)."""
        return self.steps / (1 + math.e**-log_ratio)

    def snr_fall(self, t: Array) -> Array:
        """-d(alpha^2 / sigma^2) / du of t (B,) -> (B,)."""
        u = t / self.steps
        return 2 * (1 - u) / u**3


@dataclasses.dataclass(frozen=True)
class LogSNR:
    """Levels that preserve the variance, with time linear in the log of the signal-to-noise ratio.

    It is the process of Karras et al. 2022 in another scale: their sigma is sigma / alpha here.

    Attributes:
        ends: sigma / alpha at t = 0 and at t = T.
        steps: T.
    """

    ends: tuple[float, float] = (0.002, 80.0)
    steps: int = 1000
    discrete = False

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not 0 < self.ends[0] < self.ends[1] < math.inf:
            raise UserError(f"the ends of sigma / alpha must be 0 < first < last, not {self.ends}")

    @property
    def first(self) -> float:
        """The t of the least noise."""
        return 0.0

    @property
    def last(self) -> float:
        """The t of the most noise."""
        return float(self.steps)

    @property
    def _span(self) -> float:
        return math.log(self.ends[1] / self.ends[0])

    def level(self, t: Array, ndim: int) -> Level:
        """The noise levels of t (B,) float in [0, T], for x_t of rank `ndim`."""
        ratio = _append_axes(self.ends[0] * jnp.exp(self._span * t / self.steps), ndim)
        alpha = 1 / jnp.sqrt(1 + ratio**2)
        return Level(t, alpha, ratio * alpha)

    def marginal(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma (N,) float64 of t (N,)."""
        ratio = self.ends[0] * np.exp(self._span * np.asarray(t, np.float64) / self.steps)
        alpha = 1 / np.hypot(1, ratio)
        return alpha, ratio * alpha

    def time_of(self, log_ratio: np.ndarray | Array) -> np.ndarray | Array:
        """t (N,) of log sigma / alpha (N,)."""
        return self.steps * (log_ratio - math.log(self.ends[0])) / self._span

    def snr_fall(self, t: Array) -> Array:
        """-d(alpha^2 / sigma^2) / du of t (B,) -> (B,), where u = t / T."""
        return 2 * self._span * jnp.exp(-2 * self._span * t / self.steps) / self.ends[0] ** 2


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise UserError(f"the clock of a process must have at least 2 steps, not {steps}")


def _append_axes(values: Array, ndim: int) -> Array:
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))
