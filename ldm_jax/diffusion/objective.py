"""The training loss of the denoiser, one value per example."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from ldm_jax import random
from ldm_jax.diffusion.parameterization import (
    check_parameterization,
    network_input,
    regression_target,
)
from ldm_jax.diffusion.schedule import Process, at, vlb_weights
from ldm_jax.diffusion.times import UNIFORM, Times, check_times, draw_times
from ldm_jax.diffusion.weighting import SIMPLE, Weighting, check_weighting, weight
from ldm_jax.errors import UserError
from ldm_jax.types import Array

Predict = Callable[[Array, Array], Array]  # (network input, t) -> raw network output
LossAt = Callable[[Predict, Array, Array, Array], tuple[Array, dict[str, Array]]]
Objective = Callable[[Predict, Array, Array], tuple[Array, dict[str, Array]]]

LOSSES = ("l2", "l1", "huber")
WAVES = 32  # of a log-variance in continuous time


def make_loss(
    process: Process,
    predict: str = "eps",
    loss: str = "l2",
    vlb_weight: float = 0.0,
    log_variance: float | Array = 0.0,
    weighting: Weighting = SIMPLE,
    sigma_data: float = 1.0,
    huber_delta: float = 1.0,
) -> LossAt:
    """Makes `loss_at(network, z, t, noise) -> (per_example (B,), aux)`, without any randomness.

    With e the mean error of an example's latents and w its weight, the loss is
    `w e / exp(log_variance) + log_variance + vlb_weight * w_t * e`. `aux` holds (B,) arrays: 't',
    'loss_simple' (e), if vlb_weight > 0 'loss_vlb' (w_t e), and if there is a log-variance per t
    'log_variance' and 'loss_gamma', the loss without the bound's term.

    Args:
        process: the forward process.
        predict: one of PARAMETERIZATIONS, what the network's output is compared with.
        loss: 'l2' (squared error), 'l1', or 'huber': 2 delta (sqrt(e^2 + delta^2) - delta), which
            is the squared error where that is small and rises linearly where it is large.
        vlb_weight: >= 0, weight of the original code's term of the variational bound.
        log_variance: a constant, or what `log_variance_at` takes, which may be a parameter that is
            learned (the original code's likelihood weighting; Karras et al. 2024, eq. 14): then
            call this inside the loss.
        weighting: of the errors.
        sigma_data: standard deviation of the latents, for the parameterization and weighting 'edm'.
        huber_delta: of 'huber', above 0.

    Raises:
        UserError: for an unknown name or a number outside its range.
    """
    check_parameterization(predict, sigma_data)
    check_weighting(weighting)
    if loss not in LOSSES:
        raise UserError(f"unknown loss '{loss}': choose one of {', '.join(LOSSES)}")
    if not huber_delta > 0:
        raise UserError(f"huber_delta must be above 0, not {huber_delta}")
    if vlb_weight < 0:
        raise UserError(f"vlb_weight must be >= 0, but is {vlb_weight}")
    if vlb_weight > 0 and not (process.discrete and predict in ("eps", "x0", "v")):
        raise UserError(
            "vlb_weight is for eps, x0 and v of a discrete schedule: use the weighting 'vlb'"
        )
    bound = vlb_weights(process, predict).astype("float32") if vlb_weight > 0 else None

    def loss_at(network: Predict, z: Array, t: Array, noise: Array):
        z = z.astype(jnp.float32)
        level = process.level(t, z.ndim)
        x_t = level.noised(z, noise)
        raw = network(network_input(x_t, level, predict, sigma_data), t).astype(jnp.float32)
        difference = raw - regression_target(z, noise, level, predict, sigma_data)
        error = _error(difference, loss, huber_delta)
        simple = error.mean(axis=tuple(range(1, z.ndim)))
        aux = {"t": t, "loss_simple": simple}
        learned = jnp.ndim(log_variance) > 0
        at_t = log_variance_at(log_variance, process, t) if learned else log_variance
        weighted = weight(weighting, process, level, predict, sigma_data) * simple
        per_example = weighted / jnp.exp(at_t) + at_t
        if learned:
            aux |= {"log_variance": at_t, "loss_gamma": per_example}
        if bound is not None:
            aux["loss_vlb"] = at(bound, t, 1) * simple
            per_example = per_example + vlb_weight * aux["loss_vlb"]
        return per_example, aux

    return loss_at


def make_objective(process: Process, loss_at: LossAt, times: Times = UNIFORM) -> Objective:
    """Makes `objective(network, z, keys) -> (per_example (B,), aux)` out of a loss.

    Each example draws its own t and its own noise from its key in `keys` (B,). Raises UserError for
    times that the process has not.
    """
    check_times(times, process)

    def objective(network: Predict, z: Array, keys: Array):
        t = draw_times(random.fold_in(keys, 0), process, times)
        noise = random.normal(random.fold_in(keys, 1), z.shape[1:])
        return loss_at(network, z, t, noise)

    return objective


def log_variance_size(process: Process) -> int:
    """How many numbers a learned log-variance has."""
    return process.steps if process.discrete else WAVES


def log_variance_at(values: Array, process: Process, t: Array) -> Array:
    """The log-variance (B,) of the network's errors at t (B,), of learned numbers `values`.

    They are one per t of a discrete process, and the weights of cosines over the clock of others.
    """
    if process.discrete:
        return at(values, t, 1)
    waves = jnp.arange(values.shape[0], dtype=jnp.float32)
    return jnp.cos(jnp.pi * jnp.outer(t / process.steps, waves)) @ values


def quartile_means(per_example: Array, t: Array, steps: int) -> dict[str, Array]:
    """Means of per_example (B,) over each quarter of the time range, as 'q0' to 'q3'.

    t (B,) is int in [0, steps) or float in [0, steps]. 'q0' holds the least noise. A quarter
    without any example has the mean NaN.
    """
    quarter = jnp.minimum(4 * t // steps, 3)
    means = {}
    for q in range(4):
        inside = quarter == q
        means[f"q{q}"] = jnp.where(inside, per_example, 0).sum() / inside.sum()
    return means


def _error(difference: Array, loss: str, huber_delta: float) -> Array:
    """The error of each number, of the shape of `difference`."""
    if loss == "l2":
        return jnp.square(difference)
    if loss == "l1":
        return jnp.abs(difference)
    # The usual difference of a root and delta would cancel where errors are small.
    squared = jnp.square(difference)
    return 2 * huber_delta * squared / (jnp.sqrt(squared + huber_delta**2) + huber_delta)
