"""Sampling under a constraint on the image: the predicted x0 is corrected at every call."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from ldm_jax.diffusion.guidance import Denoise
from ldm_jax.diffusion.parameterization import to_prediction
from ldm_jax.diffusion.schedule import Level
from ldm_jax.types import Array, Prediction

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JPEG files and Pillow's grey images


def luma(images: Array) -> Array:
    """Colours (..., 3) -> their luma (...)."""
    return images @ jnp.asarray(LUMA, images.dtype)


def constrain(denoise: Denoise, project: Callable[[Array], Array]) -> Denoise:
    """Passes the x0 of each call through `project` (B, h, w, C) -> the same, with eps to match."""

    def constrained(x_t: Array, level: Level) -> Prediction:
        return to_prediction(project(denoise(x_t, level).x0), x_t, level, "x0")

    return constrained


def keep_luma(
    grey: Array, encode: Callable[[Array], Array], decode: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """Makes latents whose image has the luma `grey` (B, H, W), and the colours of what they were.

    The first stage loses something each time, so the change of the latents is what is added:
    z + encode(corrected image) - encode(image).
    """

    def project(latents: Array) -> Array:
        image = jnp.clip(decode(latents), -1, 1)
        corrected = jnp.clip(image + (grey - luma(image))[..., None], -1, 1)
        return latents + encode(corrected) - encode(image)

    return project
