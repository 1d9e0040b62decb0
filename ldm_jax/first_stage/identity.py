"""First stage of a diffusion model in pixel space."""

from __future__ import annotations

from ldm_jax.first_stage.autoencoder import FirstStage
from ldm_jax.types import Array


class Identity(FirstStage):
    """Latents are the images themselves, up to the scaling: (B, H, W, 3) <-> (B, H, W, 3)."""

    channels: int = 3

    def setup(self) -> None:
        self.make_latent_scale(self.channels)

    def __call__(self, images: Array, keys: Array, *, train: bool = False) -> tuple[Array, dict]:
        """The same as `autoencode`."""
        return self.autoencode(images, keys, train=train)

    def moments(self, images: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> the same."""
        return images

    def sample(self, moments: Array, keys: Array) -> Array:
        """Scaled images (B, H, W, C); nothing is drawn, `keys` (B,) are not used."""
        return self.scaled(moments)

    def mode(self, moments: Array) -> Array:
        """Scaled images (B, H, W, C)."""
        return self.scaled(moments)

    def decode(self, latents: Array) -> Array:
        """Scaled images (B, H, W, C) -> images (B, H, W, C)."""
        return self.unscaled(latents)

    def autoencode(
        self, images: Array, keys: Array | None = None, *, train: bool = False
    ) -> tuple[Array, dict]:
        """Images (B, H, W, C) -> the same and an empty `aux`."""
        return images, {}
