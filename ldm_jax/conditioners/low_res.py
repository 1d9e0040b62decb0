"""Conditioning on a smaller version of the image, for super-resolution."""

from __future__ import annotations

import flax.linen as nn
import jax

from ldm_jax.errors import UserError
from ldm_jax.nn.resnet import space_to_depth
from ldm_jax.types import Array, Condition


class LowRes(nn.Module):
    """Brings `batch['low_res']` (B, H, W, 3) in [-1, 1] to the latents' size, as a concat.

    Pixels of a larger image become channels, k x k of them side by side: (B, h, w, 3 k^2). A
    smaller one is enlarged bicubically: (B, h, w, 3). The published models have it of that size.

    Attributes:
        factor: how much smaller than the images that are made the small ones are.
        downsampling: how much smaller the latents are; it divides `factor`, or the other way round.
    """

    factor: int
    downsampling: int

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The small images of a batch."""
        image = batch["low_res"]
        if self.downsampling >= self.factor:
            return Condition(concat=space_to_depth(image, self.downsampling // self.factor))
        times = self.factor // self.downsampling
        batch, height, width, channels = image.shape
        shape = (batch, times * height, times * width, channels)
        return Condition(concat=jax.image.resize(image, shape, "bicubic"))

    def null(self, batch_size: int) -> Condition:
        """Raises UserError: there is no empty image."""
        raise UserError(
            "super-resolution has no null condition, so it cannot be dropped or guided: use "
            "cond_drop_rate 0 and guidance_scale 1"
        )
