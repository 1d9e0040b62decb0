"""Networks on images larger than they were made for: overlapping crops, stitched by weight.

Two ways. `scan_tiles` takes one tile after the other, in the memory of one, at places that cover an
image of any size; that is what sampling uses. `apply_in_tiles` is the original code's: all crops in
one batch, weighted by their distance to the border, on images that the strides cover exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Apply
from ldm_jax.errors import UserError
from ldm_jax.types import Array, Condition

CLIP = (0.01, 0.5)
OVERLAP = 4  # neighbours of `starts` share 1 / OVERLAP of a tile, or more


class Tiling(NamedTuple):
    """Which crops are taken and how much each of their pixels counts.

    Attributes:
        kernel: (height, width) of a crop.
        stride: (down, right) from one crop to the next.
        clip: smallest and largest weight of a pixel, by its distance to the crop's border as a
            share of the crop's side.
        tie_clip: the same for whole crops, by their distance to the border of the image; None
            gives all crops the same weight.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    clip: tuple[float, float] = CLIP
    tie_clip: tuple[float, float] | None = None

    def counts(self, size: tuple[int, int]) -> tuple[int, int]:
        """Crops along height and width of an image of `size`.

        Raises:
            UserError: the crops do not end where the image does.
        """
        for side, kernel, stride in zip(size, self.kernel, self.stride, strict=True):
            if not 1 <= stride <= kernel <= side or (side - kernel) % stride:
                raise UserError(
                    f"crops of {kernel} with stride {stride} do not cover a side of {side}: "
                    "it must be the crop plus a multiple of the stride, and stride <= crop"
                )
        down, right = ((n - k) // s + 1 for n, k, s in zip(size, *self[:2], strict=True))
        return down, right

    def scaled(self, factor: int) -> Tiling:
        """The tiling of an image that is `factor` times larger."""
        return self._replace(
            kernel=(factor * self.kernel[0], factor * self.kernel[1]),
            stride=(factor * self.stride[0], factor * self.stride[1]),
        )

    def weights(self, size: tuple[int, int]) -> np.ndarray:
        """Weight (L, height, width) float64 of each pixel of each crop, row after row of crops.

        Raises:
            UserError: the crops do not cover the image, or its border would have no weight.
        """
        for name, ends in (("clip", self.clip), ("tie_clip", self.tie_clip or CLIP)):
            if not 0 < ends[0] <= ends[1]:
                raise UserError(f"{name} must be two numbers 0 < smallest <= largest, not {ends}")
        pixels = np.clip(border_distance(*self.kernel), *self.clip)
        crops = np.ones(self.counts(size))
        if self.tie_clip is not None:
            crops = np.clip(border_distance(*crops.shape), *self.tie_clip)
        return crops.reshape(-1, 1, 1) * pixels


def border_distance(height: int, width: int) -> np.ndarray:
    """Distance (height, width) of each place to the nearest border, whose sides have length 1."""

    def along(count: int) -> np.ndarray:
        place = np.arange(count) / max(count - 1, 1)
        return np.minimum(place, 1 - place)

    return np.minimum(along(height)[:, None], along(width)[None, :])


def crop(x: Array, tiling: Tiling) -> Array:
    """Cuts x (B, H, W, C) into crops (L * B, h, w, C): all of the first place, then the next."""
    rows, columns = _indices(x.shape[1:3], tiling)
    crops = x[:, rows[:, None, :, None], columns[None, :, None, :]]  # (B, Ly, Lx, h, w, C)
    crops = crops.reshape(x.shape[0], -1, *tiling.kernel, x.shape[-1])
    return crops.swapaxes(0, 1).reshape(-1, *crops.shape[2:])


def stitch(crops: Array, size: tuple[int, int], tiling: Tiling) -> Array:
    """Joins crops (L * B, h, w, C) to the weighted mean (B, H, W, C), where size = (H, W)."""
    rows, columns = _indices(size, tiling)
    places = rows[:, None, :, None], columns[None, :, None, :]
    weights = tiling.weights(size)
    grid = (len(rows), len(columns), *tiling.kernel)
    total = np.zeros(size)
    np.add.at(total, places, weights.reshape(grid))
    share = (weights.reshape(grid) / total[places]).astype(np.float32)

    crops = crops.reshape(*grid[:2], -1, *crops.shape[1:]).transpose(2, 0, 1, 3, 4, 5)
    out = jnp.zeros((crops.shape[0], *size, crops.shape[-1]), crops.dtype)
    return out.at[:, *places].add(crops * share[None, ..., None])


def apply_in_tiles(
    apply: Callable[[Any], Array],
    x: Any,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    factor: int = 1,
    clip: tuple[float, float] = CLIP,
    tie_clip: tuple[float, float] | None = None,
) -> Array:
    """Applies a function to all crops in one batch and stitches what it returns.

    Args:
        apply: maps crops (L * B, h, w, C) to (L * B, factor * h, factor * w, C').
        x: (B, H, W, C), or a tree of such arrays of one size, which are cropped alike.
        kernel: (h, w) of a crop.
        stride: (down, right) from one crop to the next.
        factor: how much larger `apply` makes a crop, e.g. a decoder's 8.
        clip: see `Tiling`.
        tie_clip: see `Tiling`.

    Returns:
        (B, factor * H, factor * W, C').

    Raises:
        UserError: the crops do not cover the image, or weights that are not positive.
    """
    tiling = Tiling(kernel, stride, clip, tie_clip)
    height, width = jax.tree.leaves(x)[0].shape[1:3]
    out = apply(jax.tree.map(lambda image: crop(image, tiling), x))
    return stitch(out, (factor * height, factor * width), tiling.scaled(factor))


def tiled(
    apply: Apply,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    clip: tuple[float, float] = CLIP,
    tie_clip: tuple[float, float] | None = None,
) -> Apply:
    """Makes a denoiser `(x_t, t, cond) -> raw` work crop by crop; `cond.concat` is cropped, too."""

    def whole(x_t: Array, t: Array, cond: Condition | None) -> Array:
        concat = None if cond is None else cond.concat

        def on_crops(crops: tuple[Array, Array | None]) -> Array:
            count = crops[0].shape[0] // x_t.shape[0]
            repeat = lambda x: jnp.tile(x, (count,) + (1,) * (x.ndim - 1))  # noqa: E731
            times, told = repeat(t), cond
            if cond is not None:
                told = jax.tree.map(repeat, cond.replace(concat=None)).replace(concat=crops[1])
            return apply(crops[0], times, told)

        return apply_in_tiles(on_crops, (x_t, concat), kernel, stride, clip=clip, tie_clip=tie_clip)

    return whole


def starts(side: int, tile: int) -> np.ndarray:
    """Where tiles begin along a side, (n,) int64: as few as overlap by a quarter, evenly spread.

    The first begins and the last ends where the side does; a side within one tile has one.
    """
    if side <= tile:
        return np.zeros(1, np.int64)
    count = -(-(side - tile) // (tile - tile // OVERLAP)) + 1
    return np.linspace(0, side - tile, count).round().astype(np.int64)


def fade(starts: np.ndarray, tile: int) -> np.ndarray:
    """Weight (n, tile) float32 of each place of each tile along a side; they add up to one.

    A tile takes over from the one before it linearly across their overlap.
    """
    begin, end = starts[1:, None], starts[:-1, None] + tile
    places = starts[:, None] + np.arange(tile) + 0.5
    taken, given = np.ones(places.shape), np.zeros(places.shape)
    taken[1:] = np.clip((places[1:] - begin) / (end - begin), 0, 1)
    given[:-1] = np.clip((places[:-1] - begin) / (end - begin), 0, 1)
    return (taken - given).astype(np.float32)


def scan_tiles(
    apply: Callable[[Any], Array], x: Any, tile: int, scale: tuple[int, int] = (1, 1)
) -> Array:
    """Applies a function to one tile after the other inside a program, and blends what it returns.

    The memory is that of `apply` on one tile of each image, and of the whole result. With the
    places and weights of `starts` and `fade`, a function of single pixels comes back undisturbed.

    Args:
        apply: maps (B, a * h, a * w, C) to (B, b * h, b * w, C'), where (a, b) = `scale`.
        x: (B, a * H, a * W, C), or a tree of such arrays, which are cut alike.
        tile: the largest h and w, at least OVERLAP; sides within it are not cut.
        scale: (factor, 1) for an encoder, (1, factor) for a decoder.

    Returns:
        (B, b * H, b * W, C').
    """
    a, b = scale
    sides = tuple(side // a for side in jax.tree.leaves(x)[0].shape[1:3])
    shape = tuple(min(side, tile) for side in sides)
    if shape == sides:
        return apply(x)
    rows, columns = (starts(side, t) for side, t in zip(sides, shape, strict=True))
    down, across = (fade(b * at, b * t) for at, t in zip((rows, columns), shape, strict=True))
    places = np.array(list(np.ndindex(len(rows), len(columns))))

    def cut(array: Array, place: tuple[Array, Array], factor: int) -> Array:
        begin = (0, factor * place[0], factor * place[1], 0)
        size = (array.shape[0], factor * shape[0], factor * shape[1], array.shape[3])
        return jax.lax.dynamic_slice(array, begin, size)

    def on_tile(index: Array) -> tuple[Array, tuple[Array, Array]]:
        place = jnp.asarray(rows)[index[0]], jnp.asarray(columns)[index[1]]
        out = apply(jax.tree.map(lambda array: cut(array, place, a), x))
        weight = jnp.asarray(down)[index[0]][:, None] * jnp.asarray(across)[index[1]][None]
        return out * weight[None, ..., None].astype(out.dtype), place

    def add(canvas: Array, index: Array) -> tuple[Array, None]:
        out, place = on_tile(index)
        begin = (0, b * place[0], b * place[1], 0)
        return jax.lax.dynamic_update_slice(canvas, cut(canvas, place, b) + out, begin), None

    out = jax.eval_shape(lambda: on_tile(jnp.asarray(places[0]))[0])
    canvas = jnp.zeros((out.shape[0], b * sides[0], b * sides[1], out.shape[3]), out.dtype)
    return jax.lax.scan(add, canvas, jnp.asarray(places))[0]


def tiled_in_turn(apply: Apply, tile: int) -> Apply:
    """Makes a denoiser `(x_t, t, cond) -> raw` work tile by tile, see `scan_tiles`.

    `cond.concat` is cut like x_t; the other slots, which have no places, are told to every tile.
    """

    def whole(x_t: Array, t: Array, cond: Condition | None) -> Array:
        concat = None if cond is None else cond.concat

        def on_tile(pair: tuple[Array, Array | None]) -> Array:
            return apply(pair[0], t, cond if cond is None else cond.replace(concat=pair[1]))

        return scan_tiles(on_tile, (x_t, concat), tile)

    return whole


def _indices(size: tuple[int, int], tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """Rows (Ly, h) and columns (Lx, w) of all crops."""
    starts = (np.arange(n) * s for n, s in zip(tiling.counts(size), tiling.stride, strict=True))
    rows, columns = (
        start[:, None] + np.arange(k) for start, k in zip(starts, tiling.kernel, strict=True)
    )
    return rows, columns
