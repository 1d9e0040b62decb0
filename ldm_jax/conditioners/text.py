"""Conditioning on a sequence of tokens by a transformer that is trained with the denoiser."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.nn.encoder import EncoderLayer, TokenEmbedding
from ldm_jax.nn.layers import LayerNorm
from ldm_jax.types import Array, Condition


class TextTransformer(nn.Module):
    """Encodes the tokens of a batch, `batch[field]` (B, L) int, into a context (B, L, width).

    The transformer of the original text-to-image and layout-to-image models (Rombach et al. 2022,
    appendix E.2.1): normalisation first, learned positions, and padding is attended to like any
    other token, so the context has no mask.

    Attributes:
        vocab_size: number of tokens.
        width: channels of an embedding; the MLPs are four times as wide.
        depth: number of layers.
        heads: attention heads.
        head_dim: width of a head; heads * head_dim need not be `width`.
        length: number of positions: the longest L, and that of the null condition.
        field: of the batch: 'tokens' for a text, 'boxes' for a layout.
        null_tokens: the tokens of the empty text, before padding; () if there is no null condition.
        pad_token: fills up a text to `length`.
        dtype: of the matrix products.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int = 8
    head_dim: int = 64
    length: int = 77
    field: str = "tokens"
    null_tokens: tuple[int, ...] = (101, 102)
    pad_token: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.embed = TokenEmbedding(self.vocab_size, self.length, self.width)
        self.layers = [
            EncoderLayer(
                self.heads, self.head_dim, 4 * self.width, qkv_bias=False, dtype=self.dtype
            )
            for _ in range(self.depth)
        ]
        self.norm_out = LayerNorm()

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The context of a batch."""
        return Condition(context=self.encode(batch[self.field]))

    def null(self, batch_size: int) -> Condition:
        """The context of the empty text; raises UserError if there is none."""
        tokens = empty_text(self.null_tokens, self.pad_token, self.length)
        return Condition(context=repeat(self.encode(tokens), batch_size))

    def encode(self, tokens: Array, mask: Array | None = None) -> Array:
        """Embeds tokens: (B, L) int, L <= length -> (B, L, width) float32.

        `mask` (B, L) bool keeps pairs of tokens from each other unless it is True for both.
        """
        x = self.embed(tokens)
        pairs = None if mask is None else mask[:, :, None] & mask[:, None, :]
        for layer in self.layers:
            x = layer(x, pairs)
        return self.norm_out(x)


def empty_text(null_tokens: tuple[int, ...], pad_token: int, length: int) -> Array:
    """The tokens of the empty text: (1, length) int32.

    Raises:
        UserError: there are none, so there is no null condition, or more than `length`.
    """
    if not null_tokens:
        raise UserError(
            "this model has no null text (null_tokens is empty), so it cannot be guided: use "
            "guidance_scale 1"
        )
    if len(null_tokens) > length:
        raise UserError(f"the {len(null_tokens)} null_tokens do not fit into length {length}")
    padding = (pad_token,) * (length - len(null_tokens))
    return jnp.asarray(np.array([null_tokens + padding], np.int32))


def repeat(encoded: Any, batch_size: int) -> Any:
    """Repeats what was encoded once for all examples: a tree of (1, ...) -> (batch_size, ...)."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, *x.shape[1:])), encoded)
