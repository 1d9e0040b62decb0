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
        crop: (side, top, left), each in [0, 1): the side of the square crop, from half to all of
            the shorter side, and its place in what room is left. None: the largest centred square.
        random: numbers for what is made of the example beside its image; None where nothing is.
        first: of several captions take the first, not one by `random`.
    """

    flip: bool = False
    crop: tuple[float, float, float] | None = None
    random: Uniforms | None = None
    first: bool = False


class Transform(Protocol):
    """Turns the dict that a source yields into the arrays that are batched."""

    def draw(self, uniforms: np.ndarray) -> Draw:
        """Makes the random choices for one example from (UNIFORMS,) numbers in [0, 1)."""
        ...

    def apply(self, example: dict, draw: Draw) -> dict[str, np.ndarray]:
        """Carries them out; every example must give the same names, shapes and dtypes."""
        ...


def _draw(uniforms: np.ndarray, flip: bool, crop: str) -> Draw:
    # The first number decides the flip in every case: whether an example is flipped must not
    # depend on the crop, nor on whether pixels or cached moments are loaded.
    return Draw(
        flip=bool(flip and uniforms[0] < 0.5),
        crop=tuple(uniforms[1:].tolist()) if crop == "random" else None,
    )


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Crop to a square, bicubic resize, mirror: 'image' of any size -> (R, R, 3) uint8.

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
        return _draw(uniforms, self.flip, self.crop)

    def apply(self, example: dict, draw: Draw) -> dict[str, np.ndarray]:
        return {"image": crop_resize(example["image"], self.resolution, draw)}


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
        return _draw(uniforms, self.flip, "center")

    def apply(self, example: dict, draw: Draw) -> dict[str, np.ndarray]:
        return {name: example[name][int(draw.flip)] for name in self.names}


def crop_resize(image: np.ndarray, resolution: int, draw: Draw) -> np.ndarray:
    """Crops a square out of (H, W, 3) uint8, resizes it to (R, R, 3) uint8 and mirrors it.

    The bicubic filter is antialiased. The result may be a view of `image`.
    """
    top, left, side = crop_box(*image.shape[:2], draw)
    image = image[top : top + side, left : left + side]
    if side != resolution:
        # Cropping first, not `resize(box=...)`, so that the filter does not see outside the crop.
        resized = Image.fromarray(image).resize((resolution,) * 2, Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    return image[:, ::-1] if draw.flip else image


def crop_box(height: int, width: int, draw: Draw) -> tuple[int, int, int]:
    """The square that is cut out of an image, before it is mirrored: top, left, side in pixels."""
    side = min(height, width)
    if draw.crop is None:
        return (height - side) // 2, (width - side) // 2, side
    size, down, right = draw.crop
    side = max(1, round(side * (0.5 + 0.5 * size)))
    return int(down * (height - side + 1)), int(right * (width - side + 1)), side
