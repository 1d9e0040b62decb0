"""Autoencoder with a vector-quantised bottleneck (Rombach et al. 2022, section 3.1, "VQ-reg.").

The diffusion model sees the latents before quantisation; `decode` quantises them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.first_stage.autoencoder import Autoencoder
from ldm_jax.types import Array

MOST_DISTANCES = 2**26


class Quantised(NamedTuple):
    """`z_q` (B, h, w, C) with straight-through gradients, `codes` (B, h, w) int32, `loss` (B,)."""

    z_q: Array
    codes: Array
    loss: Array


def nearest_codes(z: Array, codebook: Array) -> Array:
    """Indices of the Euclidean nearest entries: z (..., C), codebook (K, C) -> (...) int32.

    The product is always full float32: a faster one picks other codes. At most about
    `MOST_DISTANCES` distances are in memory at a time; the codebook is gone through in parts, so
    that the latents may be spread over devices.
    """
    flat = z.reshape(-1, z.shape[-1])
    count = -(-flat.shape[0] * codebook.shape[0] // MOST_DISTANCES)
    size = -(-codebook.shape[0] // count)
    padding = count * size - codebook.shape[0]
    squares = jnp.pad(jnp.square(codebook).sum(-1), (0, padding), constant_values=jnp.inf)
    entries = jnp.pad(codebook, ((0, padding), (0, 0)))

    def nearer(best: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[Any, None]:
        first, squares, entries = part
        products = jnp.matmul(flat, entries.T, precision=jax.lax.Precision.HIGHEST)
        distances = squares[None, :] - 2.0 * products
        codes, least = jnp.argmin(distances, axis=-1), distances.min(-1)
        closer = least < best[0]  # of equally near codes the first one counts
        return (
            jnp.where(closer, least, best[0]),
            jnp.where(closer, first + codes.astype(jnp.int32), best[1]),
        ), None

    start = jnp.full(flat.shape[0], jnp.inf), jnp.zeros(flat.shape[0], jnp.int32)
    parts = (
        size * jnp.arange(count, dtype=jnp.int32),
        squares.reshape(count, size),
        entries.reshape(count, size, -1),
    )
    if count == 1:
        (_, codes), _ = nearer(start, jax.tree.map(lambda part: part[0], parts))
    else:
        (_, codes), _ = jax.lax.scan(nearer, start, parts)
    return codes.reshape(z.shape[:-1])


def quantise(z: Array, codebook: Array, beta: float, legacy_beta: bool) -> Quantised:
    """Replaces each latent by its nearest code (van den Oord et al. 2017, equation 3).

    z (B, h, w, C), codebook (K, C). The loss is commitment + beta * codebook term if
    `legacy_beta`, as the published models were trained, else beta * commitment + codebook term;
    both are means over an example's elements.
    """
    codes = nearest_codes(jax.lax.stop_gradient(z), codebook)
    entries = jnp.take(codebook, codes, axis=0)
    commitment = jnp.square(jax.lax.stop_gradient(entries) - z).mean((1, 2, 3))
    movement = jnp.square(entries - jax.lax.stop_gradient(z)).mean((1, 2, 3))
    loss = commitment + beta * movement if legacy_beta else beta * commitment + movement
    return Quantised(z + jax.lax.stop_gradient(entries - z), codes, loss)


def code_counts(codes: Array, total: int) -> Array:
    """How often each of `total` codes is among (...) int32 -> (total,) float32."""
    return jnp.zeros(total, jnp.float32).at[codes.reshape(-1)].add(1.0)


def codebook_init(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """U(-1/K, 1/K) for a codebook (K, C)."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


class VQModel(Autoencoder):
    """Vector-quantised autoencoder: the fields of `Autoencoder`, M = C, and

    Attributes:
        codes: entries of the codebook.
        beta: weight of the commitment term or, with `legacy_beta`, of the codebook term.
        trained_codebook: whether the codebook has a gradient; otherwise someone else moves it, and
            the loss is the commitment term alone.
    """

    codes: int = 8192
    beta: float = 0.25
    legacy_beta: bool = True
    trained_codebook: bool = True

    def setup(self) -> None:
        self.make_networks(moments_per_channel=1)
        shape = (self.codes, self.channels)
        self.codebook = self.param("codebook", codebook_init, shape, jnp.float32)

    def sample(self, moments: Array, keys: Array) -> Array:
        """The same as `mode`: the bottleneck is deterministic, `keys` (B,) are not used."""
        return self.mode(moments)

    def mode(self, moments: Array) -> Array:
        """Latents before quantisation, scaled: (B, h, w, C) -> (B, h, w, C)."""
        return self.scaled(moments)

    def decode(self, latents: Array, quantize: bool = True) -> Array:
        """Scaled latents (B, h, w, C) -> images (B, H, W, 3) float32, not clipped."""
        z = self.unscaled(latents)
        if quantize:
            z = jnp.take(self.codebook, nearest_codes(z, self.codebook), axis=0)
        return self.decode_unscaled(z)

    def autoencode(
        self, images: Array, keys: Array | None = None, *, train: bool = False
    ) -> tuple[Array, dict]:
        """Images (B, H, W, 3) -> reconstruction of the same shape and `aux`; no `keys` needed.

        `aux`: 'codebook' (B,) the regularising loss, 'codes' (B, h, w) the nearest ones and
        'code_counts' (K,) how often the batch used each, 'latents' (B, h, w, C) before
        quantisation and scaling.
        """
        z = self.moments(images, train=train)
        if self.trained_codebook:
            quantised = quantise(z, self.codebook, self.beta, self.legacy_beta)
        else:
            quantised = quantise(z, jax.lax.stop_gradient(self.codebook), 0.0, True)
        counts = code_counts(quantised.codes, self.codes)
        aux = {"codebook": quantised.loss, "codes": quantised.codes, "code_counts": counts}
        return self.decode_unscaled(quantised.z_q, train), aux | {"latents": z}
