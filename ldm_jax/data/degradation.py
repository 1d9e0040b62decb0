"""Small, spoilt versions of images, for super-resolution.

'bicubic' is a plain reduction. 'bsr' imitates what happens to real pictures: blur, two reductions,
noise and JPEG in random order, from Zhang et al. 2021, "Designing a practical degradation model for
deep blind image super-resolution", https://arxiv.org/abs/2103.14006, with the milder numbers that
Rombach et al. 2022 took for LDM-BSR (https://arxiv.org/abs/2112.10752, section D.6): the function
degradation_fn_bsr_light in ldm/modules/image_degradation/bsrgan_light.py of
github.com/CompVis/latent-diffusion. Milder than the original: one blur of half the width or less
instead of two, noise of 1 to 2 grey levels (2 to 25), JPEG quality of 80 to 95 (30 to 95), and no
camera noise.

One thing is not as there: a blur has 5, 7, ... 13 taps and not any number from 5 to 14. An even one
moves the picture by half a pixel, always to the same side, and models learn to undo that. (The
original has odd ones only.)
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ldm_jax.data import filters
from ldm_jax.data.draws import Uniforms
from ldm_jax.errors import UserError

KINDS = ("bicubic", "bsr")

_STEPS = ("blur", "reduce", "resize", "noise", "jpeg")
_JPEG_QUALITY = (80, 95)
_NOISE_LEVELS = (1, 2)  # standard deviation, of 255


def degrade(image: np.ndarray, factor: int, kind: str, random: Uniforms) -> np.ndarray:
    """Makes a low-resolution image in the way `kind` says, one of `KINDS`.

    Args:
        image: (H, W, 3) uint8.
        factor: of the reduction, a divisor of H and W.
        random: the result is a function of its numbers; 'bicubic' takes none.

    Returns:
        (H / factor, W / factor, 3) uint8.

    Raises:
        UserError: an unknown kind, or the factor does not divide the sides.
    """
    if kind == "bicubic":
        return bicubic_down(image, factor)
    if kind == "bsr":
        return bsr_down(image, factor, random)
    raise UserError(f"unknown kind of degradation '{kind}'; choose one of: {', '.join(KINDS)}")


def add_noise(image: np.ndarray, level: float, random: Uniforms) -> np.ndarray:
    """Noises a small image to a level, as the forward process would: sqrt(1 - s^2) x + s e.

    Noise-level augmentation (Ho et al. 2022, "Cascaded diffusion models", section 4.2, in its
    variance preserving form): a model that has seen such images does not rely on details that real
    small images, or those that another model made, do not have.

    Args:
        image: (H, W, 3) float32 in [-1, 1].
        level: s, in [0, 1); 0 returns the image itself.
        random: e is a function of its numbers.

    Returns:
        (H, W, 3) float32, no longer within [-1, 1].
    """
    if level == 0:
        return image
    kept = np.float32(np.sqrt(1 - float(level) ** 2))
    return kept * image + np.float32(level) * random.normal(image.shape)


def bicubic_down(image: np.ndarray, factor: int) -> np.ndarray:
    """Reduces (H, W, 3) uint8 to (H / factor, W / factor, 3) by an antialiased bicubic filter.

    Raises:
        UserError: the factor does not divide the sides.
    """
    height, width = _small_size(image, factor)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def bsr_down(image: np.ndarray, factor: int, random: Uniforms) -> np.ndarray:
    """Reduces (H, W, 3) uint8 to (H / factor, W / factor, 3) by the light BSR degradation.

    Raises:
        UserError: the factor does not divide the sides.
    """
    size = _small_size(image, factor)
    planes = _to_planes(image)
    if factor == 4 and random() < 0.25:  # a first halving, and milder effects after it
        factor = 2
        if random() < 0.5:
            half = (image.shape[0] // 2, image.shape[1] // 2)
            planes = _random_resize(planes, half, random)
        else:
            planes = _to_planes(bicubic_down(image, 2))

    order = [_STEPS[i] for i in random.permutation(len(_STEPS))]
    first, second = sorted((order.index("reduce"), order.index("resize")))
    order[first], order[second] = "reduce", "resize"
    for step in order:
        if step == "blur":
            planes = _random_blur(planes, factor, random)
        elif step == "reduce":  # to any size
            planes = _random_reduction(planes, factor, random)
        elif step == "resize":  # to the size that was asked for
            planes = _random_resize(planes, size, random)
        elif step == "noise":
            planes = np.clip(planes + random_noise(planes.shape[1:], random), 0, 255)
        elif random() < 0.9:
            planes = _to_planes(_random_jpeg(planes, random))
    return _random_jpeg(planes, random)


def random_noise(size: tuple[int, int], random: Uniforms) -> np.ndarray:
    """Gaussian noise of 1 to 2 grey levels for an image of (H, W): (3, H, W) float32.

    Of each colour by itself (0.4 of the time), the same for all, (1, H, W), (0.4), or correlated.
    """
    level = random.integer(*_NOISE_LEVELS)
    roll = random()
    if roll > 0.6:
        return level * random.normal((3, *size))
    if roll < 0.4:
        return level * random.normal((1, *size))
    basis, _, _ = np.linalg.svd(random.array((3, 3)))
    # The sign of a column of the basis is arbitrary, but makes no difference to the absolute value,
    # and taking that of a 3x3 covariance leaves it positive semidefinite.
    covariance = _NOISE_LEVELS[1] ** 2 * np.abs(basis.T @ np.diag(random.array(3)) @ basis)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # the one that has no free sign
    white = random.normal((3, *size))
    return np.stack([sum(np.float32(root[i, j]) * white[j] for j in range(3)) for i in range(3)])


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """What JPEG makes of (H, W, 3) uint8, with colour at half the resolution."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file))


def _random_blur(planes: np.ndarray, factor: int, random: Uniforms) -> np.ndarray:
    if random() < 0.5:
        most = (4 + factor) / 4
        # Kept from 0, where there is no Gaussian; as narrow as this it does not blur any more.
        variances = [max(most * random(), 1e-4) for _ in range(2)]
        size, angle = 2 * random.integer(2, 6) + 1, random.between(0, np.pi)
        axes = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
        kernel = filters.gaussian_kernel(size, axes @ np.diag(variances) @ axes.T)
        return filters.convolve(planes, kernel)
    size, most = 2 * random.integer(2, 3) + 1, (2 + 0.2 * factor) / 4
    sigma = max(most * random(), 1e-2)
    taps = (filters.gaussian_taps(length, size, sigma) for length in planes.shape[1:])
    return filters.filter_planes(planes, *taps)


def _random_reduction(planes: np.ndarray, factor: int, random: Uniforms) -> np.ndarray:
    _, height, width = planes.shape
    if random() < 0.8:
        by = random.between(1, 2 * factor)
        return _random_resize(planes, (max(1, int(height / by)), max(1, int(width / by))), random)
    # A blur, and of its result every factor-th pixel. The blur is off centre, by as much as brings
    # it to the middle of the pixels that one stands for.
    sigma, shift = random.between(0.1, 0.6 * factor), (factor - 1) / 2
    taps = (filters.gaussian_taps(length, 25, sigma, shift, factor) for length in (height, width))
    return filters.filter_planes(planes, *taps)


def _random_resize(planes: np.ndarray, size: tuple[int, int], random: Uniforms) -> np.ndarray:
    return np.clip(filters.resize(planes, size, random.choice(filters.RESIZES)), 0, 255)


def _random_jpeg(planes: np.ndarray, random: Uniforms) -> np.ndarray:
    levels = np.rint(planes).astype(np.uint8).transpose(1, 2, 0)
    return jpeg(np.ascontiguousarray(levels), random.integer(*_JPEG_QUALITY))


def _to_planes(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W) float32, still of 0 to 255."""
    return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)


def _small_size(image: np.ndarray, factor: int) -> tuple[int, int]:
    height, width, _ = image.shape
    if factor < 1 or height % factor or width % factor:
        raise UserError(
            f"an image of {height}x{width} cannot be reduced {factor} times: choose a factor that "
            "divides both sides"
        )
    return height // factor, width // factor
