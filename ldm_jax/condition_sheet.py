"""The contact sheet of samples under conditions: a row for each example, in two blocks.

A row is the condition as a picture, the real image, and samples of several seeds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from ldm_jax import images
from ldm_jax.condition_judges import visible_boxes
from ldm_jax.data.layout import box_picture
from ldm_jax.held_out import Examples

EXAMPLES, CLASSES = 12, 16  # rows at most; of a model of classes alone, a row for each class
CELL = 128  # side of what is drawn for a condition, pixels
SIZES = (128, 112, 96, 80, 64, 48, 32)  # of a cell, the largest first
MOST_BYTES = 290_000  # of the PNG
COLOURS = 256  # of the PNG: a third of the bytes of all
_GAP, _HEAD, _FONT = 3, 16, 11  # pixels


def choose_rows(held: Examples) -> list[int]:
    """The examples that are shown: the first of each class, or else the first ones."""
    if set(held.fields) == {"label"}:
        _, first = np.unique(held.fields["label"], return_index=True)
        return first[:CLASSES].tolist()
    return list(range(min(EXAMPLES, len(held.images))))


def picture(conditioner: str, config: ConfigDict, held: Examples, row: int) -> np.ndarray:
    """What an example's condition looks like: (H, W, 3) uint8."""
    field, names = held.fields, held.label_names
    if conditioner == "label":
        label = int(field["label"][row])
        return draw_text(names[label] if names and label < len(names) else f"class {label}")
    if conditioner == "text":
        return draw_text(held.captions[row])
    if conditioner == "layout":
        boxes = visible_boxes(field["boxes"][row], config.layout.vocab_size)
        return box_picture(boxes, names, (CELL, CELL))
    if conditioner == "segmentation":
        return images.class_picture(field["segmentation"][row], config.segmentation.num_classes)
    if conditioner == "low_res":
        return images.to_uint8(field["low_res"][row])
    return np.where(field["mask"][row] > 0, np.uint8(127), held.images[row])


def draw_text(text: str) -> np.ndarray:
    """Words on white, in lines: (CELL, CELL, 3) uint8."""
    image = Image.new("RGB", (CELL, CELL), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)
    width = max(1, int((CELL - 8) / draw.textlength("n", font)))
    draw.multiline_text((4, 4), "\n".join(textwrap.wrap(text, width)), "black", font, spacing=2)
    return np.asarray(image)


def make_sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Lays rows of cells, (H, W, 3) uint8 each, in two blocks: (H', W', 3) uint8.

    The cells before the last four are of conditions. They are as large as a PNG of 290 kB and
    256 colours allows.
    """
    for size in SIZES:
        sheet = _lay_out(rows, size)
        if len(images.encode_png(sheet, COLOURS)) <= MOST_BYTES:
            break
    return sheet


def _lay_out(rows: Sequence[Sequence[np.ndarray]], size: int) -> np.ndarray:
    columns, high = len(rows[0]), -(-len(rows) // 2)
    step = size + _GAP
    wide = columns * step + _GAP  # of a block
    blocks = 2 if len(rows) > 1 else 1
    sheet = Image.new(
        "RGB", (blocks * wide + (blocks - 1) * 4 * _GAP, _HEAD + high * step), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for block in range(blocks):
        left = block * (wide + 4 * _GAP) + _GAP
        for place, title in ((0, "condition"), (columns - 4, "real"), (columns - 3, "samples")):
            draw.text((left + place * step, 1), title, "black", font)
        for line, row in enumerate(rows[block * high : (block + 1) * high]):
            for column, cell in enumerate(row):
                place = (left + column * step, _HEAD + line * step)
                sheet.paste(_fit(cell, size), place)
    return np.asarray(sheet)


def _fit(cell: np.ndarray, size: int) -> Image.Image:
    """A cell at the size of the sheet's; pixels stay square where it is enlarged."""
    image = Image.fromarray(cell)
    larger = size >= max(cell.shape[:2])
    resample = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return image.resize((size, size), resample)
