"""Classifier-free guidance (Ho & Salimans 2022): dropped conditions and guided denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import random
from ldm_jax.diffusion.parameterization import (
    check_parameterization,
    network_input,
    to_prediction,
)
from ldm_jax.diffusion.schedule import Level
from ldm_jax.errors import UserError
from ldm_jax.types import Array, Condition, Prediction

Apply = Callable[[Array, Array, Condition | None], Array]  # (x_t, t, cond) -> raw
Denoise = Callable[[Array, Level], Prediction]  # (x_t, level) -> x0 and eps


class Guidance(NamedTuple):
    """How two predictions are combined; what is None is off, and compiled away.

    Attributes:
        scale: 1 is off, 0 is unconditional, more than 1 extrapolates.
        rescale: share in [0, 1] by which the guided output gets the standard deviation that the
            conditional one has in each image (Lin et al. 2024, eqs. 15 and 16).
        interval: (lowest, highest) t at which there is guidance (Kynkaanniemi et al. 2024);
            elsewhere the conditional prediction is made alone, at half the cost.
    """

    scale: float | Array = 1.0
    rescale: float | Array | None = None
    interval: tuple[float | Array, float | Array] | None = None


def make_denoise(
    apply: Apply,
    predict: str,
    cond: Condition | None = None,
    null: Condition | None = None,
    guidance: float | Array | Guidance = 1.0,
    clip_x0: bool = False,
    sigma_data: float = 1.0,
    two_calls: bool = False,
) -> Denoise:
    """Makes `denoise(x_t (B, ...), level) -> Prediction` out of a network and its condition.

    A guided call is one call of twice the batch, unconditional half first, combined as
    `uncond + scale * (cond - uncond)`. The unconditional half is skipped when either condition is
    None or empty, or the scale is the Python number 1. So pass the scale as a traced scalar to
    change it without compiling anew, and `null=None` to switch guidance off.

    Args:
        apply: `(x_t, t, cond) -> raw`, the network with its parameters; t (B,) is float32 and not
            always whole, as some samplers visit noise levels between those of training.
        predict: one of PARAMETERIZATIONS, what raw stands for.
        cond: the condition, with leading axis B; None if the network takes none.
        null: the empty condition, with the same slots and shapes as `cond`.
        guidance: a `Guidance`, or its scale.
        clip_x0: keep x0 within [-1, 1], with eps to match: for pixels, never for latents.
        sigma_data: standard deviation of x0, of the parameterization 'edm'.
        two_calls: guide by two calls in turn, in the memory of one.

    Raises:
        UserError: for an unknown parameterization, or a scale that needs a null condition.
    """
    check_parameterization(predict, sigma_data)
    can_guide = bool(jax.tree.leaves(cond) and jax.tree.leaves(null))
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    scale = guidance.scale
    static_scale = isinstance(scale, int | float)
    if static_scale and scale != 1 and not can_guide:
        raise UserError(
            f"guidance_scale {scale} needs a model trained with a null condition; use 1"
        )
    guided = can_guide and not (static_scale and scale == 1)

    def both_outputs(x_t: Array, t: Array) -> tuple[Array, Array]:
        if two_calls:
            uncond_out = apply(x_t, t, null)
            # Together they would need the memory of the doubled batch after all.
            x_t, uncond_out = jax.lax.optimization_barrier((x_t, uncond_out))
            return uncond_out, apply(x_t, t, cond)
        both = jax.tree.map(lambda *halves: jnp.concatenate(halves), null, cond)
        out = apply(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        uncond_out, cond_out = jnp.split(out, 2)
        return uncond_out, cond_out

    def guided_output(x_t: Array, t: Array) -> Array:
        uncond_out, cond_out = both_outputs(x_t, t)
        out = uncond_out + scale * (cond_out - uncond_out)
        return out if guidance.rescale is None else rescaled(out, cond_out, guidance.rescale)

    def raw_output(x_t: Array, t: Array, clock: Array) -> Array:
        if not guided:
            return apply(x_t, t, cond)
        if guidance.interval is None:
            return guided_output(x_t, t)
        lowest, highest = guidance.interval
        inside = (lowest <= clock) & (clock <= highest)
        return jax.lax.cond(inside, guided_output, lambda x_t, t: apply(x_t, t, cond), x_t, t)

    def denoise(x_t: Array, level: Level) -> Prediction:
        # eps and x0 are affine in raw at a given x_t, so guiding raw guides both alike.
        seen = network_input(x_t, level, predict, sigma_data)
        raw = raw_output(seen, jnp.broadcast_to(level.t, x_t.shape[:1]), level.t)
        prediction = to_prediction(raw, x_t, level, predict, sigma_data)
        if clip_x0:
            return to_prediction(jnp.clip(prediction.x0, -1, 1), x_t, level, "x0")
        return prediction

    return denoise


def rescaled(guided: Array, cond_out: Array, share: float | Array) -> Array:
    """Gives outputs (B, ...) the spread of `cond_out`, image by image, by a share of 0 to 1."""
    axes = tuple(range(1, guided.ndim))
    ratio = cond_out.std(axes, keepdims=True) / (guided.std(axes, keepdims=True) + 1e-8)
    return guided * (share * ratio + 1 - share)


def drop(cond: Condition, null: Condition, keys: Array, rate: float) -> Condition:
    """Replaces every slot of an example by the null condition with probability `rate`.

    `cond` and `null` have the same slots with leading axis B; keys (B,); rate in [0, 1].
    """
    dropped = random.bernoulli(keys, rate)

    def choose(value: Array, empty: Array) -> Array:
        return jnp.where(dropped.reshape((-1,) + (1,) * (value.ndim - 1)), empty, value)

    return jax.tree.map(choose, cond, null)
