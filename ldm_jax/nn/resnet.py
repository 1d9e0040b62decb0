"""Residual blocks and the two kinds of resampling, shared by the UNet and the autoencoders."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.layers import GROUPS, Conv, Dense, Dropout, GroupNorm, spread
from ldm_jax.types import Array


def average_pool(x: Array) -> Array:
    """Means of 2x2 windows: (B, H, W, C) -> (B, H/2, W/2, C)."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def repeat_pixels(x: Array) -> Array:
    """Nearest-neighbour upsampling: (B, H, W, C) -> (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


RESAMPLE = {"down": average_pool, "up": repeat_pixels}


def space_to_depth(x: Array, size: int) -> Array:
    """Moves size x size windows into the channels: (B, H, W, C) -> (B, H/s, W/s, s*s*C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, -1)


def depth_to_space(x: Array, size: int) -> Array:
    """The inverse of `space_to_depth`: (B, h, w, s*s*C) -> (B, h*s, w*s, C)."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * size, width * size, -1)


class Downsample(nn.Module):
    """Strided 3x3 convolution: (B, H, W, C) -> (B, H/2, W/2, C).

    `padding` is (1, 1) in the UNet; the autoencoders pad the bottom and right only, (0, 1).
    """

    padding: tuple[int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(x.shape[-1], 2, self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a 3x3 convolution: (B, H, W, C) -> (B, 2H, 2W, C)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(repeat_pixels(x))


class ResBlock(nn.Module):
    """Residual block: (B, H, W, K), embedding (B, E) or None -> (B, H', W', channels).

    Attributes:
        channels: output channels; a 1x1 convolution carries the skip when they differ from K.
        epsilon: of both group normalisations (1e-5 in the UNet, 1e-6 in the autoencoders).
        scale_shift: the embedding scales and shifts the second normalisation instead of being
            added before it (Dhariwal & Nichol 2021, AdaGN).
        resample: None, 'down' or 'up': both branches are resampled by a factor of 2.
        zero_init: the last convolution starts at zero, so that the block starts as its skip.
        groups: of both group normalisations.
    """

    channels: int
    epsilon: float
    scale_shift: bool = False
    resample: str | None = None
    dropout: float = 0.0
    zero_init: bool = False
    groups: int = GROUPS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array | None, train: bool) -> Array:
        h = nn.silu(GroupNorm(self.epsilon, self.groups, name="norm_0")(x))
        if self.resample:
            h, x = RESAMPLE[self.resample](h), RESAMPLE[self.resample](x)
        h = Conv(self.channels, dtype=self.dtype, name="conv_0")(h)

        shift = None
        if embedding is not None:
            features = 2 * self.channels if self.scale_shift else self.channels
            shift = Dense(features, dtype=self.dtype, name="time")(nn.silu(embedding))
            shift = shift[:, None, None, :]
        if shift is not None and not self.scale_shift:
            h = h + spread(shift, h)
        h = GroupNorm(self.epsilon, self.groups, name="norm_1")(h)
        if shift is not None and self.scale_shift:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = h * (1.0 + spread(scale, h)) + spread(shift, h)
        h = Dropout(self.dropout, name="dropout")(nn.silu(h), train)
        h = Conv(self.channels, zero_init=self.zero_init, dtype=self.dtype, name="conv_1")(h)

        if x.shape[-1] != self.channels:
            x = Dense(self.channels, dtype=self.dtype, name="skip")(x)
        return x + h
