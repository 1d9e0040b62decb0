"""Random holes for inpainting: strokes and boxes, as in LaMa.

Suvorov et al. 2022, "Resolution-robust large mask inpainting with Fourier convolutions",
https://arxiv.org/abs/2109.07161. The numbers are those of its code, github.com/advimman/lama:
configs/data_gen/random_{thin,medium,thick}_{256,512}.yaml for the test sets and
configs/training/data/abl-04-256-mh-dist-web.yaml for training. Inpainting in the paper of latent
diffusion follows that protocol: it trains with 'mixed' at 256 and tests at 512.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ldm_jax.data.draws import Uniforms
from ldm_jax.errors import UserError

KINDS = ("thin", "medium", "thick", "box", "mixed")
MIN_SIZE = 16

_ANGLES = tuple(0.01 + turn for turn in range(4))  # radians; LaMa's own, and it has no others
_MAX_SEGMENTS = 5


class _Strokes(NamedTuple):
    """Chains of 1 to 5 straight segments with round ends.

    Attributes are (least, most), both included; length and width are those of a segment.
    """

    count: tuple[int, int]
    length: tuple[int, int]
    width: tuple[int, int]


class _Boxes(NamedTuple):
    """Upright rectangles that keep `margin` pixels from the border."""

    count: tuple[int, int]
    side: tuple[int, int]
    margin: int


class _Recipe(NamedTuple):
    """A mask has either strokes or boxes; it covers more than 0 and at most `max_share`."""

    strokes: _Strokes | None
    boxes: _Boxes | None
    box_share: float  # of the masks that have boxes
    max_share: float


_TEST_SHARE = 0.5  # max_tamper_area of the test sets
_TRAIN_SHARE = 0.9  # LaMa sets no bound in training; see draw_mask
_TEST_BOXES = 0.3 / 1.3  # irregular_proba 1, box_proba 0.3

_TRAIN_STROKES = _Strokes((1, 6), (10, 209), (5, 104))
_TRAIN_BOXES = _Boxes((1, 4), (30, 150), 10)
_RECIPES_256 = {
    "thin": _Recipe(_Strokes((4, 51), (10, 49), (5, 14)), None, 0.0, _TEST_SHARE),
    "medium": _Recipe(
        _Strokes((4, 6), (10, 109), (5, 54)), _Boxes((1, 5), (10, 50), 0), _TEST_BOXES, _TEST_SHARE
    ),
    "thick": _Recipe(_TRAIN_STROKES, _Boxes((1, 3), (30, 150), 10), _TEST_BOXES, _TEST_SHARE),
    "box": _Recipe(None, _TRAIN_BOXES, 1.0, _TRAIN_SHARE),
    "mixed": _Recipe(_TRAIN_STROKES, _TRAIN_BOXES, 0.5, _TRAIN_SHARE),
}
_RECIPES_512 = {  # not the same masks twice as large
    "thin": _Recipe(_Strokes((4, 71), (10, 109), (5, 24)), None, 0.0, _TEST_SHARE),
    "medium": _Recipe(
        _Strokes((4, 11), (10, 209), (5, 104)),
        _Boxes((1, 5), (30, 150), 0),
        _TEST_BOXES,
        _TEST_SHARE,
    ),
    "thick": _Recipe(
        _Strokes((1, 6), (10, 459), (5, 254)),
        _Boxes((1, 4), (30, 300), 10),
        _TEST_BOXES,
        _TEST_SHARE,
    ),
}


def draw_mask(random: Uniforms, size: int, kind: str = "mixed") -> np.ndarray:
    """Draws a hole: (size, size) bool, True inside.

    A hole is never empty. It covers at most 0.5 of a mask of 'thin', 'medium' or 'thick', as in
    LaMa's test sets, and at most 0.9 otherwise; a mask outside these bounds is drawn anew.

    Args:
        random: the mask is a function of its numbers.
        size: the side of the mask, at least 16. The test sets have numbers of their own for 512,
            which are scaled to larger sizes; below it, those for 256 are scaled. Training has
            numbers for 256 only.
        kind: 'thin', 'medium' and 'thick' are LaMa's test sets, the last two with boxes in 3 of 13
            masks, and named after the width of the strokes: by area they are alike; 'mixed' is
            its training set, wide strokes or boxes with equal probability; 'box' has only the
            boxes of the latter.

    Raises:
        UserError: an unknown kind, or the size is too small.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of mask '{kind}'; choose one of: {', '.join(KINDS)}")
    if size < MIN_SIZE:
        raise UserError(f"masks must have a side of at least {MIN_SIZE} pixels, not {size}")
    reference = 512 if size >= 512 and kind in _RECIPES_512 else 256
    recipe = (_RECIPES_512 if reference == 512 else _RECIPES_256)[kind]
    while True:
        image = Image.new("L", (size, size))
        if random() < recipe.box_share:
            _draw_boxes(random, image, recipe.boxes, size / reference)
        else:
            _draw_strokes(random, image, recipe.strokes, size / reference)
        mask = np.asarray(image) > 0
        if 0 < np.count_nonzero(mask) <= recipe.max_share * size * size:
            return mask


def _draw_strokes(random: Uniforms, image: Image.Image, strokes: _Strokes, scale: float) -> None:
    draw = ImageDraw.Draw(image)
    size = image.width
    for stroke in range(random.integer(*strokes.count)):
        start = (random.integer(0, size - 1), random.integer(0, size - 1))
        for _ in range(random.integer(1, _MAX_SEGMENTS)):
            angle = random.choice(_ANGLES)
            length = scale * random.integer(*strokes.length)
            width = max(1, round(scale * random.integer(*strokes.width)))
            side = 1 if stroke % 2 else -1  # a stroke turns to the right only, the next to the left
            x = start[0] + side * length * math.sin(angle)
            y = start[1] + length * math.cos(angle)
            end = (min(max(round(x), 0), size), min(max(round(y), 0), size))
            draw.line([start, end], fill=1, width=width)
            for x, y in (start, end):
                left, top = x - (width - 1) // 2, y - (width - 1) // 2
                draw.ellipse([left, top, left + width - 1, top + width - 1], fill=1)
            start = end


def _draw_boxes(random: Uniforms, image: Image.Image, boxes: _Boxes, scale: float) -> None:
    draw = ImageDraw.Draw(image)
    margin = round(scale * boxes.margin)
    least, most = (max(1, round(scale * side)) for side in boxes.side)
    most = min(most, image.width - 2 * margin)
    for _ in range(random.integer(*boxes.count)):
        width, height = random.integer(least, most), random.integer(least, most)
        left = random.integer(margin, image.width - margin - width)
        top = random.integer(margin, image.height - margin - height)
        draw.rectangle([left, top, left + width - 1, top + height - 1], fill=1)
