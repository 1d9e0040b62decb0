"""Several conditioners as one."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.types import Array, Condition


class Compose(nn.Module):
    """Joins the conditions of its parts slot by slot; without parts, the condition is empty.

    Contexts are joined along the length, concats along the channels, vectors by their sum.
    """

    parts: Sequence[nn.Module]

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The joint condition of a batch."""
        return join([part(batch) for part in self.parts])

    def null(self, batch_size: int) -> Condition:
        """The joint null condition, with the slots and shapes of `__call__`."""
        return join([part.null(batch_size) for part in self.parts])


def join(conditions: Sequence[Condition]) -> Condition:
    """Joins conditions of the same batch; a context without a mask is attended to throughout."""
    contexts = [c for c in conditions if c.context is not None]
    concats = [c.concat for c in conditions if c.concat is not None]
    vectors = [c.vector for c in conditions if c.vector is not None]
    masked = any(c.context_mask is not None for c in contexts)
    return Condition(
        context=jnp.concatenate([c.context for c in contexts], axis=1) if contexts else None,
        context_mask=jnp.concatenate([_mask(c) for c in contexts], axis=1) if masked else None,
        concat=jnp.concatenate(concats, axis=-1) if concats else None,
        vector=sum(vectors) if vectors else None,
    )


def _mask(cond: Condition) -> Array:
    if cond.context_mask is not None:
        return cond.context_mask
    return jnp.ones(cond.context.shape[:2], bool)
