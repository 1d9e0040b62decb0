"""Conditioning on a smaller version of the image, for super-resolution."""

from __future__ import annotations

import flax.linen as nn

from ldm_jax.errors import UserError
from ldm_jax.types import Array, Condition


class LowRes(nn.Module):
    """Passes `batch['low_res']` (B, h, w, 3) in [-1, 1], of the latents' size, on as a concat."""

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The small images of a batch."""
        return Condition(concat=batch["low_res"])

    def null(self, batch_size: int) -> Condition:
        """Raises UserError: there is no empty image."""
        raise UserError(
            "super-resolution has no null condition, so it cannot be dropped or guided: use "
            "cond_drop_rate 0 and guidance_scale 1"
        )
