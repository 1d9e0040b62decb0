import collections
import zipfile

import numpy as np
import pytest

from ldm_jax.data.sources import EMOJI, open_source
from ldm_jax.data.table import split_rows
from ldm_jax.errors import UserError

from .helpers import write_image, write_metadata


@pytest.fixture
def folder(tmp_path):
    """Twelve images in the folder itself, of grey level 0..11."""
    for i in range(12):
        write_image(tmp_path / f"{i:02d}.png", i)
    return tmp_path


def levels(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


class TestEmoji:
    def test_all_images_and_classes(self):
        source = open_source("emoji")
        assert len(source) == 1852
        assert source.num_labels == 9 and source.label_names[2] == "Flags"
        counts = collections.Counter()
        for i in range(0, len(source), 37):
            example = source[i]
            assert example["image"].shape == (64, 64, 3) and example["image"].dtype == np.uint8
            assert source.label_names[example["label"]] == example["category"]
            assert isinstance(example["text"], str) and set(source.columns) < set(example)
            counts[example["label"]] += 1
        assert len(counts) == 9
        assert source.name(0) == "images/1f600.webp"

    def test_transparent_pixels_show_the_background_and_are_decoded_once(self):
        white, green = open_source("emoji"), open_source("emoji", background=(0, 255, 0))
        np.testing.assert_array_equal(white[0]["image"][0, 0], [255, 255, 255])
        np.testing.assert_array_equal(green[0]["image"][0, 0], [0, 255, 0])
        assert white[0]["image"] is white[0]["image"]

    def test_where_and_label_by_name(self):
        source = open_source("emoji", where="category=Flags", label="subcategory")
        assert len(source) == 253
        assert source.label_names == ("country-flag", "flag")
        assert source.num_labels == 2
        example = source[0]
        assert source.label_names[example["label"]] == example["subcategory"]
        assert len(open_source("emoji", where="label=2")) == 253

    def test_no_label(self):
        source = open_source("emoji", label="")
        assert "label" not in source.columns and "label" not in source[0]
        assert source.num_labels == 0 and source.label_names is None

    def test_the_licence_is_beside_the_archive(self):
        import importlib.resources

        assets = importlib.resources.files("ldm_jax.data").joinpath("assets")
        text = assets.joinpath("LICENSE-fluent-emoji.txt").read_text()
        with zipfile.ZipFile(importlib.resources.files("ldm_jax.data").joinpath(EMOJI)) as archive:
            assert text.startswith(archive.read("LICENSE.txt").decode())
        assert "Permission is hereby granted" in text


class TestSplits:
    def test_slices_partition_and_are_fair(self):
        train = open_source("emoji", split="train[:90%]")
        rest = open_source("emoji", split="train[90%:]")
        assert (len(train), len(rest)) == (1667, 185)
        names = {train.name(i) for i in range(len(train))}
        others = [rest.name(i) for i in range(len(rest))]
        assert not names & set(others) and len(names) + len(others) == 1852
        # The archive is sorted by category; a slice is not.
        assert len({rest[i]["label"] for i in range(len(rest))}) == 9

    def test_a_filter_does_not_move_images_between_slices(self):
        train = open_source("emoji", split="train[:90%]")
        flags = open_source("emoji", split="train[90%:]", where="category=Flags")
        names = {train.name(i) for i in range(len(train))}
        assert len(flags) > 5 and not names & {flags.name(i) for i in range(len(flags))}

    def test_labels_agree_between_slices(self):
        a = open_source("emoji", split="train[:3%]", label="subcategory")
        b = open_source("emoji", split="train[3%:]", label="subcategory")
        assert a.label_names == b.label_names and a.num_labels == b.num_labels > 50

    def test_bounds(self):
        names = [f"{i}" for i in range(10)]

        def count(split):
            return len(split_rows(names, ["train"] * 10, split, "it"))

        splits = {"train": 10, "train[:3]": 3, "train[-3:]": 3, "train[20%:50%]": 3, "train[:]": 10}
        splits |= {"train[:99]": 10, "train[:-4]": 6, "train[:-10%]": 9}
        assert {split: count(split) for split in splits} == splits

    @pytest.mark.parametrize("split", ["train[", "train[:3.5%]", "train[5:5]", "train[50:]", ""])
    def test_bad_slices(self, split):
        with pytest.raises(UserError, match=r"split"):
            split_rows(["a"] * 10, ["train"] * 10, split, "it")


class TestFolder:
    def test_plain_folder(self, folder):
        source = open_source(f"folder:{folder}")
        assert levels(source) == list(range(12))
        assert source.columns == ("file_name",) and source.num_labels == 0
        assert source[3]["file_name"] == source.name(3) == "03.png"
        assert source[0]["image"].shape == (4, 6, 3)

    def test_directories_are_labels_at_any_depth(self, tmp_path):
        write_image(tmp_path / "cat" / "deep" / "a.jpg", 10)
        write_image(tmp_path / "dog" / "b.PNG", 20)
        write_image(tmp_path / ".cache" / "c.png", 30)
        (tmp_path / "dog" / "notes.txt").write_text("not an image")
        source = open_source(f"folder:{tmp_path}")
        assert source.label_names == ("cat", "dog") and source.num_labels == 2
        assert [source[i]["label"] for i in range(len(source))] == [0, 1]
        assert len(open_source(f"folder:{tmp_path}", where="label=dog")) == 1

    def test_split_directories(self, tmp_path):
        for split, names in {"train": ("a", "b"), "test": ("b",)}.items():
            for name in names:
                write_image(tmp_path / split / name / "x.png")
        train = open_source(f"folder:{tmp_path}")
        test = open_source(f"folder:{tmp_path}", split="test")
        assert (len(train), len(test)) == (2, 1)
        assert test.label_names == train.label_names == ("a", "b")
        assert test[0]["label"] == 1
        with pytest.raises(UserError, match=r"no split 'val'; it has: test, train"):
            open_source(f"folder:{tmp_path}", split="val")

    def test_an_image_outside_the_split_directories_makes_all_of_it_train(self, tmp_path):
        for name in ("train/x.png", "test/x.png", "y.png"):
            write_image(tmp_path / name)
        assert len(open_source(f"folder:{tmp_path}")) == 3

    def test_metadata(self, folder):
        rows = [
            {"file_name": "03.png", "text": "three", "kind": "odd", "n": 5},
            "",
            {"file_name": "04.png", "text": "four", "kind": "even"},
            {"file_name": "01.png", "text": "one", "kind": "odd", "n": 2},
        ]
        write_metadata(folder, rows)
        source = open_source(f"folder:{folder}", label="kind")
        assert levels(source) == [3, 4, 1]  # those it lists, in its order
        assert source.columns == ("text", "kind", "n", "file_name", "label")
        assert [source[i]["label"] for i in range(3)] == [1, 0, 1]
        assert source[1]["n"] is None and source[2]["text"] == "one"
        assert open_source(f"folder:{folder}", label="n", where="kind=odd").num_labels == 6

    def test_metadata_in_split_directories_or_above_them(self, tmp_path):
        for split in ("train", "test"):
            write_image(tmp_path / split / "x.png")
        write_metadata(tmp_path / "train", [{"file_name": "x.png", "label": 4}])
        assert open_source(f"folder:{tmp_path}")[0]["label"] == 4
        assert open_source(f"folder:{tmp_path}", split="test")[0]["label"] is None
        (tmp_path / "train" / "metadata.jsonl").unlink()
        rows = [{"file_name": f"{split}/x.png", "label": 1} for split in ("train", "test")]
        write_metadata(tmp_path, rows)
        assert open_source(f"folder:{tmp_path}", split="test")[0]["label"] == 1

    def test_symbolic_links_are_followed_and_loops_end(self, tmp_path):
        write_image(tmp_path / "real" / "x.png")
        root = tmp_path / "root"
        root.mkdir()
        (root / "a").symlink_to(tmp_path / "real")
        (root / "loop").symlink_to(root)
        assert len(open_source(f"folder:{root}")) == 1


class TestScenes:
    def test_are_opened_by_name_and_split(self):
        assert len(open_source("scenes", split="test[:7]")) == 7

    def test_know_no_metadata_to_choose_by(self):
        with pytest.raises(UserError, match="scenes cannot be chosen by where='label=3'"):
            open_source("scenes", where="label=3")


class TestUserErrors:
    @pytest.mark.parametrize("spec", ["lsun", "folder", "folder:", "tfds:", "emoji:x", ""])
    def test_unknown_kind(self, spec):
        with pytest.raises(
            UserError, match=r"unknown data source .*emoji, scenes, folder:.*, tfds:NAME$"
        ):
            open_source(spec)

    def test_missing_and_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"nowhere does not exist"):
            open_source(f"folder:{tmp_path / 'nowhere'}")
        with pytest.raises(UserError, match=r"has no images"):
            open_source(f"folder:{tmp_path}")

    def test_unreadable_image_is_named(self, folder):
        (folder / "05.png").write_bytes(b"\x89PNG broken")
        source = open_source(f"folder:{folder}")
        assert source[4]["image"].shape == (4, 6, 3)
        with pytest.raises(UserError, match=rf"{folder}/05\.png"):
            source[5]

    def test_metadata_names_a_missing_file(self, folder):
        write_metadata(folder, [{"file_name": "00.png"}, {"file_name": "99.png"}])
        with pytest.raises(UserError, match=r"line 2 of .*metadata\.jsonl .*missing: .*99\.png"):
            open_source(f"folder:{folder}")

    @pytest.mark.parametrize("line", ["{oops", "[1]", '{"text": "no file"}', '{"file_name": 3}'])
    def test_malformed_metadata_line(self, folder, line):
        write_metadata(folder, [{"file_name": "00.png"}, "", line])
        with pytest.raises(UserError, match=r"line 3 of .*metadata\.jsonl is not") as caught:
            open_source(f"folder:{folder}")
        assert "\n" not in str(caught.value)

    def test_metadata_that_is_not_text(self, folder):
        (folder / "metadata.jsonl").write_bytes(b'{"file_name": "\xff\xfe.png"}')
        with pytest.raises(UserError, match=r"line 1 of .* is not JSON"):
            open_source(f"folder:{folder}")

    def test_filters(self):
        with pytest.raises(UserError, match=r"no column 'colour'.*category"):
            open_source("emoji", where="colour=red")
        with pytest.raises(UserError, match=r"category=Cars.*Activities.*Travel & Places"):
            open_source("emoji", where="category=Cars")
        with pytest.raises(UserError, match=r"'column=value'"):
            open_source("emoji", where="Flags")
        with pytest.raises(UserError, match=r"no image of split"):
            open_source("emoji", where="text=grinning face", split="train[:1]")

    def test_labels(self, folder):
        with pytest.raises(UserError, match=r"no column 'colour' to take labels from.*category"):
            open_source("emoji", label="colour")
        write_metadata(folder, [{"file_name": "00.png", "label": -1, "score": 0.5, "box": [1]}])
        for label in ("label", "score", "box"):
            with pytest.raises(UserError, match=rf"'{label}' .*strings or integers"):
                open_source(f"folder:{folder}", label=label)

    def test_background(self):
        with pytest.raises(UserError, match=r"background"):
            open_source("emoji", background=(1, 2, 300))
