import json
import os
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import tar_source
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.tar_index import INDEX, open_index
from ldm_jax.data.tar_source import find_shards, fingerprint
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.errors import UserError

from .helpers import ROTATED, orientation, picture, refuses, write_tar


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing is kept in the home of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def shards(tmp_path):
    """Three shards of four images each, of grey levels 0, 10, ... 110."""
    for shard in range(3):
        members = {}
        for i in range(4):
            number = 4 * shard + i
            members[f"{number:04d}.jpg" if i % 2 else f"{number:04d}.PNG"] = picture(
                10 * number, kind="JPEG" if i % 2 else "PNG"
            )
            members[f"{number:04d}.txt"] = f"caption {number}, grüß\n"
            members[f"{number:04d}.cls"] = str(number % 3)
            members[f"{number:04d}.json"] = {"number": number, "place": "a" if i < 2 else "b"}
        write_tar(tmp_path / f"s-{shard:02d}.tar", members)
    return tmp_path


def levels(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def test_images_captions_labels_and_columns(shards):
    source = open_source(f"tar:{shards}/s-{{00..02}}.tar")
    np.testing.assert_allclose(levels(source), np.arange(12) * 10, atol=1)  # JPEG rounds
    assert set(source.columns) == {"number", "place", "text", "label", "file_name"}
    assert source.num_labels == 3 and source.label_names is None
    example = source[7]
    assert example["text"] == "caption 7, grüß" and example["label"] == 1 == 7 % 3
    assert example["number"] == 7 and example["place"] == "b"
    assert example["file_name"] == source.name(7) == "s-01.tar/0007.jpg"
    assert example["image"].shape == (4, 6, 3) and source.image_size(7) == (4, 6)


def test_all_that_other_sources_offer(shards):
    spec = f"tar:{shards}/*.tar"
    by_place = open_source(spec, where="place=b", label="place")
    assert len(by_place) == 6 and by_place.label_names == ("b",)
    first, rest = (open_source(spec, split=s) for s in ("train[:75%]", "train[75%:]"))
    names = {source.name(i) for source in (first, rest) for i in range(len(source))}
    assert (len(first), len(rest), len(names)) == (9, 3, 12)
    batches = Batches(
        open_source(spec), ImageTransform(4), batch_size=12, seed=0, fields=("label", "text")
    )
    batch = batches.batch(0)
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], batch["index"] * 10, atol=1)
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        open_source(spec, split="test")


def test_names_of_shards_are_splits(tmp_path):
    write_tar(tmp_path / "x-train-0.tar", {"a.png": picture(1), "a.cls": "cat"})
    write_tar(tmp_path / "x-val-0.tar", {"a.png": picture(2), "a.cls": "dog"})
    train, val = (open_source(f"tar:{tmp_path}/*.tar", split=s) for s in ("train", "val"))
    assert levels(train) == [1] and levels(val) == [2]
    assert train.label_names == val.label_names == ("cat", "dog") and val[0]["label"] == 1
    alone = open_source(f"tar:{tmp_path}/x-val-0.tar")  # of one kind: there is nothing to tell
    assert levels(alone) == [2]
    for split in ("train", "test"):
        write_tar(tmp_path / "deep" / split / "0.tar", {"a.png": picture(3)})
    assert len(open_source(f"tar:{tmp_path}/deep/*/*.tar", split="test")) == 1


def test_members_of_one_example_by_the_name_up_to_the_first_dot(tmp_path):
    long = "n" * 150  # longer than a plain header has room for
    members = [("d/1.seg.png", picture(9)), ("d/1.png", picture(1)), ("e/1.png", picture(2))]
    members += [("d/1.TXT", "one"), (f"{long}.webp", picture(3, kind="WEBP")), (".x.png", b"")]
    members += [("README", "no suffix"), ("e/1.npy", "what no model reads")]
    members += [("e/1.json", {"image": 5, "file_name": "no", "text": ["two", "zwei"]})]
    source = open_source(f"tar:{write_tar(tmp_path / 'a.tar', members)}")
    assert levels(source)[:2] == [1, 2] and len(source) == 3
    assert [source[i]["text"] for i in range(3)] == ["one", ["two", "zwei"], None]
    assert source.name(2) == f"a.tar/{long}.webp" and source.columns == ("text", "file_name")


def test_size_without_decoding_is_that_of_the_image(tmp_path, monkeypatch):
    turned = picture(size=(600, 400), kind="JPEG", exif=orientation(ROTATED))
    members = {"0.jpg": turned, "1.png": picture(size=(7, 9)), "2.webp": picture(kind="WEBP")}
    source = open_source(f"tar:{write_tar(tmp_path / 'a.tar', members)}")
    sizes = [source.image_size(i) for i in range(3)]
    assert sizes == [source[i]["image"].shape[:2] for i in range(3)]
    assert sizes[:2] == [(600, 400), (9, 7)]
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    assert [source.image_size(i) for i in range(3)] == sizes


class TestIndex:
    def test_is_kept_beside_the_shard_and_used_again(self, shards, monkeypatch):
        path = shards / "s-00.tar"
        first = open_index(path)
        assert (shards / f"s-00.tar{INDEX}").is_file()
        monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("read again"))
        assert open_index(path) == first
        assert find_shards(f"{shards}/s-0*") == [shards / f"s-0{i}.tar" for i in range(3)]

    def test_of_another_file_or_a_damaged_one_is_made_again(self, shards):
        path = shards / "s-00.tar"
        kept = shards / f"s-00.tar{INDEX}"
        before = open_index(path)
        os.utime(path, ns=(0, 12345))
        assert open_index(path) == before
        assert json.loads(kept.read_text())["mtime_ns"] == 12345
        write_tar(path, {"z.png": picture(77)})
        os.utime(path, ns=(0, 12345))  # only the size tells
        assert open_index(path).names == ["z.png"]
        for damage in ("", "{", "[]", '{"version": 1}'):
            kept.write_text(damage)
            assert open_index(path).names == ["z.png"]

    def test_is_kept_in_the_cache_where_the_folder_is_not_writable(self, shards, home, monkeypatch):
        path = shards / "s-00.tar"
        write = pathlib.Path.write_text

        def refuse(self, *args, **options):
            if self.parent == shards:
                raise PermissionError(13, "read-only")
            return write(self, *args, **options)

        monkeypatch.setattr(pathlib.Path, "write_text", refuse)
        first = open_index(path)
        assert sorted(p.name for p in shards.iterdir() if p.is_file()) == [
            f"s-0{i}.tar" for i in range(3)
        ]
        assert len(list((home / ".cache" / "ldm_jax" / "tar").iterdir())) == 1
        monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("read again"))
        assert open_index(path) == first

    def test_nowhere_to_keep_it_is_no_error(self, shards, monkeypatch):
        def refuse(*args, **options):
            raise PermissionError(13, "read-only")

        monkeypatch.setattr(pathlib.Path, "write_text", refuse)
        assert len(open_source(f"tar:{shards}/*.tar")) == 12


class TestNames:
    def test_ranges_choices_and_wild_cards(self, tmp_path):
        for name in ("a-8", "a-9", "a-10", "b-08", "b-09", "b-10"):
            write_tar(tmp_path / f"{name}.tar", {"x.png": picture()})

        def found(spec):
            return [path.stem for path in find_shards(f"{tmp_path}/{spec}")]

        assert found("b-{08..10}.tar") == ["b-08", "b-09", "b-10"]
        assert found("a-{8..10}.tar") == ["a-8", "a-9", "a-10"]
        assert found("{b-08,a-9}.tar") == ["b-08", "a-9"]
        assert found("{a,b}-*.tar") == ["a-10", "a-8", "a-9", "b-08", "b-09", "b-10"]
        assert found("{a-8,a-*}.tar") == ["a-8", "a-10", "a-9"]  # each once

    def test_missing(self, shards):
        refuses(r"s-03\.tar is missing: fetch it", open_source, f"tar:{shards}/s-{{00..03}}.tar")
        refuses(r"no tar shard matches .*t-\*", open_source, f"tar:{shards}/t-*.tar")
        refuses(r"cannot read the range \{9\.\.3\}.*count upwards", find_shards, "x-{9..3}.tar")
        refuses(r"cannot read \{x\}.*write a range as \{000..009\}", find_shards, "a-{x}.tar")
        refuses("unknown data source 'tar:'", open_source, "tar:")

    def test_fingerprint(self, shards):
        spec = f"{shards}/*.tar"
        before = fingerprint(spec)
        assert before == fingerprint(spec) != fingerprint(f"{shards}/s-00.tar")
        os.utime(shards / "s-01.tar", ns=(0, 1))
        assert fingerprint(spec) != before and fingerprint(f"{shards}/no.tar")


class TestDamage:
    @pytest.mark.parametrize("keep", [100, 700, 1024, 3000, None])
    def test_cut_off(self, tmp_path, keep):
        # None: of the whole file only the blocks of zeros are lost that mark its end
        members = {f"{i}.png": picture(i, size=(60, 40)) for i in range(33)}
        path = write_tar(tmp_path / "a.tar", members)
        data = path.read_bytes()
        end = len(data.rstrip(b"\0"))
        path.write_bytes(data[: keep or -(-end // 512) * 512])
        refuses(r"the shard .*a\.tar .*cut off.*: fetch or write it again", open_index, path)

    def test_a_damaged_header_is_not_the_end(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(3)})
        data = bytearray(path.read_bytes())
        data[1024:1100] = b"x" * 76  # the second header: its checksum no longer fits
        path.write_bytes(data)
        refuses("a.tar is damaged or was cut off at byte 1024", open_index, path)

    @pytest.mark.parametrize(("kind", "command"), [("gz", "gunzip"), ("xz", "unxz")])
    def test_compressed(self, tmp_path, kind, command):
        path = write_tar(tmp_path / f"a.tar.{kind}", {"a.png": picture()}, f"w:{kind}")
        refuses(rf"a\.tar\.{kind} is compressed.*decompress it \({command}\)", open_index, path)

    def test_no_tar(self, tmp_path):
        path = tmp_path / "a.tar"
        path.write_bytes(picture(size=(50, 50)) * 9)
        refuses("a.tar is no tar file", open_index, path)
        path.write_bytes(b"")
        refuses("a.tar is no tar file, or was cut off", open_index, path)

    def test_groups(self, tmp_path):
        path, good = tmp_path / "a.tar", {"a.png": picture()}
        write_tar(path, good | {"b/7.txt": "alone", "b/7.json": {}})
        refuses("'b/7' in the shard .*a.tar has json, txt, but no image", open_index, path)
        write_tar(path, [("a.png", picture()), ("a.png", picture())])
        refuses("a.tar holds 'a.png' twice", open_index, path)
        write_tar(path, {"notes.md": "nothing"})
        refuses("a.tar has no images", open_index, path)
        for name, content in (("a.json", "[1]"), ("a.json", "{"), ("a.txt", b"\xff\xfe")):
            write_tar(path, good | {name: content})
            refuses(f"cannot read '{name}' in the shard .*a.tar", open_index, path)

    def test_an_image_is_named(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", {"a.png": b"not a picture", "b.png": picture()})
        source = open_source(f"tar:{path}")
        refuses(r"cannot decode the image .*/a\.tar/a\.png", source.__getitem__, 0)
        refuses(r"cannot decode the image .*/a\.tar/a\.png", source.image_size, 0)

    def test_a_shard_that_shrinks_or_goes_while_it_is_read(self, shards, monkeypatch):
        monkeypatch.setattr(tar_source, "OPEN_FILES", 1)
        source = open_source(f"tar:{shards}/*.tar")
        assert source[0]["text"] and source[4]["text"]  # opened, and closed again
        os.truncate(shards / "s-01.tar", 1000)
        refuses(r"s-01\.tar has become shorter", source.__getitem__, 5)
        (shards / "s-02.tar").unlink()
        refuses(r"cannot read the shard .*s-02\.tar", source.__getitem__, 8)
