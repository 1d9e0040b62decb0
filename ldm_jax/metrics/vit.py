"""Vision transformers as towers of features: DINOv2's and CLIP's image encoder.

DINOv2 (Oquab et al. 2023) gives the features of `fd_dino` (Stein et al. 2023), CLIP (Radford et al.
2021) an embedding of images beside which that of their captions can be laid. `ldm_jax.extractors`
makes extractors of them from a folder.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ldm_jax.errors import UserError
from ldm_jax.metrics.features import Extractor, bicubic_weights, make_extractor
from ldm_jax.nn.encoder import EncoderLayer
from ldm_jax.nn.layers import Dense, LayerNorm, along_last, uniform_fan_in
from ldm_jax.tensors import digest
from ldm_jax.types import Array

# By how many patches the original DINOv2 takes its table of positions for larger than it is when
# it interpolates it, once a way round an error of rounding. Published distances are made with it,
# but transformers leaves it out.
DINO_OFFSET = 0.1
DINO_SIZE = 224  # of images, whatever the table of positions is for
RESIZE = "pillow"  # the rule of both towers, see `prepare_pixels`
PER_DEVICE = 32  # images at a time
_BITS = 22  # of the weights of Pillow's resizing


class PatchEmbedding(nn.Module):
    """A linear map of each square of `patch` pixels: (B, H, W, 3) -> (B, H/patch, W/patch, width).

    Attributes:
        width: channels of an embedding.
        patch: side of a square in pixels, which divides H and W.
        use_bias: whether something is added.
    """

    width: int
    patch: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        batch, height, width, channels = pixels.shape
        if height % self.patch or width % self.patch:
            raise UserError(
                f"images of {height}x{width} have no whole number of patches of {self.patch}"
            )
        shape = (self.patch, self.patch, channels, self.width)
        init = uniform_fan_in(int(np.prod(shape[:3])))
        kernel = self.param("kernel", init, shape, jnp.float32)
        rows, columns = height // self.patch, width // self.patch
        x = pixels.reshape(batch, rows, self.patch, columns, self.patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
        y = jnp.dot(x, kernel.reshape(-1, self.width))
        if self.use_bias:
            bias = self.param("bias", init, (self.width,), jnp.float32)
            y = y + along_last(bias, y.ndim)
        return y


class VisionTransformer(nn.Module):
    """Embeds images: (B, H, W, 3) float32, normalised -> (B, `projection` or `width`) float32.

    A transformer (Dosovitskiy et al. 2021) over patches and a class token, whose last state, after
    the final normalisation, is the embedding.

    Attributes:
        width: channels of the embedding of a patch.
        depth: number of layers.
        heads: attention heads, each width / heads wide.
        mlp_width: hidden channels of the MLPs.
        patch: side of a patch in pixels.
        grid: side of the table of positions in patches. It is interpolated for other images.
        activation: see `EncoderLayer`, as for `gated`, `layer_scale` and `epsilon`.
        patch_bias: whether the embedding of patches has a bias.
        norm_in: whether the embeddings are normalised before the first layer, as CLIP's are.
        projection: channels of the linear map at the end, which has no bias; 0 = none.
        position_offset: see `interpolate_positions`.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    grid: int
    activation: str = "gelu"
    gated: bool = False
    layer_scale: bool = False
    epsilon: float = 1e-6
    patch_bias: bool = True
    norm_in: bool = False
    projection: int = 0
    position_offset: float = 0.0

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        init = nn.initializers.normal(0.02)
        token = self.param("class_token", init, (self.width,), jnp.float32)
        shape = (1 + self.grid**2, self.width)
        positions = self.param("positions", init, shape, jnp.float32)
        x = PatchEmbedding(self.width, self.patch, self.patch_bias, name="patches")(pixels)
        batch, rows, columns, _ = x.shape
        table = positions[1:].reshape(self.grid, self.grid, self.width)
        table = interpolate_positions(table, rows, columns, self.position_offset)
        x = (x + table[None]).reshape(batch, rows * columns, self.width)
        first = jnp.broadcast_to(token + positions[0], (batch, 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        if self.norm_in:
            x = LayerNorm(self.epsilon, name="norm_in")(x)
        for i in range(self.depth):
            x = EncoderLayer(
                self.heads,
                self.width // self.heads,
                self.mlp_width,
                activation=self.activation,
                gated=self.gated,
                layer_scale=self.layer_scale,
                epsilon=self.epsilon,
                name=f"layers_{i}",
            )(x)
        x = LayerNorm(self.epsilon, name="norm_out")(x[:, 0])
        return Dense(self.projection, use_bias=False, name="out")(x) if self.projection else x


def interpolate_positions(table: Array, rows: int, columns: int, offset: float = 0.0) -> Array:
    """Embeddings of positions (h, w, C) for `rows` x `columns` patches: (rows, columns, C).

    Bicubic as PyTorch's `interpolate`: Keys' with a = -0.75, pixel centres at halves, edges
    repeated, not antialiased.

    Args:
        table: as learned.
        rows: of patches.
        columns: of patches.
        offset: each axis is taken to be scaled to so much more than its patches.
    """
    if (rows, columns) == table.shape[:2]:
        return table
    down, right = (
        jnp.asarray(_torch_bicubic(length, size, offset), jnp.float32)
        for length, size in zip(table.shape[:2], (rows, columns), strict=True)
    )
    return jnp.einsum("ah,bw,hwc->abc", down, right, table)


def _torch_bicubic(length: int, size: int, offset: float) -> np.ndarray:
    """How much each of `length` places gives to each of `size`: (size, length) float64."""
    a = -0.75
    centres = (np.arange(size) + 0.5) * (length / (size + offset)) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((size, length))
    for tap in (-1, 0, 1, 2):
        x = np.abs(centres - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        place = np.clip(first + tap, 0, length - 1)
        np.add.at(weights, (np.arange(size), place), np.where(x <= 1, near, far))
    return weights


class Tower(NamedTuple):
    """An image encoder with all that decides its features.

    Attributes:
        name: 'dino' or 'clip'.
        module: that embeds images.
        params: of it.
        size: side in pixels of the images that it is given.
        crop: whether the middle square of an image is taken; else all of it is resized to one.
        mean: of the colours, which is taken away; of levels from 0 to 1.
        std: of the colours, by which they are divided then.
    """

    name: str
    module: VisionTransformer
    params: dict[str, Any]
    size: int
    crop: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def prepare_pixels(tower: Tower, images: Array) -> Array:
    """What a tower takes of images (B, H, W, 3) uint8: (B, size, size, 3) float32, normalised.

    Resized by `resize_levels`. With `crop` it is the shorter side that becomes `size`, and the
    middle is cut out.
    """
    height, width = images.shape[1:3]
    size, high, wide = tower.size, tower.size, tower.size
    if tower.crop:
        short = min(height, width)
        high, wide = int(size * height / short), int(size * width / short)
    levels = resize_levels(images, high, wide).astype(jnp.float32)
    top, left = round((high - size) / 2), round((wide - size) / 2)
    levels = levels[:, top : top + size, left : left + size]
    mean, std = (along_last(jnp.asarray(x, jnp.float32), 4) for x in (tower.mean, tower.std))
    return (levels / 255 - mean) / std


def resize_levels(images: Array, height: int, width: int) -> Array:
    """Resizes (B, H, W, C) uint8 to (B, height, width, C) int32 levels, exactly as Pillow does.

    Bicubic and antialiased. Weights are whole multiples of 2^-22 and sums are rounded after each
    axis, so that no device and no order of summing gives another level. The width comes first, as
    in the versions that published features were made with; newer ones begin with the height where
    that shrinks and the width grows.
    """
    levels = images.astype(jnp.int32)
    for axis, size in ((2, width), (1, height)):
        if levels.shape[axis] != size:
            weights = bicubic_weights(levels.shape[axis], size) * 2**_BITS
            whole = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)
            levels = (_weighted_sums(levels, whole, axis) + 2 ** (_BITS - 1)) >> _BITS
            levels = jnp.clip(levels, 0, 255)
    return levels


def _weighted_sums(x: Array, weights: np.ndarray, axis: int) -> Array:
    """Sums over an axis of x by weights (size, length) that are 0 but for a few in a row."""
    first = (weights != 0).argmax(1)
    last = weights.shape[1] - 1 - (weights != 0)[:, ::-1].argmax(1)
    shape = tuple(-1 if i == axis else 1 for i in range(x.ndim))
    total = jnp.zeros((), jnp.int32)
    for tap in range(int((last - first).max()) + 1):
        place = np.minimum(first + tap, weights.shape[1] - 1)
        weight = np.where(first + tap <= last, weights[np.arange(len(place)), place], 0)
        total = total + jnp.take(x, place, axis=axis) * weight.reshape(shape)
    return total


def tower_extractor(tower: Tower, mesh: Mesh) -> Extractor:
    """Features of a tower: 'pool', as wide as its embedding.

    Args:
        tower: with its weights.
        mesh: its devices of this process are used.
    """
    module = tower.module
    settings = (tower.name, RESIZE, tower.size, tower.crop, tower.mean, tower.std, module.heads)
    settings += (module.activation, module.epsilon, module.position_offset)
    text = f"{settings} {digest(tower.params)}"
    found = hashlib.sha256(text.encode()).hexdigest()
    widths = {"pool": module.projection or module.width}
    features = functools.partial(_tower_features, tower._replace(params={}))
    return make_extractor(
        tower.name, found, RESIZE, widths, features, tower.params, mesh, PER_DEVICE
    )


def _tower_features(tower: Tower, params: Any, images: Array) -> dict[str, Array]:
    with jax.default_matmul_precision("highest"):
        found = tower.module.apply({"params": params}, prepare_pixels(tower, images))
    return {"pool": found}
