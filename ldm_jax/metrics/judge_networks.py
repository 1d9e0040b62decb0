"""Small networks that say what images show, and how they are fitted to real ones.

They are no part of any model: they judge samples. Each trains in about a minute on two CPU cores.
Images are (B, H, W, 3) float32 in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.data.order import epoch_order
from ldm_jax.images import to_float
from ldm_jax.nn.layers import Conv, Dense, GroupNorm
from ldm_jax.random import example_keys
from ldm_jax.types import Array

Params: TypeAlias = Any
# (params, batch, key) -> the mean loss of the batch
Loss: TypeAlias = Callable[[Params, dict[str, Array], Array], Array]

WIDTH, GROUPS, EPSILON = 32, 8, 1e-5
FEATURES = 128  # of an embedding of images and captions
CROP = 32  # side of what the classifier of crops sees, pixels
SEED = 0  # of the order of the examples and of what a loss draws
_PREDICTED = 128  # images at a time


class Block(nn.Module):
    """3x3 convolution, group normalisation, SiLU: (B, H, W, K) -> (B, H/s, W/s, features)."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, self.stride)(x)
        return nn.silu(GroupNorm(EPSILON, GROUPS)(x))


class Trunk(nn.Module):
    """Images -> features (B, 4 WIDTH), by four halvings and the mean over places."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = images
        for features in (WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH):
            x = Block(features, 2)(x)
        return Block(4 * WIDTH)(x).mean((1, 2))


class Classifier(nn.Module):
    """Images -> scores (B, classes)."""

    classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        return Dense(self.classes)(Trunk()(images))


class Segmenter(nn.Module):
    """Images with even sides -> scores of each pixel (B, H, W, classes).

    It works on squares of 2x2 pixels, and on maps of a half and a quarter of their number a side.
    """

    classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x, skips = to_depth(images), []
        for level in range(3):
            x = Block(WIDTH * 2**level, 1 if level == 0 else 2)(x)
            skips.append(x)
        x = Block(x.shape[-1], 2)(x)  # an object is to be seen as a whole
        for skip in reversed(skips):
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = Block(skip.shape[-1])(Dense(skip.shape[-1])(x) + skip)
        return to_space(Dense(4 * self.classes)(x))


def to_depth(x: Array) -> Array:
    """Squares of 2x2 pixels become channels: (B, H, W, C) -> (B, H/2, W/2, 4 C)."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(count, height // 2, width // 2, 4 * channels)


def to_space(x: Array) -> Array:
    """The inverse of `to_depth`."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(count, 2 * height, 2 * width, channels // 4)


class DualEncoder(nn.Module):
    """Images, and bags of words (B, V) of captions -> an embedding (B, FEATURES) of each.

    Embeddings have unit length; those of an image and its caption are to be alike.
    """

    @nn.compact
    def __call__(self, images: Array, words: Array) -> tuple[Array, Array, Array]:
        """Returns the embeddings of both and the factor of their products (1, 1)."""
        factor = self.param("factor", nn.initializers.constant(math.log(10.0)), (1, 1))
        image = Dense(FEATURES)(Trunk()(images))
        # Captions of many words shall not outweigh those of few.
        share = words / jnp.maximum(words.sum(-1, keepdims=True), 1.0)
        caption = Dense(FEATURES)(nn.silu(Dense(FEATURES)(share * math.sqrt(words.shape[-1]))))
        return unit(image), unit(caption), jnp.exp(jnp.minimum(factor, math.log(100.0)))


def unit(x: Array) -> Array:
    """Vectors (B, D) at unit length."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def class_loss(scores: Array, classes: Array) -> Array:
    """Mean cross-entropy of scores (..., classes) to class numbers (...)."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, classes).mean()


def contrastive_loss(images: Array, captions: Array, factor: Array) -> Array:
    """Which caption belongs to which image, and the reverse (Radford et al. 2021, figure 3)."""
    scores, same = factor * (images @ captions.T), jnp.arange(len(images))
    return (class_loss(scores, same) + class_loss(scores.T, same)) / 2


def augment(images: Array, key: Array, *, shift: int = 0, flip: bool = False) -> Array:
    """Images shifted, mirrored, blurred, brightened and with noise, each by numbers of its own.

    Samples are softer than photographs and have other noise: a judge shall not look at that.

    Args:
        images: (B, H, W, 3) in [-1, 1].
        key: of all draws.
        shift: at most so many pixels, in both directions; the border is repeated.
        flip: mirror half of them.
    """

    def one(image: Array, key: Array) -> Array:
        keys = jax.random.split(key, 6)
        if shift:
            pad = ((shift, shift), (shift, shift), (0, 0))
            start = jax.random.randint(keys[0], (2,), 0, 2 * shift + 1)
            padded = jnp.pad(image, pad, mode="edge")
            image = jax.lax.dynamic_slice(padded, (*start, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(keys[1]), image[:, ::-1], image)
        soft = nn.avg_pool(image, (3, 3), padding="SAME", count_include_pad=False)
        image = image + jax.random.uniform(keys[2]) * (soft - image)
        image = image * jax.random.uniform(keys[3], (), minval=0.8, maxval=1.2)
        image = image + jax.random.uniform(keys[4], (), minval=-0.15, maxval=0.15)
        return image + 0.05 * jax.random.normal(keys[5], image.shape)

    return jax.vmap(one)(images, example_keys(key, len(images)))


def fit(
    loss: Loss,
    params: Params,
    arrays: Mapping[str, np.ndarray],
    *,
    steps: int,
    batch_size: int = 64,
) -> Params:
    """Minimises a loss by AdamW in float32; the result follows from the arguments.

    Args:
        loss: mean over a batch of the arrays.
        params: to start from.
        arrays: (N, ...) each; 'image' is uint8 and reaches the loss as floats in [-1, 1].
        steps: updates.
        batch_size: examples of an update, if there are so many.
    """
    count = len(next(iter(arrays.values())))
    size = min(batch_size, count)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.02))

    @jax.jit
    def update(params: Params, state: Any, batch: dict[str, Array], step: Array) -> tuple:
        batch = batch | {"image": to_float(batch["image"])}
        key = jax.random.fold_in(jax.random.key(SEED), step)
        gradient = jax.grad(loss)(params, batch, key)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    for step in range(steps):
        epoch, place = divmod(step * size, count - count % size)
        rows = epoch_order(SEED, epoch, count)[place : place + size]
        batch = {name: array[rows] for name, array in arrays.items()}
        params, state = update(params, state, batch, jnp.int32(step))
    return jax.device_get(params)


def predict(apply: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """Applies a function of batches to arrays (N, ...), in parts of one shape; joins the results.

    The first array is of uint8 images, which reach the function as floats in [-1, 1].
    """
    count = len(arrays[0])
    size, parts = min(_PREDICTED, count), []
    run = jax.jit(lambda images, *others: apply(to_float(images), *others))
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        parts.append(jax.device_get(run(*(array[rows] for array in arrays))))
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)
