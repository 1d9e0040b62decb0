"""What of a block's activations is kept for the backward pass, and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from ldm_jax.errors import UserError

REMAT = ("none", "block", "dots")


def _keep_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keeps products with weights: those of attention grow with the square of the tokens."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return bool(keep(primitive, *args, **params))


def rematerialised(block: Callable, remat: str, **options: Any) -> Callable:
    """The same module class, which keeps less for its backward pass; `options` are `nn.remat`'s.

    remat: 'none' keeps everything, 'block' the block's inputs alone, and 'dots' the results of
    convolutions and linear layers, too, so that only cheap operations and attention run again.

    Raises:
        UserError: another `remat`.
    """
    if remat not in REMAT:
        raise UserError(f"remat is {remat!r}: choose from {', '.join(REMAT)}")
    if remat == "none":
        return block
    return nn.remat(block, policy=_keep_products if remat == "dots" else None, **options)
