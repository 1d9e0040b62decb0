"""What is done to one example between its source and the batch, and the random choices in it.

`draw` makes the choices from a few uniform numbers and `apply` carries them out. They are apart so
that an image and its cached first-stage moments are treated alike by the same numbers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from ldm_jax.data.draws import Uniforms
from ldm_jax.errors import UserError

CROPS = ("center", "random")
UNIFORMS = 4  # numbers that a draw takes


class Draw(NamedTuple):
    """The random choices for one example.

    Attributes:
        flip: mirror the image left to right.
        crop: (size, top, left), each in [0, 1): the size of the crop, from half to all of the
            largest that fits, and its place in what room is left. None: the largest one, centred.
        random: numbers for what is made of the example beside its image; None where nothing is.
        first: of several captions take the first, not one by `random`.
        size: height and width to crop and resize to; None where the transform's own are meant.
    """

    flip: bool = False
    crop: tuple[float, float, float] | None = None
    random: Uniforms | None = None
    first: bool = False
    size: tuple[int, int] | None = None


class Transform(Protocol):
    """Turns the dict that a source yields into the arrays that are batched."""

    def draw(self, uniforms: np.ndarray) -> Draw:
        """Makes the random choices for one example from (UNIFORMS,) numbers in [0, 1)."""
        ...

    def apply(self, example: dict, draw: Draw) -> dict[str, np.ndarray]:
        """Carries them out; every example must give the same names, shapes and dtypes."""
        ...


def draw_flip_and_crop(uniforms: np.ndarray, flip: bool, crop: str) -> Draw:
    """Makes these choices from (UNIFORMS,) numbers; `crop` is one of CROPS."""
    # The first number decides the flip in every case: whether an example is flipped must not
    # depend on the crop, nor on whether pixels or cached moments are loaded.
    return Draw(
        flip=bool(flip and uniforms[0] < 0.5),
        crop=tuple(uniforms[1:].tolist()) if crop == "random" else None,
    )


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Crop to a square, bicubic resize, mirror: 'image' of any size -> (R, R, 3) uint8.

    Where a draw has a size, that is what it crops to, (H, W, 3).

    Attributes:
        resolution: R.
        crop: 'center', the largest centred square (the paper's LSUN and ImageNet recipe), or
            'random', a square with a side of 0.5 to 1.0 of the shorter side at a random place
            (the recipe of its KL autoencoders).
        flip: mirror half of the examples.
    """

    resolution: int
    crop: str = "center"
    flip: bool = True

    def __post_init__(self):
        if self.resolution < 1:
            raise UserError(f"the image resolution must be at least 1, not {self.resolution}")
        if self.crop not in CROPS:
            raise UserError(f"crop must be one of {', '.join(CROPS)}, not '{self.crop}'")

    def draw(self, uniforms: np.ndarray) -> Draw:
        return draw_flip_and_crop(uniforms, self.flip, self.crop)

    def apply(self, example: dict, draw: Draw) -> dict[str, np.ndarray]:
        size = draw.size or (self.resolution, self.resolution)
        return {"image": crop_resize(example["image"], size, draw)}


@dataclasses.dataclass(frozen=True)
class CachedTransform:
    """Picks the plain or the mirrored entry of each array of a `CachedSource`.

    From the same numbers it draws the same flip as `ImageTransform` does.

    Attributes:
        names: the arrays, each (2, ...) in an example: [0] plain, [1] mirrored.
        flip: mirror half of the examples; when False an array may be (1, ...).
    """

    names: tuple[str, ...] = ("moments",)
    flip: bool = True

    def draw(self, uniforms: np.ndarray) -> Draw:
        return draw_flip_and_crop(uniforms, self.flip, "center")

    def apply(self, example: dict, draw: Draw) -> dict[str, np.ndarray]:
        return {name: example[name][int(draw.flip)] for name in self.names}


def crop_resize(image: np.ndarray, size: tuple[int, int], draw: Draw) -> np.ndarray:
    """Crops (H, W, 3) uint8 to the ratio of `size`, resizes it to (*size, 3) uint8, mirrors it.

    The bicubic filter is antialiased. The result may be a view of `image`.
    """
    top, left, height, width = crop_box(*image.shape[:2], draw._replace(size=size))
    image = image[top : top + height, left : left + width]
    if (height, width) != tuple(size):
        # Cropping first, not `resize(box=...)`, so that the filter does not see outside the crop.
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    return image[:, ::-1] if draw.flip else image


def crop_box(height: int, width: int, draw: Draw) -> tuple[int, int, int, int]:
    """What is cut out of an image, before it is mirrored: top, left, height, width in pixels.

    It has the ratio of `draw.size`, or is a square.
    """
    rows, columns = draw.size or (1, 1)
    scale = min(height / rows, width / columns)
    share = 1.0 if draw.crop is None else 0.5 + 0.5 * draw.crop[0]
    high = min(height, max(1, round(rows * scale * share)))
    wide = min(width, max(1, round(columns * scale * share)))
    if draw.crop is None:
        return (height - high) // 2, (width - wide) // 2, high, wide
    _, down, right = draw.crop
    return int(down * (height - high + 1)), int(right * (width - wide + 1)), high, wide
