"""Classifier-free guidance (Ho & Salimans 2022): dropped conditions and guided denoisers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldm_jax import random
from ldm_jax.diffusion.parameterization import check_parameterization, to_prediction
from ldm_jax.diffusion.schedule import Level
from ldm_jax.errors import UserError
from ldm_jax.types import Array, Condition, Prediction

Apply = Callable[[Array, Array, Condition | None], Array]  # (x_t, t, cond) -> raw
Denoise = Callable[[Array, Level], Prediction]  # (x_t, level) -> x0 and eps


def make_denoise(
    apply: Apply,
    predict: str,
    cond: Condition | None = None,
    null: Condition | None = None,
    guidance_scale: float | Array = 1.0,
    clip_x0: bool = False,
) -> Denoise:
    """Makes `denoise(x_t (B, ...), level) -> Prediction` out of a network and its condition.

    A guided call is one call of twice the batch, unconditional half first, combined as
    `uncond + scale * (cond - uncond)`. The unconditional half is skipped when either condition is
    None or empty, or the scale is the Python number 1. So pass the scale as a traced scalar to
    change it without compiling anew, and `null=None` to switch guidance off.

    Args:
        apply: `(x_t, t, cond) -> raw`, the network with its parameters; t (B,) is float32 and not
            always whole, as some samplers visit noise levels between those of training.
        predict: 'eps', 'x0' or 'v', what raw stands for.
        cond: the condition, with leading axis B; None if the network takes none.
        null: the empty condition, with the same slots and shapes as `cond`.
        guidance_scale: 1 is off, 0 is unconditional, more than 1 extrapolates.
        clip_x0: keep x0 within [-1, 1], with eps to match: for pixels, never for latents.

    Raises:
        UserError: for an unknown parameterization, or a scale that needs a null condition.
    """
    check_parameterization(predict)
    can_guide = bool(jax.tree.leaves(cond) and jax.tree.leaves(null))
    static_scale = isinstance(guidance_scale, int | float)
    if static_scale and guidance_scale != 1 and not can_guide:
        raise UserError(
            f"guidance_scale {guidance_scale} needs a model trained with a null condition; use 1"
        )
    guided = can_guide and not (static_scale and guidance_scale == 1)

    def raw_output(x_t: Array, t: Array) -> Array:
        if not guided:
            return apply(x_t, t, cond)
        both = jax.tree.map(lambda *halves: jnp.concatenate(halves), null, cond)
        out = apply(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        uncond_out, cond_out = jnp.split(out, 2)
        return uncond_out + guidance_scale * (cond_out - uncond_out)

    def denoise(x_t: Array, level: Level) -> Prediction:
        # eps and x0 are affine in raw at a given x_t, so guiding raw guides both alike.
        raw = raw_output(x_t, jnp.broadcast_to(level.t, x_t.shape[:1]))
        prediction = to_prediction(raw, x_t, level, predict)
        if clip_x0:
            return to_prediction(jnp.clip(prediction.x0, -1, 1), x_t, level, "x0")
        return prediction

    return denoise


def drop(cond: Condition, null: Condition, keys: Array, rate: float) -> Condition:
    """Replaces every slot of an example by the null condition with probability `rate`.

    `cond` and `null` have the same slots with leading axis B; keys (B,); rate in [0, 1].
    """
    dropped = random.bernoulli(keys, rate)

    def choose(value: Array, empty: Array) -> Array:
        return jnp.where(dropped.reshape((-1,) + (1,) * (value.ndim - 1)), empty, value)

    return jax.tree.map(choose, cond, null)
