"""The fields that conditions are made of, from an example and what its crop left of it.

A task's field is one function here: (image, example, draw) -> arrays, where `image` is the cropped
(R, R, 3) uint8, or of the size of its bucket, and `draw` says how it was cropped and holds the
random numbers of the example.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.data.degradation import add_noise, degrade
from ldm_jax.data.layout import boxes_from_coco, encode_layout
from ldm_jax.data.masks import draw_mask
from ldm_jax.data.scenes import flip_boxes
from ldm_jax.data.transforms import Draw, ImageTransform, crop_box
from ldm_jax.errors import UserError
from ldm_jax.images import to_float

Arrays = dict[str, np.ndarray]
Maker = Callable[[np.ndarray, dict, Draw], Arrays]
# What each field is made of: a column of the source, or '' where the image is enough.
COLUMNS = {"boxes": "boxes", "segmentation": "segmentation", "tokens": "tokens"}
COLUMNS |= {"low_res": "", "noise_level": "", "masked_image": "", "mask": ""}


@dataclasses.dataclass(frozen=True)
class TaskTransform:
    """An `ImageTransform`, and fields made of what it leaves.

    Attributes:
        image: what is done to the image.
        makers: the fields' functions.
    """

    image: ImageTransform
    makers: tuple[Maker, ...]

    def draw(self, uniforms: np.ndarray) -> Draw:
        return self.image.draw(uniforms)

    def apply(self, example: dict, draw: Draw) -> Arrays:
        arrays = self.image.apply(example, draw)
        for make in self.makers:
            arrays |= make(arrays["image"], example, draw)
        return arrays


def columns(fields: Sequence[str]) -> tuple[str, ...]:
    """The columns that a source must have for these fields."""
    wanted = (COLUMNS.get(field, field) for field in fields)
    return tuple(dict.fromkeys(column for column in wanted if column))


def passed_on(fields: Sequence[str]) -> tuple[str, ...]:
    """Those of the fields that are columns as they are, and not made here."""
    return tuple(field for field in fields if field not in COLUMNS)


def low_res(factor: int, degradation: str, noise: float = 0.0) -> Maker:
    """'low_res' (R / factor, R / factor, 3) float32 in [-1, 1]; see `degrade`.

    With `noise` above 0 it is noised to a level that is uniform in [0, noise), see `add_noise`, and
    'noise_level' () float32 says to which.
    """

    def make(image: np.ndarray, example: dict, draw: Draw) -> Arrays:
        return noised(to_float(degrade(image, factor, degradation, draw.random)), noise, draw)

    return make


def noised(small: np.ndarray, noise: float, draw: Draw) -> Arrays:
    """The fields of a low-resolution image in [-1, 1]; see `low_res`."""
    if noise == 0:
        return {"low_res": small}
    level = np.float32(draw.random.between(0, noise))
    return {"low_res": add_noise(small, level, draw.random), "noise_level": level}


def caption_tokens(image: np.ndarray, example: dict, draw: Draw) -> Arrays:
    """'tokens' (L,) int32: one of the rows of an example's tokens (K, L), each as likely."""
    rows = example["tokens"]
    return {"tokens": rows[choose_caption(len(rows), draw)]}


def choose_caption(count: int, draw: Draw) -> int:
    """Which of an example's captions is taken."""
    return 0 if draw.first or draw.random is None else draw.random.integer(0, count - 1)


def hole(kind: str) -> Maker:
    """'mask' (R, R, 1), +1 in a drawn hole and -1 outside, and 'masked_image', -1 in the hole."""

    def make(image: np.ndarray, example: dict, draw: Draw) -> Arrays:
        return mask_out(image, draw_mask(draw.random, len(image), kind))

    return make


def mask_out(image: np.ndarray, mask: np.ndarray) -> Arrays:
    """The fields of an image (R, R, 3) uint8 and its hole (R, R) bool; see `hole`."""
    masked = np.where(mask[..., None], np.float32(-1), to_float(image))
    return {"masked_image": masked, "mask": np.where(mask, 1, -1).astype(np.float32)[..., None]}


def layout(length: int, vocab_size: int) -> Maker:
    """'boxes' (length,) int32: the tokens of an example's boxes; see `encode_layout`."""

    def make(image: np.ndarray, example: dict, draw: Draw) -> Arrays:
        if example["boxes"] is None:
            raise UserError("it has no 'boxes' in metadata.jsonl")
        height, width = example["image"].shape[:2]
        entries = flip_boxes(example["boxes"], width) if draw.flip else example["boxes"]
        boxes = boxes_from_coco(entries, height=height, width=width)
        top, left, high, wide = crop_box(height, width, draw)
        if draw.flip:
            left = width - left - wide
        crop = (left / width, top / height, (left + wide) / width, (top + high) / height)
        order = draw.random.permutation(len(boxes)) if draw.random else None
        return {"boxes": encode_layout(boxes, length, vocab_size, crop, order)}

    return make


def segmentation(num_classes: int) -> Maker:
    """'segmentation' (R, R) int32: an example's map of classes, cropped like its image."""

    def make(image: np.ndarray, example: dict, draw: Draw) -> Arrays:
        if example["segmentation"] is None:
            raise UserError("it has no 'segmentation' in metadata.jsonl")
        classes = np.asarray(example["segmentation"])
        (height, width), size = classes.shape, example["image"].shape[:2]
        if (height, width) != size:
            raise UserError(
                f"its map of classes has {width}x{height} pixels, but must have those of the "
                f"image, {size[1]}x{size[0]}"
            )
        unknown = np.argwhere((classes < 0) | (classes >= num_classes))
        if len(unknown):
            row, column = unknown[0]
            raise UserError(
                f"its map of classes has the unknown class {classes[row, column]} at row {row}, "
                f"column {column} (from 0): config.segmentation.num_classes is {num_classes}"
            )
        top, left, high, wide = crop_box(*classes.shape, draw)
        classes = Image.fromarray(classes[top : top + high, left : left + wide].astype(np.int32))
        resized = np.asarray(classes.resize(image.shape[1::-1], Image.Resampling.NEAREST))
        return {"segmentation": resized[:, ::-1] if draw.flip else resized}

    return make


def make_transform(
    image: ImageTransform, fields: Sequence[str], config: ConfigDict
) -> TaskTransform:
    """Returns the transform that makes those of `fields` that are made, as the config says."""
    makers = {
        "low_res": functools.partial(
            low_res,
            config.data.low_res.factor,
            config.data.low_res.degradation,
            config.data.low_res.noise,
        ),
        "mask": functools.partial(hole, config.data.mask),
        "tokens": lambda: caption_tokens,
        "boxes": functools.partial(layout, config.layout.length, config.layout.vocab_size),
        "segmentation": functools.partial(segmentation, config.segmentation.num_classes),
    }
    return TaskTransform(image, tuple(makers[name]() for name in fields if name in makers))
