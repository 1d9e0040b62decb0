"""Conditioning on a map of classes: one-hot, shrunk to the size of the latents, projected."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.nn.encoder import look_up
from ldm_jax.nn.layers import along_last, uniform_fan_in
from ldm_jax.types import Array, Condition

METHODS = ("bilinear", "bicubic", "nearest", "area")


class SpatialRescaler(nn.Module):
    """Turns `batch['segmentation']` (B, H, W) int into a concat (B, h, w, channels).

    A class outside [0, num_classes) gives NaN.

    Attributes:
        num_classes: number of classes, the channels before the projection.
        channels: after it; 0 for no projection.
        stages: how often the map is resized.
        method: 'bilinear', 'bicubic', 'nearest' or 'area'.
        scale: factor of the height and width in each stage.
        use_bias: whether the projection has one.
    """

    num_classes: int
    channels: int
    stages: int = 2
    method: str = "bilinear"
    scale: float = 0.5
    use_bias: bool = False

    def setup(self):
        if self.channels:
            init = uniform_fan_in(self.num_classes)
            shape = (self.num_classes, self.channels)
            self.kernel = self.param("kernel", init, shape, jnp.float32)
            self.bias = (
                self.param("bias", init, (self.channels,), jnp.float32)
                if self.use_bias
                else jnp.zeros((self.channels,), jnp.float32)
            )

    def __call__(self, batch: dict[str, Array]) -> Condition:
        """The shrunk map of a batch."""
        # Resizing and projecting can change places: they act on other axes, and the weights of a
        # resized pixel sum to one. Projecting first is a look-up, and its result is far smaller
        # than a one-hot map at full size (182 channels in the published models).
        classes = batch["segmentation"]
        rows = self.kernel if self.channels else jnp.eye(self.num_classes)
        maps = self._resize(look_up(rows, classes))
        return Condition(concat=maps + along_last(self.bias, 4) if self.channels else maps)

    def null(self, batch_size: int) -> Condition:
        """Raises UserError: there is no empty map of classes."""
        raise UserError(
            "a condition on a segmentation has no null condition, so it cannot be dropped or "
            "guided: use cond_drop_rate 0 and guidance_scale 1"
        )

    def rescale(self, maps: Array) -> Array:
        """Resizes and projects maps of numbers: (B, H, W, num_classes) -> (B, h, w, channels)."""
        maps = self._resize(maps)
        if not self.channels:
            return maps
        contract = (((3,), (0,)), ((), ()))
        return jax.lax.dot_general(maps, self.kernel, contract) + along_last(self.bias, 4)

    def _resize(self, maps: Array) -> Array:
        for axis in (1, 2):
            matrix = np.eye(maps.shape[axis])
            for _ in range(self.stages):
                matrix = resize_matrix(len(matrix), self.scale, self.method) @ matrix
            maps = jnp.tensordot(jnp.asarray(matrix, jnp.float32), maps, (1, axis))
            maps = jnp.moveaxis(maps, 0, axis)
        return maps


def resize_matrix(size: int, scale: float, method: str) -> np.ndarray:
    """The weights (size * scale, size) by which one axis is resized, float64; each row sums to 1.

    Pixels are areas, the border is repeated, and nothing is smoothed beforehand: PyTorch's
    `interpolate` with its defaults.

    Raises:
        UserError: no such method, or the result is empty.
    """
    if method not in METHODS:
        raise UserError(f"no way '{method}' to resize a map: choose one of {', '.join(METHODS)}")
    out = int(size * scale)
    if not out:
        raise UserError(f"a map of side {size} cannot be resized by {scale}: nothing is left")
    matrix, rows = np.zeros((out, size)), np.arange(out)
    if method == "nearest":
        matrix[rows, np.minimum(rows / scale, size - 1).astype(int)] = 1
    elif method == "area":
        for row in rows:
            matrix[row, row * size // out : -(-(row + 1) * size // out)] = 1
    else:
        centre = (rows + 0.5) / scale - 0.5
        first, kernel = (0, _linear) if method == "bilinear" else (-1, _cubic)
        for tap in range(first, 2 - first):
            pixel = np.floor(centre).astype(int) + tap
            np.add.at(matrix, (rows, pixel.clip(0, size - 1)), kernel(np.abs(centre - pixel)))
    return matrix / matrix.sum(1, keepdims=True)


def _linear(distance: np.ndarray) -> np.ndarray:
    return 1 - distance


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.75."""
    a, d = -0.75, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    return np.where(d <= 1, near, a * (d**3 - 5 * d**2 + 8 * d - 4))
