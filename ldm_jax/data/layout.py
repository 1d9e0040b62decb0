"""Layouts, labelled boxes, as the tokens that the layout-to-image models read, and as pictures.

A layout is a list of (class, x0, y0, x1, y1): a class number and the left, top, right and bottom
edges as shares of the image's width and height, from 0 to 1, y downwards.

The tokens are those of the released model (layout2img-openimages256: vocab_size 8192, length 92):
taming-transformers' ObjectsBoundingBoxConditionalBuilder with `encode_crop` and without the group
flag, in taming/data/conditional_builder/{objects_bbox,objects_center_points,utils}.py.

With s = isqrt(vocab_size), the sides of the grid on which corners lie (8192: s = 90):

- A box is three tokens: its class number, its top left and its bottom right corner. A corner is
  round(y * (s - 1)) * s + round(x * (s - 1)), halves to even.
- What a token means follows from its place, not its value: classes and corners share the numbers,
  and the embeddings, 0, 1, 2, ... So a class may be any number from 0 to vocab_size - 2.
- Free places are filled with vocab_size - 1, "none". (Where vocab_size is a square this is also the
  last corner; only the place of the class says whether there is a box.)
- A length of 3 n + 2 has room for n boxes and then the two corners of the crop that the model sees;
  boxes are relative to the whole image. A length of 3 n has no crop; boxes are relative to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm_jax.errors import UserError

Box: TypeAlias = tuple[int, float, float, float, float]
WHOLE = (0.0, 0.0, 1.0, 1.0)
# Told apart by the colour-blind (Okabe & Ito 2008, without yellow), all dark enough for white text.
COLORS = ((0, 114, 178), (213, 94, 0), (0, 128, 95), (176, 88, 138), (70, 70, 70), (150, 100, 0))


def slots(length: int) -> int:
    """The number of boxes that `length` tokens have room for; UserError for an unusable length."""
    if length < 3 or length % 3 == 1:
        raise UserError(
            f"config.layout.length is {length}, but must be 3 n for n boxes, or 3 n + 2 with the "
            "corners of the crop"
        )
    return length // 3


def encode_layout(
    boxes: Sequence[Box],
    length: int,
    vocab_size: int,
    crop: tuple[float, float, float, float] = WHOLE,
    order: Sequence[int] | None = None,
) -> np.ndarray:
    """Turns boxes into (length,) int32 tokens, see the module.

    Boxes that reach over the image are clipped. Of boxes outside `crop` there is no token, and if
    more than `slots(length)` are left, the largest within the crop are kept.

    Args:
        boxes: relative to the whole image; none at all gives the null condition.
        length: of the tokens, config.layout.length.
        vocab_size: number of tokens, config.layout.vocab_size.
        crop: the part of the image that the model sees (x0, y0, x1, y1).
        order: the indices of all `boxes` in the order of their tokens, by default as given. The
            original shuffles them: `rng.permutation(len(boxes))`.

    Raises:
        UserError: a length or size that no layout has; a box without area, outside the image or of
            no possible class, named by its index from 0.
    """
    side, room, none = _side(vocab_size), slots(length), vocab_size - 1
    clipped = clip_boxes(boxes)
    for i, (label, *_) in enumerate(clipped):
        if not 0 <= label < none:
            raise UserError(f"box {i} has the class {label}: choose from 0 to {none - 1}")
    if order is None:
        order = range(len(boxes))
    elif sorted(order) != list(range(len(boxes))):
        raise UserError(f"the order of {len(boxes)} boxes must be a permutation of their indices")

    areas = [_area(box, crop) for box in clipped]
    largest = sorted((i for i in range(len(boxes)) if areas[i] > 0), key=lambda i: -areas[i])[:room]
    chosen = [clipped[i] for i in order if i in largest]
    with_crop = length % 3 == 2
    if not with_crop:
        chosen = [_relative(box, crop) for box in chosen]
    tokens = np.full(length, none, np.int32)
    for i, (label, x0, y0, x1, y1) in enumerate(chosen):
        tokens[3 * i : 3 * i + 3] = label, _corner(x0, y0, side), _corner(x1, y1, side)
    if with_crop:
        tokens[-2:] = _corner(*crop[:2], side), _corner(*crop[2:], side)
    return tokens


def decode_layout(tokens: np.ndarray, vocab_size: int) -> list[Box]:
    """The boxes in (length,) tokens, without padding and crop: the inverse of `encode_layout`.

    An edge is at most 1 / (2 (s - 1)) off, half a step of the grid; a box smaller than a step may
    have lost its area.

    Raises:
        UserError: the tokens are of no layout.
    """
    side, none = _side(vocab_size), vocab_size - 1
    boxes = []
    for place in range(0, 3 * slots(len(tokens)), 3):
        label, *corners = (int(token) for token in tokens[place : place + 3])
        if label == none:
            continue
        if not (0 <= label < none and all(0 <= corner < side * side for corner in corners)):
            raise UserError(
                f"the tokens {place} to {place + 2} ({label}, {corners[0]}, {corners[1]}) are no "
                "class and two corners"
            )
        x0, y0, x1, y1 = (
            number / (side - 1) for corner in corners for number in (corner % side, corner // side)
        )
        boxes.append((label, x0, y0, x1, y1))
    return boxes


def boxes_from_coco(
    entries: Sequence[Mapping], width: float = 1.0, height: float = 1.0
) -> list[Box]:
    """Turns [{'label': number, 'bbox': (left, top, width, height)}, ...] into boxes, not clipped.

    `width` and `height` are those of the image, in the unit of the entries.
    """
    boxes = []
    for entry in entries:
        x, y, w, h = entry["bbox"]
        boxes.append((entry["label"], x / width, y / height, (x + w) / width, (y + h) / height))
    return boxes


def clip_boxes(boxes: Sequence[Box]) -> list[Box]:
    """Clips boxes to the image; UserError names the index of one without area or outside."""
    clipped = []
    for i, (label, *edges) in enumerate(boxes):
        x0, y0, x1, y1 = (float(edge) for edge in edges)
        shown = f"box {i} (left {x0:g}, top {y0:g}, right {x1:g}, bottom {y1:g})"
        if not all(math.isfinite(edge) for edge in (x0, y0, x1, y1)):
            raise UserError(f"{shown} has an edge that is no number")
        if x1 <= x0 or y1 <= y0:
            raise UserError(f"{shown} has no area: its width and height must be above 0")
        if x1 <= 0 or y1 <= 0 or x0 >= 1 or y0 >= 1:
            raise UserError(f"{shown} is outside the image, which is from 0 to 1")
        clipped.append((int(label), max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)))
    return clipped


def box_picture(
    boxes: Sequence[Box], names: Sequence[str] | None, size: tuple[int, int]
) -> np.ndarray:
    """Draws boxes with the names of their classes on white: (H, W, 3) uint8 of `size` (H, W).

    Small boxes lie above large ones. Without `names`, or beyond them, a class is shown by its
    number. From about 256 pixels on the text is readable; what is drawn depends only on the
    arguments.
    """
    height, width = size
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    line = max(1, min(size) // 128)
    font = ImageFont.load_default(max(9, min(size) // 22))
    painted = []
    for i, (label, x0, y0, x1, y1) in enumerate(boxes):
        left, top = round(x0 * (width - 1)), round(y0 * (height - 1))
        right, bottom = round(x1 * (width - 1)), round(y1 * (height - 1))
        name = names[label] if names is not None and 0 <= label < len(names) else str(label)
        color = COLORS[i % len(COLORS)]
        painted.append(((right - left) * (bottom - top), (left, top, right, bottom), name, color))
    painted.sort(key=lambda entry: -entry[0])
    for _, edges, _, color in painted:
        draw.rectangle(edges, outline=color, width=line)
    for _, (left, top, _, _), name, color in painted:  # last, so that no line crosses a name
        _, _, wide, high = (math.ceil(edge) for edge in draw.textbbox((0, 0), name, font))
        wide, high = wide + 2 * line, high + 2 * line
        x, y = max(0, min(left, width - wide)), max(0, min(top, height - high))
        draw.rectangle((x, y, x + wide, y + high), fill=color)
        draw.text((x + line, y + line), name, "white", font)
    return np.asarray(picture)


def _side(vocab_size: int) -> int:
    """The number of places for a corner along each axis."""
    if vocab_size < 4:
        raise UserError(f"config.layout.vocab_size is {vocab_size}, but must be at least 4")
    return math.isqrt(vocab_size)


def _corner(x: float, y: float, side: int) -> int:
    return round(y * (side - 1)) * side + round(x * (side - 1))


def _area(box: Box, crop: tuple[float, float, float, float]) -> float:
    """The area of a box within the crop."""
    _, x0, y0, x1, y1 = box
    wide, high = min(x1, crop[2]) - max(x0, crop[0]), min(y1, crop[3]) - max(y0, crop[1])
    return max(wide, 0.0) * max(high, 0.0)


def _relative(box: Box, crop: tuple[float, float, float, float]) -> Box:
    """A box of the image as one of the crop, clipped to it.

    The original leaves the width of a box as it is when it cuts its left side off.
    """
    label, *edges = box
    starts, sizes = crop[:2] * 2, (crop[2] - crop[0], crop[3] - crop[1]) * 2
    shares = ((edge - a) / b for edge, a, b in zip(edges, starts, sizes, strict=True))
    return (label, *(min(max(share, 0.0), 1.0) for share in shares))
