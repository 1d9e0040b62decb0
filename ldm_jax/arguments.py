"""Checks of the settings and arrays that callers of a pipeline give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import images
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.guidance import Guidance
from ldm_jax.diffusion.schedule import Process
from ldm_jax.diffusion.tiles import OVERLAP
from ldm_jax.errors import UserError
from ldm_jax.first_stage.tiled import check_sides

# Up to so many times the training side, images are made at once where nothing else is said, by kind
# of denoiser. A transformer knows no positions beyond those that it was trained on.
AT_ONCE = {"unet": 2, "dit": 1}


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

    `tile` None chooses: a UNet is convolutional, and holds up to twice the training size; beyond
    that, and a transformer beyond the training size, networks see tiles of the training size. 0
    makes images at once.

    Raises:
        UserError: a tile that the model cannot take.
    """
    unit, resolution = _unit(config), config.data.resolution
    least = -(-OVERLAP * config_lib.downsampling(config) // unit) * unit
    if tile is None:
        most = AT_ONCE[config.denoiser.kind] * resolution
        tile = max(resolution, least) if max(size) > most else 0
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


def choose_scale(
    config: ConfigDict,
    scale: float | None,
    condition: Mapping[str, Any] | None,
    negative: Mapping[str, Any] | None = None,
    weak: Any | None = None,
) -> float:
    """Returns the guidance scale; None is what `config.sample` says, or 1 with nothing to guide.

    The other arguments are those of `Pipeline.sample`.

    Raises:
        UserError: a scale of what is the null condition already.
    """
    read = [name for name in condition or () if name != "label" or name in config.conditioners]
    if read or negative is not None or weak is not None:
        return config.sample.guidance_scale if scale is None else scale
    if scale not in (None, 1) and config_lib.has_null(config):  # else it is refused for that
        raise UserError(
            f"guidance_scale is {scale}, but without a condition there is nothing to guide: give "
            "one, such as a class or a caption, or leave guidance_scale away"
        )
    return 1.0 if scale is None else scale


def make_guidance(
    config: ConfigDict,
    scale: float | None = None,
    rescale: float | None = None,
    interval: tuple[float, float] | None = None,
    negative: bool = False,
    *,
    weak: bool = False,
    weights: Sequence[float] = (),
    classifier_scale: float = 0.0,
) -> Guidance:
    """Returns the guidance of these settings; None is what `config.sample` says.

    Args:
        config: of the model.
        scale: see `Guidance`, as for `rescale`, `weights` and `classifier_scale`; 0 of these and a
            scale of 1 are off.
        rescale: of the guided output.
        interval: in shares of the time range.
        negative: whether a condition takes the place of the null one.
        weak: whether guidance leads away from a weaker model.
        weights: of further conditions.
        classifier_scale: of the gradient of a classifier.

    Raises:
        UserError: a setting outside its range, or without what it needs.
    """
    s = config.sample
    scale = _number("guidance_scale", s.guidance_scale if scale is None else scale)
    weights = tuple(_number("a weight of `also`", weight) for weight in weights)
    classifier_scale = _number("classifier_scale", classifier_scale)
    guided = scale != 1 or bool(weights) or classifier_scale != 0
    # Without guidance what the config says of it is off, and what the caller says is refused.
    defaults = (s.guidance_rescale, s.guidance_interval) if guided else (0.0, (0.0, 1.0))
    rescale = defaults[0] if rescale is None else rescale
    interval = defaults[1] if interval is None else interval
    if scale != 1 and not weak and not config_lib.has_null(config):
        raise UserError(
            f"guidance_scale is {scale}, but this model has no null condition to guide away from: "
            "use 1, or a weaker model (autoguidance)"
        )
    if weights and not config_lib.has_null(config):
        raise UserError(
            "conditions are composed by what each adds to the null condition, and this model has "
            "none: leave `also` away"
        )
    if weak and scale == 1:
        raise UserError("autoguidance needs a guidance_scale other than 1")
    if weak and negative:
        raise UserError(
            "autoguidance leads away from a weaker model, so there is no place for a negative "
            "condition: leave one of them away, or give it to `also` with a weight below 0"
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
    if negative and scale == 1 and not weights:
        raise UserError("a negative condition needs a guidance_scale other than 1")
    for name, used in (("guidance_rescale", rescale > 0), ("guidance_interval", not whole)):
        if used and not guided:
            raise UserError(f"{name} needs a guidance_scale other than 1, or another guidance")
    return Guidance(
        scale,
        rescale or None,
        None if whole else (low * config.diffusion.steps, high * config.diffusion.steps),
        weights,
        classifier_scale or None,
    )


def _number(name: str, value: Any) -> float:
    """Returns a finite number, or raises UserError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} is {value}, but must be a number")
    return number


def choose_table(
    config: ConfigDict,
    process: Process,
    sampler: str,
    steps: int | None,
    eta: float | None,
    spacing: str | None,
    strength: float,
    resample: tuple[int, int],
) -> samplers.Table:
    """Returns the sampler's table; None is what `config.sample` says. See `Pipeline.sample`.

    Raises:
        UserError: a setting outside its range, or that the sampler does not know.
    """
    s = config.sample
    return samplers.make_table(
        sampler,
        process,
        s.steps if steps is None else steps,
        samplers.nearest_eta(sampler, s.eta) if eta is None else eta,
        s.spacing if spacing is None else spacing,
        strength,
        resample,
    )


def check_pictures(
    count: int,
    size: tuple[int, int],
    init_image: Any | None,
    image: Any | None,
    hole: Any | None,
    grey: Any | None,
) -> dict[str, np.ndarray | None]:
    """Returns the pictures that sampling starts from or keeps, as `Networks.generate` takes them.

    Raises:
        UserError: not one for each of `count` seeds of `size`, or an image without its hole.
    """
    if (image is None) != (hole is None):
        raise UserError("give image and hole together: what is kept, and where it is not")
    init_image = check_rows("init_image", init_image, (count, *size, 3))
    image = check_rows("image", image, (count, *size, 3))
    grey = check_rows("grey", grey, (count, *size))
    hole = check_rows("hole", hole, (count, *size))
    hole = None if hole is None else hole.astype(bool)
    if hole is not None and hole.all((1, 2)).any():
        raise UserError("a hole that is the whole image keeps nothing: leave image and hole away")
    grey = None if grey is None else images.to_float(grey)
    return {"start": init_image, "image": image, "hole": hole, "grey": grey}


def check_noise(noise: Any | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns noise as float32 of `shape`, or None for None; UserError for another shape."""
    if noise is None:
        return None
    noise = np.asarray(noise, np.float32)
    if noise.shape != shape:
        raise UserError(f"noise has the shape {noise.shape}, but must be {shape}")
    return noise


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
