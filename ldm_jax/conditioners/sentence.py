"""Conditioning on a text by a sentence encoder of the BERT architecture, such as MiniLM."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.conditioners.stored import stored_null, stored_text
from ldm_jax.conditioners.text import empty_text, repeat
from ldm_jax.errors import UserError
from ldm_jax.nn.encoder import EncoderLayer, TokenEmbedding
from ldm_jax.nn.layers import LayerNorm
from ldm_jax.types import Array, Condition

EPSILON = 1e-12  # of BERT's layer normalisations


class SentenceEncoder(nn.Module):
    """Encodes `batch['tokens']` (B, L) int into a context (B, L, width) with a mask.

    BERT (Devlin et al. 2019): normalisation last, learned positions, and padding is masked. The
    batch may give the mask, `tokens_mask` (B, L) bool, True for tokens; else it follows from
    `pad_token`.

    Attributes:
        vocab_size: number of tokens.
        width: channels of an embedding.
        depth: number of layers.
        heads: attention heads, each width / heads wide.
        mlp_width: hidden channels of the MLPs.
        length: tokens of a text, and of the null condition.
        positions: rows of the table of positions, at least `length`.
        null_tokens: the tokens of the empty text, before padding; () if there is no null condition.
        pad_token: fills up a text to `length`.
        dtype: of the matrix products.
    """

    vocab_size: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    mlp_width: int = 1536
    length: int = 77
    positions: int = 512
    null_tokens: tuple[int, ...] = (101, 102)
    pad_token: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.length > self.positions:
            raise UserError(
                f"a sentence encoder of {self.positions} positions cannot read {self.length} "
                "tokens: choose a shorter length"
            )
        self.embed = TokenEmbedding(self.vocab_size, self.positions, self.width)
        # All tokens of a single text are of the first type.
        self.token_types = self.param(
            "token_types", nn.initializers.normal(0.02), (2, self.width), jnp.float32
        )
        self.norm_in = LayerNorm(EPSILON)
        self.layers = [
            EncoderLayer(
                self.heads,
                self.width // self.heads,
                self.mlp_width,
                norm_last=True,
                epsilon=EPSILON,
                dtype=self.dtype,
            )
            for _ in range(self.depth)
        ]

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The context of a batch and its mask; stored ones if it has `text_context`."""
        stored = stored_text(batch)
        if stored is not None:
            return stored
        mask = self._mask(batch["tokens"], batch.get("tokens_mask"))
        return Condition(context=self.encode(batch["tokens"], mask), context_mask=mask)

    def null(self, batch_size: int) -> Condition:
        """The context of the empty text; raises UserError if there is none."""
        stored = stored_null(self, batch_size)
        if stored is not None:
            return stored
        tokens = empty_text(self.null_tokens, self.pad_token, self.length)
        return repeat(self({"tokens": tokens}), batch_size)

    def encode(self, tokens: Array, mask: Array | None = None) -> Array:
        """Embeds tokens: (B, L) int, L <= positions, mask (B, L) bool -> (B, L, width) float32."""
        x = self.embed(tokens) + self.token_types[None, :1]
        x, mask = self.norm_in(x), self._mask(tokens, mask)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def sentence(self, tokens: Array, mask: Array | None = None) -> Array:
        """Embeds whole texts: (B, L) int, mask (B, L) bool -> (B, width) of unit length.

        The mean over the tokens (Reimers & Gurevych 2019), so that dot products are similarities.
        """
        mask = self._mask(tokens, mask)
        states = self.encode(tokens, mask) * mask[..., None]
        mean = states.sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        norm = jnp.sqrt(jnp.square(mean).sum(-1, keepdims=True))
        return mean / jnp.maximum(norm, EPSILON)

    def _mask(self, tokens: Array, mask: Array | None) -> Array:
        return tokens != self.pad_token if mask is None else mask
