"""Where a token lies on a map: sine-cosine embeddings, and rotations of queries and keys."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array


def grid(height: int, width: int) -> np.ndarray:
    """Row and column of each token of a map, row by row: (height * width, 2) float64."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows, columns], axis=-1).reshape(-1, 2).astype(np.float64)


def axial_angles(positions: np.ndarray, count: int, max_period: float) -> np.ndarray:
    """Angles of `count` frequencies per axis: (N, 2) -> (N, 2, count) float64.

    Frequency i is max_period^(-i / count), so angles are radians and positions whole tokens.
    """
    frequencies = max_period ** (-np.arange(count, dtype=np.float64) / count)
    return positions[:, :, None] * frequencies


def sincos_embedding(positions: np.ndarray, width: int) -> np.ndarray:
    """The fixed embedding of DiT (Peebles & Xie 2023): (N, 2) -> (N, width) float32.

    Half of the channels hold the sines and cosines of the column, the other half of the row, as in
    the published models; `width` is a multiple of 4.
    """
    angles = axial_angles(positions, width // 4, 10000.0)[:, ::-1]
    parts = np.stack([np.sin(angles), np.cos(angles)], axis=2)  # (N, axis, sin or cos, width / 4)
    return parts.reshape(len(positions), width).astype(np.float32)


def rotary_angles(positions: np.ndarray, head_dim: int) -> np.ndarray:
    """Angles of axial rotary positions: (N, 2) -> (N, head_dim / 2) float32.

    Half of the pairs of channels turn with the row, half with the column. The base 100, in place of
    the 10000 of texts, fits the few positions along the side of an image (Heo et al. 2024).
    `head_dim` is a multiple of 4.
    """
    angles = axial_angles(positions, head_dim // 4, 100.0)
    return angles.reshape(len(positions), head_dim // 2).astype(np.float32)


def rotate(tokens: Array, angles: Array) -> Array:
    """Turns pairs of channels by their angles (Su et al. 2021), in float32 inside.

    tokens (B, T, heads, D), angles (T, D / 2) -> (B, T, heads, D). Channel i pairs with D / 2 + i.
    A product of a turned query and a turned key depends on the difference of their positions only.
    """
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(tokens.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(tokens.dtype)
