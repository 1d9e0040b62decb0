"""Guided denoisers: by dropped conditions, a weaker model, several conditions or a classifier.

Classifier-free guidance is that of Ho & Salimans 2022; the other kinds name their sources below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import random
from ldm_jax.diffusion.parameterization import (
    check_parameterization,
    network_input,
    regression_target,
    to_prediction,
)
from ldm_jax.diffusion.schedule import Level
from ldm_jax.errors import UserError
from ldm_jax.types import Array, Condition, Prediction

Apply = Callable[[Array, Array, Condition | None], Array]  # (x_t, t, cond) -> raw
Denoise = Callable[[Array, Level], Prediction]  # (x_t, level) -> x0 and eps


class Guidance(NamedTuple):
    """The numbers of guidance, which may be traced; what is None is off, and compiled away.

    Attributes:
        scale: 1 is off, 0 is unconditional, more than 1 extrapolates.
        rescale: share in [0, 1] by which the guided output gets the standard deviation that the
            conditional one has in each image (Lin et al. 2024, eqs. 15 and 16).
        interval: (lowest, highest) t at which there is guidance (Kynkaanniemi et al. 2024);
            elsewhere the conditional prediction is made alone, at the cost of one call.
        weights: one for each of `Guides.also`; below 0 leads away from it.
        classifier_scale: of `Guides.log_prob_grad`; 1 is Bayes' rule.
    """

    scale: float | Array = 1.0
    rescale: float | Array | None = None
    interval: tuple[float | Array, float | Array] | None = None
    weights: tuple[float | Array, ...] = ()
    classifier_scale: float | Array | None = None


class Guides(NamedTuple):
    """What steers besides the condition and the null one.

    Attributes:
        weak: `(x_t, t) -> raw` of a weaker model under the same condition, from which guidance
            leads away in place of the null condition (Karras et al. 2024, "Guiding a diffusion
            model with a bad version of itself", eq. 3). It needs no null condition, nor any.
        also: further conditions, which are composed with the first (Liu et al. 2022,
            "Compositional visual generation with composable diffusion models", eq. 11).
        log_prob_grad: `(x_t, level) -> (B, ...)`, the gradient of log p(y | x_t) by x_t
            (Dhariwal & Nichol 2021, algorithm 2).
    """

    weak: Callable[[Array, Array], Array] | None = None
    also: tuple[Condition, ...] = ()
    log_prob_grad: Callable[[Array, Level], Array] | None = None


def make_denoise(
    apply: Apply,
    predict: str,
    cond: Condition | None = None,
    null: Condition | None = None,
    guidance: float | Array | Guidance = 1.0,
    clip_x0: bool = False,
    sigma_data: float = 1.0,
    two_calls: bool = False,
    guides: Guides | None = None,
) -> Denoise:
    """Makes `denoise(x_t (B, ...), level) -> Prediction` out of a network and its condition.

    Raw outputs are combined as

        base + scale * (cond - base) + sum_j weight_j * (also_j - null)

    where base is the output under the null condition, or that of the weaker model; x0 and eps are
    affine in them at a given x_t. A classifier then takes classifier_scale * sigma * its gradient
    off eps, with x0 to match.

    The null condition, the condition and others are told to one call of so many times the batch,
    in this order; the weaker model has a call of its own. Nothing is guided away from the null
    condition when it or `cond` is None or empty, or the scale is the Python number 1. So pass the
    scale as a traced scalar to change it without compiling anew, and `null=None` to switch
    classifier-free guidance off.

    Args:
        apply: `(x_t, t, cond) -> raw`, the network with its parameters; t (B,) is float32 and not
            always whole, as some samplers visit noise levels between those of training.
        predict: one of PARAMETERIZATIONS, what raw stands for.
        cond: the condition, with leading axis B; None if the network takes none.
        null: the empty condition, with the same slots and shapes as `cond`.
        guidance: a `Guidance`, or its scale.
        clip_x0: keep x0 within [-1, 1], with eps to match: for pixels, never for latents.
        sigma_data: standard deviation of x0, of the parameterization 'edm'.
        two_calls: guide by calls in turn, in the memory of one.
        guides: what else steers; None is nothing.

    Raises:
        UserError: for an unknown parameterization, or a guidance without what it needs.
    """
    check_parameterization(predict, sigma_data)
    can_guide = bool(jax.tree.leaves(cond) and jax.tree.leaves(null))
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    guides = Guides() if guides is None else guides
    scale, weak = guidance.scale, guides.weak
    off = isinstance(scale, int | float) and scale == 1
    if isinstance(scale, int | float) and not off and not can_guide and weak is None:
        raise UserError(
            f"guidance_scale {scale} needs a model trained with a null condition; use 1"
        )
    if len(guides.also) != len(guidance.weights) or (guides.also and not can_guide):
        raise UserError("each further condition needs a weight, and all of them a null condition")
    if (guides.log_prob_grad is None) != (guidance.classifier_scale is None):
        raise UserError("a classifier and its scale go together")
    weak = None if off else weak
    needs_null = bool(guides.also) or (can_guide and weak is None and not off)
    guided = needs_null or weak is not None or guides.log_prob_grad is not None
    told = [*([null] if needs_null else []), cond, *guides.also]

    def outputs(x_t: Array, t: Array) -> list[Array]:
        """Those under each of `told`, and last the weaker model's."""
        last = [] if weak is None else [weak]
        if two_calls:
            return _in_turn([lambda x_t, t, c=c: apply(x_t, t, c) for c in told] + last, x_t, t)
        count = len(told)
        together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *told)
        out = apply(jnp.concatenate([x_t] * count), jnp.concatenate([t] * count), together)
        return [*jnp.split(out, count), *(call(x_t, t) for call in last)]

    def guided_output(x_t: Array, seen: Array, t: Array, level: Level) -> Array:
        outs = outputs(seen, t)
        null_out = outs.pop(0) if needs_null else None
        base = null_out if weak is None else outs.pop()
        cond_out, *others = outs
        out = cond_out if base is None else base + scale * (cond_out - base)
        for weight, other in zip(guidance.weights, others, strict=True):
            out = out + weight * (other - null_out)
        if guides.log_prob_grad is not None:
            if two_calls:
                x_t, out = jax.lax.optimization_barrier((x_t, out))
            gradient = guidance.classifier_scale * guides.log_prob_grad(x_t, level)
            out = out + _shift_by_classifier(gradient, level, predict, sigma_data)
        return out if guidance.rescale is None else rescaled(out, cond_out, guidance.rescale)

    def raw_output(x_t: Array, level: Level) -> Array:
        seen = network_input(x_t, level, predict, sigma_data)
        t = jnp.broadcast_to(level.t, x_t.shape[:1])
        if not guided:
            return apply(seen, t, cond)
        if guidance.interval is None:
            return guided_output(x_t, seen, t, level)
        lowest, highest = guidance.interval
        return jax.lax.cond(
            (lowest <= level.t) & (level.t <= highest),
            lambda: guided_output(x_t, seen, t, level),
            lambda: apply(seen, t, cond),
        )

    def denoise(x_t: Array, level: Level) -> Prediction:
        raw = raw_output(x_t, level)
        prediction = to_prediction(raw, x_t, level, predict, sigma_data)
        if clip_x0:
            return to_prediction(jnp.clip(prediction.x0, -1, 1), x_t, level, "x0")
        return prediction

    return denoise


def _in_turn(calls: list[Callable[[Array, Array], Array]], x_t: Array, t: Array) -> list[Array]:
    """What the calls return, of which none begins before the one before it has ended."""
    outs: list[Array] = []
    for call in calls:
        # Together they would need the memory of the larger batch after all.
        x_t, outs = jax.lax.optimization_barrier((x_t, outs))
        outs.append(call(x_t, t))
    return outs


def _shift_by_classifier(gradient: Array, level: Level, predict: str, sigma_data: float) -> Array:
    """By how much the raw output moves where a gradient (B, ...) of log p(y | x_t) is followed.

    eps moves by -sigma times the gradient, which is what that of log p(x_t) gains, and x0 by
    sigma^2 / alpha. At pure noise, alpha = 0, the exact gradient is 0, too: that of x0 has a limit,
    E[x0 | y] - E[x0], but 0 / 0 cannot be computed there, and the output stays as it is.
    """
    some = level.alpha > 0
    sigma = jnp.where(some, level.sigma, 0.0)
    per_x0 = sigma**2 / jnp.where(some, level.alpha, 1.0)
    # The raw output is linear in x0 and eps, so what it would be of their changes is its change.
    return regression_target(per_x0 * gradient, -sigma * gradient, level, predict, sigma_data)


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
