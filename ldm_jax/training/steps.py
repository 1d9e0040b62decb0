"""The update step of the diffusion model, a pure function of (state, frozen, batch, key)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ldm_jax import builders, fields, images, random
from ldm_jax.config import frozen_parts as frozen_parts_of
from ldm_jax.config import latent_channels, latent_size
from ldm_jax.diffusion.guidance import drop
from ldm_jax.diffusion.objective import quartile_means
from ldm_jax.training.ema import ema_update
from ldm_jax.training.optim import learning_rate, make_optimizer, shared_metrics
from ldm_jax.training.state import Batch, Init, Metrics, Step, TrainState
from ldm_jax.types import Array, Condition


def diffusion_functions(config: ConfigDict) -> tuple[Init, Step]:
    """Returns (init, step) that train the denoiser, and its conditioner, on latents.

    `frozen` holds the variables of the first stage. The moving average covers the denoiser only,
    as in the reference.
    """
    first_stage = builders.build_first_stage(config)
    denoiser = builders.build_denoiser(config)
    conditioner = builders.build_conditioner(config)
    objective = builders.build_objective(config)
    frozen_parts = frozen_parts_of(config)
    optimizer, rate = make_optimizer(config.train), learning_rate(config.train)
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
        # A copy: the state is donated, and one buffer cannot be donated twice.
        ema = {"denoiser": jax.tree.map(jnp.copy, params["denoiser"])}
        return TrainState(jnp.int32(0), params, ema, optimizer.init(params))

    def latents_of(frozen: Any, batch: Batch, keys: Array) -> Array:
        moments = batch.get("moments")
        if moments is None:
            image = images.to_float(batch["image"])
            moments = first_stage.apply(frozen, image, method="moments")
        return first_stage.apply(frozen, moments, keys, method="sample")

    def condition(params: Any, batch: Batch, keys: Array) -> Condition:
        # Without gradients, nothing of the backward pass through a frozen part is computed.
        stopped = {
            name: jax.lax.stop_gradient(part) if name in frozen_parts else part
            for name, part in params["conditioner"].items()
        }
        variables = {"params": stopped}
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
        z = jax.lax.stop_gradient(latents_of(frozen, batch, random.fold_in(keys, 0)))
        encode = functools.partial(first_stage.apply, frozen, method="encode")
        batch = fields.add_latents(batch, encode)

        def loss_fn(params: Any) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            cond = condition(params, batch, random.fold_in(keys, 1))
            rngs = {"dropout": jax.random.fold_in(step_key, batch_size)}

            def predict(x_t: Array, t: Array) -> Array:
                variables = {"params": params["denoiser"]}
                return denoiser.apply(variables, x_t, t, cond, train=True, rngs=rngs)

            per_example, aux = objective(predict, z, random.fold_in(keys, 2))
            return per_example.mean(), (per_example, aux)

        (loss, (per_example, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = {"denoiser": params["denoiser"]}
        ema = ema_update(state.ema_params, averaged, state.step + 1, config.ema_decay)
        new = TrainState(state.step + 1, params, ema, opt_state)
        quartiles = quartile_means(per_example, aux["t"], config.diffusion.steps)
        quartiles = {f"loss_{name}": value for name, value in quartiles.items()}
        return new, {"loss": loss, **quartiles, **shared_metrics(rate, state.step, grads)}

    return init, step


def _labelled(params: Any, frozen_parts: tuple[str, ...]) -> Any:
    """A tree like `params` that says 'frozen' for the leaves of the named conditioners."""

    def label(path: tuple, leaf: Array) -> str:
        frozen = path[0].key == "conditioner" and path[1].key in frozen_parts
        return "frozen" if frozen else "trained"

    return jax.tree_util.tree_map_with_path(label, params)
