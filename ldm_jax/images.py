"""Pixels in and out: value ranges, grids, PNG files and nearest training images."""

from __future__ import annotations

import colorsys
import io
import math
import os
import pathlib

import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_jax.types import Array

AMPLIFICATION = 4  # of differences that are shown


def to_float(images: np.ndarray | Array) -> np.ndarray | Array:
    """Maps uint8 (..., 3) to float32 in [-1, 1]; NumPy gives NumPy, JAX gives JAX."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: np.ndarray | Array) -> np.ndarray | Array:
    """Maps floats in [-1, 1] to uint8, rounding and clipping; the inverse of `to_float`."""
    xp = np if isinstance(images, np.ndarray) else jnp
    levels = (images.astype(np.float32) + np.float32(1)) * np.float32(127.5)
    return xp.clip(xp.round(levels), 0, 255).astype(np.uint8)


def wide_columns(count: int) -> int:
    """Columns of a grid that is wider than high, and full where that is possible."""
    best = math.ceil(math.sqrt(count))
    return next((c for c in range(best, 2 * best + 1) if count % c == 0), best)


def make_grid(
    images: np.ndarray, columns: int | None = None, padding: int = 2, fill: int = 255
) -> np.ndarray:
    """Lays out (N, H, W, 3) uint8 row by row in one picture (H', W', 3) uint8.

    Without `columns` the grid is about square. `padding` pixels of grey level `fill` separate and
    surround the images.
    """
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = -(-count // columns)
    down, right = height + padding, width + padding
    grid = np.full((rows * down + padding, columns * right + padding, channels), fill, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * down + padding, i % columns * right + padding
        grid[top : top + height, left : left + width] = image
    return grid


def pairs_grid(
    samples: np.ndarray, neighbours: np.ndarray, columns: int | None = None, padding: int = 4
) -> np.ndarray:
    """A grid that shows each sample with its neighbour, both (N, H, W, 3) uint8, below it."""
    pairs = np.concatenate([samples, neighbours], axis=1)
    return make_grid(pairs, columns, padding)


def reconstruction_grid(
    images: np.ndarray, reconstructions: np.ndarray, columns: int | None = None, padding: int = 4
) -> np.ndarray:
    """A grid of images, their reconstructions below them, and the differences below these.

    Both are (N, H, W, 3) uint8; the differences are those of `show_difference`.
    """
    shown = show_difference(images, reconstructions)
    return make_grid(np.concatenate([images, reconstructions, shown], axis=1), columns, padding)


def show_difference(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """reconstruction - image, 4 times amplified around mid-grey; all are uint8 of one shape.

    A channel is at 128 where the two are equal, brighter where the reconstruction is, and saturated
    from 32 levels of difference on.
    """
    difference = reconstructions.astype(np.int16) - images
    return np.clip(128 + AMPLIFICATION * difference, 0, 255).astype(np.uint8)


def class_picture(classes: np.ndarray, count: int) -> np.ndarray:
    """A map (H, W) of `count` classes as colours (H, W, 3) uint8; class 0 is white."""
    hues = [colorsys.hsv_to_rgb(i / max(1, count - 1), 0.7, 0.8) for i in range(count - 1)]
    return np.round(255 * np.array([(1.0, 1.0, 1.0), *hues]))[classes].astype(np.uint8)


def encode_png(image: np.ndarray, colours: int = 0) -> bytes:
    """(H, W, 3) uint8 as a PNG; with `colours`, as a smaller one of at most so many, up to 256."""
    file = io.BytesIO()
    _write_png(file, image, colours)
    return file.getvalue()


def save_png(path: str | os.PathLike, image: np.ndarray, colours: int = 0) -> None:
    """Writes the PNG of `encode_png`, complete or not at all; makes the directory."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_png(temporary, image, colours)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_png(file: pathlib.Path | io.BytesIO, image: np.ndarray, colours: int) -> None:
    picture = Image.fromarray(image)
    if colours:
        picture = picture.quantize(colours, Image.Quantize.MEDIANCUT, dither=0)
    picture.save(file, format="PNG", optimize=bool(colours))


def save_numbered(
    directory: str | os.PathLike, images: np.ndarray, start: int = 0
) -> list[pathlib.Path]:
    """Writes (N, H, W, 3) uint8 as 000000.png, 000001.png, ... counted from `start`."""
    paths = [pathlib.Path(directory) / f"{start + i:06d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        save_png(path, image)
    return paths


def nearest(
    samples: np.ndarray, references: np.ndarray, chunk: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the reference that is nearest to each sample in pixel space.

    samples (N, ...) and references (M, ...) are uint8. Returns indices (N,) int64 and distances
    (N,) float64: the root mean square difference in grey levels, 0 for a copy, at most 255.
    Memory beyond the inputs is that of 2 * `chunk` float32 images.
    """
    best = np.zeros(len(samples), np.int64)
    for rows in _chunks(len(samples), chunk):
        a = _centred(samples[rows])
        least = np.full(len(a), np.inf, np.float32)
        for columns in _chunks(len(references), chunk):
            b = _centred(references[columns])
            # |a - b|^2 without |a|^2, which does not change the order
            squares = np.einsum("ij,ij->i", b, b) - 2 * (a @ b.T)
            smallest = squares.argmin(axis=1)
            value = squares[np.arange(len(a)), smallest]
            better = value < least
            best[rows] = np.where(better, columns.start + smallest, best[rows])
            least = np.where(better, value, least)
    # The expanded square loses digits in float32: the distance of a copy must be exactly 0.
    distances = np.array(
        [
            np.sqrt(np.mean((sample.astype(np.float64) - references[i]) ** 2))
            for sample, i in zip(samples, best, strict=True)
        ]
    )
    return best, distances


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _centred(images: np.ndarray) -> np.ndarray:
    """Flattens to (n, d) float32 around 0, where float32 products are most precise."""
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1
