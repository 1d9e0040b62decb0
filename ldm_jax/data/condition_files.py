"""Files with conditions that a user gives to sampling, read and checked.

Sizes are (height, width) of what the model takes; messages give pixels as width x height. Every
mistake in a file is a UserError of one line that names the file and the rule.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ldm_jax.data.decode import FILE_ITSELF, WHITE, check_size, decode_image
from ldm_jax.data.layout import Box, boxes_from_coco, clip_boxes
from ldm_jax.errors import Unreachable, UserError

Path = str | os.PathLike
Size = tuple[int, int]

IMAGE_BYTES, TEXT_BYTES = 256 * 2**20, 16 * 2**20
MAX_PROMPTS = 10_000
CLASS_KEYS = ("label", "category", "category_id")
SHOWN_NAMES, SHOWN_CHARACTERS = 20, 80
BLACK = (0, 0, 0)


class FittedImage(NamedTuple):
    """An image at the model's size.

    Attributes:
        pixels: (H, W, 3) uint8.
        file_size: (height, width) in the file, as it is shown.
        note: what was done to fit it, in one line; '' if it had the size.
    """

    pixels: np.ndarray
    file_size: Size
    note: str


def read_image(path: Path, size: Size) -> FittedImage:
    """Reads an image and fits it to `size` as training does: the largest centred part of the
    model's ratio, resized by an antialiased bicubic filter.
    """
    pixels = _decode(path, WHITE)
    file_size = pixels.shape[:2]
    part = _centre(pixels, size)
    steps = []
    if part.shape != pixels.shape:
        steps.append(f"cropped to its centred {_shown(part.shape)}")
    if part.shape[:2] != size:
        steps.append(f"resized to {_shown(size)}")
    note = f"{path}: {_shown(file_size)} pixels, {' and '.join(steps)}" if steps else ""
    return FittedImage(_resize(part, size), file_size, note)


def read_low_res(path: Path, size: Size) -> FittedImage:
    """Reads the low-resolution image of super-resolution, which must have the ratio of `size`.

    One of another size is resized, as in `read_image`, and the note says so.
    """
    pixels = _decode(path, WHITE)
    _check_ratio(path, pixels.shape, size, "the low-resolution image")
    note = ""
    if pixels.shape[:2] != size:
        note = f"{path}: {_shown(pixels.shape)} pixels, resized to the model's {_shown(size)}"
    return FittedImage(_resize(pixels, size), pixels.shape[:2], note)


def read_mask(path: Path, size: Size, image_size: Size | None = None) -> np.ndarray:
    """Reads a mask of what to paint anew: (H, W) bool, True in the hole.

    The hole is where the mean of red, green and blue is at least half; what is transparent counts
    as black, so it is kept. Resized by taking the nearest pixel.

    Args:
        path: of a picture of any kind.
        size: of the result.
        image_size: `FittedImage.file_size` of the image that the mask belongs to. The mask must
            have its ratio, and is cropped like it. By default the image has the ratio of `size`.
    """
    mask = _decode(path, BLACK).mean(axis=-1) >= 127.5
    _check_ratio(path, mask.shape, image_size or size, "the mask")
    mask = _nearest(_centre(mask, size), size)
    rule = "white is what to paint anew, black is kept"
    if not mask.any():
        raise UserError(f"the mask {path} has no hole at {_shown(size)} pixels: {rule}")
    if mask.all():
        raise UserError(f"the mask {path} keeps nothing at {_shown(size)} pixels: {rule}")
    return mask


def read_label_map(path: Path, num_classes: int, size: Size) -> np.ndarray:
    """Reads a map of class numbers: (H, W) int32 in [0, num_classes).

    It is a PNG of 1 to 16 bits of grey, whose levels are the class numbers, or with a palette,
    whose indices are. One that is a whole number of times larger or smaller than `size` is resized
    by taking the nearest pixel; any other size is refused.
    """
    classes = read_classes(path)
    unknown = np.argwhere(classes >= num_classes)
    if len(unknown):
        row, column = unknown[0]
        raise UserError(
            f"the label map {path} has the unknown class {classes[row, column]} at row {row}, "
            f"column {column} (from 0): the model knows 0 to {num_classes - 1}"
        )
    (height, width), (out_height, out_width) = classes.shape, size
    whole = any(a % b == 0 for a, b in ((height, out_height), (out_height, height)))
    if height * out_width != width * out_height or not whole:
        raise UserError(
            f"the label map {path} has {_shown(classes.shape)} pixels, but must have "
            f"{_shown(size)}, or a whole number of times more or fewer"
        )
    return _nearest(classes, size)


def read_classes(path: Path) -> np.ndarray:
    """Reads the stored numbers of a grey or palette PNG: (H, W) int32, of 0 to 65535.

    Raises:
        UserError: it cannot be read, or is a picture of another kind.
    """
    data = _read_bytes(path, IMAGE_BYTES)
    rule = "save the class numbers as a PNG of 8 or 16 bits of grey, or with a palette"
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode = image.format, image.mode
            check_size(image.size)
            numbers = None
            if kind == "PNG" and (mode in ("1", "L", "P") or mode.startswith("I")):
                numbers = np.asarray(ImageOps.exif_transpose(image)).astype(np.int32)
    except Exception as error:  # Pillow raises many kinds, even SyntaxError, for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot decode the label map {path} ({reason}): {rule}") from error
    if kind != "PNG":
        raise UserError(f"the label map {path} is a {kind} file: {rule}")
    if numbers is None:
        what = "grey with transparency" if mode == "LA" else "of colours"
        raise UserError(f"the label map {path} is {what} ({mode}), not of class numbers: {rule}")
    depth = data[24]  # in the header, which comes first
    if mode == "L" and depth < 8:  # Pillow spreads 2 and 4 bits of grey over 0..255
        numbers //= 255 // (2**depth - 1)
    return numbers


def read_layout(path: Path, names: Sequence[str], slots: int | None = None) -> list[Box]:
    """Reads a layout from JSON: (class, x0, y0, x1, y1) per box, in [0, 1], see `layout`.

    The file is a list as in COCO, [{"label": "cat", "bbox": [x, y, w, h]}, ...], of boxes in shares
    of the image's width and height; or an object {"width": 640, "height": 480, "boxes": [...]},
    of boxes in pixels, where the sizes may be missing and "boxes" may be called "annotations". A
    "label", "category" or "category_id" is a name or a number from 0. Other keys are ignored. Boxes
    are clipped to the image.

    Args:
        path: of the file.
        names: of the classes.
        slots: how many boxes the model has room for.
    """
    content = _parse_json(path)
    entries, (width, height) = _entries(path, content)
    if slots is not None and len(entries) > slots:
        raise UserError(
            f"the layout {path} has {len(entries)} boxes, but this model takes at most {slots}: "
            f"remove {len(entries) - slots}"
        )
    checked = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"box {i} of {path} must be an object with a label and a bbox")
        bbox = _bbox(f"box {i} of {path}", entry.get("bbox"))
        if width is None and max(map(abs, bbox)) > 1:
            raise UserError(
                f'box {i} of {path} is not in shares from 0 to 1: for pixels, write {{"width": '
                '..., "height": ..., "boxes": [...]}'
            )
        label = _class_number(f"box {i} of {path}", entry, names)
        checked.append({"label": label, "bbox": bbox})
    try:
        return clip_boxes(boxes_from_coco(checked, width or 1, height or 1))
    except UserError as error:
        raise UserError(f"the layout {path}: {error}") from error


def read_prompts(path: Path) -> list[str]:
    """Reads prompts from UTF-8 text, one a line; blank lines and outer spaces are left out."""
    data = _read_bytes(path, TEXT_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"the prompts {path} are not UTF-8 text: byte {data[error.start]:#04x} in line {line}; "
            "save the file as UTF-8"
        ) from error
    if "\0" in text:  # such as UTF-16 without a mark
        raise UserError(f"the prompts {path} hold zero bytes: save the file as UTF-8 text")
    lines = io.StringIO(text, newline=None)  # \n, \r\n and \r alone end a line
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"the prompts {path} are empty: write one prompt a line")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{path} has {len(prompts)} prompts, but at most {MAX_PROMPTS} are read: split the file"
        )
    return prompts


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        with pathlib.Path(path).expanduser().open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) not in (None, *FILE_ITSELF):
            raise Unreachable(f"cannot read {path} ({reason})") from error
        raise UserError(f"cannot read {path} ({reason}): check the path") from error
    if len(data) > limit:
        raise UserError(f"{path} has more than {limit // 2**20} MiB: give a smaller file")
    return data


def _decode(path: Path, background: tuple[int, int, int]) -> np.ndarray:
    return decode_image(_read_bytes(path, IMAGE_BYTES), str(path), background)


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(_read_bytes(path, TEXT_BYTES).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"the layout {path} is not JSON: {error.msg} in {where}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, endless digits or brackets
        raise UserError(f"the layout {path} is not JSON in UTF-8 ({error})") from error


def _entries(path: Path, content: Any) -> tuple[list, tuple[float | None, float | None]]:
    """The boxes in a layout, and the (width, height) that they are relative to or (None, None)."""
    sizes = (None, None)
    if isinstance(content, dict):
        if "images" in content or "categories" in content:
            raise UserError(
                f"the layout {path} is a whole COCO file: give the annotations of one image, with "
                "its width and height, and class names"
            )
        sizes = (content.get("width"), content.get("height"))
        if sizes != (None, None) and not all(_is_number(side) and side > 0 for side in sizes):
            raise UserError(f"the layout {path} must have a width and a height above 0, or neither")
        content = content.get("boxes", content.get("annotations"))
    if not isinstance(content, list):
        raise UserError(f"the layout {path} must be a list of boxes, or have one called 'boxes'")
    if not content:
        raise UserError(f"the layout {path} has no boxes")
    return content, sizes


def _bbox(title: str, value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise UserError(f"{title} must have a bbox of four numbers, [left, top, width, height]")
    return [float(number) for number in value]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e9  # neither NaN nor endless, and exact enough as a float


def _class_number(title: str, entry: dict, names: Sequence[str]) -> int:
    key = next((key for key in CLASS_KEYS if key in entry), None)
    if key is None:
        raise UserError(f"{title} has no class: give its name or number as 'label'")
    value = entry[key]
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(names):
            raise UserError(f"{title} has the {key} {value}: choose from 0 to {len(names) - 1}")
        return value
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    shown = json.dumps(value, ensure_ascii=False)[:SHOWN_CHARACTERS]
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(shown.strip('"').casefold(), folded, 1)
    hint = f" (did you mean '{folded[near[0]]}'?)" if near else ""
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN_NAMES else ""
    raise UserError(
        f"{title} has the unknown {key} {shown}{hint}: the model knows "
        f"{', '.join(names[:SHOWN_NAMES])}{more}"
    )


def _check_ratio(path: Path, shape: Sequence[int], size: Size, what: str) -> None:
    if shape[0] * size[1] != shape[1] * size[0]:
        divisor = math.gcd(*size)
        ratio = f"{size[1] // divisor}:{size[0] // divisor}"
        raise UserError(
            f"{path} has {_shown(shape)} pixels, but {what} must have the ratio {ratio} of "
            f"{_shown(size)}: crop or pad it"
        )


def _centre(array: np.ndarray, size: Size) -> np.ndarray:
    """The largest centred part of (h, w, ...) with the ratio of `size`, to the next pixel."""
    (height, width), (h, w) = array.shape[:2], size
    part_height = min(height, max(1, round(width * h / w)))
    part_width = min(width, max(1, round(height * w / h)))
    top, left = (height - part_height) // 2, (width - part_width) // 2
    return array[top : top + part_height, left : left + part_width]


def _resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def _nearest(array: np.ndarray, size: Size) -> np.ndarray:
    """Resizes (h, w) by taking the pixel in which a new one has its centre, as Pillow does."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for new, old in zip(size, array.shape, strict=True)
    )
    return array[rows[:, None], columns]


def _shown(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
