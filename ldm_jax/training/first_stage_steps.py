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
from ldm_jax.first_stage import codebook as codebook_lib
from ldm_jax.first_stage.discriminator import discriminator_loss, generator_loss, lecam_loss
from ldm_jax.first_stage.losses import (
    adversarial_factor,
    output_loss,
    reconstruction_loss,
    regulariser,
)
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.training import guard
from ldm_jax.training.ema import ema_decay, ema_update
from ldm_jax.training.optim import (
    ADAM_SHARE,
    learning_rate,
    make_optimizer,
    shared_metrics,
    without_decay,
)
from ldm_jax.training.state import Batch, Init, Metrics, Step, TrainState
from ldm_jax.types import Array

LECAM_DECAY = 0.99  # of the running means of the logits


def first_stage_functions(config: ConfigDict) -> tuple[Init, Step]:
    """Returns (init, step) that train the first stage, and its discriminator, on images.

    `frozen` is {'lpips': params} where there is a perceptual term, else {}. The discriminator
    learns from the reconstruction that the autoencoder was updated by, so that a step encodes and
    decodes once; the original code reconstructs anew after the first update.
    """
    module, discriminator = builders.build_first_stage(config), builders.build_discriminator(config)
    c, d = config.first_stage, config.first_stage.discriminator
    optimizer, rate = make_optimizer(c.train), learning_rate(c.train)
    optimizers = {"first_stage": optimizer}
    # A statistic of the errors, not a weight that should stay small.
    optimizers["observation"] = without_decay(optimizer, ["log_variance"])
    optimizers["discriminator"] = make_optimizer(_discriminator_block(config))

    def init(key: Array) -> TrainState:
        size = config.data.resolution
        example = jnp.zeros((1, size, size, 3))
        params = {"first_stage": module.init(key, example, random.example_keys(key, 1))["params"]}
        stats = {}
        if c.learn_log_variance:
            params["observation"] = {"log_variance": jnp.float32(0.0)}
        if discriminator is not None:
            variables = discriminator.init(jax.random.fold_in(key, 1), example)
            params["discriminator"] = variables["params"]
            stats["discriminator"] = variables["batch_stats"]
            if d.lecam > 0:
                stats["logits"] = {"real": jnp.float32(0.0), "generated": jnp.float32(0.0)}
        if c.kind == "vq":
            stats["codebook"] = codebook_lib.start_averages(params["first_stage"]["codebook"])
        opt_state = {part: optimizers[part].init(tree) for part, tree in params.items()}
        ema = {"first_stage": params["first_stage"]} if c.ema_decay > 0 else {}
        # Copies: the state is donated, and one buffer cannot be donated twice.
        stats, ema = jax.tree.map(jnp.copy, (stats, ema))
        return TrainState(jnp.int32(0), params, ema, opt_state, stats)

    def autoencode(params: Any, image: Array, keys: Array, dropout_key: Array):
        """-> (reconstruction, weighted term of the bottleneck), (metrics, aux)."""
        reconstruction, aux = module.apply(
            {"params": params}, image, keys, train=True, rngs={"dropout": dropout_key}
        )
        weights = dict(kl_weight=c.kl_weight, codebook_weight=c.codebook_weight)
        term, metrics = regulariser(aux, kind=c.kind, **weights)
        return (reconstruction, term), (metrics, aux)

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

    def discriminate(params: Any, stats: dict[str, Any], image: Array, generated: Array):
        """-> loss, (running statistics after this batch, metrics)."""
        real, after = judge(params, stats["discriminator"], image)
        generated, after = judge(params, after, generated)
        loss, after = discriminator_loss(real, generated, d.loss), {"discriminator": after}
        seen = {"logits_real": real.mean(), "logits_generated": generated.mean()}
        metrics = seen | {"discriminator": loss}
        if d.lecam > 0:
            metrics["lecam"] = lecam_loss(real, generated, stats["logits"])
            loss = loss + d.lecam * metrics["lecam"]
            now = {"real": seen["logits_real"], "generated": seen["logits_generated"]}
            after["logits"] = ema_update(stats["logits"], now, None, LECAM_DECAY)
        return loss, (after, metrics)

    def step(
        state: TrainState, frozen: Any, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        image = images.to_float(batch["image"])
        step_key = jax.random.fold_in(key, state.step)
        keys = random.fold_in(random.example_keys(step_key, image.shape[0]), 0)
        dropout_key = jax.random.fold_in(step_key, image.shape[0])
        (reconstruction, term), pull, (metrics, aux) = jax.vjp(
            lambda params: autoencode(params, image, keys, dropout_key),
            state.params["first_stage"],
            has_aux=True,
        )
        log_variance = jnp.float32(0.0)
        if c.learn_log_variance:
            log_variance = state.params["observation"]["log_variance"]
        error = functools.partial(likelihood, frozen, image)
        grads, seen_stats = {}, state.stats
        if discriminator is None:
            value, out_grads, more = _without_discriminator(error, reconstruction, log_variance)
        else:
            fixed = state.params["discriminator"], state.stats["discriminator"]
            output = output_loss(
                reconstruction,
                log_variance,
                error,
                lambda generated: generator_loss(judge(*fixed, generated)[0]),
                lambda grad: pull((grad, jnp.zeros_like(term)))[0]["decoder"]["conv_out"]["kernel"],
                weight=d.weight,
                factor=adversarial_factor(state.step, d.start + d.warmup, d.factor, d.ramp),
            )
            value, *out_grads, more = output
            grads["discriminator"], (after, seen) = jax.grad(discriminate, has_aux=True)(
                fixed[0], state.stats, image, reconstruction
            )
            learns = adversarial_factor(state.step, d.start, d.factor)
            grads["discriminator"] = jax.tree.map(lambda g: learns * g, grads["discriminator"])
            seen_stats, more = seen_stats | after, more | seen
            more["discriminator_grad_norm"] = optax.global_norm(grads["discriminator"])
        grads["first_stage"] = pull((out_grads[0], jnp.ones_like(term)))[0]
        if c.learn_log_variance:
            grads["observation"] = {"log_variance": out_grads[1]}
            more["log_variance"] = log_variance

        def update() -> TrainState:
            params, opt_state, stats = {}, {}, dict(seen_stats)
            for part, tree in state.params.items():
                updates, opt_state[part] = optimizers[part].update(
                    grads[part], state.opt_state[part], tree
                )
                params[part] = optax.apply_updates(tree, updates)
            if c.kind == "vq":
                reset_key = jax.random.fold_in(step_key, image.shape[0] + 1)
                codebook, stats["codebook"] = _tend(
                    c.codebook,
                    params["first_stage"]["codebook"],
                    stats["codebook"],
                    aux,
                    ema_decay(state.step + 1, c.codebook.decay),
                    reset_key,
                )
                params["first_stage"] = params["first_stage"] | {"codebook": codebook}
            ema = state.ema_params
            if c.ema_decay > 0:
                trained = {"first_stage": params["first_stage"]}
                ema = ema_update(ema, trained, state.step + 1, c.ema_decay)
                if c.kind == "vq" and (c.codebook.rule == "ema" or c.codebook.reset > 0):
                    # An average already; and one over a reset would lie nowhere.
                    ema = {"first_stage": ema["first_stage"] | {"codebook": codebook}}
            return TrainState(state.step + 1, params, ema, opt_state, stats)

        shared = shared_metrics(rate, state.step, grads["first_stage"])
        new, metrics = guard.checked_update(
            update, state, {"loss": value + term, **metrics, **more, **shared}
        )
        if c.kind == "vq":
            metrics["codes_alive"] = codebook_lib.share_alive(new.stats["codebook"])
        return new, metrics

    return init, step


def _discriminator_block(config: ConfigDict) -> ConfigDict:
    """How the discriminator is optimised: as the autoencoder, but always by AdamW.

    Muon's updates have the same size however small the gradient: they let it win at once.
    """
    block = config.first_stage.train.copy_and_resolve_references()
    share = ADAM_SHARE if block.optimizer == "muon" else 1.0
    block.update(lr=config.first_stage.discriminator.lr or share * block.lr, optimizer="adamw")
    return block


def trained_weights(state: TrainState) -> Any:
    """The first stage's weights that are kept: the averaged ones, if there are any."""
    return state.ema_params.get("first_stage", state.params["first_stage"])


def _tend(
    c: ConfigDict,
    codebook: Array,
    averages: codebook_lib.Averages,
    aux: Metrics,
    decay: Array,
    key: Array,
) -> tuple[Array, codebook_lib.Averages]:
    """What happens to a codebook (K, C) beside its gradient, as `first_stage.codebook` says."""
    averages = codebook_lib.update_averages(averages, aux["latents"], aux["codes"], decay)
    if c.rule == "ema":
        codebook = codebook_lib.averaged_codebook(averages, codebook)
    if c.reset > 0:
        latents = aux["latents"]
        codebook, averages = codebook_lib.reset_unused(codebook, averages, latents, key, c.reset)
    return codebook, averages


def _without_discriminator(
    error: Any, reconstruction: Array, log_variance: Array
) -> tuple[Array, tuple[Array, Array], Metrics]:
    """The mean error, its gradients with respect to both arguments, and metrics."""

    def mean(reconstruction: Array, log_variance: Array) -> tuple[Array, Metrics]:
        per_example, metrics = error(reconstruction, log_variance)
        return per_example.mean(), metrics

    run = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
    (value, metrics), grads = run(reconstruction, log_variance)
    return value, grads, metrics
