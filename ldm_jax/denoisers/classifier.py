"""The classifier of noisy latents whose gradient guides sampling (Dhariwal & Nichol 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.denoisers.unet import EPSILON, Blocks, Levels, check_sides, encode
from ldm_jax.nn.attention import SelfAttention, attend, head_count
from ldm_jax.nn.embed import TimeEmbedding
from ldm_jax.nn.layers import Dense, GroupNorm
from ldm_jax.nn.resnet import Downsample, ResBlock
from ldm_jax.types import Array


class NoisyClassifier(nn.Module):
    """The first half of a UNet and a pooling by attention: noisy latents -> logits of classes.

    The original code makes it of the settings of the denoiser's own UNet, with self-attention and
    the pooling of Dhariwal & Nichol 2021 (there of pixels, with other blocks).

    Attributes:
        num_classes: number of classes K.
        width: channels of the first level; the time embedding is 4 times as wide.
        mult: channels of each level as multiples of `width`; each level halves the resolution.
        depth: residual blocks per level.
        attn_downsample: downsampling factors at which residual blocks are followed by
            self-attention. The middle always has it.
        head_dim: width of one head, in the pooling, too.
        side: of the latents that it is trained on; at other sizes the positions of the pooling are
            interpolated.
        dropout: rate inside residual blocks, active when `train`; needs the 'dropout' stream.
        dtype: of the computation; parameters, normalisation statistics, softmax and logits are
            float32.
    """

    num_classes: int
    width: int
    mult: Sequence[int]
    depth: int
    attn_downsample: Sequence[int]
    head_dim: int
    side: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z_t: Array, t: Array, *, train: bool = False) -> Array:
        """z_t (B, h, w, C), t (B,) int or float -> logits (B, K) float32.

        Raises UserError if the levels do not divide h and w.
        """
        check_sides(z_t, len(self.mult))
        embedding = TimeEmbedding(self.width, name="time_embed")(t)

        def res(name: str, h: Array, channels: int) -> Array:
            options = dict(dropout=self.dropout, zero_init=True, dtype=self.dtype)
            return ResBlock(channels, EPSILON, **options, name=name)(h, embedding, train)

        def attention(name: str, h: Array) -> Array:
            heads = head_count(h.shape[-1], 0, self.head_dim)
            return SelfAttention(heads, EPSILON, zero_init=True, dtype=self.dtype, name=name)(h)

        def resample(name: str, h: Array, kind: str) -> Array:
            return Downsample((1, 1), self.dtype, name=name)(h)

        levels = Levels(self.width, self.mult, self.depth, self.attn_downsample)
        h, _ = encode(z_t, levels, Blocks(res, attention, resample), self.dtype)
        h = nn.silu(GroupNorm(EPSILON, name="norm_out")(h))
        heads, side = head_count(h.shape[-1], 0, self.head_dim), self.side >> len(self.mult) - 1
        h = AttentionPool(heads, side, self.dtype, name="pool")(h)
        return Dense(self.num_classes, name="logits")(h.astype(jnp.float32))


class AttentionPool(nn.Module):
    """What the mean of a map attends to in it: (B, H, W, C) -> (B, C).

    Radford et al. 2021 (CLIP), section 2.4, as Dhariwal & Nichol 2021 use it: keys are the mean and
    all pixels, with learned positions. A plain mean weighs the pixels of the ground like those of
    the object.

    Attributes:
        heads: number of heads; C must be a multiple of it.
        side: of the map whose positions are learned; those of other maps are interpolated.
    """

    heads: int
    side: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        normal = nn.initializers.normal(channels**-0.5)
        places = self.param("positions", normal, (self.side, self.side, channels), jnp.float32)
        mean_place = self.param("mean_position", normal, (channels,), jnp.float32)
        if (height, width) != (self.side, self.side):
            places = jax.image.resize(places, (height, width, channels), "linear")
        mean = x.astype(jnp.float32).mean((1, 2)) + mean_place[None]
        pixels = (x.astype(jnp.float32) + places[None]).reshape(batch, height * width, channels)
        tokens = jnp.concatenate([mean[:, None], pixels], axis=1).astype(self.dtype)

        def project(name: str, tokens: Array) -> Array:
            y = Dense(channels, dtype=self.dtype, name=name)(tokens)
            return y.reshape(*y.shape[:2], self.heads, -1)

        h = attend(project("q", tokens[:, :1]), project("k", tokens), project("v", tokens))
        return h.reshape(batch, channels)
