"""Prepares a small tensorflow_datasets set of its own, without TensorFlow or a network."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.sources import open_source
from ldm_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

COUNTS = {"train": 20, "test": 4}


def png(level: int) -> io.BytesIO:
    out = io.BytesIO()
    Image.fromarray(np.full((5 + level, 6, 3), level, np.uint8)).save(out, "PNG")
    out.seek(0)  # an array instead of a file would need TensorFlow to be encoded
    return out


class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Grey images of a level that is in their metadata."""

    VERSION = tfds.core.Version("1.0.0")
    # For a class inside a package tfds would import importlib_resources, which it does not install.
    __module__ = "tiny_shapes"

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "mask": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
            "text": tfds.features.Text(),
            "level": np.int64,
            "group": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in COUNTS.items()}

    def _generate_examples(self, count):
        for i in range(count):
            row = {"image": png(i), "mask": png(i), "label": i % 2, "text": f"level {i}"}
            yield i, {**row, "level": i, "group": "cab"[i % 3]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    TinyShapes(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture(autouse=True)
def data_dir(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    # As a user meets it: the files are there, the code that made them is not.
    monkeypatch.delitem(tfds.core.registered._DATASET_REGISTRY, "tiny_shapes", raising=False)


def test_examples():
    source = open_source("tfds:tiny_shapes")
    assert len(source) == 20
    assert set(source.columns) == {"label", "text", "level", "group"}
    assert source.label_names == ("even", "odd") and source.num_labels == 2
    seen = set()
    for i in range(20):
        example = source[i]
        level = example["level"]
        np.testing.assert_array_equal(example["image"], np.full((5 + level, 6, 3), level))
        assert example["label"] == level % 2 and example["text"] == f"level {level}"
        seen.add(level)
    assert seen == set(range(20))
    assert source.name(7) == "tfds:tiny_shapes train number 7"


def test_splits_and_slices():
    assert len(open_source("tfds:tiny_shapes", split="test")) == 4
    assert len(open_source("tfds:tiny_shapes:1.0.0", split="train[:10%]")) == 2
    for split in ("val", "train[", "train[:0%]"):
        with pytest.raises(UserError, match=r"no split .*train, test"):
            open_source("tfds:tiny_shapes", split=split)


@pytest.mark.parametrize("where", ["label=odd", "label=1"])
def test_where(where):
    source = open_source("tfds:tiny_shapes", where=where)
    assert sorted(source[i]["level"] for i in range(len(source))) == list(range(1, 20, 2))


def test_bad_where():
    with pytest.raises(UserError, match=r"no column 'colour'.*level"):
        open_source("tfds:tiny_shapes", where="colour=red")
    with pytest.raises(UserError, match=r"level=77.*values of 'level': 0, 1, 10"):
        open_source("tfds:tiny_shapes", where="level=77")


def test_labels_from_other_columns():
    source = open_source("tfds:tiny_shapes", split="test", label="group")
    assert source.label_names == ("a", "b", "c") and source.num_labels == 3
    for i in range(4):
        assert source.label_names[source[i]["label"]] == source[i]["group"]
    source = open_source("tfds:tiny_shapes", split="test", label="level")
    assert source.label_names is None and source.num_labels == 20  # over all splits
    source = open_source("tfds:tiny_shapes", where="level=4", label="text")
    assert source.label_names == ("level 4",) and source[0]["label"] == 0
    assert "label" not in open_source("tfds:tiny_shapes", label="")[0]
    with pytest.raises(UserError, match=r"no column 'colour' to take labels from"):
        open_source("tfds:tiny_shapes", label="colour")


def test_a_set_that_is_not_prepared_tells_how_to_get_it(prepared):
    with pytest.raises(UserError) as caught:
        open_source("tfds:cifar10")
    first, *commands = str(caught.value).split("\n")
    assert str(prepared) in first
    assert [command.strip() for command in commands] == [
        "pip install -e '.[tf]'",
        'python -c "import tensorflow_datasets as tfds; '
        "tfds.builder('cifar10', file_format='array_record').download_and_prepare()\"",
    ]


def test_an_unknown_name_suggests_similar_ones():
    with pytest.raises(UserError, match=r"no tfds:cifar11.*similar:.*cifar10"):
        open_source("tfds:cifar11")


def test_a_set_without_random_access_is_refused(prepared, tmp_path, monkeypatch):
    directory = tmp_path / "tiny_shapes" / "1.0.0"
    directory.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        text = (prepared / "tiny_shapes" / "1.0.0" / name).read_text()
        (directory / name).write_text(text.replace("array_record", "tfrecord"))
    assert json.loads((directory / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"as tfrecord, which has no random access"):
        open_source("tfds:tiny_shapes")


def test_tensorflow_is_not_imported(prepared):
    code = (
        "import sys; from ldm_jax.data.sources import open_source;"
        "open_source('tfds:tiny_shapes', where='label=odd')[0];"
        "assert 'tensorflow' not in sys.modules"
    )
    environment = {**os.environ, "TFDS_DATA_DIR": str(prepared)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
