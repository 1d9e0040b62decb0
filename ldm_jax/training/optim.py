"""The optimiser of a stage."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict


def learning_rate(block: ConfigDict) -> optax.Schedule:
    """Learning rate as a function of the step: linear warm-up, then constant or cosine."""
    if block.lr_decay == "cosine":
        after = optax.cosine_decay_schedule(block.lr, max(1, block.steps - block.warmup_steps))
    else:
        after = optax.constant_schedule(block.lr)
    if not block.warmup_steps:
        return after
    # The reference's warm-up starts at a factor of 1e-6, so that the first step is not lost.
    warmup = optax.linear_schedule(1e-6 * block.lr, block.lr, block.warmup_steps)
    return optax.join_schedules([warmup, after], [block.warmup_steps])


def make_optimizer(block: ConfigDict) -> optax.GradientTransformation:
    """AdamW with decay on every parameter, as torch.optim.AdamW does by default."""
    adamw = optax.adamw(
        learning_rate(block), *block.betas, eps=1e-8, weight_decay=block.weight_decay
    )
    if block.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(block.grad_clip), adamw)
    return adamw
