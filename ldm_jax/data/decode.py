"""Image files of any common kind -> uint8 RGB arrays."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import warnings
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ldm_jax.errors import Unreachable, UserError

WHITE = (255, 255, 255)
# Beyond twice its limit Pillow opens nothing. At the limit it would warn: here a number of pixels
# is refused, or is none of anybody's business.
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Of what Pillow reads, the kinds that image sets are made of: others have been attacked more often,
# or start programs. TGA has no mark of its own, and so comes last.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "TGA")
_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # EXIF: these exchange height and width
# What the system says of a file that is no image, or not there; anything else may pass.
FILE_ITSELF = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EINVAL)

File = bytes | str | os.PathLike | IO[bytes]


class Limits(NamedTuple):
    """What an image must obey, judged by its header, before any memory is spent on it.

    Attributes:
        min_side: least pixels of its shorter side.
        max_pixels: most pixels in all.
    """

    min_side: int = 1
    max_pixels: int = 100_000_000


ANY = Limits()


def decode_image(
    file: File, name: str, background: tuple[int, int, int] = WHITE, limits: Limits = ANY
) -> np.ndarray:
    """Decodes an encoded image, given as bytes, a path or an open file, to (H, W, 3) uint8.

    What it is follows from its content, not from its name. The EXIF rotation is applied,
    transparent pixels are composited on `background`, 16-bit grey is brought to 8 bits, and grey,
    palette and CMYK images become RGB. Of an animation the first frame is taken. The array may be
    read-only.

    Raises:
        UserError: the file cannot be decoded, or is beyond the limits; the message contains `name`.
        Unreachable: the file system did not give it.
    """
    with _opened(file, name, limits) as image:
        return _to_rgb(ImageOps.exif_transpose(image), background)


def image_size(file: File, name: str, limits: Limits = ANY) -> tuple[int, int]:
    """Height and width of an image as `decode_image` would give it, from the file's header alone.

    Raises:
        UserError: the header cannot be read, or is beyond the limits; the message contains `name`.
        Unreachable: the file system did not give it.
    """
    with _opened(file, name, limits) as image:
        width, height = image.size
        # Of a PNG without EXIF before its pixels, Pillow would decode all to look behind them.
        look = image.format != "PNG" or "exif" in image.info
        turned = look and image.getexif().get(_ORIENTATION) in _TURNED
        return (width, height) if turned else (height, width)


def check_size(size: tuple[int, int], limits: Limits = ANY) -> None:
    """Raises ValueError if an image of this width and height is beyond the limits."""
    width, height = size
    if min(width, height) < limits.min_side:
        raise ValueError(
            f"it has {width}x{height} pixels, but its sides must be at least {limits.min_side}"
        )
    if width * height > limits.max_pixels:
        raise ValueError(f"it has {width}x{height} pixels, but at most {limits.max_pixels} may be")


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # AVIF is an option


@contextlib.contextmanager
def _opened(file: File, name: str, limits: Limits) -> Iterator[Image.Image]:
    """Opens an image within its limits; errors, those within the block too, name it."""
    try:
        file = io.BytesIO(file) if isinstance(file, bytes) else file
        with Image.open(file, formats=_formats()) as image:
            check_size(image.size, limits)
            yield image
    except UserError:  # of a file within an archive
        raise
    except Exception as error:  # Pillow raises many kinds, even SyntaxError, for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno not in (None, *FILE_ITSELF):
            raise Unreachable(f"cannot read the image {name} ({reason})") from error
        if isinstance(error, Image.DecompressionBombError):
            reason = f"it has more than {limits.max_pixels} pixels"
        raise UserError(
            f"cannot decode the image {name} ({reason}): repair, replace or remove it"
        ) from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    """Converts an image of any Pillow mode to (H, W, 3) uint8."""
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("grey values outside 0..65535")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
