"""Captions of a source as tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.sources import Source, size_of
from ldm_jax.errors import UserError

# List of K captions -> tokens (K, L) int32, and of each caption the end that was cut off, or ''.
Encode = Callable[[Sequence[str]], tuple[np.ndarray, list[str]]]


class CaptionedSource:
    """A `Source` with one more column, `tokens` (K, L) int32, made of the captions in another.

    There is a row for each of an example's K captions, at least one: an example without captions
    has the empty one. `task_fields` chooses among them.

    Args:
        source: where the examples come from.
        column: its captions: text, or a list of texts. 'captions/text' is what 'text' stands for in
            the column 'captions', where that holds a mapping of lists or a list of mappings.
        encode: such as `Tokenizer.encode`; called from several threads.

    Raises:
        UserError: the source has no such column.
    """

    def __init__(self, source: Source, column: str, encode: Encode):
        # A name with a slash may be that of a column itself, as 'image/filename' in tfds.
        self._path = (column,) if column in source.columns else tuple(column.split("/"))
        if self._path[0] not in source.columns:
            has = ", ".join(source.columns) or "no metadata"
            raise UserError(
                f"the data has no captions '{column}' (config.data.caption); it has: {has}"
            )
        self._source, self._column, self._encode = source, column, encode
        self._lock = threading.Lock()
        self._read = self._cut = 0
        self.columns = (*source.columns, "tokens")
        self.label_names, self.num_labels = source.label_names, source.num_labels
        self.flippable = getattr(source, "flippable", True)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        example = self._source[index]
        captions = self._captions(index, example)
        tokens, cut = self._encode(captions)
        with self._lock:
            self._read += len(captions)
            self._cut += sum(map(bool, cut))
        return {**example, "tokens": tokens}

    def name(self, index: int) -> str:
        return self._source.name(index)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return size_of(self._source, index)

    @property
    def cut_share(self) -> float:
        """The share of the captions read so far that were longer than the tokens have room for."""
        return self._cut / max(1, self._read)

    def _captions(self, index: int, example: dict) -> list[str]:
        value: Any = example.get(self._path[0])
        try:
            for part in self._path[1:] if value is not None else ():
                if isinstance(value, Mapping):
                    value = value[part]
                else:
                    value = [entry[part] for entry in value]
            if isinstance(value, str | bytes) or value is None:
                value = [value]
            return [_text(entry) for entry in value] or [""]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{self.name(index)} has in '{self._column}' (config.data.caption) neither a text "
                "nor a list of texts"
            ) from error


def _text(value: Any) -> str:
    """Text as str; TypeError if it is none."""
    if value is None:
        return ""
    if isinstance(value, bytes):  # as tensorflow-datasets gives text
        return value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise TypeError(type(value))
    return value
