"""Self-attention block and transformer block with cross-attention, on feature maps."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.nn.attend import attend
from ldm_jax.nn.layers import GROUPS, Dense, GroupNorm, LayerNorm
from ldm_jax.types import Array


class SelfAttention(nn.Module):
    """Residual self-attention over the pixels of a map: (B, H, W, C) -> (B, H, W, C).

    Attributes:
        heads: number of heads; C must be a multiple of it.
        epsilon: of the group normalisation (1e-5 in the UNet, 1e-6 in the autoencoders).
        split_qkv_first: the order of the 3C outputs of `qkv`: (q/k/v, head, channel) if True,
            (head, q/k/v, channel) if False, as in most published models.
        zero_init: the output projection starts at zero.
        groups: of the group normalisation.
    """

    heads: int
    epsilon: float
    split_qkv_first: bool = False
    zero_init: bool = False
    groups: int = GROUPS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.epsilon, self.groups, name="norm")(x).reshape(
            batch, height * width, channels
        )
        qkv = Dense(3 * channels, dtype=self.dtype, name="qkv")(h)
        if self.split_qkv_first:
            qkv = qkv.reshape(batch, height * width, 3, self.heads, -1)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            qkv = qkv.reshape(batch, height * width, self.heads, 3, -1)
            q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        h = attend(q, k, v).reshape(batch, height, width, channels)
        return x + Dense(channels, zero_init=self.zero_init, dtype=self.dtype, name="out")(h)


class Attention(nn.Module):
    """Multi-head attention of tokens (B, T, C) to a context (B, S, K) -> (B, T, C)."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        channels = x.shape[-1]

        def project(name: str, tokens: Array) -> Array:
            y = Dense(channels, use_bias=False, dtype=self.dtype, name=name)(tokens)
            return y.reshape(*y.shape[:2], self.heads, -1)

        h = attend(project("q", x), project("k", context), project("v", context), mask)
        return Dense(channels, dtype=self.dtype, name="out")(h.reshape(x.shape))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated MLP, each residual: (B, T, C) -> (B, T, C)."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
        channels = x.shape[-1]
        h = LayerNorm(name="norm_0")(x)
        x = x + Attention(self.heads, dtype=self.dtype, name="self")(h, h)
        h = LayerNorm(name="norm_1")(x)
        x = x + Attention(self.heads, dtype=self.dtype, name="cross")(h, context, mask)
        h = LayerNorm(name="norm_2")(x)
        h = Dense(8 * channels, dtype=self.dtype, name="mlp_in")(h)
        h, gate = jnp.split(h, 2, axis=-1)
        h = h * nn.gelu(gate, approximate=False)
        return x + Dense(channels, dtype=self.dtype, name="mlp_out")(h)


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels of a map, conditioned on a context.

    x (B, H, W, C), context (B, S, K), mask (B, S) bool or None -> (B, H, W, C). The output
    projection starts at zero (Rombach et al. 2022, appendix E.2.1).
    """

    heads: int
    depth: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(1e-6, name="norm")(x).reshape(batch, height * width, channels)
        h = Dense(channels, dtype=self.dtype, name="proj_in")(h)
        for i in range(self.depth):
            h = TransformerBlock(self.heads, self.dtype, name=f"block_{i}")(h, context, mask)
        h = Dense(channels, zero_init=True, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(x.shape)


def head_count(channels: int, num_heads: int, head_dim: int) -> int:
    """Number of heads at a width, given either their number or the width of one.

    Raises UserError if not exactly one of the two is given, or if it does not divide `channels`.
    """
    if bool(num_heads) == bool(head_dim):
        raise UserError(
            f"give either num_heads or head_dim, not both or neither: got num_heads={num_heads} "
            f"and head_dim={head_dim}"
        )
    if channels % (num_heads or head_dim):
        given = f"num_heads={num_heads}" if num_heads else f"head_dim={head_dim}"
        raise UserError(f"{given} does not divide the {channels} channels of an attention block")
    return num_heads or channels // head_dim
