"""Image files of any common kind -> uint8 RGB arrays."""

from __future__ import annotations

import io
import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ldm_jax.errors import UserError

WHITE = (255, 255, 255)
_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # EXIF: these exchange height and width


def decode_image(
    file: bytes | str | os.PathLike, name: str, background: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """Decodes an encoded image, given as bytes or a path, to (H, W, 3) uint8.

    The EXIF rotation is applied, transparent pixels are composited on `background`, 16-bit grey is
    brought to 8 bits, and grey, palette and CMYK images become RGB. Of an animation the first
    frame is taken. The array may be read-only.

    Raises:
        UserError: the file cannot be decoded; the message contains `name`.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            return _to_rgb(ImageOps.exif_transpose(image), background)
    except Exception as error:  # Pillow raises many kinds, even SyntaxError, for damaged files
        raise _undecodable(name, error) from error


def image_size(file: bytes | str | os.PathLike | IO[bytes], name: str) -> tuple[int, int]:
    """Height and width of an image as `decode_image` would give it, from the file's header alone.

    Raises:
        UserError: the header cannot be read; the message contains `name`.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            # Of a PNG without EXIF before its pixels, Pillow would decode all to look behind them.
            look = image.format != "PNG" or "exif" in image.info
            turned = look and image.getexif().get(_ORIENTATION) in _TURNED
    except UserError:
        raise
    except Exception as error:
        raise _undecodable(name, error) from error
    return (width, height) if turned else (height, width)


def _undecodable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot decode the image {name} ({reason}): repair, replace or remove it")


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
