"""The inputs of `sample`: files in, images out, through a toy model that nobody trained."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import networks, sample_inputs
from ldm_jax import workdir as files
from ldm_jax.errors import UserError
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.steps import diffusion_functions

NOISE = np.random.RandomState(0)


def model(*conditioners, **changes):
    """A pipeline of 32x32 pixels and 8x8 latents with random weights."""
    c = config_lib.get_config()
    c.data.update(source="scenes", resolution=32, flip=False)
    c.data.fields = tuple(f for name in conditioners for f in config_lib.FIELDS[name])
    c.data.low_res.factor = 4
    c.conditioners = conditioners
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, z_channels=3, channels=3)
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.denoiser.cross_attention = "layout" in conditioners
    c.layout.update(vocab_size=401, width=32, depth=1, length=20, null=True)
    c.segmentation.update(num_classes=7, stages=2)
    c.sample.update(steps=2, batch_size=8)
    c.update_from_flattened_dict(changes)
    config = config_lib.check(c)
    random = lambda x: (0.1 * NOISE.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    shapes = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    variables = jax.tree.map(random, shapes)
    variables["first_stage"] = jax.tree.map(random, files.abstract_first_stage(config))
    variables["first_stage"]["latents"] = {
        "shift": np.zeros(3, np.float32),
        "scale": np.ones(3, np.float32),
    }
    return Pipeline(config, variables, 0, ["animal", "bus", "cat"])


@pytest.fixture(scope="module")
def plain():
    return model()


def read(pipe, count=2, **given):
    with flagsaver.flagsaver(**given):
        return sample_inputs.read_inputs(pipe, count)


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def save(path, array):
    Image.fromarray(array).save(path)
    return str(path)


def pixels(*shape):
    return NOISE.randint(0, 256, shape).astype(np.uint8)


def test_known_pixels_come_back_untouched(plain, tmp_path):
    image, mask = pixels(32, 32, 3), np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    inputs, pictures = read(
        plain, image=save(tmp_path / "a.png", image), mask=save(tmp_path / "m.png", mask)
    )
    made = plain.sample([0, 1], **inputs)
    kept = mask == 0
    for one in made:
        np.testing.assert_array_equal(one[kept], image[kept])
    assert (made[0] != made[1]).any() and (made[0][~kept] != image[~kept]).any()
    np.testing.assert_array_equal(pictures["masked"][~kept], 127)


def test_latents_are_kept_where_no_pixel_of_theirs_is_in_the_hole(plain):
    hole = np.zeros((1, 32, 32), bool)
    hole[:, 8:13, 8:12] = True  # of the latents 2 and 3 downwards, 2 to the right
    known = networks.Networks(plain.config)._known(
        plain.variables, pixels(1, 32, 32, 3), hole, (8, 8)
    )
    made = np.argwhere(np.asarray(known.mask)[0, ..., 0] == 0)
    np.testing.assert_array_equal(made, [[2, 2], [3, 2]])
    # What the hole holds is not seen.
    other = pixels(1, 32, 32, 3)
    again = networks.Networks(plain.config)._known(
        plain.variables, np.where(hole[..., None], other, pixels(1, 32, 32, 3) * 0), hole, (8, 8)
    )
    black = networks.Networks(plain.config)._known(
        plain.variables, np.zeros((1, 32, 32, 3), np.uint8), hole, (8, 8)
    )
    np.testing.assert_allclose(again.x0, black.x0, atol=1e-6)


def test_strength_decides_how_much_of_a_start_is_left(plain, tmp_path):
    path = save(tmp_path / "strokes.png", np.full((32, 32, 3), 200, np.uint8))
    inputs, _ = read(plain, init_image=path, strength=0.5)
    assert inputs["strength"] == 0.5 and inputs["init_image"].shape == (2, 32, 32, 3)
    started = plain.sample([0, 1], **inputs)
    assert (started != plain.sample([0, 1])).any()
    with pytest.raises(UserError, match="strength must be above 0"):
        plain.sample([0], init_image=inputs["init_image"][:1], strength=0.0)
    with pytest.raises(UserError, match="no init_image"):
        plain.sample([0], strength=0.5)


def test_colours_for_a_grey_image(plain, tmp_path):
    inputs, pictures = read(plain, colorize=save(tmp_path / "a.png", pixels(40, 32, 3)))
    assert inputs["grey"].shape == (2, 32, 32)
    np.testing.assert_array_equal(pictures["grey"][..., 0], inputs["grey"][0])
    assert plain.sample([0, 1], **inputs).shape == (2, 32, 32, 3)


def test_noise_between_two_seeds(plain):
    inputs, _ = read(plain, count=5, interpolate_seeds=["3", "9"])
    noise = inputs["noise"]
    np.testing.assert_allclose(noise[[0, -1]], plain.initial_noise([3, 9]), atol=1e-6)
    np.testing.assert_allclose(noise.std((1, 2, 3)), 1, atol=0.2)  # of 192 numbers each
    with pytest.raises(UserError, match="two whole numbers"):
        read(plain, interpolate_seeds=["3"])


def test_other_sizes(plain):
    inputs, _ = read(plain, height=16, width=48)
    assert plain.sample([0, 1], **inputs).shape == (2, 16, 48, 3)
    with pytest.raises(UserError, match=r"16x50 .* multiples of 4"):
        read(plain, height=16, width=50)


def test_layout_becomes_tokens_and_a_picture(tmp_path):
    pipe, path = model("layout"), tmp_path / "boxes.json"
    path.write_text(json.dumps([{"label": "bus", "bbox": [0.1, 0.2, 0.5, 0.5]}]))
    inputs, pictures = read(pipe, layout=str(path))
    tokens = inputs["condition"]["boxes"]
    assert tokens.shape == (2, 20) and tokens[0, 0] == 1 and pictures["layout"].ndim == 3
    latents = [
        pipe.sample([0, 1], **inputs, guidance_scale=scale, decode=False) for scale in (1.0, 3.0)
    ]
    assert (latents[0] != latents[1]).any()
    with pytest.raises(UserError, match="--segmentation needs a model with the conditioner"):
        read(pipe, segmentation=str(path))


def test_a_negative_condition_takes_the_place_of_the_null(tmp_path):
    pipe = model("layout")
    one, two = NOISE.randint(0, 400, (2, 1, 20))
    null = np.full((1, 20), 400)

    def sample(**more):
        return pipe.sample([0], {"boxes": one}, guidance_scale=2.0, decode=False, **more)

    np.testing.assert_array_equal(sample(), sample(negative={"boxes": null}))
    assert (sample() != sample(negative={"boxes": two})).any()
    with pytest.raises(UserError, match="a negative condition needs a guidance_scale"):
        pipe.sample([0], {"boxes": one}, guidance_scale=1.0, negative={"boxes": two})


def test_map_and_small_image_become_conditions(tmp_path):
    pipe = model("segmentation", "low_res")
    classes = NOISE.randint(0, 7, (32, 32)).astype(np.uint8)
    small = pixels(8, 8, 3)
    inputs, pictures = read(
        pipe,
        segmentation=save(tmp_path / "map.png", classes),
        low_res=save(tmp_path / "small.png", small),
    )
    np.testing.assert_array_equal(inputs["condition"]["segmentation"][1], classes)
    np.testing.assert_array_equal(pictures["low_res"], small)
    assert pipe.sample([0, 1], **inputs).shape == (2, 32, 32, 3)
    with pytest.raises(UserError, match="makes images of its training size, 32x32, only"):
        pipe.sample([0], {}, size=(64, 64))


def test_a_model_for_inpainting_takes_image_and_hole_as_its_condition():
    pipe = model("inpainting")
    image, hole = pixels(1, 32, 32, 3), np.zeros((1, 32, 32), bool)
    hole[:, 4:12, 4:12] = True
    made = pipe.sample([0], image=image, hole=hole)
    np.testing.assert_array_equal(made[~hole], image[~hole])
    assert (made[hole] != image[hole]).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(image="a.png"), "give --image and --mask together"),
        (dict(prompt=["a cat"]), "--prompt needs a model with the conditioner 'text'"),
        (dict(negative_prompt="a cat"), "--negative_prompt needs a model"),
        (dict(prompt=["a"], prompts_file="b"), "not both"),
        (dict(low_res="none.png"), "--low_res needs a model with the conditioner"),
        (dict(init_image="none.png"), "none.png"),
        (dict(condition="none.npz"), "is no .npz file"),
        (dict(label=["3"]), "knows no classes"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(plain, given, message):
    with pytest.raises(UserError, match=message) as caught:
        read(plain, **given)
    assert "\n" not in str(caught.value)
