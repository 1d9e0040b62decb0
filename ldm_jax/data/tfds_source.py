"""Sets of tensorflow_datasets, read without TensorFlow from their array_record files."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any

import numpy as np

from ldm_jax.data.boxes import boxes_from_tfds
from ldm_jax.data.decode import ANY, Limits, decode_image, image_size
from ldm_jax.data.table import match_rows, number_labels, parse_where
from ldm_jax.errors import UserError


class TfdsSource:
    """A prepared set of tensorflow_datasets; a `Source`.

    The image comes from the feature 'image'; other image features are left out. The first sequence
    of a bbox and a label, as `objects` of coco and `bobjects` of open_images_v4, also gives the
    column 'boxes'. Names like
    'lsun/bedroom' or 'lsun/bedroom:3.1.0' choose a configuration and a version. The set is looked
    for in the directory in the environment variable TFDS_DATA_DIR, or ~/tensorflow_datasets.

    A filter, and labels that are not a tfds ClassLabel, need one pass over the metadata of all
    examples when the source is opened.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str,
        where: str,
        label: str,
        background: tuple[int, int, int],
        limits: Limits = ANY,
    ):
        import tensorflow_datasets as tfds  # takes a while, and only this source needs it

        self._title = f"tfds:{name}"
        self._background, self._limits = background, limits
        self._split = split
        self._builder = _find_builder(tfds, name)
        features = self._builder.info.features
        images = {k for k, v in features.items() if isinstance(v, tfds.features.Image)}
        if "image" not in images:
            raise UserError(f"{self._title} has no feature 'image'; it has: {', '.join(features)}")
        # The encoded bytes are decoded by `decode_image`, as for every other source.
        self._decoders = {key: tfds.decode.SkipDecoding() for key in images}
        self._keys = tuple(key for key in features if key not in images)
        self._boxes = _box_feature(tfds, features)
        self._data = self._read_split(split)
        self._where = self._read_where(where)
        self._rows = self._match([self._data])
        self._set_labels(tfds, label)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        row = int(self._rows[index])
        example = self._data[row]
        result = {key: _plain(example[key]) for key in self._keys if key != "label"}
        result["image"] = decode_image(
            example["image"], self.name(index), self._background, self._limits
        )
        if self._boxes:
            result["boxes"] = boxes_from_tfds(example[self._boxes], *result["image"].shape[:2])
        if self._label:
            value = _plain(example[self._label])
            result["label"] = self._number[value] if self._number else value
        return result

    def name(self, index: int) -> str:
        return f"{self._title} {self._split} number {int(self._rows[index])}"

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        image = self._data[int(self._rows[index])]["image"]
        return image_size(image, self.name(index), self._limits)

    def _read_split(self, split: str) -> Any:
        try:
            return self._builder.as_data_source(split=split, decoders=self._decoders)
        except ValueError as error:
            splits = ", ".join(self._builder.info.splits)
            raise UserError(
                f"{self._title} has no split '{split}' with examples in it; it has: {splits} "
                "(part of one is written like 'train[:10%]')"
            ) from error

    def _read_where(self, where: str) -> str:
        """Checks the filter; the value of a ClassLabel may be its name or its number."""
        if not where:
            return ""
        column, value = parse_where(where, self._keys, self._title)
        names = getattr(self._builder.info.features[column], "names", None) or ()
        return f"{column}={names.index(value)}" if value in names else where

    def _match(self, parts: list) -> np.ndarray:
        """The places that the filter keeps in the concatenation of `parts`."""
        count = sum(len(part) for part in parts)
        if not self._where:
            return np.arange(count)
        column = self._where.partition("=")[0]
        values = {column: self._column(parts, column)}
        return np.asarray(match_rows(values, self._where, count, self._title))

    def _set_labels(self, tfds: Any, label: str) -> None:
        self._number = None
        self.label_names, self.num_labels = None, 0
        self._label = label if label != "label" or label in self._keys else ""
        feature = dict(self._builder.info.features).get(self._label)
        if isinstance(feature, tfds.features.ClassLabel):
            self.num_labels = feature.num_classes
            self.label_names = tuple(feature.names) if feature.names else None
        elif self._label:
            values, rows = {key: [] for key in self._keys}, ()
            if label in values:
                parts = [self._read_split(split) for split in self._builder.info.splits]
                values[label], rows = self._column(parts, label), self._match(parts)
            _, self.label_names, self.num_labels = number_labels(values, label, rows, self._title)
            if self.label_names:
                self._number = {name: i for i, name in enumerate(self.label_names)}
        kept = tuple(key for key in self._keys if key != "label")
        self.columns = (*kept, "label") if self._label else kept
        if self._boxes:
            self.columns = (*self.columns, "boxes")
        if self._boxes and not self._label:
            names = self._builder.info.features[self._boxes]["label"].names
            self.label_names = tuple(names) if names else None

    def _column(self, parts: list, column: str) -> list:
        return [_plain(part[i][column]) for part in parts for i in range(len(part))]


def _box_feature(tfds: Any, features: Any) -> str:
    """The name of the first feature that lists labelled boxes; '' if there is none."""
    for key, feature in features.items():
        inner = feature.feature if isinstance(feature, tfds.features.Sequence) else None
        if isinstance(inner, tfds.features.FeaturesDict) and {"bbox", "label"} <= set(inner.keys()):
            if isinstance(inner["bbox"], tfds.features.BBoxFeature):
                return key
    return ""


def _plain(value: Any) -> Any:
    """Text as str and integers as int; anything else as it is."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value


def _find_builder(tfds: Any, name: str) -> Any:
    """The builder of a set prepared as array_record, or a UserError that tells how to get it."""
    # Given here because tfds itself reads the variable only once, when it is imported.
    data_dir = os.environ.get("TFDS_DATA_DIR")
    place = data_dir or tfds.core.constants.DATA_DIR
    how = (
        "\n  pip install -e '.[tf]'\n"
        '  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
    )
    try:
        # From the files, not from the catalogue: its code may need TensorFlow to be imported.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        catalogue = tfds.list_builders(with_community_datasets=False)
        plain_name = re.split("[/:]", name)[0]
        if plain_name in catalogue:
            raise UserError(
                f"tfds:{name} is not prepared in {place}; to prepare it:{how}"
            ) from error
        close = ", ".join(difflib.get_close_matches(plain_name, catalogue)) or "nothing"
        raise UserError(
            f"there is no tfds:{name}: it is not prepared in {place} (the environment variable "
            f"TFDS_DATA_DIR) and the catalogue of tfds has nothing of that name; similar: {close}"
        ) from error
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"tfds:{name} in {builder.data_dir} is prepared as {builder.info.file_format.value}, "
            "which has no random access; remove it or set TFDS_DATA_DIR to another directory, "
            f"then prepare it as array_record:{how}"
        )
    return builder
