import collections
import concurrent.futures
import hashlib
import inspect
import re
import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.data import scenes
from ldm_jax.data.order import uniforms_at
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.scenes import SceneSource, caption, flip_boxes, load_things, open_scenes
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.errors import UserError

RELATION = re.compile(r"(.+) (left of|right of|above|below) (.+)")


def digest(example):
    parts = (example["image"].tobytes(), example["segmentation"].tobytes())
    rest = repr([example[name] for name in ("boxes", "text", "label")]).encode()
    return hashlib.sha256(b"".join((*parts, rest))).hexdigest()


def boxes_at(*places):
    """Boxes of 4x4 pixels around these centres, of class 0, 1, ..."""
    return [{"label": i, "bbox": [x - 2, y - 2, 4, 4]} for i, (x, y) in enumerate(places)]


def centre(box):
    x, y, width, height = box["bbox"]
    return x + width / 2, y + height / 2


def holds(relation, a, b):
    dx, dy = np.subtract(centre(b), centre(a))
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > 0


def without_article(phrase):
    return re.sub(r"^(a|an|some) ", "", phrase)


@pytest.fixture(scope="module")
def train():
    return open_scenes("train")


@pytest.fixture(scope="module")
def examples(train):
    return [train[i] for i in range(300)]


@pytest.fixture(scope="module")
def drawn():
    """Scenes of objects in their real shapes, but with hard edges and a colour that no ground has.

    ([(example, which object is seen at a pixel (64, 64), pixels of each object), ...], objects).
    """
    things = load_things()["train"]
    sides = {}

    def cut_out(index, side):
        sides[index] = side  # that of the last call: one that was left out may come again
        part = scenes.resize(things[index].picture, side)
        picture = np.zeros_like(part.picture)
        picture[part.mask] = (index % 40, index // 40, 255, 255)
        return part._replace(picture=picture)

    made = []
    for i in range(150):
        uniforms = uniforms_at(7, i * scenes._BLOCKS, scenes._BLOCKS, 4).ravel()
        example = scenes.compose(things, cut_out, uniforms, 64)
        image = example["image"].astype(int)
        seen = np.where(image[..., 2] == 255, image[..., 0] + 40 * image[..., 1], -1)
        indices = np.setdiff1d(seen, [-1]).tolist()
        full = {k: int(scenes.resize(things[k].picture, sides[k]).mask.sum()) for k in indices}
        made.append((example, seen, full))
    return made, things


class TestSource:
    def test_examples(self, train, examples):
        assert len(train) == 20_000 and len(open_scenes("test")) == 2_000
        assert train.num_labels == len(train.label_names) == 6
        assert train.segmentation_names == ("ground", *train.label_names)
        assert train.flippable is False
        assert train.name(3) == "scene 3 of train"
        for example in examples:
            assert set(example) == {"image", *train.columns}
            assert example["image"].shape == (64, 64, 3) and example["image"].dtype == np.uint8
            assert example["segmentation"].shape == (64, 64)
            assert example["segmentation"].dtype == np.int32
            for box in example["boxes"]:
                x, y, width, height = box["bbox"]
                assert all(type(value) is int for value in (box["label"], x, y, width, height))
                assert min(x, y) >= 0 and min(width, height) > 0
                assert x + width <= 64 and y + height <= 64
            present = {0, *(1 + box["label"] for box in example["boxes"])}
            assert set(np.unique(example["segmentation"])) == present
            areas = [box["bbox"][2] * box["bbox"][3] for box in example["boxes"]]
            assert example["label"] == example["boxes"][int(np.argmax(areas))]["label"]

    def test_all_counts_classes_and_grounds_occur(self, examples):
        counts = collections.Counter(len(example["boxes"]) for example in examples)
        assert set(counts) == {1, 2, 3, 4, 5, 6} and min(counts.values()) > 20
        labels = collections.Counter(
            box["label"] for example in examples for box in example["boxes"]
        )
        assert set(labels) == set(range(6)) and min(labels.values()) > sum(labels.values()) / 9
        assert len({example["text"] for example in examples}) > 270
        assert len({digest(example) for example in examples}) == 300

    def test_other_resolutions(self):
        example = SceneSource(resolution=96)[1]
        assert example["image"].shape == (96, 96, 3) and example["segmentation"].shape == (96, 96)
        with pytest.raises(UserError, match=r"at least 32 pixels a side, not 16"):
            open_scenes(resolution=16)

    @pytest.mark.parametrize("index", [-1, 2_000])
    def test_indices_out_of_range(self, index):
        with pytest.raises(IndexError, match=rf"scene {index} is out of range: there are 2000"):
            open_scenes("test")[index]

    def test_slices_are_parts_of_a_split(self, train):
        part, rest = open_scenes("train[:90%]"), open_scenes("train[90%:]")
        assert (len(part), len(rest)) == (18_000, 2_000)
        names = {source.name(i) for source in (part, rest) for i in range(len(source))}
        assert len(names) == 20_000
        place = int(rest.name(5).split()[1])
        assert digest(rest[5]) == digest(train[place])
        with pytest.raises(UserError, match=r"the set of scenes has no split 'val'"):
            open_scenes("val")

    def test_batches(self):
        fields = ("label", "segmentation", "text")
        batch = next(epoch_batches(open_scenes("test"), ImageTransform(64), 4, fields=fields))
        assert batch["segmentation"].shape == (4, 64, 64)
        assert batch["segmentation"].dtype == batch["label"].dtype == np.int32


class TestDeterminism:
    def test_order_of_access_and_process(self, examples):
        """Another process, another order and cold caches make the same scenes."""
        code = (
            "import hashlib\nfrom ldm_jax.data.scenes import open_scenes\n"
            + inspect.getsource(digest)
            + "source = open_scenes()\nprint(*[digest(source[i]) for i in range(19, -1, -1)])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[::-1] == [digest(example) for example in examples[:20]]

    def test_threads(self, examples):
        source = open_scenes()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: digest(source[i]), range(100)))
        assert found == [digest(example) for example in examples[:100]]

    def test_a_scene_stays_what_it_is(self, train):
        """Trained models and their figures refer to these scenes; a change must be meant."""
        assert train[21]["text"] == "a european castle left of a pineapple"
        assert train[21]["boxes"] == [
            {"label": 1, "bbox": [1, 16, 27, 28]},
            {"label": 3, "bbox": [18, 10, 23, 30]},
        ]

    def test_seed_and_split_matter(self, train):
        texts = {train[0]["text"], SceneSource(seed=1)[0]["text"], open_scenes("test")[0]["text"]}
        assert len(texts) == 3


class TestObjects:
    def test_train_and_test_share_nothing(self):
        things = load_things()
        names = {split: {thing.name for thing in things[split]} for split in things}
        assert not names["train"] & names["test"]
        assert len(names["train"]) > 300
        assert 0.1 < len(names["test"]) / len(names["train"] | names["test"]) < 0.16
        for split in things:
            assert {thing.label for thing in things[split]} == set(range(6))

    def test_captions_name_objects_of_the_split_only(self, examples):
        test = open_scenes("test")
        for split, made in (("train", examples), ("test", [test[i] for i in range(100)])):
            labels = {thing.name: thing.label for thing in load_things()[split]}
            for example in made:
                phrases = re.split(
                    r", | and | left of | right of | above | below ", example["text"]
                )
                found = [labels[without_article(phrase)] for phrase in phrases]
                assert sorted(found) == sorted(box["label"] for box in example["boxes"])

    def test_names_are_words(self):
        for thing in (thing for things in load_things().values() for thing in things):
            assert re.fullmatch(r"[a-z]+([ -][a-z]+){0,3}", thing.name)
            assert not {"and", "left", "right", "above", "below"} & set(thing.name.split())

    def test_all_can_be_drawn_at_the_smallest_size(self):
        for thing in (thing for things in load_things().values() for thing in things):
            assert scenes.resize(thing.picture, 6).mask.any()


class TestGeometry:
    """Boxes, label maps and occlusion against what is drawn."""

    def test_boxes_are_the_extents_of_what_is_not_hidden(self, drawn):
        made, things = drawn
        checked = 0
        for example, seen, full in made:
            assert len(full) == len(example["boxes"])
            for index, size in full.items():
                rows, columns = np.nonzero(seen == index)
                if len(rows) == size:
                    x, y = columns.min(), rows.min()
                    extent = [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
                    assert {"label": things[index].label, "bbox": extent} in example["boxes"]
                    checked += 1
        assert checked > 250

    def test_boxes_hold_also_what_is_hidden(self, drawn):
        """Seen pixels lie inside the box, and hidden ones make some boxes larger than these."""
        made, things = drawn
        larger = 0
        for example, seen, full in made:
            for index in full:
                rows, columns = np.nonzero(seen == index)
                bounds = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                around = [
                    (x, y, x + w, y + h)
                    for x, y, w, h in (
                        box["bbox"]
                        for box in example["boxes"]
                        if box["label"] == things[index].label
                    )
                    if x <= bounds[0] and y <= bounds[1]
                    if x + w >= bounds[2] and y + h >= bounds[3]
                ]
                assert around
                larger += bounds not in around
        assert larger > 5

    def test_label_map(self, drawn):
        made, things = drawn
        classes = np.array([0, *(1 + thing.label for thing in things)])
        for example, seen, _ in made:
            np.testing.assert_array_equal(example["segmentation"], classes[seen + 1])

    def test_occlusion(self, drawn):
        shares = [
            (seen == index).sum() / size
            for _, seen, full in drawn[0]
            for index, size in full.items()
        ]
        assert 1 - scenes.MAX_OCCLUSION <= min(shares) < 0.8  # some come close to the bound
        assert max(shares) == 1

    def test_label_map_agrees_with_the_image_of_a_single_object(self, examples):
        """The box of an object that is alone is the extent of its label map."""
        alone = [example for example in examples if len(example["boxes"]) == 1]
        for example in alone:
            rows, columns = np.nonzero(example["segmentation"])
            x, y, width, height = example["boxes"][0]["bbox"]
            assert (x, x + width - 1) == (columns.min(), columns.max())
            assert (y, y + height - 1) == (rows.min(), rows.max())
            assert 64 * 0.3 < max(width, height) < 64 * 0.72
        assert len(alone) > 20

    def test_flip_boxes(self):
        boxes = [{"label": 2, "bbox": [5, 7, 10, 20]}, {"label": 0, "bbox": [0, 0, 64, 64]}]
        flipped = flip_boxes(boxes, 64)
        assert flipped == [{"label": 2, "bbox": [49, 7, 10, 20]}, boxes[1]]
        assert flip_boxes(flipped, 64) == boxes


class TestCaption:
    @pytest.mark.parametrize(
        ("places", "expected"),
        [
            ([(20, 30), (40, 30)], {"a cat left of an ox", "an ox right of a cat"}),
            ([(40, 30), (20, 30)], {"a cat right of an ox", "an ox left of a cat"}),
            ([(30, 20), (30, 40)], {"a cat above an ox", "an ox below a cat"}),
            (
                [(20, 40), (28, 20)],
                {
                    "a cat left of an ox",
                    "a cat below an ox",
                    "an ox right of a cat",
                    "an ox above a cat",
                },
            ),
            ([(30, 30), (23, 33)], {"an ox and a cat"}),  # too close to be left or right
        ],
    )
    def test_two(self, places, expected):
        uniforms = np.arange(20) / 20
        found = {caption(["cat", "ox"], boxes_at(*places), 64, uniform) for uniform in uniforms}
        assert found == expected

    def test_one_and_many(self):
        assert caption(["unicorn"], boxes_at((9, 9)), 64, 0.9) == "a unicorn"
        boxes = boxes_at((30, 9), (50, 9), (10, 50))
        text = caption(["grapes", "octopus", "bread"], boxes, 64, 0.1)
        assert text == "some bread, some grapes and an octopus"

    def test_relations_tell_the_truth(self, examples):
        """Told apart by class, the objects of a scene are where its caption says."""
        labels = {thing.name: thing.label for thing in load_things()["train"]}
        told = collections.Counter()
        for example in examples:
            boxes = {box["label"]: box for box in example["boxes"]}
            match = RELATION.fullmatch(example["text"])
            if match and len(boxes) == 2:
                first, relation, second = match.groups()
                a, b = (boxes[labels[without_article(phrase)]] for phrase in (first, second))
                assert holds(relation, a, b)
                told[relation] += 1
        assert len(told) == 4 and min(told.values()) > 2

    def test_lists_go_from_left_to_right(self, examples):
        labels = {thing.name: thing.label for thing in load_things()["train"]}
        several = [example for example in examples if len(example["boxes"]) > 2]
        for example in several:
            phrases = re.split(", | and ", example["text"])
            found = [labels[without_article(phrase)] for phrase in phrases]
            assert found == [box["label"] for box in sorted(example["boxes"], key=centre)]
        assert len(several) > 100
