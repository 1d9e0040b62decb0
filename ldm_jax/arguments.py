"""Checks of the sizes and arrays that callers of a pipeline give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.diffusion.guidance import Guidance
from ldm_jax.diffusion.tiles import OVERLAP
from ldm_jax.errors import UserError
from ldm_jax.first_stage.tiled import check_sides

# Up to so many times the training side, images are made at once where nothing else is said.
CONVOLUTIONAL = 2


def check_size(config: ConfigDict, size: tuple[int, int] | None) -> tuple[int, int]:
    """Returns (height, width) in pixels, by default the training size, if it can be made.

    Raises:
        UserError: it cannot.
    """
    if size is None:
        return (config.data.resolution,) * 2
    unit = _unit(config)
    if "low_res" in config.conditioners:
        unit = math.lcm(unit, config.data.low_res.factor)
    if min(size) < 1 or size[0] % unit or size[1] % unit:
        raise UserError(
            f"images of {size[0]}x{size[1]} (height x width): this model makes multiples of {unit}"
        )
    return tuple(size)


def choose_tile(config: ConfigDict, size: tuple[int, int], tile: int | None) -> int | None:
    """Returns the side of the tiles in which images of `size` are made, in pixels; None: at once.

    `tile` None chooses: networks are convolutional, and hold up to twice the training size; beyond
    that they see tiles of the training size. 0 makes images at once.

    Raises:
        UserError: a tile that the model cannot take.
    """
    unit, resolution = _unit(config), config.data.resolution
    least = -(-OVERLAP * config_lib.downsampling(config) // unit) * unit
    if tile is None:
        tile = max(resolution, least) if max(size) > CONVOLUTIONAL * resolution else 0
    if tile and (tile < least or tile % unit):
        raise UserError(
            f"tiles of {tile} pixels: this model makes multiples of {unit}, and tiles of {least} "
            f"or more: try {max(least, tile // unit * unit)}"
        )
    return tile if tile and max(size) > tile else None


def latent_shape(config: ConfigDict, size: tuple[int, int]) -> tuple[int, int, int]:
    """(h, w, C) of the latents of one image of `size` = (height, width)."""
    factor = config_lib.downsampling(config)
    return (size[0] // factor, size[1] // factor, config_lib.latent_channels(config))


def _unit(config: ConfigDict) -> int:
    """What sides of images must be multiples of, in pixels, for first stage and denoiser."""
    return config_lib.downsampling(config) * config_lib.denoiser_unit(config)


def make_guidance(
    config: ConfigDict,
    scale: float,
    rescale: float,
    interval: tuple[float, float],
    negative: bool,
) -> Guidance:
    """Returns the guidance of these settings; `interval` is in shares of the time range.

    Raises:
        UserError: a setting outside its range, or without what it needs.
    """
    if not math.isfinite(scale):
        raise UserError(f"guidance_scale is {scale}, but must be a number")
    if scale != 1 and not config_lib.has_null(config):
        raise UserError(
            f"guidance_scale is {scale}, but this model has no null condition to guide away from: "
            "use 1"
        )
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance_rescale is {rescale}, but must be from 0 to 1")
    low, high = interval if len(interval) == 2 else (1, 0)
    if not 0 <= low < high <= 1:
        given = ",".join(f"{x:g}" for x in interval)
        raise UserError(
            f"guidance_interval is {given}, but must be two numbers 0 <= low < high <= 1"
        )
    whole = (low, high) == (0, 1)
    for name, used in (
        ("a negative condition", negative),
        ("guidance_rescale", rescale > 0),
        ("guidance_interval", not whole),
    ):
        if used and scale == 1:
            raise UserError(f"{name} needs a guidance_scale other than 1")
    steps = config.diffusion.steps
    return Guidance(scale, rescale or None, None if whole else (low * steps, high * steps))


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
