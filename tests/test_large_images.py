"""Images larger than those of training, at once or in tiles, with conditions of their size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from toy_models import NOISE, model, pixels, read, save

from ldm_jax import arguments, memory, sample_inputs
from ldm_jax.errors import UserError
from ldm_jax.networks import Networks
from ldm_jax.pipeline import Pipeline
from ldm_jax.sampling_memory import attention_bytes


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


@pytest.fixture(scope="module")
def plain():
    return model()


def pointwise(self, variables, z_t, t, cond):
    """A denoiser to which a tile's borders do not matter."""
    told = 0.0 if cond.concat is None else cond.concat.mean(-1, keepdims=True)
    return 0.5 * jnp.tanh(z_t + told) + 0.001 * t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("size", "tile", "chosen"),
    [
        ((32, 32), None, None),
        ((64, 16), None, None),  # up to twice the training size, networks take it at once
        ((64, 68), None, 32),
        ((1024, 1024), None, 32),
        ((1024, 1024), 0, None),
        ((1024, 1024), 64, 64),
        ((64, 64), 64, None),  # one tile
    ],
)
def test_tiles_begin_beyond_twice_the_training_size(plain, size, tile, chosen):
    assert arguments.choose_tile(plain.config, size, tile) == chosen


@pytest.mark.parametrize(
    ("size", "tile", "chosen"),
    [
        ((32, 32), None, None),
        ((16, 32), None, None),
        ((32, 40), None, 32),
        ((64, 64), None, 32),
        ((64, 64), 0, None),
        ((64, 64), 40, 40),
    ],
)
def test_tiles_of_a_transformer_begin_beyond_the_training_size(plain, size, tile, chosen):
    config = plain.config.copy_and_resolve_references()
    config.denoiser.kind = "dit"
    assert arguments.choose_tile(config, size, tile) == chosen


@pytest.mark.parametrize("tile", [-4, 4, 8, 12, 18])
def test_tiles_that_the_model_cannot_take(plain, tile):
    with pytest.raises(UserError, match=rf"tiles of {tile} pixels: .* of 4, and tiles of 16 or"):
        plain.sample([0], size=(128, 128), tile=tile)


def test_a_pointwise_denoiser_makes_the_same_in_tiles_and_at_once(plain, monkeypatch):
    monkeypatch.setattr(Networks, "denoise", pointwise)
    pipe = Pipeline(plain.config, plain.variables, 0)
    size = (80, 52)  # 20 x 13 latents, in tiles of 8
    at_once = pipe.sample([3, 4], size=size, tile=0, decode=False)
    in_tiles = pipe.sample([3, 4], size=size, tile=32, decode=False)
    assert at_once.shape == (2, 20, 13, 3)
    # Two steps of weights that add up to one in float32.
    np.testing.assert_allclose(in_tiles, at_once, rtol=1e-5, atol=1e-5)


def test_seeds_keep_their_meaning_in_tiles(plain):
    settings = dict(size=(64, 68), decode=False, eta=0.0)
    whole = plain.sample([2, 3, 4], **settings)
    alone = plain.sample([3], batch_size=1, **settings)
    # float32 rounding may differ with the batch.
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-4, atol=1e-4)
    noise = plain.initial_noise([3], settings["size"])
    given = plain.sample([9], noise=noise, **settings)
    np.testing.assert_allclose(given, alone, rtol=1e-4, atol=1e-4)


def test_pixels_of_tiles_are_those_of_the_tiled_decoder(plain):
    latents = plain.sample([5], size=(68, 40), tile=32, decode=False)
    decoded = np.asarray(plain.decode(latents, tile=32))
    made = plain.sample([5], size=(68, 40), tile=32)
    assert made.shape == (1, 68, 40, 3) and made.dtype == np.uint8
    np.testing.assert_array_equal(made, np.round((decoded + 1) * 127.5).astype(np.uint8))


@pytest.fixture(scope="module")
def mapped():
    return model("segmentation", "low_res")


def test_maps_and_small_images_of_a_larger_size(mapped, tmp_path, monkeypatch):
    classes, small = NOISE.randint(0, 7, (48, 64)).astype(np.uint8), pixels(12, 16, 3)
    paths = dict(
        segmentation=save(tmp_path / "map.png", classes),
        low_res=save(tmp_path / "small.png", small),
    )
    inputs, _ = read(mapped, 2, **paths, height=48, width=64)
    np.testing.assert_array_equal(inputs["condition"]["segmentation"][1], classes)
    assert inputs["condition"]["low_res"].shape == (2, 12, 16, 3)
    assert mapped.sample([0, 1], **inputs).shape == (2, 48, 64, 3)
    cond = mapped.condition(inputs["condition"], (48, 64))
    assert cond.concat.shape == (2, 12, 16, 6)
    # Each tile is told of its own part.
    monkeypatch.setattr(Networks, "denoise", pointwise)
    pipe = Pipeline(mapped.config, mapped.variables, 0)
    at_once, in_tiles = (pipe.sample([0, 1], **inputs, tile=t, decode=False) for t in (0, 32))
    np.testing.assert_allclose(in_tiles, at_once, rtol=1e-5, atol=1e-5)
    other = {n: np.roll(x, 3, axis=1) for n, x in inputs["condition"].items()}
    moved = pipe.sample([0, 1], **inputs | {"condition": other}, tile=32, decode=False)
    assert (np.abs(moved - in_tiles) > 1e-2).any()


def test_sizes_that_the_small_image_cannot_have():
    pipe = model("low_res", **{"data.low_res.factor": 8})
    assert pipe.check_size((48, 40)) == (48, 40)
    with pytest.raises(UserError, match=r"36x40 .* multiples of 8"):
        pipe.check_size((36, 40))


@pytest.mark.parametrize("conditioners", [(), ("inpainting",)])
def test_known_pixels_come_back_untouched_in_tiles(plain, conditioners):
    pipe = model(*conditioners) if conditioners else plain
    image, hole = pixels(1, 40, 72, 3), np.zeros((1, 40, 72), bool)
    hole[:, 8:30, 20:60] = True
    made = pipe.sample([0], image=image, hole=hole, size=(40, 72))
    np.testing.assert_array_equal(made[~hole], image[~hole])
    assert (made[hole] != image[hole]).any()


def test_a_start_and_a_luma_are_encoded_in_tiles(plain):
    starts, greys = pixels(2, 1, 40, 72, 3), pixels(2, 1, 40, 72)

    def sample(start, grey):
        return plain.sample([0], size=(40, 72), init_image=start, strength=0.5, grey=grey)

    made = sample(starts[0], greys[0])
    assert made.shape == (1, 40, 72, 3)
    assert (made != sample(starts[1], greys[0])).any()
    assert (made != sample(starts[0], greys[1])).any()


class Measured(Exception):
    pass


def measure(pipe, **settings):
    needs = []

    def measured(need):
        needs.append(need)
        raise Measured

    with pytest.raises(Measured):
        pipe.sample(list(range(8)), measured=measured, **settings)
    return needs[0]


def test_tiles_take_the_memory_of_one(plain):
    """Nothing of this is run: only compiled."""
    size = (512, 512)
    at_once, in_tiles = (measure(plain, size=size, tile=tile) for tile in (0, 32))
    assert in_tiles.canvas == at_once.canvas
    assert at_once.weights == sum(x.nbytes for x in jax.tree.leaves(plain.variables))
    latents = 4 * 8 * 128 * 128  # bytes of one channel of eight images
    features = 32  # of the denoiser, of which many maps are alive at once
    # Without the scratch that is counted for any program.
    base = 8 * memory.SCRATCH_BYTES
    assert at_once.tile - base > 2 * features * latents
    assert in_tiles.tile - base < (at_once.tile - base) / 4


def test_attention_between_all_pixels_is_counted(plain):
    # 16 x 16 latents, whose middle has 32 channels and so one head; the first stage has none.
    assert attention_bytes(plain.config, (64, 64), 3) == 3 * 4 * 16**4
    # 128 x 128 of them: no longer the whole matrix, but tiles.
    assert attention_bytes(plain.config, (512, 512), 3) == 3 * 4 * 512**2
    deeper = model(**{"denoiser.mult": (1, 2), "denoiser.head_dim": 32})
    assert attention_bytes(deeper.config, (256, 128), 1) == 2 * 4 * (32 * 16) ** 2
    transformer = plain.config.copy_and_resolve_references()
    transformer.denoiser.update(kind="dit", num_heads=2)  # of 16 x 16 patches
    assert attention_bytes(transformer, (128, 128), 3) == 3 * 2 * 4 * 16**4


def test_more_than_is_free_is_refused_and_tiles_are_named(plain, monkeypatch, capsys):
    inputs, _ = read(plain, 1, height=64, width=64)
    assert sample_inputs.memory_check(plain, read(plain, 1)[0]) is None
    check = sample_inputs.memory_check(plain, inputs)
    assert plain.sample([0], **inputs, measured=check).shape == (1, 64, 64, 3)
    assert "a batch of 64x64 at once; memory: at most" in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_on_host", lambda: 10**6)
    with pytest.raises(
        UserError, match=r"64x64 at once needs .* free: use --tile=32 or a smaller --batch"
    ):
        plain.sample([0], **inputs, measured=check)
    tiled, _ = read(plain, 1, height=64, width=64, tile=32)
    with pytest.raises(UserError, match=r"in tiles of 32 needs .* use a smaller --tile or"):
        plain.sample([0], **tiled, measured=sample_inputs.memory_check(plain, tiled))


def test_what_was_measured_is_what_runs(plain):
    settings = dict(size=(64, 40), batch_size=8, decode=False)
    seeds = list(range(10))  # two batches
    needs = []
    measured = plain.sample(seeds, measured=needs.append, **settings)
    assert len(needs) == 1
    np.testing.assert_array_equal(measured, plain.sample(seeds, **settings))
