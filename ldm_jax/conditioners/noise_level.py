"""Conditioning on how much noise the low-resolution image has, for super-resolution."""

from __future__ import annotations

import flax.linen as nn

from ldm_jax.errors import UserError
from ldm_jax.nn.embed import TimeEmbedding
from ldm_jax.types import Array, Condition

STEPS = 1000  # levels are spread over what the sinusoids of diffusion times resolve


class NoiseLevel(nn.Module):
    """Embeds `batch['noise_level']` (B,) float32 in [0, 1) as a vector (B, features).

    It is what a model that is trained with noise-level augmentation must be told (Ho et al. 2022,
    "Cascaded diffusion models", section 4.2). The network is that of the diffusion time.

    Attributes:
        dim: width of the sinusoids.
        features: channels of the denoiser's slot `vector`.
    """

    dim: int
    features: int

    @nn.compact
    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The embedded levels of a batch."""
        return Condition(
            vector=TimeEmbedding(self.dim, self.features, name="embed")(
                STEPS * batch["noise_level"]
            )
        )

    def null(self, batch_size: int) -> Condition:
        """Raises UserError: an image has some noise or none, which is a level too."""
        raise UserError(
            "the noise level of a low-resolution image has no null condition, so it cannot be "
            "dropped or guided: use cond_drop_rate 0 and guidance_scale 1"
        )
