"""The update step of a first stage and its discriminator, a pure function of (state, frozen,
batch, key)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ldm_jax import builders, images, random
from ldm_jax.first_stage.discriminator import discriminator_loss, generator_loss
from ldm_jax.first_stage.losses import (
    adversarial_factor,
    output_loss,
    reconstruction_loss,
    regulariser,
)
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.training.optim import learning_rate, make_optimizer, shared_metrics
from ldm_jax.training.state import Batch, Init, Metrics, Step, TrainState
from ldm_jax.types import Array


def first_stage_functions(config: ConfigDict) -> tuple[Init, Step]:
    """Returns (init, step) that train the first stage, and its discriminator, on images.

    `frozen` is {'lpips': params} where there is a perceptual term, else {}. The discriminator
    learns from the reconstruction that the autoencoder was updated by, so that a step encodes and
    decodes once; the original code reconstructs anew after the first update.
    """
    module, discriminator = builders.build_first_stage(config), builders.build_discriminator(config)
    c, d = config.first_stage, config.first_stage.discriminator
    optimizer, rate = make_optimizer(c.train), learning_rate(c.train)

    def init(key: Array) -> TrainState:
        size = config.data.resolution
        example = jnp.zeros((1, size, size, 3))
        params = {"first_stage": module.init(key, example, random.example_keys(key, 1))["params"]}
        stats = {}
        if discriminator is not None:
            variables = discriminator.init(jax.random.fold_in(key, 1), example)
            params["discriminator"] = variables["params"]
            stats["discriminator"] = variables["batch_stats"]
        opt_state = {part: optimizer.init(tree) for part, tree in params.items()}
        return TrainState(jnp.int32(0), params, {}, opt_state, stats)

    def autoencode(params: Any, image: Array, keys: Array, dropout_key: Array):
        """-> (reconstruction, weighted term of the bottleneck), metrics."""
        reconstruction, aux = module.apply(
            {"params": params}, image, keys, train=True, rngs={"dropout": dropout_key}
        )
        weights = dict(kl_weight=c.kl_weight, codebook_weight=c.codebook_weight)
        term, metrics = regulariser(aux, kind=c.kind, **weights)
        return (reconstruction, term), metrics

    def likelihood(frozen: Any, image: Array, reconstruction: Array, log_variance: Array):
        perceptual = None
        if c.perceptual_weight > 0:
            perceptual = functools.partial(LPIPS().apply, {"params": frozen["lpips"]})
        return reconstruction_loss(
            reconstruction,
            image,
            kind=c.kind,
            loss=c.loss,
            perceptual=perceptual,
            perceptual_weight=c.perceptual_weight,
            log_variance=log_variance,
        )

    def judge(params: Any, stats: Any, image: Array) -> tuple[Array, Any]:
        """-> logits of the patches, and the running statistics after this batch."""
        variables = {"params": params, "batch_stats": stats}
        logits, updated = discriminator.apply(variables, image, True, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def step(
        state: TrainState, frozen: Any, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        image = images.to_float(batch["image"])
        step_key = jax.random.fold_in(key, state.step)
        keys = random.fold_in(random.example_keys(step_key, image.shape[0]), 0)
        dropout_key = jax.random.fold_in(step_key, image.shape[0])
        (reconstruction, term), pull, metrics = jax.vjp(
            lambda params: autoencode(params, image, keys, dropout_key),
            state.params["first_stage"],
            has_aux=True,
        )
        error = functools.partial(likelihood, frozen, image)
        grads, stats = {}, state.stats
        if discriminator is None:
            value, grad, more = _without_discriminator(error, reconstruction)
        else:
            factor = adversarial_factor(state.step, d.start, d.factor)
            fixed = state.params["discriminator"], state.stats["discriminator"]
            output = output_loss(
                reconstruction,
                jnp.float32(0.0),
                error,
                lambda generated: generator_loss(judge(*fixed, generated)[0]),
                lambda grad: pull((grad, jnp.zeros_like(term)))[0]["decoder"]["conv_out"]["kernel"],
                weight=d.weight,
                factor=factor,
            )
            value, grad, more = output.value, output.reconstruction_grad, output.metrics

            def discriminate(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
                real, after = judge(params, fixed[1], image)
                generated, after = judge(params, after, reconstruction)
                loss = discriminator_loss(real, generated, d.loss)
                seen = {"logits_real": real.mean(), "logits_generated": generated.mean()}
                return factor * loss, (after, seen | {"discriminator": loss})

            grads["discriminator"], (after, seen) = jax.grad(discriminate, has_aux=True)(fixed[0])
            stats, more = {"discriminator": after}, more | seen
            more["discriminator_grad_norm"] = optax.global_norm(grads["discriminator"])
        grads["first_stage"] = pull((grad, jnp.ones_like(term)))[0]

        params, opt_state = {}, {}
        for part, tree in state.params.items():
            updates, opt_state[part] = optimizer.update(grads[part], state.opt_state[part], tree)
            params[part] = optax.apply_updates(tree, updates)
        new = TrainState(state.step + 1, params, state.ema_params, opt_state, stats)
        shared = shared_metrics(rate, state.step, grads["first_stage"])
        return new, {"loss": value + term, **metrics, **more, **shared}

    return init, step


def _without_discriminator(error: Any, reconstruction: Array) -> tuple[Array, Array, Metrics]:
    """The mean error, its gradient with respect to the reconstruction, and metrics."""

    def mean(reconstruction: Array) -> tuple[Array, Metrics]:
        per_example, metrics = error(reconstruction, jnp.float32(0.0))
        return per_example.mean(), metrics

    (value, metrics), grad = jax.value_and_grad(mean, has_aux=True)(reconstruction)
    return value, grad, metrics
