"""Layouts that a user gives to sampling."""

import json

import pytest

from ldm_jax.data.condition_files import read_layout

from .helpers import refuses, write_json

NAMES = ("cat", "dog", "Smileys & Emotion")


def test_layout_in_shares_and_in_pixels(tmp_path):
    shares = write_json(
        tmp_path / "a.json",
        [
            {"label": "dog", "bbox": [0.25, 0.5, 0.5, 0.25]},
            {"category_id": 0, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
        ],
    )
    expected = [(1, 0.25, 0.5, 0.75, 0.75), (0, 0, 0, 1, 1)]
    assert read_layout(shares, NAMES) == expected
    entries = [{"category": "dog", "bbox": [16, 16, 32, 8]}, {"label": 0, "bbox": [0, 0, 64, 32]}]
    for key in ("boxes", "annotations"):
        pixels = {"width": 64, "height": 32, key: entries}
        assert read_layout(write_json(tmp_path / "b.json", pixels), NAMES, 2) == expected
    no_size = {"boxes": json.loads(shares.read_text())}
    assert read_layout(write_json(tmp_path / "c.json", no_size), NAMES) == expected


def test_layout_is_clipped_to_the_image(tmp_path):
    content = {"width": 10, "height": 10, "boxes": [{"label": 0, "bbox": [-5, 5, 30, 30]}]}
    assert read_layout(write_json(tmp_path / "a.json", content), NAMES) == [(0, 0, 0.5, 1, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"a\.json is not JSON: .* in line 1, column 3"),
        ("[" * 100_000, r"a\.json is not JSON"),
        ("3", r"a\.json must be a list of boxes"),
        ({"boxs": []}, "must be a list of boxes, or have one called 'boxes'"),
        ([], r"a\.json has no boxes"),
        ({"width": 5, "boxes": [1]}, "a width and a height above 0, or neither"),
        ({"width": 5, "height": 0, "boxes": [1]}, "a width and a height above 0, or neither"),
        ({"images": [], "annotations": []}, "is a whole COCO file"),
        ([7], "box 0 of .* must be an object"),
        ([{"label": 0}], "box 0 of .* four numbers"),
        ([{"label": 0, "bbox": [0, 0, 1]}], "four numbers"),
        ([{"label": 0, "bbox": [0, 0, 1, "1"]}], "four numbers"),
        ([{"label": 0, "bbox": [0, 0, 1, True]}], "four numbers"),
        ('[{"label": 0, "bbox": [0, 0, NaN, 1]}]', "four numbers"),
        ('[{"label": 0, "bbox": [0, 0, 1, 1' + "0" * 400 + "]}]", "four numbers"),
        ([{"label": 0, "bbox": [10, 10, 50, 50]}], 'is not in shares .* write {"width": '),
        ([{"label": 0, "bbox": [0, 0, -0.5, 1]}], r"a\.json: box 0 .* has no area"),
        ([{"label": 0, "bbox": [0, 0, 0.5, 0]}], r"a\.json: box 0 .* has no area"),
        ([{"label": 0, "bbox": [1, 0, 0.5, 1]}], r"a\.json: box 0 .* is outside the image"),
        ([{"bbox": [0, 0, 1, 1]}], "box 0 of .* has no class"),
        ([{"label": 3, "bbox": [0, 0, 1, 1]}], "has the label 3: choose from 0 to 2"),
        ([{"category_id": -1, "bbox": [0, 0, 1, 1]}], "has the category_id -1"),
        (
            [{"label": "Dgo", "bbox": [0, 0, 1, 1]}],
            r"\(did you mean 'dog'\?\): the model knows cat, dog, Sm",
        ),
        (
            [{"label": "smileys & emotions", "bbox": [0, 0, 1, 1]}],
            "did you mean 'Smileys & Emotion'",
        ),
        ([{"label": "qqq", "bbox": [0, 0, 1, 1]}], 'unknown label "qqq": the model knows cat'),
        ([{"label": None, "bbox": [0, 0, 1, 1]}], "unknown label null"),
        ([{"label": 0, "bbox": [0, 0, 1, 1]}] * 4, "has 4 boxes, .* at most 3: remove 1"),
    ],
    ids=range(27),
)
def test_bad_layouts_are_refused(tmp_path, content, message):
    refuses(message, read_layout, write_json(tmp_path / "a.json", content), NAMES, 3)


def test_the_message_lists_only_some_of_many_classes(tmp_path):
    path = write_json(tmp_path / "a.json", [{"label": "x", "bbox": [0, 0, 1, 1]}])
    refuses(r"knows class0, .*, class19, \.\.\. \(600 in all\)$", read_layout, path, MANY)


MANY = [f"class{i}" for i in range(600)]
