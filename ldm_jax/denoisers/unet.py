"""The time-conditional UNet of the paper (Rombach et al. 2022, appendix E), channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.nn.attention import SelfAttention, SpatialTransformer, head_count
from ldm_jax.nn.embed import TimeEmbedding
from ldm_jax.nn.layers import Conv, GroupNorm
from ldm_jax.nn.remat import rematerialised
from ldm_jax.nn.resnet import RESAMPLE, Downsample, ResBlock, Upsample
from ldm_jax.types import Array, Condition

EPSILON = 1e-5


class Levels(NamedTuple):
    """The levels of a UNet on the way down; see `UNet` for what each number is."""

    width: int
    mult: Sequence[int]
    depth: int
    attn_downsample: Sequence[int]


class Blocks(NamedTuple):
    """What a UNet is built of, called within a compact method; each takes the block's name first.

    Attributes:
        res: (name, h, channels) -> h of so many channels.
        attention: (name, h) -> h.
        resample: (name, h, 'down' or 'up') -> h at half or twice the resolution.
    """

    res: Callable[..., Array]
    attention: Callable[[str, Array], Array]
    resample: Callable[[str, Array, str], Array]


def check_sides(x_t: Array, levels: int) -> None:
    """Raises UserError if x_t (B, h, w, C) cannot be halved on the way through so many levels."""
    factor = 2 ** (levels - 1)
    if x_t.shape[1] % factor or x_t.shape[2] % factor:
        raise UserError(
            f"a UNet of {levels} levels needs heights and widths that are multiples "
            f"of {factor}, got {x_t.shape[1]}x{x_t.shape[2]}"
        )


def encode(
    x_t: Array, levels: Levels, blocks: Blocks, dtype: jnp.dtype
) -> tuple[Array, list[Array]]:
    """The first half of a UNet, its middle included, within a compact method.

    x_t (B, h, w, K) -> the middle's output at the lowest resolution, and what the way up joins to
    it: the output of every block but the middle's, from the first to the last.
    """
    h = Conv(levels.width, dtype=dtype, name="conv_in")(x_t)
    skips = [h]
    for level, mult in enumerate(levels.mult):
        for i in range(levels.depth):
            h = blocks.res(f"down_{level}_res_{i}", h, mult * levels.width)
            if 2**level in levels.attn_downsample:
                h = blocks.attention(f"down_{level}_attn_{i}", h)
            skips.append(h)
        if level < len(levels.mult) - 1:
            h = blocks.resample(f"down_{level}_resample", h, "down")
            skips.append(h)
    h = blocks.res("mid_res_0", h, h.shape[-1])
    h = blocks.attention("mid_attn", h)
    return blocks.res("mid_res_1", h, h.shape[-1]), skips


class UNet(nn.Module):
    """Noise (or x0, v) predictor with every variant of the published models.

    Attributes:
        width: channels of the first level; the time embedding is 4 times as wide.
        out_channels: channels of the output.
        mult: channels of each level as multiples of `width`; each level halves the resolution.
        depth: residual blocks per level on the way down; one more on the way up.
        attn_downsample: downsampling factors at which residual blocks are followed by attention.
            The middle always has attention; a factor that is never reached has no effect.
        num_heads: heads of every attention; 0 derives them from `head_dim`.
        head_dim: width of one head; the deeper levels then have more heads.
        cross_attention: attention blocks are transformers that read `cond.context`.
        transformer_depth: transformer blocks per such attention.
        scale_shift: the time embedding scales and shifts the normalisation of a residual block.
        resblock_resample: levels are joined by resampling residual blocks.
        conv_resample: otherwise by convolutions; False means plain pooling and repetition.
        split_qkv_first: layout of the fused qkv projection, see `SelfAttention`.
        dropout: rate inside residual blocks, active when `train`; needs the 'dropout' stream.
        dtype: of the computation; parameters, normalisation statistics, softmax and output are
            float32.
        remat: what the backward pass recomputes of each block to save memory: 'none', 'block' or
            'dots', see `rematerialised`.
    """

    width: int
    out_channels: int
    mult: Sequence[int]
    depth: int
    attn_downsample: Sequence[int]
    num_heads: int = 0
    head_dim: int = 0
    cross_attention: bool = False
    transformer_depth: int = 1
    scale_shift: bool = False
    resblock_resample: bool = False
    conv_resample: bool = True
    split_qkv_first: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x_t: Array, t: Array, cond: Condition, *, train: bool = False) -> Array:
        """x_t (B, h, w, C), t (B,) int or float -> (B, h, w, out_channels) float32.

        `cond.concat` (B, h, w, K) is joined to `x_t`, `cond.context` (B, L, D) with
        `cond.context_mask` (B, L) is attended to, `cond.vector` (B, 4 * width) is added to the
        time embedding. Raises UserError if sizes or slots do not fit the fields.
        """
        self._check(x_t, cond)
        if cond.concat is not None:
            x_t = jnp.concatenate([x_t, cond.concat.astype(x_t.dtype)], axis=-1)
        embedding = TimeEmbedding(self.width, name="time_embed")(t)
        if cond.vector is not None:
            embedding = embedding + cond.vector.astype(jnp.float32)

        def res(name: str, h: Array, channels: int, resample: str | None = None) -> Array:
            block = rematerialised(ResBlock, self.remat, static_argnums=(3,))
            options = dict(scale_shift=self.scale_shift, resample=resample, dropout=self.dropout)
            module = block(
                channels, EPSILON, **options, zero_init=True, dtype=self.dtype, name=name
            )
            return module(h, embedding, train)

        def attention(name: str, h: Array) -> Array:
            heads = head_count(h.shape[-1], self.num_heads, self.head_dim)
            if self.cross_attention:
                block = rematerialised(SpatialTransformer, self.remat)
                module = block(heads, self.transformer_depth, self.dtype, name=name)
                return module(h, cond.context, cond.context_mask)
            block = rematerialised(SelfAttention, self.remat)
            options = dict(split_qkv_first=self.split_qkv_first, zero_init=True)
            return block(heads, EPSILON, **options, dtype=self.dtype, name=name)(h)

        def resample(name: str, h: Array, kind: str) -> Array:
            if self.resblock_resample:
                return res(name, h, h.shape[-1], kind)
            if not self.conv_resample:
                return RESAMPLE[kind](h)
            if kind == "down":
                return Downsample((1, 1), self.dtype, name=name)(h)
            return Upsample(self.dtype, name=name)(h)

        levels = Levels(self.width, self.mult, self.depth, self.attn_downsample)
        h, skips = encode(x_t, levels, Blocks(res, attention, resample), self.dtype)
        for level, mult in reversed(list(enumerate(self.mult))):
            for i in range(self.depth + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = res(f"up_{level}_res_{i}", h, mult * self.width)
                if 2**level in self.attn_downsample:
                    h = attention(f"up_{level}_attn_{i}", h)
            if level > 0:
                h = resample(f"up_{level}_resample", h, "up")

        h = nn.silu(GroupNorm(EPSILON, name="norm_out")(h))
        h = Conv(self.out_channels, zero_init=True, dtype=self.dtype, name="conv_out")(h)
        return h.astype(jnp.float32)

    def _check(self, x_t: Array, cond: Condition) -> None:
        """Raises UserError where the input would be used wrongly or not at all."""
        check_sides(x_t, len(self.mult))
        if self.cross_attention and cond.context is None:
            raise UserError("the UNet has cross_attention=True, but the condition has no context")
        if not self.cross_attention and cond.context is not None:
            raise UserError("the condition has a context: set cross_attention=True in the UNet")
        if cond.vector is not None and cond.vector.shape[-1] != 4 * self.width:
            raise UserError(
                f"the condition's vector must be {4 * self.width} wide (4 * width), "
                f"got {cond.vector.shape[-1]}"
            )
