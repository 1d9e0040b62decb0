"""Conditioning on a class label."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.types import Array, Condition

SLOTS = ("context", "vector")


class LabelEmbedder(nn.Module):
    """Looks up an embedding of `batch['label']` (B,) int in [0, num_classes).

    Attributes:
        num_classes: number of classes.
        width: channels D of an embedding.
        slot: 'context' for one token (B, 1, D), 'vector' for (B, D).
        null_label: whether there is one more row, the last, for the null condition.
    """

    num_classes: int
    width: int
    slot: str = "context"
    null_label: bool = True

    def setup(self):
        if self.slot not in SLOTS:
            raise UserError(
                f"a label has no slot '{self.slot}' to go to: choose one of {', '.join(SLOTS)}"
            )
        rows = self.num_classes + self.null_label
        # Standard normal as in the original, whose null row is trained like any other.
        self.embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (rows, self.width), jnp.float32
        )

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """Embeds the labels of a batch; a label outside the range gives NaN."""
        return self._embed(batch["label"])

    def null(self, batch_size: int) -> Condition:
        """The condition "no label" for a batch; raises UserError if there is no null label."""
        if not self.null_label:
            raise UserError(
                "this model has no null label, so it cannot be guided: use guidance_scale 1"
            )
        return self._embed(jnp.full((batch_size,), self.num_classes))

    def _embed(self, labels: Array) -> Condition:
        rows = self.embedding.at[labels].get(
            mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
        )
        return Condition(vector=rows) if self.slot == "vector" else Condition(context=rows[:, None])
