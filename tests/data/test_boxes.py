"""Boxes, captions and label maps of real sets: prepared by tfds, or in a folder."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax.data.boxes import boxes_from_tfds, number_boxes
from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.layout import decode_layout
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.errors import UserError
from ldm_jax.training.latents import task_transform

from .helpers import noise, refuses, write, write_metadata

tfds = pytest.importorskip("tensorflow_datasets")

HEIGHT, WIDTH = 40, 80
NAMES = ("cat", "dog", "bus")
# Of each image: label, edges in pixels (left, top, right, bottom) and whether it is a crowd.
OBJECTS = (
    ((2, (20, 10, 60, 30), False), (0, (0, 0, 80, 40), True)),
    (),
    ((0, (40, 0, 60, 40), False), (1, (30, 10, 30, 20), False)),  # the second has no area
)


def picture(place):
    out = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), place, np.uint8)).save(out, "PNG")
    out.seek(0)
    return out


def share(edges):
    left, top, right, bottom = edges
    return tfds.features.BBox(top / HEIGHT, left / WIDTH, bottom / HEIGHT, right / WIDTH)


class TinySet(tfds.core.GeneratorBasedBuilder):
    """What the sets below share. Each has the features of the set of tfds that it is named for."""

    VERSION = tfds.core.Version("1.0.0")
    __module__ = "tiny_set"  # see test_tfds_source.py

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), **self.more()}
        features["image/filename"] = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for place, objects in enumerate(OBJECTS):
            image = {"image": picture(place), "image/filename": f"{place}.png"}
            yield place, {**image, **self.row(place, objects)}


class TinyCoco(TinySet):
    """As coco and coco_captions."""

    def more(self):
        objects = {
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "id": np.int64,
            "is_crowd": np.bool_,
            "label": tfds.features.ClassLabel(names=NAMES),
        }
        captions = {"id": np.int64, "text": np.str_}
        return {
            "captions": tfds.features.Sequence(captions),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }

    def row(self, place, objects):
        found = [
            {"area": 1, "bbox": share(edges), "id": 1, "is_crowd": crowd, "label": label}
            for label, edges, crowd in objects
        ]
        captions = [{"id": i, "text": f"caption {i} of {place}"} for i in range(place + 1)]
        return {"captions": captions, "image/id": place, "objects": found}


class TinyOpenImages(TinySet):
    """As open_images_v4, whose labels of whole images come before its boxes."""

    def more(self):
        whole = {
            "confidence": np.int32,
            "label": tfds.features.ClassLabel(names=("x",)),
            "source": tfds.features.ClassLabel(names=("human",)),
        }
        boxed = {
            "bbox": tfds.features.BBoxFeature(),
            "is_group_of": np.int8,
            "label": tfds.features.ClassLabel(names=NAMES),
            "source": tfds.features.ClassLabel(names=("human",)),
        }
        return {
            "objects": tfds.features.Sequence(whole),
            "bobjects": tfds.features.Sequence(boxed),
        }

    def row(self, place, objects):
        whole = [{"confidence": 10, "label": 0, "source": 0}]
        boxed = [
            {"bbox": share(edges), "is_group_of": 0, "label": label, "source": 0}
            for label, edges, crowd in objects
            if not crowd
        ]
        return {"objects": whole, "bobjects": boxed}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    for builder in (TinyCoco, TinyOpenImages):
        builder(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture
def tfds_sets(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    for name in ("tiny_coco", "tiny_open_images", "tiny_set"):
        monkeypatch.delitem(tfds.core.registered._DATASET_REGISTRY, name, raising=False)


def in_order(source):
    """The examples by the grey level of their images, since tfds shuffles them."""
    return sorted((source[i] for i in range(len(source))), key=lambda row: row["image"][0, 0, 0])


def layouts(source, flip=False):
    c = config_lib.get_config()
    c.data.update(fields=("boxes",), resolution=32, flip=False)
    c.layout.update(vocab_size=401, length=6)  # a grid of 20 x 20, two boxes
    (batch,) = epoch_batches(source, task_transform(c), len(source), flip=flip, threads=0)
    levels = batch["image"][:, 0, 0, 0].tolist()
    found = [decode_layout(tokens, 401) for tokens in batch["boxes"]]
    return dict(zip(levels, found, strict=True))


@pytest.mark.parametrize("name", ["tiny_coco", "tiny_open_images"])
def test_boxes_of_tfds(tfds_sets, name):
    source = open_source(f"tfds:{name}", label="")
    assert "boxes" in source.columns and source.label_names == NAMES and source.num_labels == 0
    found = [example["boxes"] for example in in_order(source)]
    # Neither the crowd nor the box without area. Shares are stored as float32.
    assert [[box["label"] for box in boxes] for boxes in found] == [[2], [], [0]]
    np.testing.assert_allclose(found[0][0]["bbox"], [20, 10, 40, 20], atol=1e-4)
    np.testing.assert_allclose(found[2][0]["bbox"], [40, 0, 20, 40], atol=1e-4)


def test_boxes_of_tfds_become_tokens_of_the_crop(tfds_sets):
    source = open_source("tfds:tiny_coco", label="")
    found = layouts(source)  # the centred square is that from 20 to 60
    assert found == {0: [(2, 0, 5 / 19, 1, 14 / 19)], 1: [], 2: [(0, 10 / 19, 0, 1, 1)]}
    assert layouts(source, flip=True)[2] == [(0, 0, 0, 10 / 19, 1)]  # halves go to the even place


def test_captions_of_tfds(tfds_sets):
    read = []

    def encode(captions):
        read.append(captions)
        return np.zeros((len(captions), 1), np.int32), [""] * len(captions)

    source = CaptionedSource(open_source("tfds:tiny_coco", label=""), "captions/text", encode)
    assert [len(example["tokens"]) for example in in_order(source)] == [1, 2, 3]
    assert ["caption 0 of 1", "caption 1 of 1"] in read
    names = CaptionedSource(source, "image/filename", encode)
    names[0]
    assert read[-1][0].endswith(".png")


def test_edges_are_top_left_bottom_right():
    objects = {"bbox": [[0.25, 0.5, 0.75, 1.0]], "label": [3]}
    assert boxes_from_tfds(objects, 8, 4) == [{"label": 3, "bbox": [2, 2, 2, 4]}]


# Folders


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.png", np.full((20, 40, 3), ord(name), np.uint8))
    return tmp_path


def test_boxes_of_a_folder_are_numbered_over_all_splits(tmp_path):
    labels = {"train": ["dog", "bus"], "test": ["cat"]}
    for split, names in labels.items():
        (tmp_path / split).mkdir()
        write(tmp_path / split / "a.png", np.zeros((20, 40, 3), np.uint8))
        boxes = [{"label": name, "bbox": [10, 5, 20, 10]} for name in names]
        write_metadata(tmp_path / split, [{"file_name": "a.png", "boxes": boxes}])
    for split, numbers in (("train", [2, 0]), ("test", [1])):
        source = open_source(f"folder:{tmp_path}", split=split, label="")
        assert source.label_names == ("bus", "cat", "dog")
        assert [box["label"] for box in source[0]["boxes"]] == numbers
    assert layouts(source) == {0: [(1, 0, 5 / 19, 1, 14 / 19)]}


def test_numbers_stay_and_a_label_of_its_own_names_the_classes(folder):
    boxes = [{"label": 7, "bbox": [0, 0, 1.5, 2]}]
    write_metadata(
        folder,
        [{"file_name": "a.png", "boxes": boxes, "label": "x"}, {"file_name": "b.png", "boxes": []}],
    )
    source = open_source(f"folder:{folder}", label="")
    assert source.label_names is None
    assert source[0]["boxes"] == boxes and source[1]["boxes"] == []
    assert open_source(f"folder:{folder}").label_names == ("x",)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([{"label": "a", "bbox": [0, 0, 1]}], r"box 0 of b\.png in the folder .* must be \{"),
        ([{"label": "a", "bbox": [0, 0, 1, 1]}, {"bbox": [0, 0, 1, 1]}], r"box 1 of b\.png"),
        ([{"label": -1, "bbox": [0, 0, 1, 1]}], "name or number from 0"),
        ([{"label": True, "bbox": [0, 0, 1, 1]}], "name or number from 0"),
        ([{"label": "a", "bbox": [0, 0, 1, float("nan")]}], "must be"),
        ([{"label": "a", "bbox": [0, 0, 1, 10**400]}], "must be"),
        ([{"label": "a", "bbox": [0, 0, -1, 1]}], r"box 0 of b\.png .* has no area"),
        ({"label": "a", "bbox": [0, 0, 1, 1]}, r"boxes of b\.png .* must be a list"),
        ("none", r"boxes of b\.png .* must be a list"),
        ([{"label": 0, "bbox": [0, 0, 1, 1]}], "names as well as numbers"),
    ],
    ids=range(10),
)
def test_bad_boxes_are_refused_by_the_name_of_their_file(folder, boxes, message):
    good = [{"label": "dog", "bbox": [0, 0, 1, 1]}]
    write_metadata(
        folder, [{"file_name": "a.png", "boxes": good}, {"file_name": "b.png", "boxes": boxes}]
    )
    refuses(message, open_source, f"folder:{folder}")


def test_boxes_of_images_that_are_filtered_out_do_not_count():
    column = [[{"label": "b", "bbox": [0, 0, 1, 1]}], "not read", None]
    numbered, names = number_boxes(column, [0, 2], ["x", "y", "z"], "it")
    assert numbered == [[{"label": 0, "bbox": [0, 0, 1, 1]}], None, None] and names == ("b",)


def test_maps_of_a_folder(folder):
    classes = noise(20, 40, 1)[..., 0] % 5
    (folder / "maps").mkdir()
    write(folder / "maps" / "a.png", classes)
    palette = Image.fromarray(classes).convert("P")
    palette.putpalette(list(range(60)))
    write(folder / "maps" / "b.png", palette)
    write_metadata(
        folder,
        [{"file_name": f"{n}.png", "segmentation": f"maps/{n}.png"} for n in "ab"]
        + [{"file_name": "c.png"}],
    )
    source = open_source(f"folder:{folder}")
    assert len(source) == 3 and source[2]["segmentation"] is None
    for i in range(2):
        assert source[i]["segmentation"].dtype == np.int32
        np.testing.assert_array_equal(source[i]["segmentation"], classes)


def test_maps_are_no_images_of_the_set(tmp_path):
    """Also those that lie where no metadata.jsonl lists the images."""
    for name in ("images/a.png", "maps/a.png", "more/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, np.zeros((4, 4), np.uint8))
    row = {"file_name": "a.png", "segmentation": "../maps/a.png"}
    write_metadata(tmp_path / "images", [row])
    source = open_source(f"folder:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == ["images/a.png", "more/b.png"]
    assert source[0]["segmentation"].shape == (4, 4)


def test_bad_maps_of_a_folder_are_refused(folder):
    def given(value):
        (folder / "metadata.jsonl").write_text(
            json.dumps({"file_name": "a.png", "segmentation": value}) + "\n"
        )
        return open_source(f"folder:{folder}")

    refuses(r"line 1 of .*names a file that is missing: .*none\.png", given, "none.png")
    refuses(r"'segmentation' in line 1 of .*jsonl is no name of a file", given, [[1, 2]])
    source = given("b.png")
    refuses(r"the label map .*b\.png is of colours", source.__getitem__, 0)


def test_a_map_is_cropped_and_mirrored_with_its_image(tmp_path):
    classes = noise(20, 40, 1)[..., 0] % 7
    write(tmp_path / "a.png", np.repeat(classes[..., None] * 30, 3, -1))
    (tmp_path / "maps").mkdir()
    write(tmp_path / "maps" / "a.png", classes)
    write_metadata(tmp_path, [{"file_name": "a.png", "segmentation": "maps/a.png"}])
    c = config_lib.get_config()
    c.data.update(fields=("segmentation",), resolution=20, flip=False)
    for flip in (False, True):
        source = open_source(f"folder:{tmp_path}")
        (batch,) = epoch_batches(source, task_transform(c), 1, flip=flip, threads=0)
        np.testing.assert_array_equal(batch["image"][0, ..., 0], 30 * batch["segmentation"][0])
    with pytest.raises(UserError, match=r"^a\.png: its map of classes has the unknown class 6"):
        c.segmentation.num_classes = 6
        next(epoch_batches(source, task_transform(c), 1, threads=0))
