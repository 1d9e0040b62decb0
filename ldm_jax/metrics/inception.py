"""Inception-v3 as the Frechet distance uses it: TensorFlow's of 2015 (Szegedy et al. 2016).

Submodules are called as in that network's graph. It differs from the network of the paper in its
pooling: averages leave out the padding, and the last block takes a maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.nn.batch_norm import BatchNorm
from ldm_jax.nn.layers import Dense, uniform_fan_in
from ldm_jax.types import Array

SIZE = 299
FEATURES = 2048
CLASSES = 1008
EPSILON = 1e-3
# Never a faster product: a distance is only comparable if its features are.
PRECISION = jax.lax.Precision.HIGHEST


class Unit(NamedTuple):
    """A convolution of a branch: its name there, channels, kernel and stride."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# A branch is a sequence of units; a tuple of two in it are applied side by side and joined.
Branch = Sequence[Unit | tuple[Unit, Unit]]


class Blocks(NamedTuple):
    """Outputs of the four parts of the network, (B, h, w, C) with C = 64, 192, 768, 2048."""

    stem: Array
    reduced: Array
    middle: Array
    last: Array


def resize_bilinear(images: Array, size: int = SIZE, half_pixel: bool = True) -> Array:
    """Resizes (B, H, W, C) to (B, size, size, C) bilinearly, without antialiasing.

    Args:
        images: of any size.
        size: of both output axes.
        half_pixel: pixel centres lie at halves, as in PyTorch (and pytorch-fid); otherwise at whole
            numbers, as in TensorFlow 1 (and the original FID code).
    """
    for axis in (1, 2):
        length = images.shape[axis]
        if length == size:
            continue
        if half_pixel:
            place = (np.arange(size) + 0.5) * (length / size) - 0.5
        else:
            place = np.arange(size) * (length / size)
        place = np.clip(place, 0, length - 1)
        low = np.floor(place).astype(np.int32)
        high = np.minimum(low + 1, length - 1)
        share = np.float32(place - low).reshape((1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1))
        first, second = jnp.take(images, low, axis=axis), jnp.take(images, high, axis=axis)
        images = first * (1 - share) + second * share
    return images


def max_pool(x: Array, stride: int) -> Array:
    """Maximum over 3x3, padded only at stride 1."""
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


def average_pool(x: Array) -> Array:
    """Mean over the part of 3x3 that lies inside the map, stride 1."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class Conv(nn.Module):
    """Convolution without bias: (B, H, W, K) -> (B, H', W', channels)."""

    channels: int
    kernel: tuple[int, int]
    stride: int
    padding: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", uniform_fan_in(int(np.prod(shape[:3]))), shape, jnp.float32)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=PRECISION,
        )


class ConvUnit(nn.Module):
    """Convolution, batch normalisation by running statistics, rectifier."""

    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv(self.channels, self.kernel, self.stride, self.padding, name="conv")(x)
        return nn.relu(BatchNorm(EPSILON, name="bn")(y, train=False))


class Mixed(nn.Module):
    """Branches side by side, joined along the channels, the pooling branch last.

    Units of stride 2 are not padded. `pool` is 'average' or 'max', both followed by a unit of
    `pool_channels`, or 'reduce', a maximum of stride 2 on its own.
    """

    branches: Sequence[Branch]
    pool: str
    pool_channels: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def unit(spec: Unit, h: Array) -> Array:
            padding = "SAME" if spec.stride == 1 else "VALID"
            name = f"branch{spec.name}"
            return ConvUnit(spec.channels, spec.kernel, spec.stride, padding, name=name)(h)

        outputs = []
        for branch in self.branches:
            h = x
            for step in branch:
                if isinstance(step, Unit):
                    h = unit(step, h)
                else:
                    h = jnp.concatenate([unit(spec, h) for spec in step], -1)
            outputs.append(h)
        if self.pool == "reduce":
            outputs.append(max_pool(x, 2))
        else:
            pooled = max_pool(x, 1) if self.pool == "max" else average_pool(x)
            outputs.append(ConvUnit(self.pool_channels, (1, 1), name="branch_pool")(pooled))
        return jnp.concatenate(outputs, -1)


def block_35(pool_channels: int) -> dict:
    """Fields of the blocks on 35x35 maps: 1x1, 5x5 and two 3x3."""
    double = [Unit("3x3dbl_1", 64), Unit("3x3dbl_2", 96, (3, 3)), Unit("3x3dbl_3", 96, (3, 3))]
    five = [Unit("5x5_1", 48), Unit("5x5_2", 64, (5, 5))]
    branches = [[Unit("1x1", 64)], five, double]
    return dict(branches=branches, pool="average", pool_channels=pool_channels)


def block_17(width: int) -> dict:
    """Fields of the blocks on 17x17 maps: 1x1, one and two 7x7, each split into two lines."""
    seven = [
        Unit("7x7_1", width),
        Unit("7x7_2", width, (1, 7)),
        Unit("7x7_3", 192, (7, 1)),
    ]
    double = [
        Unit("7x7dbl_1", width),
        Unit("7x7dbl_2", width, (7, 1)),
        Unit("7x7dbl_3", width, (1, 7)),
        Unit("7x7dbl_4", width, (7, 1)),
        Unit("7x7dbl_5", 192, (1, 7)),
    ]
    return dict(branches=[[Unit("1x1", 192)], seven, double], pool="average", pool_channels=192)


def block_8(pool: str) -> dict:
    """Fields of the blocks on 8x8 maps: 1x1 and two branches that end in a row beside a column."""
    three = [
        Unit("3x3_1", 384),
        (Unit("3x3_2a", 384, (1, 3)), Unit("3x3_2b", 384, (3, 1))),
    ]
    double = [
        Unit("3x3dbl_1", 448),
        Unit("3x3dbl_2", 384, (3, 3)),
        (Unit("3x3dbl_3a", 384, (1, 3)), Unit("3x3dbl_3b", 384, (3, 1))),
    ]
    return dict(branches=[[Unit("1x1", 320)], three, double], pool=pool, pool_channels=192)


REDUCE_35 = dict(
    branches=[
        [Unit("3x3", 384, (3, 3), 2)],
        [Unit("3x3dbl_1", 64), Unit("3x3dbl_2", 96, (3, 3)), Unit("3x3dbl_3", 96, (3, 3), 2)],
    ],
    pool="reduce",
)
REDUCE_17 = dict(
    branches=[
        [Unit("3x3_1", 192), Unit("3x3_2", 320, (3, 3), 2)],
        [
            Unit("7x7x3_1", 192),
            Unit("7x7x3_2", 192, (1, 7)),
            Unit("7x7x3_3", 192, (7, 1)),
            Unit("7x7x3_4", 192, (3, 3), 2),
        ],
    ],
    pool="reduce",
)
MIDDLE = {
    "Mixed_5b": block_35(32),
    "Mixed_5c": block_35(64),
    "Mixed_5d": block_35(64),
    "Mixed_6a": REDUCE_35,
    "Mixed_6b": block_17(128),
    "Mixed_6c": block_17(160),
    "Mixed_6d": block_17(160),
    "Mixed_6e": block_17(192),
}
LAST = {"Mixed_7a": REDUCE_17, "Mixed_7b": block_8("average"), "Mixed_7c": block_8("max")}


class Inception(nn.Module):
    """Features of images: (B, H, W, 3) in [0, 1], of any size -> (B, 2048) float32.

    Attributes:
        half_pixel: how images that are not 299x299 are resized; see `resize_bilinear`.

    Raises:
        UserError: the images have not three channels.
    """

    half_pixel: bool = True

    def setup(self) -> None:
        self.fc = Dense(CLASSES)

    def __call__(self, images: Array) -> Array:
        features = self.blocks(images).last.mean((1, 2))
        if self.is_initializing():
            self.logits(features)
        return features

    def logits(self, features: Array) -> Array:
        """Class scores of features (B, 2048): (B, 1008)."""
        with jax.default_matmul_precision("highest"):
            return self.fc(features)

    @nn.compact
    def blocks(self, images: Array) -> Blocks:
        """Outputs of the four parts for images (B, H, W, 3) in [0, 1]."""
        if images.shape[-1] != 3:
            raise UserError(f"Inception needs images of 3 channels, got {images.shape[-1]}")
        h = 2.0 * resize_bilinear(images.astype(jnp.float32), SIZE, self.half_pixel) - 1.0
        h = ConvUnit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(h)
        h = ConvUnit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(h)
        h = ConvUnit(64, (3, 3), name="Conv2d_2b_3x3")(h)
        h = stem = max_pool(h, 2)
        h = ConvUnit(80, (1, 1), name="Conv2d_3b_1x1")(h)
        h = ConvUnit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(h)
        h = reduced = max_pool(h, 2)
        for name, fields in MIDDLE.items():
            h = Mixed(**fields, name=name)(h)
        middle = h
        for name, fields in LAST.items():
            h = Mixed(**fields, name=name)(h)
        return Blocks(stem, reduced, middle, h)
