"""The column `boxes` of real sets: what their files say, checked and brought to one form.

That form is COCO's, as `layout.boxes_from_coco` reads it: a list of
{'label': class number, 'bbox': [left, top, width, height]} in pixels of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.errors import UserError

Boxes = list[dict]


def boxes_from_tfds(objects: Mapping[str, Sequence], height: int, width: int) -> Boxes:
    """Boxes of a tensorflow_datasets sequence such as `objects` of coco.

    Crowds are left out, as is usual for COCO: their boxes hold many objects. So are boxes without
    area, of which COCO has a few.

    Args:
        objects: 'bbox' (N, 4), the top, left, bottom and right edges as shares of the image;
            'label' (N,); and 'is_crowd' (N,) bool where the set knows crowds.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    crowds = objects.get("is_crowd", [False] * len(objects["label"]))
    boxes = []
    for edges, label, crowd in zip(objects["bbox"], objects["label"], crowds, strict=True):
        top, left, bottom, right = (float(edge) for edge in edges)
        if not crowd and bottom > top and right > left:
            box = [left * width, top * height, (right - left) * width, (bottom - top) * height]
            boxes.append({"label": int(label), "bbox": box})
    return boxes


def number_boxes(
    column: Sequence[Any], rows: Sequence[int], names: Sequence[str], title: str
) -> tuple[list[Boxes | None], tuple[str, ...] | None]:
    """Checks the boxes of a metadata.jsonl and numbers their labels.

    Labels that are integers stay as they are; names are numbered in sorted order, over `rows` only.
    The result is None for other rows.

    Args:
        column: of each image [{'label': name or number, 'bbox': [x, y, w, h]}, ...], or None.
        rows: the images that count.
        names: of the images' files.
        title: of the set.

    Returns:
        The boxes, with numbers, and the names of the classes, or None if they have none.

    Raises:
        UserError: an entry that is no box, named by its file; or names beside numbers.
    """
    labels = set()
    for row in rows:
        if column[row] is None:
            continue
        if not isinstance(column[row], list):
            raise UserError(f"the boxes of {names[row]} in {title} must be a list, also of one box")
        for i, box in enumerate(column[row]):
            labels.add(_checked_label(f"box {i} of {names[row]} in {title}", box))
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise UserError(
            f"the boxes of {title} have names as well as numbers for labels: use one of them"
        )
    found = tuple(sorted(labels)) if kinds == {str} else None
    number = {name: i for i, name in enumerate(found)} if found else {}
    numbered: list[Boxes | None] = [None] * len(column)
    for row in rows:
        if column[row] is not None:
            numbered[row] = [
                {"label": number.get(box["label"], box["label"]), "bbox": box["bbox"]}
                for box in column[row]
            ]
    return numbered, found


def _checked_label(title: str, box: Any) -> str | int:
    """The label of one box, after a check of all of it."""
    label, bbox = (box.get("label"), box.get("bbox")) if isinstance(box, dict) else (None, None)
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))
    known = isinstance(label, str) or (type(label) is int and label >= 0)
    if not (numbers and known):
        form = '{"label": name or number from 0, "bbox": [left, top, width, height]}'
        raise UserError(f"{title} must be {form}, in pixels")
    if min(bbox[2:]) <= 0:
        raise UserError(f"{title} has no area: its width and height must be above 0")
    return label


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # nor NaN, nor too large for a float
