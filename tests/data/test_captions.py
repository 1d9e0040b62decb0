"""Captions of a source as tokens."""

import numpy as np
import pytest

from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.sources import open_source
from ldm_jax.data.table import TableSource
from ldm_jax.errors import UserError


def source(captions, column="text"):
    image = np.zeros((2, 2, 3), np.uint8)
    names = [f"{place}.png" for place in range(len(captions))]
    return TableSource(names, {column: captions}, lambda name: image, ("x",), 1)


def lengths(captions):
    """One token, the length of the caption, and what is beyond five letters."""
    return np.asarray([[len(text)] for text in captions], np.int32), [text[5:] for text in captions]


def tokens(captioned):
    return [captioned[i]["tokens"].tolist() for i in range(len(captioned))]


def test_adds_tokens_and_keeps_the_rest():
    captioned = CaptionedSource(source(["one", b"four", None]), "text", lengths)
    assert len(captioned) == 3 and captioned.name(1) == "1.png"
    assert captioned.columns == ("text", "tokens")
    assert (captioned.label_names, captioned.num_labels) == (("x",), 1)
    assert tokens(captioned) == [[[3]], [[4]], [[0]]]
    assert captioned[0]["image"].shape == (2, 2, 3)


def test_an_example_may_have_several_captions():
    captioned = CaptionedSource(source([["one", b"four"], [], ["seven"]]), "text", lengths)
    assert tokens(captioned) == [[[3], [4]], [[0]], [[5]]]


@pytest.mark.parametrize(
    "captions",
    [
        [{"text": [b"one", "four"], "id": [1, 2]}, None],  # as tfds gives coco_captions
        [[{"text": "one", "id": 1}, {"text": "four", "id": 2}], []],
    ],
)
def test_captions_inside_a_column(captions):
    captioned = CaptionedSource(source(captions, "captions"), "captions/text", lengths)
    assert tokens(captioned) == [[[3], [4]], [[0]]]
    flat = CaptionedSource(source(["one"], "captions/text"), "captions/text", lengths)
    assert tokens(flat) == [[[3]]]


@pytest.mark.parametrize(
    ("value", "name"),
    [(7, "text"), (["a", 7], "text"), ({"words": ["a"]}, "text/text"), ("plain", "text/text")],
)
def test_what_is_no_text_is_refused_by_the_name_of_its_file(value, name):
    captioned = CaptionedSource(source([value]), name, lengths)
    with pytest.raises(UserError, match=rf"^0\.png has in '{name}' .* neither a text nor a list"):
        captioned[0]


def test_cut_captions_are_counted():
    captioned = CaptionedSource(source([["one", "eleven"], ["fourteen", "four"]]), "text", lengths)
    assert captioned.cut_share == 0
    captioned[0]
    assert captioned.cut_share == 0.5
    captioned[0], captioned[1]
    assert captioned.cut_share == 0.5


def test_a_source_without_captions_is_refused():
    for column in ("caption", "caption/text"):
        with pytest.raises(UserError, match=rf"no captions '{column}' .*it has: text"):
            CaptionedSource(source(["a", "b", "c"]), column, lengths)


def test_scenes_with_captions_are_still_not_to_be_mirrored():
    assert not CaptionedSource(open_source("scenes", split="test[:3]"), "text", lengths).flippable
