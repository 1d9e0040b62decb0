"""The inputs of `sample`: files in, images out, through a toy model that nobody trained."""

import functools
import json

import jax
import numpy as np
import pytest
from absl import flags
from toy_models import NOISE, model, pixels, read, save

from ldm_jax import networks
from ldm_jax.errors import UserError


@pytest.fixture(scope="module")
def plain():
    return model()


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


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
    encode = functools.partial(networks.Networks(plain.config).encode, plain.variables)
    known = networks.known_latents(encode, pixels(1, 32, 32, 3), hole, (8, 8))
    made = np.argwhere(np.asarray(known.mask)[0, ..., 0] == 0)
    np.testing.assert_array_equal(made, [[2, 2], [3, 2]])
    # What the hole holds is not seen.
    other = np.where(hole[..., None], pixels(1, 32, 32, 3), np.uint8(0))
    again = networks.known_latents(encode, other, hole, (8, 8))
    black = networks.known_latents(encode, np.zeros((1, 32, 32, 3), np.uint8), hole, (8, 8))
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
    with pytest.raises(UserError, match=r"'segmentation' has the shape \(1, 32, 32\), but must be"):
        pipe.sample([0], {k: v[:1] for k, v in inputs["condition"].items()}, size=(64, 64))


def words(captions):
    """A tokenizer: numbers from 3 up, between 1 and 2, then zeros."""
    known = {"a": 3, "red": 4, "blue": 5, "teapot": 6}
    rows = np.zeros((len(captions), 8), np.int32)
    for row, caption in zip(rows, captions, strict=True):
        tokens = [1, *(known[word] for word in caption.split()), 2]
        row[: len(tokens)] = tokens
    return rows


@pytest.fixture(scope="module")
def text_model():
    small = dict(vocab_size=7, width=32, depth=1, heads=1, length=8, mlp_width=128)
    changes = {f"text.{name}": value for name, value in small.items()}
    pipe = model("text", **changes, **{"text.null_tokens": (1, 2)})
    pipe.tokenizer = words
    # So much that a caption shows beside the rounding of float32 sums.
    strong = jax.tree.map(lambda x: 50 * x, pipe.variables["conditioner"])
    pipe.variables = pipe.variables | {"conditioner": strong}
    return pipe


def test_prompts_of_a_file_are_used_in_turn(text_model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red teapot\n\n a blue teapot \n", encoding="utf-8")
    inputs, _ = read(text_model, 5, prompts_file=str(path))
    red, blue = "a red teapot", "a blue teapot"
    assert inputs["condition"] == {"text": [red, blue, red, blue, red]}
    made = text_model.sample([0, 1, 2, 3, 4], **inputs, decode=False)
    given = read(text_model, 5, prompt=[red, blue])[0]
    np.testing.assert_array_equal(made, text_model.sample([0, 1, 2, 3, 4], **given, decode=False))
    other = text_model.sample([0, 1, 2, 3, 4], {"text": [blue] * 5}, decode=False)
    differs = (made != other).any((1, 2, 3))
    np.testing.assert_array_equal(differs, [True, False, True, False, True])


def test_a_negative_prompt_takes_the_place_of_the_empty_one(text_model):
    def sample(**given):
        inputs, _ = read(text_model, 2, prompt=["a red teapot"], **given)
        return text_model.sample([0, 1], **inputs, guidance_scale=3.0, decode=False)

    plain = sample()
    # The empty prompt is the null condition of this model: nothing changes, but for float32 sums
    # of another order.
    np.testing.assert_allclose(sample(negative_prompt=""), plain, atol=1e-4, rtol=1e-4)
    away = sample(negative_prompt="a blue teapot")
    assert (np.abs(away - plain) > 1e-2).any((1, 2, 3)).all()
    # Away from what it is to show, guidance has nothing left to do.
    same = sample(negative_prompt="a red teapot")
    unguided = text_model.sample([0, 1], {"text": ["a red teapot"] * 2}, decode=False)
    np.testing.assert_allclose(same, unguided, atol=1e-4, rtol=1e-4)


def test_resampling_is_a_setting_of_inpainting(plain, tmp_path):
    image, mask = pixels(32, 32, 3), np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    paths = dict(image=save(tmp_path / "a.png", image), mask=save(tmp_path / "m.png", mask))
    once, _ = read(plain, **paths)
    twice, _ = read(plain, **paths, resample=["3"])
    assert "resample" not in once and twice["resample"] == (3, 1)
    assert read(plain, **paths, resample=["4", "2"])[0]["resample"] == (4, 2)
    settings = dict(sampler="ddpm", steps=4)
    made = [plain.sample([0, 1], **inputs, **settings) for inputs in (once, twice, twice)]
    np.testing.assert_array_equal(made[1], made[2])
    np.testing.assert_array_equal(made[1][:, mask == 0], np.stack([image[mask == 0]] * 2))
    assert (made[0] != made[1])[:, mask > 0].any()
    with pytest.raises(UserError, match="sampler 'dpmpp_2m' makes each step of earlier"):
        plain.sample([0, 1], **twice, sampler="dpmpp_2m", steps=4)
    with pytest.raises(UserError, match="give image and hole too"):
        plain.sample([0], resample=(2, 1))
    with pytest.raises(UserError, match="one or two whole numbers"):
        read(plain, **paths, resample=["2", "x"])


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
        (dict(resample=["2"]), "--resample=2 makes parts fit those of an image"),
        (dict(noise_level=0.5), "--noise_level needs a model with the conditioner"),
        (dict(condition="none.npz"), "is no .npz file"),
        (dict(label=["3"]), "knows no classes"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(plain, given, message):
    with pytest.raises(UserError, match=message) as caught:
        read(plain, **given)
    assert "\n" not in str(caught.value)
