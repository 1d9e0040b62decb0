"""Conditioning on a text by CLIP's text transformer, as in Stable Diffusion v1."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioners.stored import stored_null, stored_text
from ldm_jax.conditioners.text import empty_text, repeat
from ldm_jax.nn.encoder import EncoderLayer, TokenEmbedding
from ldm_jax.nn.layers import LayerNorm
from ldm_jax.types import Array, Condition


class ClipText(nn.Module):
    """Encodes `batch['tokens']` (B, L) int into a context (B, L, width).

    Each token attends to itself and those before it (Radford et al. 2021, section 2.4); the context
    is the last hidden state after the final normalisation, and has no mask.

    Attributes:
        vocab_size: number of tokens; the last is the end of a text.
        width: channels of an embedding.
        depth: number of layers.
        heads: attention heads, each width / heads wide.
        mlp_width: hidden channels of the MLPs.
        length: number of positions: the longest L, and that of the null condition.
        activation: 'quick_gelu' in OpenAI's models, 'gelu' in many later ones.
        null_tokens: the tokens of the empty text, before padding; () if there is no null condition.
        pad_token: fills up a text to `length`.
        dtype: of the matrix products.
    """

    vocab_size: int = 49408
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    length: int = 77
    activation: str = "quick_gelu"
    null_tokens: tuple[int, ...] = (49406, 49407)
    pad_token: int = 49407
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.embed = TokenEmbedding(self.vocab_size, self.length, self.width)
        self.layers = [
            EncoderLayer(
                self.heads,
                self.width // self.heads,
                self.mlp_width,
                activation=self.activation,
                dtype=self.dtype,
            )
            for _ in range(self.depth)
        ]
        self.norm_out = LayerNorm()

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The context of a batch; a stored one if it has `text_context`."""
        stored = stored_text(batch)
        return Condition(context=self.encode(batch["tokens"])) if stored is None else stored

    def null(self, batch_size: int) -> Condition:
        """The context of the empty text; raises UserError if there is none."""
        stored = stored_null(self, batch_size)
        if stored is not None:
            return stored
        tokens = empty_text(self.null_tokens, self.pad_token, self.length)
        return Condition(context=repeat(self.encode(tokens), batch_size))

    def encode(self, tokens: Array) -> Array:
        """Embeds tokens: (B, L) int, L <= length -> (B, L, width) float32."""
        return self.norm_out(self.hidden_states(tokens)[-1])

    def pooled(self, tokens: Array) -> Array:
        """Embeds whole texts: (B, L) int -> (B, width), the state of the first end token.

        Like the original, it takes the greatest token of a text for the end.
        """
        end = jnp.argmax(tokens, axis=1)
        return jnp.take_along_axis(self.encode(tokens), end[:, None, None], axis=1)[:, 0]

    def hidden_states(self, tokens: Array) -> list[Array]:
        """The embeddings and what each layer makes of them: depth + 1 times (B, L, width)."""
        states = [self.embed(tokens)]
        causal = jnp.asarray(np.tri(tokens.shape[1], dtype=bool))[None]
        for layer in self.layers:
            states.append(layer(states[-1], causal))
        return states
