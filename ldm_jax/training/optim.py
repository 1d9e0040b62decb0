"""The optimiser of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

ADAM_SHARE = 0.2  # of Muon's learning rate: that of what Adam moves beside it


def learning_rate(block: ConfigDict) -> optax.Schedule:
    """Learning rate as a function of the step: linear warm-up, then constant, cosine or linear.

    The warm-up rises from `lr_start * lr` to `lr` at `warmup_steps`; a decay falls to `lr_end * lr`
    at `decay_steps` (0: at `steps`). A cosine starts at the end of the warm-up, and a line at step
    0, unseen until the warm-up ends: these are the schedules of the original code.
    """
    end = block.decay_steps or block.steps
    if block.lr_decay == "cosine":
        span = max(1, end - block.warmup_steps)
        after = optax.cosine_decay_schedule(block.lr, span, alpha=block.lr_end)
    elif block.lr_decay == "linear":
        whole = optax.linear_schedule(block.lr, block.lr_end * block.lr, max(1, end))
        after = lambda step: whole(step + block.warmup_steps)  # noqa: E731
    else:
        after = optax.constant_schedule(block.lr)
    if not block.warmup_steps:
        return after
    warmup = optax.linear_schedule(block.lr_start * block.lr, block.lr, block.warmup_steps)
    return optax.join_schedules([warmup, after], [block.warmup_steps])


def shared_metrics(rate: optax.Schedule, step: jax.Array, grads: Any) -> dict[str, jax.Array]:
    """What every training step logs: the norm of its gradient and its learning rate."""
    return {
        "grad_norm": optax.global_norm(grads),
        "learning_rate": jnp.asarray(rate(step), jnp.float32),
    }


def make_optimizer(block: ConfigDict) -> optax.GradientTransformation:
    """AdamW as torch.optim.AdamW is by default, or Muon (Jordan 2024), as the config says.

    Weight decay falls on every parameter. Muon orthogonalises the updates of matrices and
    convolutions, whose scale differs from Adam's: `lr` is theirs, and Adam (with Nesterov
    momentum) moves the biases and norms at a fifth of it. The first moment is kept in
    `moment_dtype`.
    """
    rate = learning_rate(block)
    if block.optimizer == "muon":
        optimizer = optax.contrib.muon(
            rate,
            weight_decay=block.weight_decay,
            mu_dtype=block.moment_dtype,
            adam_b1=block.betas[0],
            adam_b2=block.betas[1],
            adam_weight_decay=block.weight_decay,
            adam_learning_rate=lambda step: ADAM_SHARE * rate(step),
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        optimizer = optax.adamw(
            rate,
            *block.betas,
            eps=1e-8,
            mu_dtype=block.moment_dtype,
            weight_decay=block.weight_decay,
        )
    if block.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(block.grad_clip), optimizer)
    return optimizer


def without_decay(
    optimizer: optax.GradientTransformation, parts: Sequence[str]
) -> optax.GradientTransformation:
    """The same optimiser, with a state of the same form, whose weight decay spares some parts.

    parts: names at the top of the parameters, a dict.
    """

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # Values are only read to decay them, and those of zero do not decay.
        spared = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in parts}
        return optimizer.update(grads, state, params | spared)

    return optax.GradientTransformation(optimizer.init, update)


def _matrices(params: Any) -> Any:
    """Tells Muon how each kernel is a matrix: all axes but the last are its input.

    Kernels of three axes are those of repeated blocks, one matrix for each index of the first axis.
    """

    def numbers(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        # Rows of an embedding or a codebook are looked up, not multiplied with.
        if leaf.ndim < 2 or path[-1].key != "kernel":
            return None
        inputs = (1,) if leaf.ndim == 3 else tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(numbers, params)
