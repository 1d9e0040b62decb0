"""The update step of the classifier of noisy latents, a pure function of its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ldm_jax import builders, random
from ldm_jax.config import latent_channels, latent_size
from ldm_jax.diffusion.objective import quartile_means
from ldm_jax.diffusion.times import UNIFORM, draw_times
from ldm_jax.training import guard
from ldm_jax.training.accumulate import accumulated_grad
from ldm_jax.training.latents import draw_latents
from ldm_jax.training.optim import learning_rate, make_optimizer, shared_metrics
from ldm_jax.training.state import Batch, Init, Metrics, Step, TrainState
from ldm_jax.types import Array


def classifier_functions(config: ConfigDict) -> tuple[Init, Step]:
    """Returns (init, step) that train the classifier by cross-entropy on z_t of the process.

    Times are uniform over the clock, however the denoiser's are drawn (Dhariwal & Nichol 2021;
    the original code). `frozen` holds the variables of the first stage. 'accuracy' is the share of
    the batch with the right class at the top; `loss_q0` to `loss_q3`, and 'accuracy_q0' likewise,
    are means over quarters of the time range, q0 with the least noise. There is no moving average.
    """
    first_stage, classifier = builders.build_first_stage(config), builders.build_classifier(config)
    process, block = builders.build_schedule(config), config.classifier.train
    optimizer, rate = make_optimizer(block), learning_rate(block)

    def init(key: Array) -> TrainState:
        latents = jnp.zeros((1, *(latent_size(config),) * 2, latent_channels(config)))
        variables = classifier.init(jax.random.fold_in(key, 0), latents, jnp.zeros((1,), jnp.int32))
        params = {"classifier": variables["params"]}
        return TrainState(jnp.int32(0), params, {}, optimizer.init(params))

    def step(
        state: TrainState, frozen: Any, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        batch_size = batch["label"].shape[0]
        step_key = jax.random.fold_in(key, state.step)
        keys = random.example_keys(step_key, batch_size)

        def loss_fn(
            params: Any, examples: Any, part: Array
        ) -> tuple[Array, tuple[Array, Array, Array]]:
            batch, keys = examples
            label = batch["label"]
            z = draw_latents(first_stage, frozen, batch, random.fold_in(keys, 0))
            t = draw_times(random.fold_in(keys, 1), process, UNIFORM)
            noise = random.normal(random.fold_in(keys, 2), z.shape[1:])
            z_t = process.level(t, z.ndim).noised(z, noise)
            rngs = {"dropout": jax.random.fold_in(step_key, batch_size + part)}
            variables = {"params": params["classifier"]}
            logits = classifier.apply(variables, z_t, t, train=True, rngs=rngs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), (losses, (logits.argmax(-1) == label).astype(jnp.float32), t)

        (loss, (losses, right, t)), grads = accumulated_grad(
            loss_fn, state.params, (batch, keys), block.accumulate
        )

        def update() -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(state.step + 1, params, state.ema_params, opt_state)

        measured = {"loss": loss, "accuracy": right.mean()}
        for name, values in (("loss", losses), ("accuracy", right)):
            quarters = quartile_means(values, t, process.steps)
            measured |= {f"{name}_{quarter}": mean for quarter, mean in quarters.items()}
        metrics = {**measured, **shared_metrics(rate, state.step, grads)}
        return guard.checked_update(update, state, metrics)

    return init, step
