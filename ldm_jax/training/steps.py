"""The update step of the diffusion model, a pure function of (state, frozen, batch, key)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ldm_jax import builders, fields, random
from ldm_jax.conditioners.stored import COLLECTION
from ldm_jax.config import frozen_parts as frozen_parts_of
from ldm_jax.config import latent_channels, latent_size
from ldm_jax.diffusion.guidance import drop
from ldm_jax.diffusion.objective import log_variance_size, quartile_means
from ldm_jax.training import guard
from ldm_jax.training.accumulate import accumulated_grad
from ldm_jax.training.ema import averaged_parts, ema_update, profiles
from ldm_jax.training.latents import draw_latents
from ldm_jax.training.optim import learning_rate, make_optimizer, shared_metrics, without_decay
from ldm_jax.training.state import Batch, Init, Metrics, Step, TrainState
from ldm_jax.types import Array, Condition


def diffusion_functions(config: ConfigDict) -> tuple[Init, Step]:
    """Returns (init, step) that train the denoiser, and its conditioner, on latents.

    A learned log-variance is a part of the parameters of its own. `loss_q0` to `loss_q3` are means
    of the plain error over quarters of the time range, whatever its weight. `frozen` holds the
    variables of the first stage, and perhaps the null condition of stored outputs of a text encoder
    (`stored_latents.stored_null`). The moving average covers the denoiser only, as in the
    reference.
    """
    first_stage = builders.build_first_stage(config)
    denoiser = builders.build_denoiser(config)
    conditioner = builders.build_conditioner(config)
    process, learns_variance = builders.build_schedule(config), config.diffusion.learn_log_variance
    frozen_parts, kept = frozen_parts_of(config), profiles(config)
    optimizer, rate = make_optimizer(config.train), learning_rate(config.train)
    if learns_variance:  # statistics of the errors, not weights that should stay small
        optimizer = without_decay(optimizer, ["log_variance"])
    if frozen_parts:
        optimizer = optax.multi_transform(
            {"trained": optimizer, "frozen": optax.set_to_zero()},
            lambda params: _labelled(params, frozen_parts),
        )

    def init(key: Array) -> TrainState:
        size, channels = latent_size(config), latent_channels(config)
        latents = jnp.zeros((1, size, size, channels))
        example = fields.add_latents(fields.examples(config, 1), lambda image: latents)
        cond, variables = conditioner.init_with_output(jax.random.fold_in(key, 0), example)
        params = {
            "denoiser": denoiser.init(
                jax.random.fold_in(key, 1), latents, jnp.zeros((1,), jnp.int32), cond
            )["params"],
            "conditioner": variables.get("params", {}),
        }
        if learns_variance:
            params["log_variance"] = {"values": jnp.zeros(log_variance_size(process))}
        # A copy: the state is donated, and one buffer cannot be donated twice.
        ema = {"denoiser": jax.tree.map(jnp.copy, params["denoiser"])}
        parts = averaged_parts(params, frozen_parts)
        averages = {profile.name: jax.tree.map(jnp.copy, parts) for profile in kept}
        return TrainState(jnp.int32(0), params, ema, optimizer.init(params), averages=averages)

    def condition(params: Any, frozen: Any, batch: Batch, keys: Array) -> Condition:
        # Without gradients, nothing of the backward pass through a frozen part is computed.
        stopped = {
            name: jax.lax.stop_gradient(part) if name in frozen_parts else part
            for name, part in params["conditioner"].items()
        }
        # Of stored outputs of a text encoder, the null condition is stored too.
        variables = {"params": stopped, COLLECTION: frozen.get(COLLECTION, {})}
        cond = conditioner.apply(variables, batch)  # with the latents that `step` has added
        if config.cond_drop_rate == 0:
            return cond
        null = conditioner.apply(variables, keys.shape[0], method="null")
        return drop(cond, null, keys, config.cond_drop_rate)

    def step(
        state: TrainState, frozen: Any, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        step_key = jax.random.fold_in(key, state.step)
        keys = random.example_keys(step_key, batch_size)
        encode = functools.partial(first_stage.apply, frozen, method="encode")

        def loss_fn(params: Any, examples: Any, part: Array) -> tuple[Array, dict[str, Array]]:
            batch, keys = examples
            z = draw_latents(first_stage, frozen, batch, random.fold_in(keys, 0))
            batch = fields.add_latents(batch, encode)
            cond = condition(params, frozen, batch, random.fold_in(keys, 1))
            rngs = {"dropout": jax.random.fold_in(step_key, batch_size + part)}

            def predict(x_t: Array, t: Array) -> Array:
                variables = {"params": params["denoiser"]}
                return denoiser.apply(variables, x_t, t, cond, train=True, rngs=rngs)

            log_variance = params["log_variance"]["values"] if learns_variance else 0.0
            objective = builders.build_objective(config, process, log_variance)
            per_example, aux = objective(predict, z, random.fold_in(keys, 2))
            return per_example.mean(), aux

        (loss, aux), grads = accumulated_grad(
            loss_fn, state.params, (batch, keys), config.train.accumulate
        )

        def update() -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            averaged = {"denoiser": params["denoiser"]}
            ema = ema_update(state.ema_params, averaged, state.step + 1, config.ema_decay)
            parts = averaged_parts(params, frozen_parts)
            averages = {
                profile.name: profile.update(state.averages[profile.name], parts, state.step + 1)
                for profile in kept
            }
            return TrainState(state.step + 1, params, ema, opt_state, averages=averages)

        measured = {"loss_simple": aux["loss_simple"].mean()}
        if learns_variance:
            measured["log_variance"] = aux["log_variance"].mean()
        quartiles = quartile_means(aux["loss_simple"], aux["t"], process.steps)
        measured |= {f"loss_{name}": value for name, value in quartiles.items()}
        metrics = {"loss": loss, **measured, **shared_metrics(rate, state.step, grads)}
        return guard.checked_update(update, state, metrics)

    return init, step


def _labelled(params: Any, frozen_parts: tuple[str, ...]) -> Any:
    """A tree like `params` that says 'frozen' for the leaves of the named conditioners."""

    def label(path: tuple, leaf: Array) -> str:
        frozen = path[0].key == "conditioner" and path[1].key in frozen_parts
        return "frozen" if frozen else "trained"

    return jax.tree_util.tree_map_with_path(label, params)
