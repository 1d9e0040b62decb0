"""A folder with every kind of bad image, and of odd ones that are none, read as training does."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.bad import BAD_IMAGES, TolerantSource
from ldm_jax.data.buckets import make_buckets
from ldm_jax.data.decode import Limits
from ldm_jax.data.pipeline import Batches, epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.task_fields import TaskTransform, segmentation
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.errors import Unreachable, UserError

from .helpers import Numbers, orientation, write_metadata
from .test_decode import bomb

GOOD, SIDE = 60, 10
TRANSFORM = ImageTransform(8, crop="random")


@pytest.fixture
def folder(tmp_path):
    """60 plain images, 7 bad ones, and 5 odd ones that can be read."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(GOOD):
        Image.new("RGB", (SIDE, SIDE), (i, i, i)).save(root / f"good-{i:02d}.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for kind in ("png", "jpg"):
        Image.fromarray(noise).save(root / f"bad-cut.{kind}")
        data = (root / f"bad-cut.{kind}").read_bytes()
        (root / f"bad-cut.{kind}").write_bytes(data[: len(data) // 2])
    (root / "bad-empty.png").touch()
    (root / "bad-text.jpg").write_text("<html>404</html>")
    Image.new("RGB", (1, 1)).save(root / "bad-1x1.png")
    (root / "bad-bomb.png").write_bytes(bomb(60_000))
    (root / "bad-large.png").write_bytes(bomb(5_000))
    Image.new("RGB", (SIDE, SIDE)).save(root / "odd-png.jpg", "PNG")
    Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16)).save(root / "odd-16-bit.png")
    Image.new("RGB", (SIDE, SIDE)).quantize(4).save(root / "odd-palette.png")
    Image.new("CMYK", (SIDE, SIDE)).save(root / "odd-cmyk.jpg")
    Image.new("RGB", (SIDE, 2 * SIDE)).save(root / "odd-rotated.jpg", exif=orientation(6))
    return root


BAD = 7
TOTAL = GOOD + BAD + 5


def tolerant(folder, max_bad=0.1, source=None, path=None):
    source = source or open_source(f"folder:{folder}", limits=Limits(8, 10**7))
    return TolerantSource(source, max_bad, path or folder.parent / "run" / BAD_IMAGES)


def batches(source, start=0, **options):
    options = {"batch_size": 6, "seed": 0, "threads": 2, **options}
    return Batches(source, TRANSFORM, start_step=start, **options)


def take(iterable, count):
    return list(itertools.islice(iterable, count))


def test_bad_images_are_replaced_said_once_and_the_same_after_resuming(folder, capfd):
    source = tolerant(folder)
    straight = take(batches(source), 24)  # two epochs
    seen = {source.name(i) for batch in straight for i in batch["index"].tolist()}
    assert seen == {source.name(i) for i in range(TOTAL) if "bad" not in source.name(i)}
    assert source.bad == BAD
    lines = (folder.parent / "run" / BAD_IMAGES).read_text().splitlines()
    assert len(lines) == BAD and all(re.match(r"bad-\S+\t.*bad-", line) for line in lines)
    said = capfd.readouterr().out
    assert said.count("; another example takes its place") == BAD

    again = tolerant(folder)  # as a run that goes on, from the middle, and on two hosts
    parts = [
        take(batches(again, 7, process_index=i, process_count=2, threads=0), 17) for i in range(2)
    ]
    for whole, *halves in zip(straight[7:], *parts, strict=True):
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)
    assert again.bad == BAD
    assert (folder.parent / "run" / BAD_IMAGES).read_text().splitlines() == lines
    assert "warning" not in capfd.readouterr().out


def test_a_pass_leaves_them_out_or_counts_what_replaces_them(folder):
    source = tolerant(folder)
    good = np.array(["bad" not in source.name(i) for i in range(TOTAL)])
    for replace in (False, True):
        found = list(epoch_batches(source, TRANSFORM, 16, replace=replace))
        index, valid = (np.concatenate([b[key] for b in found]) for key in ("index", "valid"))
        np.testing.assert_array_equal(valid[:TOTAL], good | replace)
        assert not valid[TOTAL:].any()
        np.testing.assert_array_equal(index[:TOTAL][good], np.flatnonzero(good))
        assert good[index[:TOTAL][~good]].all()
    # In training each is replaced by the same one.
    pairs = dict(zip(range(TOTAL), index[:TOTAL].tolist(), strict=True))
    plain = Batches(Numbers(TOTAL), ImageTransform(6), batch_size=6, seed=0)
    for step in range(12):
        wanted = [pairs[i] for i in plain.batch(step)["index"].tolist()]
        assert batches(source).batch(step)["index"].tolist() == wanted


def test_buckets_have_a_place_for_bad_images(folder):
    source = tolerant(folder)
    buckets = make_buckets(source, ((8, 8), (8, 16)), threads=2)
    assert sorted(len(members) for members in buckets.members) == [1, TOTAL - 1]
    for step in range(14):
        batch = batches(source, buckets=buckets).batch(step)
        assert not any("bad" in source.name(i) for i in batch["index"].tolist())


def test_more_than_the_share_end_the_run_and_again_when_it_goes_on(folder):
    take(batches(tolerant(folder, max_bad=BAD / TOTAL)), 12)
    (folder.parent / "run" / BAD_IMAGES).unlink()
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            take(batches(tolerant(folder, max_bad=(BAD - 0.5) / TOTAL)), 12)
        expected = (
            rf"7 of {TOTAL} examples \(9\.72%\) are bad, more than config\.data\.max_bad=0\.09"
        )
        assert re.match(expected, str(caught.value))
        assert re.search(r"the last: cannot .*/bad-\S+ \(.*run/bad_images\.txt", str(caught.value))
    with pytest.raises(UserError, match=r"^1 of 72 examples"):
        take(batches(tolerant(folder, 0.0, path=folder.parent / "other"), threads=0), 12)


def test_a_bad_condition_counts_too(tmp_path):
    root, rows = tmp_path / "images", []
    root.mkdir()
    for i in range(20):
        Image.new("RGB", (SIDE, SIDE)).save(root / f"{i}.png")
        label = Image.new("L", (SIDE, SIDE), 9 if i == 3 else 1)  # an unknown class
        label.save(root / f"map-{i}.png")
        row = {"file_name": f"{i}.png", "segmentation": f"map-{i}.png", "label": i}
        rows.append(row | ({"label": None} if i == 5 else {}))
    (root / "map-4.png").write_text("no map")
    write_metadata(root, rows)
    source = tolerant(root, 0.15)
    transform = TaskTransform(TRANSFORM, (segmentation(3),))
    for batch in take(Batches(source, transform, batch_size=5, seed=0, fields=("label",)), 8):
        assert not {3, 4, 5} & set(batch["label"].tolist())
    text = (tmp_path / "run" / BAD_IMAGES).read_text()
    assert source.bad == 3
    for reason in ("unknown class 9", "cannot decode the label map", "no value for the field"):
        assert reason in text


def test_a_file_system_that_fails_is_no_bad_image(tmp_path):
    class Away(Numbers):
        def __getitem__(self, index):
            raise Unreachable("the disk is away")

    source = tolerant(tmp_path, 1.0, Away(9), tmp_path / BAD_IMAGES)
    with pytest.raises(Unreachable, match="the disk is away"):
        Batches(source, TRANSFORM, batch_size=2, seed=0).batch(0)
    assert not (tmp_path / BAD_IMAGES).exists()


def test_names_that_cannot_be_printed_and_sets_without_a_good_image(tmp_path, capfd):
    class Odd(Numbers):
        def __getitem__(self, index):
            raise UserError("no\nimage")

        def name(self, index):
            return f"\udce9\t{index}"

    source = tolerant(tmp_path, 1.0, Odd(3), tmp_path / BAD_IMAGES)
    with pytest.raises(UserError, match="there is no good example in place of"):
        source.first_good(0, source.__getitem__)
    assert source.bad == 3
    assert "\\udce9\\t0\tno\\nimage\n" in (tmp_path / BAD_IMAGES).read_text()
    assert tolerant(tmp_path, 1.0, Odd(3), tmp_path / BAD_IMAGES).bad == 3


def test_two_processes_write_one_list(tmp_path):
    """Each says what it finds, and counts what the other has found."""
    path = tmp_path / BAD_IMAGES
    one, other = (tolerant(tmp_path, 0.2, Numbers(10, broken=b), path) for b in (1, 2))
    one.first_good(1, one.__getitem__)
    other.first_good(2, other.__getitem__)
    assert (one.bad, other.bad) == (2, 2)
    assert len(path.read_text().splitlines()) == 2
