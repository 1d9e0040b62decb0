import itertools

import numpy as np
import pytest

from ldm_jax.data.buckets import Buckets, assign, image_sizes, make_buckets
from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.pipeline import Batches, CachedSource, epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.task_fields import TaskTransform, layout, segmentation
from ldm_jax.data.transforms import CachedTransform, Draw, ImageTransform, crop_box
from ldm_jax.errors import UserError

from .helpers import Numbers, write_image

SIZES = ((8, 8), (12, 8), (8, 12))


class Shapes:
    """Images of several shapes, (H, W), whose pixels tell the example."""

    columns = ("label",)
    label_names = None
    num_labels = 2

    def __init__(self, shapes):
        self.shapes = shapes

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        image = np.full((*self.shapes[index], 3), index % 256, np.uint8)
        image[..., 1] = np.arange(self.shapes[index][1])  # so that crops and flips show
        return {"image": image, "label": index % 2}

    def name(self, index):
        return f"number {index}"


def shapes(count=37):
    kinds = ((16, 17), (25, 16), (16, 23))
    return Shapes([kinds[i % 7 % 3 if i % 5 else 0] for i in range(count)])


def make(source, buckets, **options):
    options = {"batch_size": 4, "seed": 0, "threads": 2, "prefetch": 1, **options}
    return Batches(source, ImageTransform(10), buckets=buckets, **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


class TestAssign:
    def test_nearest_ratio(self):
        images = [(100, 100), (300, 210), (200, 310), (100, 121), (100, 124), (50, 5000), (3, 2)]
        # Between 1 and 3 / 2 the border is sqrt(3 / 2) = 1.2247, the middle of the logarithms.
        found = assign(SIZES, np.array(images))
        np.testing.assert_array_equal(found, [0, 1, 2, 0, 2, 2, 1])

    def test_of_one_ratio_the_largest_that_is_filled(self):
        sizes = ((64, 64), (256, 256), (128, 128), (96, 64))
        images = [(1000, 1010), (200, 256), (130, 128), (60, 60), (255, 256), (256, 256)]
        found = assign(sizes, np.array(images))
        np.testing.assert_array_equal(found, [1, 2, 2, 0, 2, 1])

    def test_sizes_of_all_images_in_order(self, tmp_path):
        source = shapes(600)
        np.testing.assert_array_equal(image_sizes(source, 3), source.shapes)
        for i in range(4):
            write_image(tmp_path / f"{i}.png", size=(5 + i, 3))
        folder = open_source(f"folder:{tmp_path}")
        np.testing.assert_array_equal(image_sizes(folder, 2), [(3, 5 + i) for i in range(4)])
        (tmp_path / "2.png").write_bytes(b"broken")
        with pytest.raises(UserError, match=r"cannot decode the image .*2\.png"):
            image_sizes(folder, 2)

    def test_sources_tell_the_sizes_of_their_images(self):
        for spec in ("emoji", "scenes"):
            source = open_source(spec)
            assert source.image_size(3) == (64, 64) == source[3]["image"].shape[:2]
        encode = lambda texts: (np.zeros((len(texts), 2), np.int32), [""] * len(texts))  # noqa: E731
        assert CaptionedSource(source, "text", encode).image_size(3) == (64, 64)


class TestOrder:
    @pytest.mark.parametrize("batch_size", [1, 4, 7, 16, 50])
    def test_no_image_is_dropped(self, batch_size):
        source = shapes()
        buckets = make_buckets(source, SIZES, 1)
        seen, steps, most = np.zeros(37, int), 0, 0
        for epoch in range(12):
            while steps < sum((epoch + 1) * len(rows) // batch_size for rows in buckets.members):
                size, rows = buckets.batch(3, steps, batch_size)
                members = buckets.members[SIZES.index(size)]
                assert len(rows) == batch_size and np.isin(rows, members).all()
                seen += np.bincount(rows, minlength=37)
                steps += 1
            # What is left of a bucket is less than a batch: at the end of each epoch its images
            # have been seen equally often, up to one, and as often as epochs went by, up to that.
            for rows in buckets.members:
                assert seen[rows].max() - seen[rows].min() <= 1
                assert 0 <= (epoch + 1) * len(rows) - seen[rows].sum() < batch_size
                most = max(most, seen[rows].max())
        assert most <= 12

    def test_batches_hold_one_size_and_sizes_are_mixed(self):
        source = shapes(60)
        buckets = make_buckets(source, SIZES, 1)
        batches = take(make(source, buckets), 60)
        for batch in batches:
            shape = batch["image"].shape
            assert shape[0] == 4 and shape[1:3] in SIZES and shape[3] == 3
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
            bucket = SIZES.index(shape[1:3])
            assert np.isin(batch["index"], buckets.members[bucket]).all()
        order = [batch["image"].shape[1:3] for batch in batches]
        changes = sum(a != b for a, b in itertools.pairwise(order))
        assert set(order) == set(SIZES) and changes > 20  # not one size after the other

    def test_epochs_and_seeds_have_other_orders(self):
        source = Shapes([(8, 8)] * 16 + [(12, 8)] * 16)
        buckets = make_buckets(source, SIZES, 1)
        epochs = []
        for seed in (0, 1):
            rows = np.concatenate([buckets.batch(seed, step, 4)[1] for step in range(24)])
            epochs += [tuple(epoch) for epoch in rows.reshape(3, 32)]
            for epoch in rows.reshape(3, 32):
                np.testing.assert_array_equal(np.sort(epoch), np.arange(32))
        assert len(set(epochs)) == 6

    @pytest.mark.parametrize("start", [1, 5, 19, 40])
    def test_the_same_wherever_iteration_starts(self, start):
        source = shapes()
        buckets = make_buckets(source, SIZES, 1)
        straight = take(make(source, buckets), 44)
        again = make_buckets(source, SIZES, 3)  # as after a restart
        assert_equal(take(make(source, again, start_step=start), 44 - start), straight[start:])

    def test_a_large_step_is_as_good_as_a_small_one(self):
        buckets = make_buckets(shapes(), SIZES, 1)
        before = [buckets.batch(0, 10**12 + i, 4)[1] for i in range(200)]
        assert np.bincount(np.concatenate(before), minlength=37).min() > 10

    @pytest.mark.parametrize("processes", [2, 4])
    def test_the_global_batch_does_not_depend_on_the_number_of_processes(self, processes):
        source = shapes()
        whole = take(make(source, make_buckets(source, SIZES, 1), fields=("label",)), 20)
        parts = [
            take(
                make(
                    source,
                    make_buckets(source, SIZES, 2),
                    fields=("label",),
                    process_index=i,
                    process_count=processes,
                ),
                20,
            )
            for i in range(processes)
        ]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole)

    def test_one_bucket_and_an_empty_one(self):
        source = Numbers(11)  # 6x10 pixels
        buckets = make_buckets(source, ((8, 8), (6, 10)), 1)
        assert buckets.summary() == "8x8 0 images, 6x10 11 images"
        batches = take(make(source, buckets), 11)
        assert {batch["image"].shape for batch in batches} == {(4, 6, 10, 3)}
        indices = np.concatenate([batch["index"] for batch in batches])
        np.testing.assert_array_equal(np.bincount(indices), np.full(11, 4))

    def test_buckets_must_be_those_of_the_source(self):
        buckets = Buckets(SIZES, np.zeros(9, int))
        with pytest.raises(ValueError, match="the buckets have 9 images, the source 10"):
            make(Numbers(10), buckets)


class TestCrops:
    @pytest.mark.parametrize("size", [*SIZES, (64, 96), (7, 3)])
    @pytest.mark.parametrize("image", [(16, 17), (25, 16), (3, 50), (640, 427), (1, 1)])
    def test_the_largest_part_of_the_ratio_in_the_middle(self, size, image):
        top, left, high, wide = crop_box(*image, Draw(size=size))
        assert 1 <= high <= image[0] and 1 <= wide <= image[1]
        assert high == image[0] or wide == image[1]
        assert abs(high * size[1] - wide * size[0]) <= max(size)  # a pixel off, from rounding
        assert (top, left) == ((image[0] - high) // 2, (image[1] - wide) // 2)

    def test_random_parts_stay_within(self):
        rng = np.random.default_rng(0)
        for _ in range(200):
            draw = Draw(crop=tuple(rng.random(3)), size=(64, 96))
            top, left, high, wide = crop_box(53, 91, draw)
            assert 0 <= top <= 53 - high and 0 <= left <= 91 - wide
            assert 26 <= high <= 53 and abs(wide - 1.5 * high) <= 1

    def test_boxes_and_maps_follow_the_crop(self):
        transform = TaskTransform(ImageTransform(8), (layout(8, 1000), segmentation(9)))
        classes = np.zeros((24, 12), np.int32)
        classes[6:18, :6] = 5
        entry = {"label": 5, "bbox": (0, 6, 6, 12)}
        example = {
            "image": np.repeat((classes * 20).astype(np.uint8)[..., None], 3, axis=-1),
            "segmentation": classes,
            "boxes": [entry],
        }
        draw = Draw(flip=True, size=(12, 12))  # the middle square: rows 6 to 18
        arrays = transform.apply(example, draw)
        assert arrays["image"].shape == (12, 12, 3)
        np.testing.assert_array_equal(arrays["segmentation"][:, 6:], 5)
        np.testing.assert_array_equal(arrays["image"][..., 0], arrays["segmentation"] * 20)
        crop = arrays["boxes"][-2:]  # as corners on a grid of 31 x 31: isqrt(1000)
        np.testing.assert_array_equal([crop // 31, crop % 31], [[8, 22], [0, 30]])


class TestCached:
    @pytest.mark.parametrize("flip", [True, False])
    def test_rows_of_a_bucket_at_its_size(self, flip):
        source = shapes()
        buckets = make_buckets(source, SIZES, 1)
        transform = ImageTransform(10, flip=flip)

        def rows(which, **options):
            batches = epoch_batches(source, transform, 4, **options)
            return np.concatenate([batch[which][batch["valid"]] for batch in batches])

        cached = [None] * len(source)
        for size, members in zip(buckets.sizes, buckets.members, strict=True):
            options = {"rows": members, "size": size}
            np.testing.assert_array_equal(rows("index", **options), members)
            flips = (False, True) if flip else (False,)
            moments = np.stack([rows("image", flip=f, **options) for f in flips], axis=1)
            for place, row in enumerate(members):
                cached[row] = moments[place]
        held = CachedSource(source, {"moments": cached}, {"label": np.arange(37) % 2})
        options = {"batch_size": 4, "seed": 3, "fields": ("label",), "buckets": buckets}
        pixels = take(Batches(source, transform, **options), 30)
        picked = take(Batches(held, CachedTransform(flip=flip), **options), 30)
        assert_equal([{"image": b.pop("moments"), **b} for b in picked], pixels)
