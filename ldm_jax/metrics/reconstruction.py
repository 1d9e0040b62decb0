"""How close images are to others, pixel by pixel and window by window: PSNR and SSIM."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.types import Array

RANGE = 2.0  # of the data, from -1 to 1
LARGEST_PSNR = 100.0
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(images: Array, others: Array) -> Array:
    """Peak signal-to-noise ratio of images (B, H, W, C) in [-1, 1] to others: (B,) dB float32.

    At most 100, which equal images get instead of infinity, so that means stay finite. Of 8-bit
    images that differ, only those with one level in over 150,000 elements come as far.

    Raises:
        UserError: the two have not the same shape (B, H, W, C).
    """
    a, b = _pair(images, others)
    error = jnp.square(a - b).mean((1, 2, 3))
    least = RANGE**2 * 10 ** (-LARGEST_PSNR / 10)
    return 10.0 * jnp.log10(RANGE**2 / jnp.maximum(error, least))


def ssim(images: Array, others: Array) -> Array:
    """Structural similarity of images (B, H, W, C) in [-1, 1] to others: (B,) float32, at most 1.

    Wang et al. 2004: Gaussian windows of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, covariances
    that are not corrected for the sample's size, only windows that lie inside the image, the mean
    over windows and channels.

    Raises:
        UserError: images smaller than a window, or not of the same shape (B, H, W, C).
    """
    a, b = _pair(images, others)
    if min(a.shape[1:3]) < WINDOW:
        size = f"{a.shape[1]}x{a.shape[2]}"
        raise UserError(f"SSIM needs images of at least {WINDOW}x{WINDOW}, got {size}")
    a, b = a + 1, b + 1  # its luminance term is one of intensities, which are not negative
    mean_a, mean_b = window_means(a), window_means(b)
    var_a = window_means(a * a) - mean_a * mean_a
    var_b = window_means(b * b) - mean_b * mean_b
    covariance = window_means(a * b) - mean_a * mean_b
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((1, 2, 3))


def window_means(x: Array) -> Array:
    """Means of (B, H, W, C) over Gaussian windows that lie inside: (B, H - 10, W - 10, C)."""
    places = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (places / SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    # Shifted sums, not a convolution: an accelerator would round its products to few digits, and
    # the variance is a small difference of two of these means.
    for axis in (1, 2):
        size = x.shape[axis] - WINDOW + 1
        along = [slice(None)] * axis
        x = sum(w * x[(*along, slice(i, i + size))] for i, w in enumerate(weights))
    return x


def _pair(images: Array, others: Array) -> tuple[Array, Array]:
    a, b = jnp.asarray(images, jnp.float32), jnp.asarray(others, jnp.float32)
    if a.ndim != 4 or a.shape != b.shape:
        raise UserError(f"expected two batches of images (B, H, W, C), got {a.shape}, {b.shape}")
    return a, b
