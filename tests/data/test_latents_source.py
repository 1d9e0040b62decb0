"""Batches of stored latents beside those of the images that they were made of."""

import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax import stored_latents
from ldm_jax.data.degradation import bicubic_down
from ldm_jax.data.latents_index import Spec, pack, unpack
from ldm_jax.data.latents_source import LatentsSource
from ldm_jax.data.pipeline import Batches, epoch_batches
from ldm_jax.data.task_fields import passed_on
from ldm_jax.errors import UserError
from ldm_jax.images import to_float, to_uint8
from ldm_jax.training.encoding import Settings
from ldm_jax.training.latents import task_transform

FIELDS = ("label", "boxes", "segmentation", "tokens", "low_res", "noise_level")
COUNT = 11
EXACT = Settings(dtype="float32", shards=2, batch_size=8)


class Toy:
    """Noise with boxes, maps of classes and one to three captions; not square."""

    columns = ("label", "boxes", "segmentation", "tokens")
    label_names = ("a", "b")
    num_labels = 2

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        height, width = 20 + index, 40
        boxes = [
            {"label": i, "bbox": [*random.uniform(0, 10, 2).tolist(), 20.5, 9]}
            for i in range(index % 5)
        ]
        return {
            "image": random.integers(0, 256, (height, width, 3), np.uint8),
            "label": index % 2,
            "boxes": boxes,
            "segmentation": random.integers(0, 7, (height, width)),
            "tokens": random.integers(0, 99, (1 + index % 3, 6)).astype(np.int32),
        }

    def name(self, index):
        return f"toy {index}"


def toy_config(**changes):
    """Latents that are the images themselves, of 16x16 pixels."""
    c = config_lib.get_config()
    c.data.update(resolution=16, fields=FIELDS, threads=2)
    c.data.low_res.update(factor=4, noise=0.3)
    c.first_stage.kind = "identity"
    c.layout.update(vocab_size=99, length=11)
    c.segmentation.num_classes = 7
    c.text.length = 6
    c.update_from_flattened_dict(changes)
    return c


def store(folder, config, settings=EXACT):
    stored_latents.encode_data(config, Toy(), folder, settings, lambda place: None)
    return LatentsSource(folder)


def from_source(config, source, step):
    settings = dict(batch_size=8, seed=5, fields=passed_on(FIELDS), threads=0)
    return Batches(source, task_transform(config), **settings).batch(step)


def assert_same(batch, expected):
    image = expected.pop("image")
    # Compiled, the division may be off by one bit.
    np.testing.assert_allclose(batch.pop("moments"), to_float(image), rtol=0, atol=1.2e-7)
    assert batch.keys() == expected.keys()
    for name, array in expected.items():
        assert batch[name].dtype == array.dtype, name
        np.testing.assert_array_equal(batch[name], array, err_msg=name)


def test_batches_are_those_of_the_images(tmp_path):
    config = toy_config()
    source = store(tmp_path, config)
    stored = toy_config(**{"data.source": f"latents:{tmp_path}"})
    assert len(source) == COUNT and source.label_names == ("a", "b") and source.num_labels == 2
    # Flips, captions, the order of boxes and noise are drawn anew in each epoch.
    for step in (0, 1, 7, 20):
        assert_same(from_source(stored, source, step), from_source(config, Toy(), step))
    options = dict(batch_size=COUNT, fields=passed_on(FIELDS), threads=0)
    batches = [
        next(epoch_batches(data, task_transform(c), **options))
        for c, data in ((stored, source), (config, Toy()))
    ]
    assert_same(*batches)


def test_random_crops_belong_to_their_fields(tmp_path):
    config = toy_config(**{"data.crop": "random", "data.low_res.noise": 0.0})
    config.data.fields = FIELDS[:-1]
    settings = EXACT._replace(crops=3)
    source = store(tmp_path / "a", config, settings)
    config.data.source = f"latents:{tmp_path / 'a'}"
    assert source[0]["moments"].shape == (2, 3, 16, 16, 3)
    seen = set()
    for step in range(12):
        batch = from_source(config, source, step)
        pixels = to_uint8(batch["moments"])
        small = np.stack([bicubic_down(image, 4) for image in pixels])
        np.testing.assert_array_equal(batch["low_res"], to_float(small))
        for image, index, boxes in zip(pixels, batch["index"], batch["boxes"], strict=True):
            if index == 0:
                seen.add((image.tobytes(), boxes.tobytes()))
    # The first image in two directions and at three places, which its last two tokens tell.
    assert 4 <= len(seen) <= 6 and len({image for image, _ in seen}) == len(seen)
    again = store(tmp_path / "b", toy_config(**{"data.crop": "random"}), settings)
    np.testing.assert_array_equal(again[4]["crops"], source[4]["crops"])
    assert not np.array_equal(source[4]["crops"], source[5]["crops"])


def test_a_bad_example_ends_the_encoding_with_its_name(tmp_path):
    class Bad(Toy):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return example | {"segmentation": example["segmentation"] + (index == 9)}

    with pytest.raises(UserError, match=r"toy 9: its map of classes has the unknown class 7"):
        stored_latents.encode_data(toy_config(), Bad(), tmp_path, EXACT, lambda place: None)


SPECS = (Spec("a", (2, 3), "bfloat16"), Spec("b", (None, 2), "int32"), Spec("c", (), "uint8"))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_records_keep_arrays(rows):
    example = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.arange(2 * rows).reshape(rows, 2) - 3,
        "c": np.uint8(7),
    }
    record = pack(example, SPECS)
    assert len(record) == 12 + 4 + 8 * rows + 1
    found = unpack(record, SPECS)
    for name, shape, dtype in SPECS:
        assert found[name].dtype.name == dtype and len(found[name].shape) == len(shape)
        np.testing.assert_array_equal(found[name].astype(np.float64), example[name])
    for broken in (record[:-1], record[:3], record[:14], record + b"x", b""):
        with pytest.raises(ValueError, match=r"it ends within|bytes too many"):
            unpack(broken, SPECS)
    with pytest.raises(ValueError, match=r"'a' has the shape \(3, 2\), but must have \(2, 3\)"):
        pack(example | {"a": np.zeros((3, 2))}, SPECS)
    with pytest.raises(ValueError, match="'c' has the shape"):
        pack(example | {"c": np.zeros(1)}, SPECS)


def test_a_damaged_record_is_named(tmp_path):
    source = store(tmp_path, toy_config())
    object.__setattr__(source.index, "arrays", source.index.arrays[:-1])
    with pytest.raises(UserError, match=r"shard-00001-of-00002.* is damaged at .* number 7 \(it h"):
        source[7]
