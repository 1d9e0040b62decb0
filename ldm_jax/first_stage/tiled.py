"""Encoder and decoder on images that do not fit: overlapping tiles, one at a time.

The image lies in the host's memory, the network only ever sees a tile. Where one tile alone covers
a place, the result is that tile's; across an overlap, one fades linearly into the next. The same
tiles, inside a compiled program, are those of `ldm_jax.diffusion.tiles.scan_tiles`.

Group norms and attention see no further than a tile, so the result is not quite what the network
makes of the whole image, unless one tile covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import memory
from ldm_jax.diffusion.tiles import OVERLAP, fade, starts
from ldm_jax.errors import UserError
from ldm_jax.types import Array

# Bytes per pixel on the host. Of the image: as uint8, its reconstruction as float32 and as uint8.
# Of a tile: its result and the product of that with its weights.
CANVAS, BLENDING = 3 + 12 + 3, 12 + 12
Progress = Callable[[int, int], None]


class Memory(NamedTuple):
    """Bytes at most: `weights` and `tile` on the device, `canvas` on the host."""

    weights: int
    tile: int
    canvas: int

    def bound(self, what: str = "one tile") -> str:
        """The most that this process will hold, in words, with what it holds already.

        `what` is a name for that of which `tile` is the size.
        """
        held = memory.held_by_process()
        if memory.free_on_device() is None:  # the weights are among what it holds
            total = held + self.tile + self.canvas
            parts = f"{held / 1e9:.2f} now, {what} {self.tile / 1e9:.2f}"
            return f"at most {total / 1e9:.2f} GB ({parts}, canvas {self.canvas / 1e9:.2f})"
        device, host = self.weights + self.tile, held + self.canvas
        return f"at most {device / 1e9:.2f} GB on the device and {host / 1e9:.2f} GB on the host"

    def check_fits(self, name: str, way_out: str) -> None:
        """Checks that tile and canvas fit into what is free now; the weights are there already.

        Raises:
            UserError: they do not; the message begins with `name` and ends with `way_out`.
        """
        host, device = memory.free_on_host(), memory.free_on_device()
        wanted = [(self.tile, device), (self.canvas, host)]
        if device is None:  # both lie in the same memory
            wanted = [(self.tile + self.canvas, host)]
        for size, free in wanted:
            if free is not None and size > free:
                sizes = f"{size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
                raise UserError(f"{name} needs {sizes}: {way_out}")


class TiledFirstStage:
    """Encodes and decodes tile by tile; tiles of one shape share one compiled program.

    Args:
        encode: jitted (variables, pixels (B, H, W, 3)) -> latents (B, h, w, C).
        decode: jitted (variables, latents (B, h, w, C)) -> images (B, H, W, 3).
        factor: pixels per latent along one side.
        channels: C.
    """

    def __init__(self, encode: Any, decode: Any, factor: int, channels: int) -> None:
        self.encode_jit, self.decode_jit = encode, decode
        self.factor, self.channels = factor, channels
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def encode(
        self, variables: Any, pixels: np.ndarray, tile: int, progress: Progress | None = None
    ) -> np.ndarray:
        """Images (B, H, W, 3), side of a tile in pixels -> latents (B, h, w, C) float32.

        `progress` is called with the numbers of done and of all tiles, after each.

        Raises:
            UserError: a tile that the first stage cannot take.
        """
        scale = (self.factor, 1)
        return self._map(self.encode_jit, variables, pixels, tile, scale, progress)

    def decode(
        self, variables: Any, latents: np.ndarray, tile: int, progress: Progress | None = None
    ) -> np.ndarray:
        """Latents (B, h, w, C), side of a tile in pixels -> images (B, H, W, 3), not clipped.

        `progress` and the errors are those of `encode`.
        """
        scale = (1, self.factor)
        return self._map(self.decode_jit, variables, latents, tile, scale, progress)

    def memory(self, variables: Any, height: int, width: int, tile: int | None) -> Memory:
        """What encoding and decoding one uint8 image takes; compiles the programs, runs nothing.

        Without `tile`, one tile is as large as the image.
        """
        if tile is not None:
            check_tile(tile, self.factor)
        tall, wide = (min(side, tile or side) for side in (height, width))
        latents = (1, tall // self.factor, wide // self.factor, self.channels)
        programs = (
            self._program(self.encode_jit, variables, (1, tall, wide, 3), np.uint8),
            self._program(self.decode_jit, variables, latents, np.float32),
        )
        return Memory(
            weights=sum(x.nbytes for x in jax.tree.leaves(variables)),
            tile=max(map(memory.program_bytes, programs)) + BLENDING * tall * wide,
            canvas=height * width * CANVAS + 4 * self.channels * (height * width // self.factor**2),
        )

    def _map(
        self,
        function: Any,
        variables: Any,
        x: np.ndarray,
        tile: int,
        scale: tuple[int, int],
        progress: Progress | None,
    ) -> np.ndarray:
        check_tile(tile, self.factor)

        def apply(piece: np.ndarray) -> Array:
            return self._program(function, variables, piece.shape, piece.dtype)(variables, piece)

        return map_tiles(apply, x, tile // self.factor, scale, progress)

    def _program(
        self, function: Any, variables: Any, shape: tuple[int, ...], dtype: Any
    ) -> jax.stages.Compiled:
        key = function, shape, np.dtype(dtype)
        if key not in self._programs:
            example = jax.ShapeDtypeStruct(shape, dtype)
            self._programs[key] = function.lower(variables, example).compile()
        return self._programs[key]


def check_sides(height: int, width: int, factor: int, name: str = "images") -> None:
    """Checks the sides of images in pixels.

    Raises:
        UserError: `factor` does not divide them.
    """
    if height % factor or width % factor:
        low, high = (
            "x".join(str((side + more) // factor * factor) for side in (height, width))
            for more in (0, factor - 1)
        )
        crop = f"crop to {low} or " if min(height, width) >= factor else ""
        raise UserError(
            f"{name} of {height}x{width} (height x width): the first stage needs multiples of "
            f"{factor}: {crop}pad to {high}"
        )


def check_tile(tile: int, factor: int) -> None:
    """Checks the side of a tile in pixels.

    Raises:
        UserError: `factor` does not divide it, or a quarter of it is less than a latent.
    """
    least = OVERLAP * factor
    if tile < least or tile % factor:
        near = max(least, tile // factor * factor)
        raise UserError(
            f"tiles of {tile} pixels: the first stage needs multiples of {factor}, and {least} or "
            f"more: try {near}"
        )


def map_tiles(
    apply: Callable[[np.ndarray], Array],
    x: np.ndarray,
    tile: int,
    scale: tuple[int, int],
    progress: Progress | None = None,
) -> np.ndarray:
    """Applies a function to one tile of one image after the other, all of one shape, and blends.

    Args:
        apply: maps (1, a * h, a * w, C) to (1, b * h, b * w, C'), where (a, b) = `scale`.
        x: (B, a * H, a * W, C).
        tile: the largest h and w.
        scale: (factor, 1) for an encoder, (1, factor) for a decoder.
        progress: called with the numbers of done and of all tiles, after each.

    Returns:
        (B, b * H, b * W, C') float32.
    """
    (a, b), (count, *sides) = scale, (x.shape[0], x.shape[1] // scale[0], x.shape[2] // scale[0])
    shape = [min(side, tile) for side in sides]
    rows, columns = (starts(side, t) for side, t in zip(sides, shape, strict=True))
    down, across = (fade(b * at, b * t) for at, t in zip((rows, columns), shape, strict=True))
    out, total = None, count * len(rows) * len(columns)
    for done, (i, row, column) in enumerate(np.ndindex(count, len(rows), len(columns)), 1):
        place = rows[row], columns[column]
        result = np.asarray(apply(x[i : i + 1, *_window(place, shape, a)]))[0]
        if out is None:
            out = np.zeros((count, *(b * side for side in sides), result.shape[-1]), np.float32)
        weight = down[row][:, None, None] * across[column][:, None]
        out[i, *_window(place, shape, b)] += weight * result
        if progress is not None:
            progress(done, total)
    return out


def _window(place: tuple[int, int], shape: list[int], scale: int) -> tuple[slice, slice]:
    down, right = (slice(scale * at, scale * (at + n)) for at, n in zip(place, shape, strict=True))
    return down, right
