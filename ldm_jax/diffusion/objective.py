"""The training loss of the denoiser, one value per example."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from ldm_jax import random
from ldm_jax.diffusion.parameterization import check_parameterization, regression_target
from ldm_jax.diffusion.schedule import Schedule, at, vlb_weights
from ldm_jax.errors import UserError
from ldm_jax.types import Array

Predict = Callable[[Array, Array], Array]  # (x_t, t) -> raw network output
LossAt = Callable[[Predict, Array, Array, Array], tuple[Array, dict[str, Array]]]
Objective = Callable[[Predict, Array, Array], tuple[Array, dict[str, Array]]]

ERRORS = {"l2": jnp.square, "l1": jnp.abs}


def make_loss(
    schedule: Schedule,
    predict: str = "eps",
    loss: str = "l2",
    vlb_weight: float = 0.0,
    log_variance: float | Array = 0.0,
) -> LossAt:
    """Makes `loss_at(network, z, t, noise) -> (per_example (B,), aux)`, without any randomness.

    With e the mean error of an example's latents, the loss is
    `e / exp(log_variance) + log_variance + vlb_weight * w_t * e`. `aux` holds (B,) arrays: 't',
    'loss_simple' (e), if vlb_weight > 0 'loss_vlb' (w_t e), and if there is a log-variance per t
    'log_variance' and 'loss_gamma', the loss without the bound's term.

    Args:
        schedule: the forward process.
        predict: 'eps', 'x0' or 'v', what the network's output is compared with.
        loss: 'l2' (squared error) or 'l1'.
        vlb_weight: >= 0, weight of the variational-bound term.
        log_variance: of the original code's likelihood weighting: a constant, or one value per t
            (T,), which may be a parameter that is learned: then call this inside the loss.

    Raises:
        UserError: for an unknown name or a negative weight.
    """
    check_parameterization(predict)
    if loss not in ERRORS:
        raise UserError(f"unknown loss '{loss}': choose one of {', '.join(ERRORS)}")
    if vlb_weight < 0:
        raise UserError(f"vlb_weight must be >= 0, but is {vlb_weight}")
    weights = vlb_weights(schedule, predict).astype("float32") if vlb_weight > 0 else None

    def loss_at(network: Predict, z: Array, t: Array, noise: Array):
        z = z.astype(jnp.float32)
        level = schedule.level(t, z.ndim)
        raw = network(level.noised(z, noise), t).astype(jnp.float32)
        error = ERRORS[loss](raw - regression_target(z, noise, level, predict))
        simple = error.mean(axis=tuple(range(1, z.ndim)))
        aux = {"t": t, "loss_simple": simple}
        at_t = at(log_variance, t, 1) if jnp.ndim(log_variance) else log_variance
        per_example = simple / jnp.exp(at_t) + at_t
        if jnp.ndim(log_variance):
            aux |= {"log_variance": at_t, "loss_gamma": per_example}
        if weights is not None:
            aux["loss_vlb"] = at(weights, t, 1) * simple
            per_example = per_example + vlb_weight * aux["loss_vlb"]
        return per_example, aux

    return loss_at


def make_objective(
    schedule: Schedule,
    predict: str = "eps",
    loss: str = "l2",
    vlb_weight: float = 0.0,
    log_variance: float | Array = 0.0,
) -> Objective:
    """Makes `objective(network, z, keys) -> (per_example (B,), aux)`; arguments as in `make_loss`.

    Each example draws its own t, uniform in [0, T), and its own noise from its key in `keys` (B,).
    """
    loss_at = make_loss(schedule, predict, loss, vlb_weight, log_variance)

    def objective(network: Predict, z: Array, keys: Array):
        t = random.randint(random.fold_in(keys, 0), 0, schedule.steps)
        noise = random.normal(random.fold_in(keys, 1), z.shape[1:])
        return loss_at(network, z, t, noise)

    return objective


def quartile_means(per_example: Array, t: Array, steps: int) -> dict[str, Array]:
    """Means of per_example (B,) over each quarter of the time range [0, steps), as 'q0' to 'q3'.

    t (B,) int. 'q0' holds the least noise. A quarter without any example has the mean NaN.
    """
    quarter = 4 * t // steps
    means = {}
    for q in range(4):
        inside = quarter == q
        means[f"q{q}"] = jnp.where(inside, per_example, 0).sum() / inside.sum()
    return means
