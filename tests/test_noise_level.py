"""Noise-level augmentation of super-resolution, from the data to the denoiser."""

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from toy_models import model, pixels, read, save

from ldm_jax import config as config_lib
from ldm_jax.conditioners.noise_level import NoiseLevel
from ldm_jax.data import task_fields
from ldm_jax.data.degradation import add_noise
from ldm_jax.data.draws import Uniforms
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.transforms import Draw
from ldm_jax.errors import UserError
from ldm_jax.training.latents import task_transform

NOISE = {"data.low_res.noise": 0.5}


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


@pytest.fixture(scope="module")
def pipe():
    return model("low_res", "noise_level", **NOISE)


def test_noise_preserves_the_variance_and_a_level_of_zero_the_image():
    image = Uniforms(1).normal((64, 64, 3))  # of unit variance
    for level in (0.1, 0.5, 0.9):
        noised = add_noise(image, level, Uniforms(2))
        assert noised.dtype == np.float32
        # 12288 numbers: standard errors of 0.007 and 0.009.
        np.testing.assert_allclose(noised.std(), 1, atol=0.03)
        correlation = np.corrcoef(noised.ravel(), image.ravel())[0, 1]
        np.testing.assert_allclose(correlation, (1 - level**2) ** 0.5, atol=0.03)
        np.testing.assert_array_equal(noised, add_noise(image, level, Uniforms(2)))
        assert (noised != add_noise(image, level, Uniforms(3))).any()
    assert add_noise(image, 0.0, Uniforms(2)) is image


@pytest.mark.parametrize("degradation", ["bicubic", "bsr"])
def test_without_noise_a_small_image_is_bit_equal_and_nothing_is_drawn_for_it(degradation):
    image = pixels(32, 32, 3)
    random, other = Uniforms(3), Uniforms(3)
    plain = task_fields.low_res(4, degradation)(image, {}, Draw(random=random))
    noised = task_fields.low_res(4, degradation, 0.5)(image, {}, Draw(random=other))
    assert list(plain) == ["low_res"] and random() != other()
    level = noised["noise_level"]
    assert level.dtype == np.float32 and 0 < level < 0.5
    # What was added to the same degraded image is the noise of that level.
    rest = (noised["low_res"] - np.sqrt(1 - level**2) * plain["low_res"]) / level
    np.testing.assert_allclose(rest.std(), 1, atol=0.25)  # of 192 numbers


def test_levels_and_noise_follow_from_seed_and_position():
    c = config_lib.get_config()
    c.data.update(source="scenes", fields=("low_res", "noise_level"), resolution=32, flip=False)
    c.data.low_res.noise = 0.5
    source = open_source("scenes", split="train[:16]")

    def batch(seed, **more):
        transform = task_transform(c)
        return Batches(source, transform, batch_size=16, seed=seed, threads=0, **more).batch(3)

    whole, again, other = batch(0), batch(0), batch(1)
    halves = [batch(0, process_index=i, process_count=2) for i in range(2)]
    for name in ("low_res", "noise_level"):
        np.testing.assert_array_equal(whole[name], again[name])
        np.testing.assert_array_equal(whole[name], np.concatenate([h[name] for h in halves]))
        assert (whole[name] != other[name]).any()
    assert whole["noise_level"].shape == (16,) and len(set(whole["noise_level"].tolist())) == 16
    assert 0 <= whole["noise_level"].min() and whole["noise_level"].max() < 0.5


def test_the_level_reaches_the_denoiser(pipe):
    small = np.zeros((3, 8, 8, 3), np.float32)
    levels = np.array([0.0, 0.1, 0.5], np.float32)
    cond = pipe.condition({"low_res": small, "noise_level": levels})
    assert cond.vector.shape == (3, 4 * 32) and cond.concat.shape == (3, 8, 8, 3)
    out = np.asarray(pipe.denoise(np.zeros((3, 8, 8, 3)), np.array([100] * 3), cond))
    assert (out[0] != out[1]).any() and (out[1] != out[2]).any()
    same = pipe.condition({"low_res": small, "noise_level": np.full(3, 0.1, np.float32)})
    again = np.asarray(pipe.denoise(np.zeros((3, 8, 8, 3)), np.array([100] * 3), same))
    np.testing.assert_allclose(again, np.broadcast_to(again[:1], again.shape), atol=1e-5)


def test_sampling_noises_by_seed_and_says_so(pipe, tmp_path, monkeypatch):
    path = save(tmp_path / "small.png", pixels(8, 8, 3))
    inputs, _ = read(pipe, 2, low_res=path, noise_level=0.4)
    assert inputs["noise_level"] == 0.4
    made = pipe.sample([5, 6], **inputs, decode=False)
    np.testing.assert_array_equal(made, pipe.sample([5, 6], **inputs, decode=False))
    clean, _ = read(pipe, 2, low_res=path)
    assert "noise_level" not in clean
    silent = pipe.sample([5, 6], **clean, decode=False)
    assert (made != silent).any()
    # The fields as training makes them are taken as they are.
    small = inputs["condition"]["low_res"]
    fields = {"low_res": small, "noise_level": np.zeros(2, np.float32)}
    np.testing.assert_array_equal(silent, pipe.sample([5, 6], fields, decode=False))
    noised = np.stack(
        [add_noise(x, 0.4, Uniforms(s, 1)) for x, s in zip(small, (5, 6), strict=True)]
    )
    assert (noised[0] != noised[1]).any()
    fields = {"low_res": noised, "noise_level": np.full(2, 0.4, np.float32)}
    np.testing.assert_array_equal(made, pipe.sample([5, 6], fields, decode=False))


def test_levels_and_settings_that_cannot_be_used(pipe):
    small = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(UserError, match=r"noise_level is 0\.6, .* levels from 0 to 0\.5"):
        pipe.sample([0], {"low_res": small}, noise_level=0.6)
    with pytest.raises(UserError, match="noised already"):
        fields = {"low_res": small, "noise_level": np.zeros(1, np.float32)}
        pipe.sample([0], fields, noise_level=0.1)
    with pytest.raises(UserError, match="the condition 'low_res' is missing"):
        pipe.sample([0], {"noise_level": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=r"low_res 3\.0 is out of range: choose from -1 to 1"):
        pipe.sample([0], {"low_res": small + 3}, noise_level=0.1)
    with pytest.raises(UserError, match="for models with the conditioner 'noise_level'"):
        model("low_res").sample([0], {"low_res": small}, noise_level=0.1)
    with pytest.raises(UserError, match="cannot be dropped or guided"):
        NoiseLevel(32, 128).apply({}, 2, method="null")
    assert jnp.isfinite(pipe.sample([0], {"low_res": small}, decode=False)).all()


@pytest.mark.parametrize(
    ("conditioners", "noise", "message"),
    [
        (("low_res",), 0.5, "must be above 0 with the conditioner 'noise_level', and 0 without"),
        (("low_res", "noise_level"), 0.0, "is 0, but must be above 0"),
        (("low_res", "noise_level"), 1.0, r"must be in \[0, 1\)"),
        (("noise_level",), 0.5, "add 'low_res' too"),
    ],
)
def test_configs_whose_values_do_not_fit(conditioners, noise, message):
    with pytest.raises(UserError, match=message):
        model(*conditioners, **{"data.low_res.noise": noise})
