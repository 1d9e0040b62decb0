"""At which times the denoiser is trained."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import random
from ldm_jax.diffusion.schedule import Process
from ldm_jax.errors import UserError
from ldm_jax.types import Array

TIMES = ("uniform", "logit_normal", "log_normal")
SMALLEST = 1e-5  # share of the clock; what a normal draw exceeds it by would be no noise at all


class Times(NamedTuple):
    """How the times of training are drawn, one per example.

    Attributes:
        kind: 'uniform' over the clock; 'logit_normal', where the logit of u = t / T is normal
            (Esser et al. 2024, eq. 19); 'log_normal', where log sigma / alpha is (Karras et al.
            2022, table 1). On a flow these two are the same.
        mean: of the normal distribution.
        std: of the normal distribution.
        shift: s of u' = s u / (1 + (s - 1) u), which moves the draws towards noise: above 1 for
            large images (Esser et al. 2024, eq. 23). On a flow it multiplies sigma / alpha by s.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0


UNIFORM = Times()


def check_times(times: Times, process: Process) -> None:
    """Raises UserError for an unknown kind, a number outside its range or a process without it."""
    if times.kind not in TIMES:
        raise UserError(f"unknown times '{times.kind}': choose one of {', '.join(TIMES)}")
    for name in ("std", "shift"):
        if not getattr(times, name) > 0:
            raise UserError(f"{name} of times must be above 0, not {getattr(times, name)}")
    if process.discrete and (times.kind != "uniform" or times.shift != 1):
        raise UserError(
            "the time steps of a discrete schedule are drawn uniformly: use times 'uniform' and "
            "shift 1, or a schedule in continuous time"
        )


def draw_times(keys: Array, process: Process, times: Times) -> Array:
    """The times t (B,) of the examples that own `keys` (B,): int32 of a discrete process."""
    if process.discrete:
        return random.randint(keys, 0, process.steps)
    if times.kind == "uniform":
        u = 1 - random.uniform(keys)  # with pure noise, without no noise
    else:
        normal = times.mean + times.std * random.normal(keys, ())
        if times.kind == "logit_normal":
            u = jax.nn.sigmoid(normal)
        else:
            u = process.time_of(normal) / process.steps
    u = jnp.clip(u, SMALLEST, 1.0)
    return process.steps * (times.shift * u / (1 + (times.shift - 1) * u))
