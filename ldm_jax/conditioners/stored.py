"""Outputs of a text encoder that were made before, in place of running it."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.conditioners.text import repeat
from ldm_jax.data.latents_index import TEXT_CONTEXT, TEXT_MASK
from ldm_jax.types import Array, Condition

COLLECTION = "stored"  # of a conditioner's variables: its null condition


def stored_text(batch: dict[str, Array]) -> Condition | None:
    """The condition in a batch that holds `text_context` (B, L, D), else None."""
    if TEXT_CONTEXT not in batch:
        return None
    # Stored in 16 bits, perhaps; the encoders' own output is float32.
    return Condition(batch[TEXT_CONTEXT].astype(jnp.float32), batch.get(TEXT_MASK))


def stored_null(module: nn.Module, batch_size: int) -> Condition | None:
    """The null condition among the variables `stored` of a conditioner, else None."""
    if not module.has_variable(COLLECTION, TEXT_CONTEXT):
        return None
    names = [name for name in (TEXT_CONTEXT, TEXT_MASK) if module.has_variable(COLLECTION, name)]
    found = {name: module.get_variable(COLLECTION, name) for name in names}
    return stored_text(repeat(found, batch_size))
