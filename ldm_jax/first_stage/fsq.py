"""Autoencoder whose latents are rounded, channel by channel (Mentzer et al. 2024, "Finite scalar
quantization: VQ-VAE made simple").

There is no codebook to learn: the codes are all combinations of `levels` values per channel, and
the only loss is that of the reconstruction. Otherwise as in vq.py: the diffusion model sees the
latents before rounding, and `decode` rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.first_stage.autoencoder import Autoencoder
from ldm_jax.first_stage.vq import code_counts
from ldm_jax.nn.layers import along_last
from ldm_jax.types import Array

MARGIN = 1e-3  # of the range, so that the outermost values are well in reach


def bound(z: Array, levels: Sequence[int]) -> Array:
    """Squashes z (..., C) so that rounding gives channel c one of levels[c] values: (..., C).

    The values are whole numbers from -(L // 2) to (L - 1) // 2, for L of at least 3. The paper's
    code has 1 - margin and tan where there are 1 + margin and artanh here, by which 0 stays 0.
    """
    levels = np.asarray(levels, np.float32)
    half = (levels - 1) * (1 + MARGIN) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0).astype(np.float32)
    half, offset, shift = (
        along_last(np.float32(x), z.ndim) for x in (half, offset, np.arctanh(offset / half))
    )
    return jnp.tanh(z + shift) * half - offset


def round_through(x: Array) -> Array:
    """Rounds, with the gradient of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def code_numbers(rounded: Array, levels: Sequence[int]) -> Array:
    """Numbers rounded values (..., C) from 0 to prod(levels) - 1: (...) int32."""
    levels = np.asarray(levels)
    digits = rounded.astype(jnp.int32) + along_last(levels // 2, rounded.ndim)
    places = np.concatenate([[1], np.cumprod(levels[:-1])]).astype(np.int32)
    return (digits * along_last(places, rounded.ndim)).sum(-1).astype(jnp.int32)


class FSQModel(Autoencoder):
    """Autoencoder with rounded latents: the fields of `Autoencoder`, M = C, and

    Attributes:
        levels: number of values of each channel, at least 3.
    """

    levels: Sequence[int] = ()

    def setup(self) -> None:
        self.make_networks(moments_per_channel=1)

    def sample(self, moments: Array, keys: Array) -> Array:
        """The same as `mode`: the bottleneck is deterministic, `keys` (B,) are not used."""
        return self.mode(moments)

    def mode(self, moments: Array) -> Array:
        """Latents in [-1.001, 1.001] before rounding, scaled: (B, h, w, C) -> (B, h, w, C)."""
        return self.scaled(bound(moments, self.levels) / self._unit(moments))

    def decode(self, latents: Array) -> Array:
        """Scaled latents (B, h, w, C) -> images (B, H, W, 3) float32, not clipped."""
        z = self.unscaled(latents)
        levels = along_last(np.asarray(self.levels), z.ndim)
        # A diffusion model may go beyond the values that there are.
        rounded = jnp.clip(jnp.round(z * self._unit(z)), -(levels // 2), (levels - 1) // 2)
        return self.decode_unscaled(rounded / self._unit(z))

    def autoencode(
        self, images: Array, keys: Array | None = None, *, train: bool = False
    ) -> tuple[Array, dict]:
        """Images (B, H, W, 3) -> reconstruction of the same shape and `aux`; no `keys` needed.

        `aux`: 'codes' (B, h, w), 'code_counts' (K,) how often the batch used each of the K =
        prod(levels) codes, 'latents' (B, h, w, C) before rounding and scaling.
        """
        bounded = bound(self.moments(images, train=train), self.levels)
        rounded, unit = round_through(bounded), self._unit(bounded)
        codes = code_numbers(jax.lax.stop_gradient(rounded), self.levels)
        aux = {"codes": codes, "code_counts": code_counts(codes, math.prod(self.levels))}
        return self.decode_unscaled(rounded / unit, train), aux | {"latents": bounded / unit}

    def _unit(self, like: Array) -> Array:
        """What the whole numbers are divided by, so that they lie in [-1, 1]."""
        return along_last(np.asarray(self.levels, np.float32) // 2, like.ndim)
