"""How well images agree with what they were to show: boxes, maps, captions, holes, greys, strokes.

Images are uint8; boxes are (x0, y0, x1, y1) as shares of the image, y downwards. A judge, such as
the networks of `judge_networks`, may have said what the images show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy import ndimage

from ldm_jax.data.draws import Uniforms
from ldm_jax.diffusion.constraint import LUMA

Edges: TypeAlias = tuple[float, float, float, float]

_DERANGEMENT = 11  # stream of random numbers
_GROUND_DIFFERENCE = 32  # grey levels from which a pixel is not of the ground
_SPECK = 0.1  # a part of fewer pixels than this share of the largest one is none of the object


def derangement(count: int, seed: int = 0) -> np.ndarray:
    """Another row for each of `count` rows: (count,) int64, a permutation without fixed points.

    It is one cycle through all rows in random order; of a single row it is that row.
    """
    order = np.asarray(Uniforms(seed, _DERANGEMENT).permutation(count), np.int64)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, -1)
    return other


def box_iou(box: Edges, other: Edges) -> float:
    """Area in which two boxes overlap, divided by the area that they cover together."""
    wide = min(box[2], other[2]) - max(box[0], other[0])
    high = min(box[3], other[3]) - max(box[1], other[1])
    both = max(wide, 0.0) * max(high, 0.0)
    area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)) - both
    return both / area if area > 0 else 0.0


def extent_near(mask: np.ndarray, box: Edges) -> Edges:
    """The extent of what `mask` (H, W) bool marks near a box; of no area where that is nothing.

    Near is the box and half its sides around it. Connected parts far smaller than the largest one
    are left out: one wrong pixel would spoil an extent.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = box
    wide, high = (x1 - x0) / 2, (y1 - y0) / 2
    left, right = max(0, math.floor((x0 - wide) * width)), math.ceil((x1 + wide) * width)
    top, bottom = max(0, math.floor((y0 - high) * height)), math.ceil((y1 + high) * height)
    parts, count = ndimage.label(mask[top:bottom, left:right], np.ones((3, 3)))
    if not count:
        return (x0, y0, x0, y0)
    sizes = np.bincount(parts.ravel())[1:]
    kept = np.isin(parts, 1 + np.flatnonzero(sizes >= _SPECK * sizes.max()))
    columns, rows = np.flatnonzero(kept.any(0)), np.flatnonzero(kept.any(1))
    return (
        (left + columns[0]) / width,
        (top + rows[0]) / height,
        (left + columns[-1] + 1) / width,
        (top + rows[-1] + 1) / height,
    )


def inside(boxes: Sequence[Edges], size: tuple[int, int]) -> np.ndarray:
    """Where an image of `size` (H, W) is covered by boxes: (H, W) bool."""
    height, width = size
    x, y = (np.arange(width) + 0.5) / width, ((np.arange(height) + 0.5) / height)[:, None]
    covered = np.zeros(size, bool)
    for x0, y0, x1, y1 in boxes:
        covered |= (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    return covered


def differs_from_ground(image: np.ndarray, boxes: Sequence[Edges]) -> np.ndarray:
    """Where an image (H, W, 3) is unlike the median colour of what lies outside `boxes`: (H, W)."""
    ground = image[~inside(boxes, image.shape[:2])]
    colour = np.median(ground if len(ground) else image.reshape(-1, 3), axis=0)
    return np.abs(image - colour).max(-1) >= _GROUND_DIFFERENCE


def retrieval(
    images: np.ndarray, captions: np.ndarray, texts: Sequence[str], target: np.ndarray, among: int
) -> float:
    """Share of images that are most like the right caption among some.

    Args:
        images: (N, D) embeddings.
        captions: (M, D) embeddings; likeness is the product with that of an image.
        texts: the M captions. Another caption of the same words is no wrong answer.
        target: (N,) the place of each image's right caption.
        among: how many candidates: the right caption and others after it, in turn.
    """
    scores, right = images @ captions.T, 0
    for row, place in enumerate(target.tolist()):
        later = ((place + i) % len(texts) for i in range(1, len(texts)))
        others = [i for i in later if texts[i] != texts[place]][: among - 1]
        right += bool(np.all(scores[row, place] > scores[row, others]))
    return right / len(target)


def clip_score(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """CLIP score of images with embeddings (N, D) and their captions' (N, D): (N,), 0 to 100.

    100 max(cosine, 0), as most report it; Hessel et al. 2021, equation 1, have 2.5 in place of 100.
    """
    norms = np.linalg.norm(images, axis=1) * np.linalg.norm(captions, axis=1)
    return 100 * np.maximum((images * captions).sum(1) / norms, 0)


def agreement(
    found: np.ndarray, maps: np.ndarray, ground: int | None = None
) -> tuple[float, float]:
    """Share of pixels whose class is that of the maps (B, H, W): of all, and of those that the maps
    do not give the class `ground`; NaN where there are none, or no such class.
    """
    same, objects = found == maps, maps != ground
    if ground is None or not objects.any():
        return float(same.mean()), math.nan
    return float(same.mean()), float(same[objects].mean())


def colourfulness(images: np.ndarray) -> np.ndarray:
    """Colourfulness M of (B, H, W, 3) uint8: (B,), 0 for grey to over 100.

    Hasler & Suesstrunk 2003, "Measuring colourfulness in natural images", section 7.
    """
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = np.hypot(rg.std((1, 2)), yb.std((1, 2)))
    return spread + 0.3 * np.hypot(rg.mean((1, 2)), yb.mean((1, 2)))


def grey_levels(images: np.ndarray) -> np.ndarray:
    """The luma of (..., 3) uint8 as (...) uint8."""
    return np.clip(np.round(images @ np.float32(LUMA)), 0, 255).astype(np.uint8)


def luma_error(images: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Root mean square difference of the luma of (B, H, W, 3) uint8 to (B, H, W): (B,) levels."""
    error = images.astype(np.float64) @ np.array(LUMA) - grey
    return np.sqrt(np.square(error).mean((1, 2)))


def block_means(images: np.ndarray, block: int) -> np.ndarray:
    """Means of (B, H, W, C) over squares of `block` pixels, which divides the sides: float64."""
    count, height, width, channels = images.shape
    shape = (count, height // block, block, width // block, block, channels)
    return images.reshape(shape).mean((2, 4))


def stroke_distance(images: np.ndarray, strokes: np.ndarray) -> np.ndarray:
    """Root mean square difference of images, averaged over squares of 8x8, to strokes: (B,) levels.

    Both are (B, H, W, 3) uint8; the squares are smaller where 8 does not divide the sides.
    """
    block = math.gcd(8, *images.shape[1:3])
    error = block_means(images, block) - block_means(strokes, block)
    return np.sqrt(np.square(error).mean((1, 2, 3)))


def largest_change(images: np.ndarray, others: np.ndarray, hole: np.ndarray) -> int:
    """Largest difference of (B, H, W, 3) uint8, in levels, outside the hole (B, H, W) bool."""
    return int(np.abs(images.astype(int) - others)[~hole].max(initial=0))


def mean_colour_fill(images: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3) uint8 whose hole (B, H, W) bool has the mean colour of the rest."""
    filled = images.copy()
    for image, part in zip(filled, hole, strict=True):
        known = image[~part]
        image[part] = np.round(known.mean(0)).astype(np.uint8) if len(known) else 127
    return filled
