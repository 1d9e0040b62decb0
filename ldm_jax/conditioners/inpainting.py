"""Conditioning on an image with a hole, for inpainting."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.types import Array, Condition


class Inpainting(nn.Module):
    """Joins the latents of the image without its hole with the mask, at the latents' size.

    Fields: `masked_latents` (B, h, w, C), not scaled, of the image whose hole is grey level -1;
    `mask` (B, H, W, 1), +1 in the hole and -1 outside. The concat is (B, h, w, C + 1). The mask is
    shrunk by taking the nearest pixel, so that it stays two-valued.
    """

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The masked latents of a batch, then the mask."""
        latents, mask = batch["masked_latents"], batch["mask"]
        for axis in (1, 2):
            size, pixels = latents.shape[axis], mask.shape[axis]
            mask = jnp.take(mask, np.arange(size) * pixels // size, axis=axis)
        return Condition(concat=jnp.concatenate([latents, mask.astype(latents.dtype)], axis=-1))

    def null(self, batch_size: int) -> Condition:
        """Raises UserError: there is no empty image."""
        raise UserError(
            "inpainting has no null condition, so it cannot be dropped or guided: use "
            "cond_drop_rate 0 and guidance_scale 1"
        )
