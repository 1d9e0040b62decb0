"""Fields that are made of an example after its crop."""

import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax.data import task_fields
from ldm_jax.data.draws import Uniforms
from ldm_jax.data.layout import decode_layout
from ldm_jax.data.pipeline import Batches, epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.table import TableSource
from ldm_jax.data.transforms import Draw, ImageTransform
from ldm_jax.errors import UserError
from ldm_jax.training.latents import task_transform

RNG = np.random.default_rng(0)


def config(fields, **changes):
    c = config_lib.get_config()
    c.data.update(source="scenes", fields=fields, resolution=64, flip=False, threads=0)
    c.layout.update(vocab_size=401, length=20)  # a grid of 20 x 20, room for 6 boxes and the crop
    c.segmentation.num_classes = 7
    c.update_from_flattened_dict(changes)
    return c


def example(height=48, width=64):
    """A box, and a map and an image that show where it is."""
    image = np.zeros((height, width, 3), np.uint8)
    classes = np.zeros((height, width), np.int32)
    image[12:24, 16:32], classes[12:24, 16:32] = 255, 5
    boxes = [{"label": 4, "bbox": [16, 12, 16, 12]}]
    return {"image": image, "boxes": boxes, "segmentation": classes}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, (0.5, 0.3, 0.2), (0.9, 0.5, 0.0)])
def test_box_map_and_image_are_cropped_alike(flip, crop):
    transform = task_fields.make_transform(
        ImageTransform(64), ("boxes", "segmentation"), config((), **{"layout.length": 3})
    )
    arrays = transform.apply(example(), Draw(flip, crop, Uniforms(0)))
    inside = arrays["segmentation"] == 5
    assert arrays["segmentation"].dtype == np.int32 and arrays["segmentation"].shape == (64, 64)
    bright = arrays["image"][..., 0] > 127
    assert (bright != inside).mean() < 0.05  # bicubic against nearest, at the edges
    ((label, x0, y0, x1, y1),) = decode_layout(arrays["boxes"], 401)  # relative to the crop
    rows, columns = np.nonzero(inside)
    seen = columns.min() / 64, rows.min() / 64, (columns.max() + 1) / 64, (rows.max() + 1) / 64
    # Half a step of the grid, and a pixel of the resized map.
    np.testing.assert_allclose((x0, y0, x1, y1), seen, atol=0.5 / 19 + 1.5 / 64)
    assert label == 4


def test_hole_is_grey_level_minus_one_and_marked():
    image = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    arrays = task_fields.hole("box")(image, {}, Draw(random=Uniforms(3)))
    hole = arrays["mask"][..., 0] == 1
    assert set(np.unique(arrays["mask"])) == {-1.0, 1.0} and 0 < hole.mean() < 1
    np.testing.assert_array_equal(arrays["masked_image"][hole], -1)
    np.testing.assert_allclose(127.5 * (arrays["masked_image"][~hole] + 1), image[~hole], atol=1e-4)


def test_low_res_is_the_degraded_image():
    image = np.full((32, 32, 3), 51, np.uint8)
    arrays = task_fields.low_res(4, "bicubic")(image, {}, Draw(random=Uniforms(3)))
    assert arrays["low_res"].shape == (8, 8, 3)
    np.testing.assert_allclose(arrays["low_res"], 51 / 127.5 - 1, atol=1e-6)


def test_a_batch_does_not_depend_on_when_or_by_how_many_it_is_made():
    c = config(("boxes", "segmentation", "masked_image", "mask", "low_res"))
    source = open_source("scenes", split="train[:32]")
    passed = task_fields.passed_on(c.data.fields)
    assert passed == () and task_fields.columns(c.data.fields) == ("boxes", "segmentation")
    make = lambda step, **more: Batches(  # noqa: E731
        source, task_transform(c), batch_size=8, seed=0, start_step=step, threads=0, **more
    ).batch(step)
    whole, again = make(5), make(5)
    halves = [make(5, process_index=i, process_count=2) for i in range(2)]
    for name, value in whole.items():
        np.testing.assert_array_equal(value, again[name])
        np.testing.assert_array_equal(value, np.concatenate([half[name] for half in halves]))
    other = make(9)  # the same examples, an epoch later
    rows = [np.flatnonzero(other["index"] == i) for i in whole["index"]]
    pairs = [(i, int(row[0])) for i, row in enumerate(rows) if len(row)]
    assert all((whole["mask"][i] != other["mask"][j]).any() for i, j in pairs)


def test_one_pass_makes_the_same_fields_each_time():
    c, source = config(("masked_image", "mask")), open_source("scenes", split="test[:5]")
    passes = [list(epoch_batches(source, task_transform(c), 4, threads=0)) for _ in range(2)]
    for one, two in zip(*passes, strict=True):
        np.testing.assert_array_equal(one["mask"], two["mask"])


def test_maps_that_do_not_fit_are_refused():
    make = task_fields.segmentation(5)
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=r"unknown class 5 at row 12, column 16 .*num_classes is 5"):
        make(image, example(), Draw())
    small = example() | {"segmentation": np.zeros((8, 9), np.int32)}
    with pytest.raises(UserError, match=r"has 9x8 pixels, .* those of the image, 64x48"):
        make(image, small, Draw())


@pytest.mark.parametrize("field", ["boxes", "segmentation"])
def test_what_is_missing_or_wrong_is_refused_by_the_name_of_its_file(field):
    image = np.zeros((8, 8, 3), np.uint8)
    values = [[{"label": 1, "bbox": [9, 0, 4, 4]}], None]
    if field == "segmentation":
        values[0] = np.full((8, 8), 7, np.int32)
    source = TableSource(["a.png", "b.png"], {field: values}, lambda name: image)
    for place, message in (
        (0, r"^a\.png: .*(outside the image|class 7)"),
        (1, r"^b\.png: it has no"),
    ):
        only = TableSource([source.name(place)], {field: values[place:][:1]}, lambda name: image)
        with pytest.raises(UserError, match=message) as caught:
            Batches(only, task_transform(config((field,))), batch_size=1, seed=0).batch(0)
        assert "\n" not in str(caught.value)


def test_one_of_several_captions_is_drawn_by_seed_and_position_and_the_first_in_evaluation():
    image = np.zeros((8, 8, 3), np.uint8)
    rows = np.arange(5, dtype=np.int32)[:, None]  # five captions of one token
    source = TableSource(["a", "b"], {"tokens": [rows, rows + 5]}, lambda name: image)
    transform = task_transform(config(("tokens",)))
    assert task_fields.passed_on(("tokens",)) == ()

    def drawn(seed, step, size):
        return Batches(source, transform, batch_size=size, seed=seed, threads=0).batch(step)

    batch = drawn(0, 0, 64)
    assert batch["tokens"].shape == (64, 1)
    own = batch["tokens"][:, 0] // 5 == batch["index"]  # of its own example
    assert own.all() and len(np.unique(batch["tokens"])) == 10
    again = np.concatenate([drawn(0, step, 16)["tokens"] for step in range(4)])
    np.testing.assert_array_equal(again, batch["tokens"])  # whatever the size of the batch
    assert (drawn(1, 0, 64)["tokens"] % 5 != batch["tokens"] % 5).any()
    (one_pass,) = epoch_batches(source, transform, 2, threads=0)
    assert one_pass["tokens"].tolist() == [[0], [5]]
