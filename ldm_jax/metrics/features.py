"""Features of 8-bit images by a fixed network: what distances between sets of images are made of.

A distance is only comparable if its features are: an `Extractor` therefore bears a digest of all
that decides them, its weights and its way of resizing. `ldm_jax.extractors.load_extractor` makes
one from the weights on disk.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.errors import UserError
from ldm_jax.metrics.inception import CLASSES, FEATURES, PRECISION, SIZE, Inception, resize_bilinear
from ldm_jax.tensors import digest
from ldm_jax.types import Array

Features: TypeAlias = dict[str, np.ndarray]

RESIZES = ("pytorch", "tensorflow", "antialiased")
# The sixth of the blocks "mixed" to "mixed_10" of TensorFlow's graph begins with this convolution.
SPATIAL_UNIT = ("Mixed_6d", "branch1x1")
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
WIDTHS = {"pool": FEATURES, "logits": CLASSES, "spatial": SPATIAL_FEATURES}
PER_DEVICE = 64  # images at a time


class Extractor(NamedTuple):
    """A network that gives features of images.

    Attributes:
        name: of the network, such as 'inception'.
        digest: SHA-256 in hex of its weights and its resize rule: equal digests, equal features.
        resize: the rule, such as 'pytorch'.
        outputs: the width of each output that `extract` gives, by its name.
        extract: (B, H, W, 3) uint8 of any B -> {name: (B, width) float32}. The images are split
            over this process's devices. With several processes each gives its own images and gets
            their features; they need not do so together.
    """

    name: str
    digest: str
    resize: str
    outputs: dict[str, int]
    extract: Callable[[np.ndarray], Features]


def inception_extractor(
    variables: Mapping[str, Any],
    *,
    resize: str = "pytorch",
    mesh: Mesh,
    outputs: Sequence[str] = ("pool", "logits", "spatial"),
) -> Extractor:
    """Features of Inception-v3.

    'pool' (2048) is what FID, KID and the manifold metrics take. 'logits' (1008) is for the
    Inception score: without the bias of the last layer, as in Salimans et al.'s code and the ADM
    suite's, which multiply by its weights only. 'spatial' (2023) is for sFID (Nash et al. 2021):
    the first 7 channels of the 17x17 map of the first convolution of the block "mixed_6", as in the
    ADM suite.

    Args:
        variables: of `Inception`.
        resize: see `prepare_inception`.
        mesh: its devices of this process are used.
        outputs: some of the three; the fewer, the sooner done.

    Raises:
        UserError: no such rule or output, or 'logits' of weights that have no last layer.
    """
    if resize not in RESIZES:
        raise UserError(f"unknown resize rule '{resize}': choose one of {', '.join(RESIZES)}")
    for name in outputs:
        if name not in WIDTHS:
            raise UserError(f"Inception has no output '{name}': choose among {', '.join(WIDTHS)}")
    if "logits" in outputs and "fc" not in variables["params"]:
        raise UserError(
            "these Inception weights have no class scores, which the Inception score needs: get "
            "them with `python -m ldm_jax.weights fetch inception "
            "--from=pt_inception-2015-12-05-6726825d.pth`, or leave `is` out"
        )
    found = _features_digest("inception", resize, variables)
    apply = functools.partial(_inception_features, resize, tuple(outputs))
    widths = {name: WIDTHS[name] for name in outputs}
    return make_extractor("inception", found, resize, widths, apply, variables, mesh)


def make_extractor(
    name: str,
    digest: str,
    resize: str,
    outputs: dict[str, int],
    apply: Callable[[Any, Array], dict[str, Array]],
    variables: Any,
    mesh: Mesh,
    per_device: int = PER_DEVICE,
) -> Extractor:
    """An extractor of any network.

    Args:
        name, digest, resize, outputs: as in `Extractor`.
        apply: (variables, images (B, H, W, 3) uint8) -> the outputs; it is compiled with full
            float32 products, and never sees more images at a time than it has to.
        variables: of the network; they are put on each device.
        mesh: its devices of this process are used.
        per_device: the most images that a device is given at a time.
    """
    devices = np.array(mesh.local_devices)
    local = Mesh(devices, ("images",))
    everywhere = NamedSharding(local, PartitionSpec())
    split = NamedSharding(local, PartitionSpec("images"))
    variables = jax.device_put(variables, everywhere)
    run = jax.jit(apply, in_shardings=(everywhere, split), out_shardings=split)
    largest = per_device * devices.size
    known: dict[tuple[int, ...], int] = {}  # by size of the images: rows of the compiled program

    def extract(images: np.ndarray) -> Features:
        check_images(images)
        if not len(images):
            return {key: np.zeros((0, width), np.float32) for key, width in outputs.items()}
        size = images.shape[1:3]
        rows = min(largest, -(-len(images) // devices.size) * devices.size)
        rows = known[size] = max(rows, known.get(size, 0))
        found, waiting = [], collections.deque()
        for start in range(0, len(images), rows):
            part = images[start : start + rows]
            padded = np.pad(part, ((0, rows - len(part)), (0, 0), (0, 0), (0, 0)))
            with jax.default_matmul_precision("highest"):
                waiting.append((len(part), run(variables, jax.device_put(padded, split))))
            if len(waiting) > 2:  # two are on the devices, so that these are never idle
                found.append(_fetch(*waiting.popleft()))
        found += [_fetch(*part) for part in waiting]
        return {key: np.concatenate([part[key] for part in found]) for key in outputs}

    return Extractor(name, digest, resize, dict(outputs), extract)


def _fetch(count: int, found: dict[str, Array]) -> Features:
    return {key: np.asarray(array)[:count] for key, array in found.items()}


def check_images(images: np.ndarray | Sequence[np.ndarray]) -> None:
    """Checks that images are (B, H, W, 3) uint8, or (H, W, 3) each, of one size.

    Raises:
        UserError: grey images, an alpha channel, sizes that differ, or values that are no levels.
    """
    if not isinstance(images, np.ndarray):
        shapes = sorted({np.shape(image) for image in images})
        if len(shapes) > 1:
            sizes = " and ".join("x".join(map(str, shape)) for shape in shapes[:2])
            raise UserError(
                f"the images are not all of one size, but {sizes}: crop and resize them alike"
            )
        images = np.asarray(images)
    if images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 1):
        raise UserError(
            f"expected images (B, H, W, 3), got {images.shape}: grey images must be repeated to "
            "three channels"
        )
    if images.ndim == 4 and images.shape[-1] == 4:
        raise UserError(
            f"expected images (B, H, W, 3), got {images.shape}: lay images with alpha on a "
            "background first"
        )
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"expected images (B, H, W, 3), got {images.shape}")
    if images.dtype != np.uint8:
        raise UserError(
            f"expected images of 8-bit levels (uint8, 0 to 255), got {images.dtype}: round first, "
            "as a distance to 8-bit images would see what no file keeps"
        )


def prepare_inception(images: Array, resize: str) -> Array:
    """What `Inception` takes, at 299x299, of (B, H, W, 3) uint8: float32.

    Args:
        images: of any size.
        resize: 'pytorch', as pytorch-fid: bilinear, pixel centres at halves, no antialiasing,
            levels 0..255 to -1..1. 'tensorflow', as the graph of 2015 that the original FID code
            and the ADM suite run: bilinear, pixel centres at whole numbers, (level - 128) / 128.
            'antialiased', as clean-fid (Parmar et al. 2022): bicubic of PIL, with a window as wide
            as the reduction, clipped to the levels but not rounded to them, (level - 128) / 128.
    """
    levels = images.astype(jnp.float32)
    if resize == "pytorch":
        return resize_bilinear(levels / 255)
    if resize == "tensorflow":
        levels = resize_bilinear(levels, half_pixel=False)
    else:
        levels = jnp.clip(resize_bicubic(levels, SIZE, SIZE), 0, 255)
    return levels / 256  # which the network maps to (level - 128) / 128


def resize_bicubic(images: Array, height: int, width: int) -> Array:
    """Resizes (B, H, W, C) to (B, height, width, C), antialiased as Pillow does: float32.

    Keys' cubic with a = -0.5, stretched by the reduction. Its weights are made in float64; those of
    jax.image come from float32 positions, which costs thousandths of a level.
    """
    for axis, size in ((2, width), (1, height)):
        length = images.shape[axis]
        if length != size:
            weights = jnp.asarray(bicubic_weights(length, size), jnp.float32)
            images = jnp.tensordot(images, weights, (axis, 1), precision=PRECISION)
            images = jnp.moveaxis(images, -1, axis)
    return images


def bicubic_weights(length: int, size: int) -> np.ndarray:
    """How much each of `length` pixels gives to each of `size`: (size, length) float64."""
    scale = length / size
    stretch = max(scale, 1.0)
    centres = (np.arange(size)[:, None] + 0.5) * scale
    # Pillow's window holds whole pixels only.
    first = np.maximum(np.floor(centres - 2 * stretch + 0.5), 0)
    last = np.minimum(np.floor(centres + 2 * stretch + 0.5), length)
    pixels = np.arange(length)[None, :]
    x = np.abs(pixels + 0.5 - centres) / stretch
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = np.where((pixels >= first) & (pixels < last), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


def _inception_features(
    resize: str, outputs: tuple[str, ...], variables: Any, images: Array
) -> dict[str, Array]:
    found, prepared = {}, prepare_inception(images, resize)
    pool, seen = Inception().apply(
        variables, prepared, capture_intermediates=lambda module, _: module.path == SPATIAL_UNIT
    )
    for name in outputs:
        if name == "pool":
            found[name] = pool
        elif name == "logits":
            kernel = variables["params"]["fc"]["kernel"]
            found[name] = jnp.dot(pool, kernel, precision=PRECISION)
        else:
            block, unit = SPATIAL_UNIT
            (maps,) = seen["intermediates"][block][unit]["__call__"]
            found[name] = maps[..., :SPATIAL_CHANNELS].reshape(len(images), SPATIAL_FEATURES)
    return found


def _features_digest(name: str, resize: str, variables: Mapping[str, Any]) -> str:
    """The digest without the last layer, which the features that are compared do not pass."""
    params = {key: value for key, value in variables["params"].items() if key != "fc"}
    weights = digest({**variables, "params": params})
    return hashlib.sha256(f"{name} {resize} {weights}".encode()).hexdigest()
