"""Captions of a source as tokens."""

import numpy as np
import pytest

from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.table import TableSource
from ldm_jax.errors import UserError


def source(captions):
    image = np.zeros((2, 2, 3), np.uint8)
    return TableSource(list("abc"), {"text": captions}, lambda name: image, ("x",), 1)


def lengths(captions):
    return np.asarray([[len(text), 0] for text in captions], np.int32)


def test_adds_tokens_and_keeps_the_rest():
    captioned = CaptionedSource(source(["one", b"four", None]), "text", lengths)
    assert len(captioned) == 3 and captioned.name(1) == "b"
    assert captioned.columns == ("text", "tokens")
    assert (captioned.label_names, captioned.num_labels) == (("x",), 1)
    found = [captioned[i]["tokens"].tolist() for i in range(3)]
    assert found == [[3, 0], [4, 0], [0, 0]]
    assert captioned[0]["image"].shape == (2, 2, 3)


def test_a_source_without_captions_is_refused():
    with pytest.raises(UserError, match=r"no captions 'caption' .*it has: text"):
        CaptionedSource(source(["a", "b", "c"]), "caption", lengths)
