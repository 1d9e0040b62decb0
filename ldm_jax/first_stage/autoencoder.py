"""Encoder, decoder and latent scaling, shared by the KL and VQ autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.nn.attention import SelfAttention
from ldm_jax.nn.layers import GROUPS, Conv, Dense, GroupNorm, along_last
from ldm_jax.nn.resnet import Downsample, ResBlock, Upsample, depth_to_space, space_to_depth
from ldm_jax.types import Array

EPSILON = 1e-6


class Encoder(nn.Module):
    """Images to features: (B, H, W, 3) -> (B, H/f, W/f, out_channels), f = patch * 2^(levels - 1).

    `depth` residual blocks per level, single-head attention after each block at the factors
    `attn_downsample` and, with `mid_attn`, in the middle (Esser et al. 2021, table 7).
    """

    width: int
    mult: Sequence[int]
    depth: int
    attn_downsample: Sequence[int]
    mid_attn: bool
    out_channels: int
    dropout: float = 0.0
    patch: int = 1
    norm_groups: int = GROUPS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        factor = self.patch * 2 ** (len(self.mult) - 1)
        if images.shape[1] % factor or images.shape[2] % factor:
            raise UserError(
                f"this first stage needs image heights and widths that are multiples of {factor}, "
                f"got {images.shape[1]}x{images.shape[2]}"
            )
        h = Conv(self.width, dtype=self.dtype, name="conv_in")(space_to_depth(images, self.patch))
        for level, mult in enumerate(self.mult):
            for i in range(self.depth):
                h = _res(self, f"down_{level}_res_{i}", h, mult * self.width, train)
                if 2**level in self.attn_downsample:
                    h = _attention(self, f"down_{level}_attn_{i}", h)
            if level < len(self.mult) - 1:
                h = Downsample((0, 1), self.dtype, name=f"down_{level}_resample")(h)
        h = _middle(self, h, train)
        h = nn.silu(GroupNorm(EPSILON, self.norm_groups, name="norm_out")(h))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h).astype(jnp.float32)


class Decoder(nn.Module):
    """Features to images: (B, h, w, K) -> (B, h*f, w*f, 3) float32, the mirror of `Encoder`.

    Each level has one residual block more than the encoder's. The output is not clipped.
    """

    width: int
    mult: Sequence[int]
    depth: int
    attn_downsample: Sequence[int]
    mid_attn: bool
    dropout: float = 0.0
    patch: int = 1
    norm_groups: int = GROUPS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, train: bool = False) -> Array:
        h = Conv(self.mult[-1] * self.width, dtype=self.dtype, name="conv_in")(features)
        h = _middle(self, h, train)
        for level, mult in reversed(list(enumerate(self.mult))):
            for i in range(self.depth + 1):
                h = _res(self, f"up_{level}_res_{i}", h, mult * self.width, train)
                if 2**level in self.attn_downsample:
                    h = _attention(self, f"up_{level}_attn_{i}", h)
            if level > 0:
                h = Upsample(self.dtype, name=f"up_{level}_resample")(h)
        h = nn.silu(GroupNorm(EPSILON, self.norm_groups, name="norm_out")(h))
        h = Conv(3 * self.patch**2, dtype=self.dtype, name="conv_out")(h)
        return depth_to_space(h, self.patch).astype(jnp.float32)


def _res(net: Encoder | Decoder, name: str, h: Array, channels: int, train: bool) -> Array:
    options = dict(dropout=net.dropout, groups=net.norm_groups, dtype=net.dtype)
    return ResBlock(channels, EPSILON, **options, name=name)(h, None, train)


def _attention(net: Encoder | Decoder, name: str, h: Array) -> Array:
    options = dict(groups=net.norm_groups, dtype=net.dtype)
    return SelfAttention(heads=1, epsilon=EPSILON, **options, name=name)(h)


def _middle(net: Encoder | Decoder, h: Array, train: bool) -> Array:
    h = _res(net, "mid_res_0", h, h.shape[-1], train)
    if net.mid_attn:
        h = _attention(net, "mid_attn", h)
    return _res(net, "mid_res_1", h, h.shape[-1], train)


class FirstStage(nn.Module):
    """Base of all first stages: the affine map to the latents that a diffusion model sees.

    `shift` (C,) and `scale` (C,) live in the collection 'latents', which no optimiser sees; they
    start as 0 and 1 and are set from `ldm_jax.first_stage.statistics` or from a checkpoint. The
    methods `autoencode` and `moments` do not scale and can be applied without the collection.
    """

    def make_latent_scale(self, channels: int) -> None:
        """Creates the variables; for `setup` of a subclass."""
        if self.is_initializing():
            self.variable("latents", "shift", jnp.zeros, (channels,), jnp.float32)
            self.variable("latents", "scale", jnp.ones, (channels,), jnp.float32)

    def scaled(self, z: Array) -> Array:
        """(B, h, w, C) -> (z - shift) * scale."""
        shift, scale = self._latent_scale()
        return (z - shift) * scale

    def unscaled(self, latents: Array) -> Array:
        """(B, h, w, C) -> latents / scale + shift, the inverse of `scaled`."""
        shift, scale = self._latent_scale()
        return latents / scale + shift

    def encode(self, images: Array) -> Array:
        """Images (B, H, W, 3) -> latents (B, h, w, C), at the posterior's mode and not scaled."""
        return self.unscaled(self.mode(self.moments(images)))

    def _latent_scale(self) -> tuple[Array, Array]:
        shift = self.get_variable("latents", "shift")
        scale = self.get_variable("latents", "scale")
        if shift is None or scale is None:
            raise ValueError("latents are scaled: apply the first stage with its 'latents' too")
        return along_last(shift, 4), along_last(scale, 4)


class Autoencoder(FirstStage):
    """Fields and networks that the KL and VQ autoencoders share.

    Attributes:
        width: channels of the first level.
        mult: channels of each level as multiples of `width`; f = patch * 2^(len(mult) - 1).
        depth: residual blocks per level of the encoder; the decoder has one more.
        attn_downsample: factors at which each residual block is followed by attention.
        mid_attn: whether the middle of encoder and decoder has attention.
        z_channels: channels between encoder and the 1x1 convolution before the bottleneck.
        channels: channels of the latents.
        dropout: rate inside residual blocks, active when `train`; needs the 'dropout' stream.
        patch: windows of patch x patch pixels enter and leave as channels; the published models
            have none (1), but the full resolution is where a small autoencoder spends its time.
        norm_groups: groups of the normalisations, 32 in the published models. Narrow networks need
            fewer: a group of one channel loses that channel's mean, and colours with it.
        dtype: of the computation; parameters, moments, latents and images are float32.
    """

    width: int
    mult: Sequence[int]
    depth: int
    attn_downsample: Sequence[int]
    z_channels: int
    channels: int
    mid_attn: bool = True
    dropout: float = 0.0
    patch: int = 1
    norm_groups: int = GROUPS
    dtype: jnp.dtype = jnp.float32

    def make_networks(self, moments_per_channel: int, bias_init: Callable | None = None) -> None:
        """Creates encoder, decoder and the 1x1 convolutions; for `setup` of a subclass."""
        shape = (self.width, self.mult, self.depth, self.attn_downsample, self.mid_attn)
        rest = dict(dropout=self.dropout, patch=self.patch)
        rest |= dict(norm_groups=self.norm_groups, dtype=self.dtype)
        self.encoder = Encoder(*shape, moments_per_channel * self.z_channels, **rest)
        self.decoder = Decoder(*shape, **rest)
        # Next to the bottleneck: a rounding error here is one of the latents, and they are cheap.
        self.quant_conv = Dense(moments_per_channel * self.channels, bias_init=bias_init)
        self.post_quant_conv = Dense(self.z_channels)
        self.make_latent_scale(self.channels)

    def __call__(self, images: Array, keys: Array, *, train: bool = False) -> tuple[Array, dict]:
        """The same as `autoencode`; `init` through it creates every parameter."""
        return self.autoencode(images, keys, train=train)

    def moments(self, images: Array, *, train: bool = False) -> Array:
        """(B, H, W, 3) in [-1, 1] -> (B, H/f, W/f, M) float32: what may be cached of an image."""
        return self.quant_conv(self.encoder(images, train))

    def decode(self, latents: Array) -> Array:
        """Scaled latents (B, h, w, C) -> images (B, h*f, w*f, 3) float32, not clipped."""
        return self.decode_unscaled(self.unscaled(latents))

    def decode_unscaled(self, z: Array, train: bool = False) -> Array:
        """The decoder behind the bottleneck: (B, h, w, C) -> (B, h*f, w*f, 3) float32."""
        return self.decoder(self.post_quant_conv(z), train)
