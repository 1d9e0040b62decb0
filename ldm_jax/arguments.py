"""Checks of the arrays that callers of a pipeline give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.first_stage.tiled import check_sides


def check_seeds(seeds: Sequence[int]) -> np.ndarray:
    """Returns seeds as (B,) uint32, or raises UserError."""
    seeds = np.asarray(seeds)
    if seeds.ndim != 1 or not len(seeds) or seeds.dtype.kind not in "iu":
        raise UserError("seeds must be a list of at least one whole number")
    if seeds.min() < 0 or seeds.max() >= 2**32:
        raise UserError("seeds must lie in 0 to 4294967295")
    return seeds.astype(np.uint32)


def check_rows(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns an array of uint8 or bool, or None for None; UserError for another shape."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.shape != shape or array.dtype not in (np.uint8, np.bool_):
        raise UserError(
            f"{name} is {array.dtype} of the shape {array.shape}, but must be uint8 (or bool) "
            f"{shape}: one for each seed, of the size that is made"
        )
    return array


def check_pixels(pixels: Any, factor: int) -> np.ndarray:
    """Returns uint8 or finite float32 images with sides that `factor` divides, or raises."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise UserError(
            f"images have the shape {pixels.shape}, but must be (B, H, W, 3): "
            "ldm_jax.data.decode.decode_image makes RGB of any file"
        )
    check_sides(*pixels.shape[1:3], factor)
    if pixels.dtype == np.uint8:
        return pixels
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise UserError(f"images are {pixels.dtype}, but must be uint8, or float32 in [-1, 1]")
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise UserError("images hold NaN or infinite values: give uint8, or float32 in [-1, 1]")
    return pixels
