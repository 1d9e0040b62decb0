"""LPIPS, the perceptual distance of the first stages (Zhang et al. 2018), on a VGG16 trunk."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.nn.layers import Conv, Dense, along_last
from ldm_jax.types import Array

# Convolutions and channels of each block (Simonyan & Zisserman 2015, configuration D).
VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
# Mean and standard deviation of ImageNet's colours for images in [-1, 1].
COLOUR_MEAN = np.float32([-0.030, -0.088, -0.188])
COLOUR_STD = np.float32([0.458, 0.448, 0.450])
SMALLEST = 2 ** (len(VGG16) - 1)


def unit_length(features: Array) -> Array:
    """Features (..., C) divided by their length over the channels; zeros stay zeros."""
    squares = jnp.square(features).sum(-1, keepdims=True)
    # The root of zero has no derivative, and rectified features may all be zero.
    length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return features / (length + 1e-10)


def to_colours(images: Array) -> Array:
    """Images (..., 1, 3 or 4) in [-1, 1] -> (..., 3) float32: grey in three equal channels, colours
    behind straight alpha (-1 = clear, 1 = solid) laid on white, as the data sources lay them.

    Raises:
        UserError: images of another number of channels.
    """
    channels, images = images.shape[-1], images.astype(jnp.float32)
    if channels not in (1, 3, 4):
        raise UserError(f"LPIPS compares images of 1, 3 or 4 channels, got {channels}")
    if channels == 4:
        alpha = 0.5 * (images[..., 3:] + 1.0)
        return alpha * images[..., :3] + (1.0 - alpha)
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


class LPIPS(nn.Module):
    """Perceptual distance of images (B, H, W, 3) in [-1, 1]: two of them -> (B,) float32.

    Images of 1 or 4 channels are grey and RGBA: see `to_colours`.

    Version 0.1 with VGG16 and linear heads, without dropout. The weights are made for full float32
    products: on an accelerator, evaluate within `jax.default_matmul_precision("highest")`.

    Raises:
        UserError: images of another number of channels, or smaller than 16x16.
    """

    def setup(self) -> None:
        self.blocks = [
            [Conv(features, name=f"conv_{i}_{j}") for j in range(depth)]
            for i, (depth, features) in enumerate(VGG16)
        ]
        self.heads = [Dense(1, use_bias=False, name=f"head_{i}") for i in range(len(VGG16))]

    def __call__(self, images: Array, others: Array) -> Array:
        return self.layer_distances(images, others).sum(-1)

    def layer_distances(self, images: Array, others: Array) -> Array:
        """The share of each block in the distance: (B, 5)."""
        # Two passes rather than one over both: only one of them has a gradient to carry back.
        pairs = zip(self.heads, self.features(images), self.features(others), strict=True)
        shares = [
            head(jnp.square(unit_length(a) - unit_length(b))).mean((1, 2)) for head, a, b in pairs
        ]
        return jnp.concatenate(shares, -1)

    def distance_map(self, images: Array, others: Array) -> Array:
        """Where two images differ: (B, H, W), the blocks' distances at each place, enlarged
        bilinearly to the size of the images and summed.
        """
        size, total = images.shape[:3], 0.0
        pairs = zip(self.heads, self.features(images), self.features(others), strict=True)
        for head, a, b in pairs:
            distances = head(jnp.square(unit_length(a) - unit_length(b)))[..., 0]
            total += jax.image.resize(distances, size, "bilinear", antialias=False)
        return total

    def features(self, images: Array) -> list[Array]:
        """Rectified outputs of the last convolution of each block, (B, H / 2^i, W / 2^i, C)."""
        if min(images.shape[1:3]) < SMALLEST:
            size = "x".join(map(str, images.shape[1:3]))
            raise UserError(
                f"LPIPS needs images of at least {SMALLEST}x{SMALLEST}, got {size}: "
                "use larger images or set the perceptual weight to 0"
            )
        h = to_colours(images) - along_last(COLOUR_MEAN, 4)
        h = h / along_last(COLOUR_STD, 4)
        found = []
        for i, block in enumerate(self.blocks):
            if i > 0:
                h = nn.max_pool(h, (2, 2), strides=(2, 2))
            for conv in block:
                h = nn.relu(conv(h))
            found.append(h)
        return found
