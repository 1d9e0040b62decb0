"""A source whose metadata is a table in memory, and the choices a user makes about one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ldm_jax.data.boxes import number_boxes
from ldm_jax.errors import UserError

_SPLIT = re.compile(r"(?P<name>\w+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class TableSource:
    """Images that are read one by one, with metadata columns held as lists; a `Source`.

    Args:
        names: what to call each image, in messages and to `read`; (N,).
        columns: name -> values (N,), None where an image has no value.
        read: decodes the image of a name to (H, W, 3) uint8; called from several threads.
        loaders: column -> what gives its values, of what `columns` holds; likewise.
        measure: tells the height and width of the image of a name without decoding it; likewise.
    """

    def __init__(
        self,
        names: Sequence[str],
        columns: dict[str, list],
        read: Callable[[str], np.ndarray],
        label_names: tuple[str, ...] | None = None,
        num_labels: int = 0,
        loaders: Mapping[str, Callable[[str], np.ndarray]] | None = None,
        measure: Callable[[str], tuple[int, int]] | None = None,
    ):
        self._names = names
        self._values = columns
        self._read = read
        self._loaders = dict(loaders or {})
        self._measure = measure
        self.columns = tuple(columns)
        self.label_names = label_names
        self.num_labels = num_labels

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        row = {name: values[index] for name, values in self._values.items()}
        for name, load in self._loaders.items():
            if row.get(name) is not None:
                row[name] = load(row[name])
        return {**row, "image": self._read(self._names[index])}

    def name(self, index: int) -> str:
        return self._names[index]

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        name = self._names[index]
        return self._measure(name) if self._measure else self._read(name).shape[:2]


def select_table(
    names: list[str],
    columns: dict[str, list],
    splits: list[str],
    read: Callable[[str], np.ndarray],
    *,
    split: str,
    where: str,
    label: str,
    title: str,
    loaders: Mapping[str, Callable[[str], np.ndarray]] | None = None,
    measure: Callable[[str], tuple[int, int]] | None = None,
) -> TableSource:
    """Makes the source of the rows that `split` and `where` select, labelled by `label`.

    Labels, and those of the column `boxes`, are numbered over what `where` keeps of all splits, so
    that a training and a test set agree.
    """
    matching = match_rows(columns, where, len(names), title)
    labels, label_names, num_labels = number_labels(columns, label, matching, title)
    columns = {key: values for key, values in columns.items() if key != "label"}
    if "boxes" in columns:
        columns["boxes"], box_names = number_boxes(columns["boxes"], matching, names, title)
        label_names = label_names if labels is not None else box_names
    if labels is not None:
        columns["label"] = labels
    rows = sorted(set(split_rows(names, splits, split, title)) & set(matching))
    if not rows:
        raise UserError(f"no image of split '{split}' of {title} matches '{where}'")
    return TableSource(
        [names[i] for i in rows],
        {key: [values[i] for i in rows] for key, values in columns.items()},
        read,
        label_names,
        num_labels,
        loaders,
        measure,
    )


def split_rows(names: Sequence[str], splits: Sequence[str], split: str, title: str) -> list[int]:
    """The rows of a split such as 'train', 'train[:90%]', 'train[90%:]' or 'test[:500]'.

    A slice counts the images in the order of the SHA-256 of their names. That is as good as a
    random order, so every slice is a fair sample even where the files are sorted by class, and an
    image added later does not move the others between slices much.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise UserError(f"cannot read the split '{split}': write it like 'train' or 'train[:90%]'")
    rows = [i for i, name in enumerate(splits) if name == match["name"]]
    if not rows:
        raise UserError(
            f"{title} has no split '{match['name']}'; it has: {_listing(set(splits))} "
            "(part of one is written like 'train[:90%]')"
        )
    if match[2] is None:
        return rows
    rows.sort(key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest())
    start = _bound(match["start"], len(rows), 0)
    stop = _bound(match["stop"], len(rows), len(rows))
    if start >= stop:
        raise UserError(f"the split '{split}' of {title} is empty: it slices {len(rows)} images")
    return sorted(rows[start:stop])


def match_rows(columns: dict[str, list], where: str, count: int, title: str) -> list[int]:
    """The rows whose column has the value, for `where` = 'column=value'; '' matches all."""
    if not where:
        return list(range(count))
    column, value = parse_where(where, columns, title)
    rows = [
        i for i, entry in enumerate(columns[column]) if entry is not None and str(entry) == value
    ]
    if not rows:
        raise UserError(
            f"nothing in {title} has {where}; values of '{column}': {_listing(columns[column])}"
        )
    return rows


def parse_where(where: str, columns: Iterable[str], title: str) -> tuple[str, str]:
    """Splits 'column=value' after checking that there is such a column."""
    column, equals, value = where.partition("=")
    if not equals:
        raise UserError(f"cannot read the filter '{where}': write it like 'column=value'")
    if column not in columns:
        has = ", ".join(columns) or "no metadata"
        raise UserError(f"{title} has no column '{column}' to filter by; it has: {has}")
    return column, value


def number_labels(
    columns: dict[str, list], label: str, rows: Sequence[int], title: str
) -> tuple[list | None, tuple[str, ...] | None, int]:
    """Turns the column `label` into class numbers: (labels, label names or None, class count).

    Integers stay as they are; strings are numbered in sorted order, over `rows` only. The label
    of other rows is None. Without labels ('' or the default 'label' where there is no such column)
    the result is (None, None, 0).
    """
    if not label or (label == "label" and label not in columns):
        return None, None, 0
    if label not in columns:
        has = ", ".join(columns) or "no metadata"
        raise UserError(f"{title} has no column '{label}' to take labels from; it has: {has}")
    values = columns[label]
    present = [values[i] for i in rows if values[i] is not None]
    if all(isinstance(value, str) for value in present):
        names = tuple(sorted(set(present)))
        number = {name: i for i, name in enumerate(names)}
        return [number.get(value) for value in values], names, len(names)
    if not all(isinstance(value, int) and value >= 0 for value in present):
        raise UserError(
            f"the label column '{label}' of {title} must hold strings or integers from 0 up, "
            f"not: {_listing(present)}"
        )
    return [None if value is None else int(value) for value in values], None, max(present) + 1


def _bound(text: str | None, total: int, default: int) -> int:
    if not text:
        return default
    value = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(value + total if value < 0 else value, 0), total)


def _listing(values: Iterable, limit: int = 20) -> str:
    """Distinct values for a message, at most `limit` of them."""
    texts = sorted({str(value) for value in values if value is not None})
    more = f", ... ({len(texts)} in all)" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
