"""Moving averages of the weights: the original code's, and power-function profiles beside it.

A profile says how much the weights of each past update count. That of width `std` after t updates
is proportional to tau**gamma for 0 < tau <= t, where `std` is the standard deviation of tau over t:
it grows along with the run. (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1 and appendix C.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.checks import WIDEST_STD
from ldm_jax.errors import UserError
from ldm_jax.types import Array


def ema_decay(n: int | Array, decay: float) -> Array:
    """Decay of update number n, counted from 1: min(decay, (1 + n) / (10 + n))."""
    return jnp.minimum(decay, (1 + n) / (10 + n))


def ema_update(ema: Any, params: Any, n: int | Array | None, decay: float) -> Any:
    """Moves every array of `ema` towards `params`, a tree of the same structure.

    n: the number of updates including this one, or None for a constant decay without warm-up.
    """
    return _move(ema, params, 1 - (decay if n is None else ema_decay(n, decay)))


def _move(ema: Any, params: Any, rate: float | Array) -> Any:
    return jax.tree.map(lambda old, new: old - rate * (old - new), ema, params)


def exponent(std: float) -> float:
    """The gamma >= 0 of a power-function profile of a relative width.

    It is the positive root of std**2 (gamma + 2)**2 (gamma + 3) = gamma + 1.

    Raises:
        UserError: no such profile has this width.
    """
    if not 0 < std < WIDEST_STD:
        raise UserError(f"std is {std}, but must lie between 0 and {WIDEST_STD:.4f} (12**-0.5)")
    a = std**-2
    # The product of the roots is positive and their sum negative: only one has a positive part.
    return max(0.0, float(np.roots([1, 7, 16 - a, 12 - a]).real.max()))


def power_rate(n: int | Array, std: float) -> Array:
    """Share that update number n, counted from 1, has in its average: () float32.

    It is 1 - (1 - 1/n)**(gamma + 1), so that update tau of t weighs
    (tau**(gamma + 1) - (tau - 1)**(gamma + 1)) / t**(gamma + 1). The first one replaces the initial
    weights.
    """
    # Both are small after many updates: 1 - x would lose their digits in float32.
    return -jnp.expm1((exponent(std) + 1) * jnp.log1p(-1 / jnp.asarray(n, jnp.float32)))


class Profile(NamedTuple):
    """How past updates are weighed.

    Attributes:
        kind: std (a power function) | decay (constant after the warm-up of `ema_decay`).
        value: the relative width, or the decay.
    """

    kind: str
    value: float

    @property
    def name(self) -> str:
        """Names it in states and files, such as 'std_0.05'."""
        return f"{self.kind}_{self.value}"

    def update(self, ema: Any, params: Any, n: int | Array) -> Any:
        """Moves `ema` towards `params` in update number n, counted from 1."""
        if self.kind == "std":
            return _move(ema, params, power_rate(n, self.value))
        return ema_update(ema, params, n, self.value)


def profiles(config: ConfigDict) -> tuple[Profile, ...]:
    """The averages that a run keeps besides the one of `config.ema_decay`."""
    c = config.ema_snapshots
    return tuple(Profile("std", value) for value in c.stds) + tuple(
        Profile("decay", value) for value in c.decays
    )


def averaged_parts(params: dict[str, Any], frozen: tuple[str, ...]) -> dict[str, Any]:
    """The weights that profiles average: the denoiser, and what is trained of the conditioner.

    `frozen` names the parts of the conditioner that are not. Unlike the original code's average,
    which pairs the averaged denoiser with the newest conditioner, one of a profile is a whole model
    of the same time.
    """
    trained = {name: part for name, part in params["conditioner"].items() if name not in frozen}
    return {"denoiser": params["denoiser"], "conditioner": trained}


def subtree(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Those leaves of a nested dict whose names `like` has too."""
    return {
        name: subtree(tree[name], part) if isinstance(part, dict) else tree[name]
        for name, part in like.items()
    }
