"""Captions of a source as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ldm_jax.data.sources import Source
from ldm_jax.errors import UserError


class CaptionedSource:
    """A `Source` with one more column, `tokens` (L,) int32, made of the captions in another.

    Args:
        source: where the examples come from.
        column: its captions; an example without one has the empty caption.
        tokenizer: list of B captions -> (B, L) int32; called from several threads.

    Raises:
        UserError: the source has no such column.
    """

    def __init__(
        self, source: Source, column: str, tokenizer: Callable[[Sequence[str]], np.ndarray]
    ):
        if column not in source.columns:
            has = ", ".join(source.columns) or "no metadata"
            raise UserError(
                f"the data has no captions '{column}' (config.data.caption); it has: {has}"
            )
        self._source, self._column, self._tokenizer = source, column, tokenizer
        self.columns = (*source.columns, "tokens")
        self.label_names, self.num_labels = source.label_names, source.num_labels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        example = self._source[index]
        caption = example.get(self._column) or ""
        if isinstance(caption, bytes):  # as tensorflow-datasets gives text
            caption = caption.decode("utf-8", "replace")
        return {**example, "tokens": self._tokenizer([str(caption)])[0]}

    def name(self, index: int) -> str:
        return self._source.name(index)
