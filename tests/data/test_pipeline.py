import itertools

import numpy as np
import pytest

from ldm_jax.data.pipeline import Batches, CachedSource, epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.transforms import CachedTransform, ImageTransform
from ldm_jax.errors import UserError

from .helpers import Numbers, assert_threads_end, loader_threads, write_image, write_metadata


def make(source, transform=None, **options):
    options = {"batch_size": 4, "seed": 0, "threads": 2, "prefetch": 1, **options}
    return Batches(source, transform or ImageTransform(6, crop="random"), **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_contents_of_a_batch():
    [batch] = take(make(Numbers(11), fields=("label", "text")), 1)
    assert {name: (array.shape, array.dtype.kind) for name, array in batch.items()} == {
        "image": ((4, 6, 6, 3), "u"),
        "index": ((4,), "i"),
        "label": ((4,), "i"),
        "text": ((4,), "U"),
    }
    assert batch["index"].dtype == batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


def test_a_batch_is_its_own_memory():
    source = open_source("emoji", split="train[:8]")  # keeps its images
    batch = make(source, ImageTransform(64)).batch(0)
    image = source[int(batch["index"][0])]["image"]
    assert batch["image"].flags.c_contiguous and batch["image"].flags.writeable
    assert not np.shares_memory(batch["image"], image)


@pytest.mark.parametrize("start", [1, 2, 5, 9])
def test_a_batch_is_the_same_wherever_iteration_starts(start):
    source = Numbers(11)  # 4 does not divide 11: batches cross the epoch boundaries
    straight = take(make(source), 12)
    assert_equal(take(make(source, start_step=start), 12 - start), straight[start:])
    assert_equal([make(source).batch(start)], [straight[start]])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_do_not_change_the_batches(threads):
    assert_equal(take(make(Numbers(11), threads=threads), 9), take(make(Numbers(11)), 9))


def test_every_epoch_has_every_example_once_in_another_order():
    indices = np.concatenate([batch["index"] for batch in take(make(Numbers(11)), 22)])
    epochs = indices.reshape(8, 11)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(11))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert tuple(epochs[0]) != tuple(range(11))


def test_seeds_differ_and_do_not_share_epochs():
    def epochs(seed):
        batches = take(make(Numbers(12), seed=seed), 12)
        return {tuple(e) for e in np.concatenate([b["index"] for b in batches]).reshape(4, 12)}

    assert not epochs(0) & epochs(1)


def test_crops_and_flips_differ_between_epochs():
    batches = take(make(Numbers(4)), 8)
    images = [batch["image"][np.argsort(batch["index"])] for batch in batches]
    assert len({image[0].tobytes() for image in images}) > 4


def test_a_large_step_is_as_good_as_a_small_one():
    [batch] = take(make(Numbers(11), start_step=10**12), 1)
    assert batch["image"].shape == (4, 6, 6, 3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_source_smaller_than_the_batch_repeats(count):
    indices = np.concatenate([b["index"] for b in take(make(Numbers(count), batch_size=6), 2)])
    for epoch in indices.reshape(-1, count):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(processes):
    whole = take(make(Numbers(11)), 5)
    parts = [
        take(make(Numbers(11), process_index=i, process_count=processes), 5)
        for i in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_epoch_batches_are_in_order_and_padded():
    source, transform = Numbers(10), ImageTransform(6, crop="random")
    batches = list(epoch_batches(source, transform, 4, fields=("label",), threads=2))
    indices = np.concatenate([batch["index"] for batch in batches])
    valid = np.concatenate([batch["valid"] for batch in batches])
    np.testing.assert_array_equal(indices, [*range(10), 9, 9])
    np.testing.assert_array_equal(valid, [True] * 10 + [False] * 2)
    assert all(batch["image"].shape == (4, 6, 6, 3) for batch in batches)
    for batch in batches:  # the centred crop
        np.testing.assert_array_equal(batch["image"][0, 0, :, 1], np.arange(2, 8))
    mirrored = list(epoch_batches(source, transform, 4, flip=True, threads=2))
    for plain, flipped in zip(batches, mirrored, strict=True):
        np.testing.assert_array_equal(plain["image"], flipped["image"][:, :, ::-1])
    halves = [
        list(epoch_batches(source, transform, 4, process_index=i, process_count=2))
        for i in range(2)
    ]
    for whole, a, b in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(whole["index"], np.concatenate([a["index"], b["index"]]))


@pytest.mark.parametrize("flip", [True, False])
def test_cached_arrays_follow_the_draws_of_the_images(flip):
    source, transform = Numbers(10), ImageTransform(6, flip=flip)

    def rows(**options):
        batches = epoch_batches(source, transform, 4, **options)
        return np.concatenate([batch["image"][batch["valid"]] for batch in batches])

    moments = np.stack([rows(), rows(flip=True)] if flip else [rows()], axis=1)
    labels = np.arange(10) % 3
    cached = CachedSource(source, {"moments": moments}, {"label": labels})
    assert cached.columns == ("label",) and cached.num_labels == 3 and cached.name(2) == "number 2"
    options = {"batch_size": 4, "seed": 3, "fields": ("label",), "start_step": 2}
    pixels = take(Batches(source, transform, **options), 9)
    picked = take(Batches(cached, CachedTransform(flip=flip), **options), 9)
    renamed = [{"moments": b["image"], **{k: b[k] for k in ("index", "label")}} for b in pixels]
    assert_equal(picked, renamed)


def test_cached_arrays_must_fit_the_source():
    with pytest.raises(ValueError, match="'moments' has 9 rows, the source 10"):
        CachedSource(Numbers(10), {"moments": np.zeros((9, 2, 1))}, {})


def test_user_errors():
    with pytest.raises(UserError, match="no field 'tokens'; it has: label, text, ragged"):
        make(Numbers(4), fields=("tokens",))
    with pytest.raises(UserError, match="no field 'label'; it has: no metadata"):
        make(CachedSource(Numbers(4), {}, {}), fields=("label",))
    for options in ({"batch_size": 0}, {"process_count": 3}):
        with pytest.raises(UserError, match="positive multiple"):
            make(Numbers(4), **options)
    with pytest.raises(UserError, match="'ragged' differs in shape"):
        take(make(Numbers(4), fields=("ragged",)), 1)


@pytest.mark.parametrize("threads", [0, 3])
def test_an_error_reaches_the_consumer_as_it_is(threads):
    batches = iter(make(Numbers(11, broken=7), threads=threads))
    with pytest.raises(UserError) as caught:
        take(batches, 3)
    assert str(caught.value) == "cannot decode the image number 7"
    assert_threads_end()


def test_a_missing_value_names_the_example(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png")
    write_metadata(tmp_path, [{"file_name": "a.png", "label": 1}, {"file_name": "b.png"}])
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(UserError, match=r"b\.png has no value for the field 'label'"):
        make(source, batch_size=2, fields=("label",)).batch(0)


def test_threads_end_when_the_consumer_stops():
    batches = iter(make(Numbers(11), threads=4))
    next(batches)
    assert loader_threads()
    batches.close()
    assert_threads_end()
    for _ in make(Numbers(11), threads=4):
        break  # the iterator is dropped, not closed
    assert_threads_end()


def test_threads_end_with_the_epoch():
    assert len(list(epoch_batches(Numbers(10), ImageTransform(4), 3))) == 4
    assert_threads_end()
