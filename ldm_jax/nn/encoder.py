"""Transformer encoder over tokens: the embedding and the layers that all text encoders share."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.nn.attention import attend
from ldm_jax.nn.layers import Dense, LayerNorm, along_last
from ldm_jax.types import Array

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}


def look_up(table: Array, indices: Array) -> Array:
    """Rows of a table: (N, C), (...) int -> (..., C); NaN for an index outside [0, N).

    Plain indexing would take the nearest row for it, without a word.
    """
    return (
        jnp.asarray(table)
        .at[indices]
        .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )


class TokenEmbedding(nn.Module):
    """Embeddings of tokens plus those of their positions: (B, L) int -> (B, L, width) float32.

    A token outside [0, vocab_size) gives NaN.

    Attributes:
        vocab_size: number of tokens.
        length: number of positions, the longest L.
        width: channels of an embedding.
    """

    vocab_size: int
    length: int
    width: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        init = nn.initializers.normal(0.02)
        table = self.param("tokens", init, (self.vocab_size, self.width), jnp.float32)
        positions = self.param("positions", init, (self.length, self.width), jnp.float32)
        count = tokens.shape[1]
        if count > self.length:
            raise UserError(
                f"{count} tokens are more than the {self.length} positions of the text encoder: "
                "truncate them"
            )
        return look_up(table, tokens) + positions[None, :count]


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer MLP, each residual: (B, L, C) -> the same.

    The residual stream keeps the type of `x` (float32): only the products are made in `dtype`.

    Attributes:
        heads: number of attention heads.
        head_dim: width of one; heads * head_dim need not be C.
        mlp_width: hidden channels of the MLP.
        activation: 'gelu' (exact), 'quick_gelu' or 'silu'.
        gated: the MLP's input layer also gives factors of what is activated (Shazeer 2020, with
            'silu': SwiGLU), as many again.
        layer_scale: each branch is multiplied by a weight for each channel before it is added
            (Touvron et al. 2021, "Going deeper with Image Transformers", section 2).
        qkv_bias: whether the projections to q, k and v have a bias.
        norm_last: normalise after each residual sum, as in BERT, and not before each branch.
        epsilon: of both layer normalisations.
    """

    heads: int
    head_dim: int
    mlp_width: int
    activation: str = "gelu"
    gated: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    norm_last: bool = False
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Encodes tokens; `mask` (B, L) or (B or 1, L, L) bool as in `attend`."""
        channels = x.shape[-1]
        dense = functools.partial(Dense, dtype=self.dtype)
        norms = [LayerNorm(self.epsilon, name=f"norm_{i}") for i in range(2)]

        def project(name: str, h: Array) -> Array:
            y = dense(self.heads * self.head_dim, use_bias=self.qkv_bias, name=name)(h)
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        def attention(h: Array) -> Array:
            h = attend(project("q", h), project("k", h), project("v", h), mask)
            return dense(channels, name="out")(h.reshape(*h.shape[:2], -1))

        def mlp(h: Array) -> Array:
            h = dense(self.mlp_width * (2 if self.gated else 1), name="mlp_in")(h)
            h, *factors = jnp.split(h, 2, axis=-1) if self.gated else (h,)
            h = ACTIVATIONS[self.activation](h)
            return dense(channels, name="mlp_out")(h * factors[0] if factors else h)

        def scaled(i: int, h: Array) -> Array:
            if not self.layer_scale:
                return h
            weights = self.param(f"scale_{i}", nn.initializers.ones, (channels,), jnp.float32)
            return h * along_last(weights, h.ndim)

        for i, branch in enumerate((attention, mlp)):
            if self.norm_last:
                x = norms[i](x + scaled(i, branch(x)))
            else:
                x = x + scaled(i, branch(norms[i](x)))
        return x
