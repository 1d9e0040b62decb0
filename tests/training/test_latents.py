"""What happens between the stages: cached moments, and the rules of the latent scale."""

import json

import numpy as np
import pytest

from ldm_jax import builders, random
from ldm_jax import config as config_lib
from ldm_jax.data.pipeline import Batches, epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.transforms import CachedTransform
from ldm_jax.first_stage.identity import Identity
from ldm_jax.images import to_float
from ldm_jax.training import latents
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.latents import encode_source, transform
from ldm_jax.training.sharding import make_mesh

FROZEN = {"latents": {"shift": np.full(3, 9.0, np.float32), "scale": np.full(3, 7.0, np.float32)}}


def pixel_config(batch_size=12, seed=0):
    """Latents that are the images themselves; 12 is no multiple of the eight devices."""
    config = config_lib.get_config()
    config.seed = seed
    config.data.update(resolution=16, threads=2)
    config.first_stage.kind = "identity"
    config.train.batch_size = batch_size
    return config


@pytest.fixture(scope="module")
def source():
    return open_source("emoji", where="category=Smileys & Emotion")


def pixels(source, count):
    """The latents of the first images, (count * 16 * 16, 3) float64."""
    (batch,) = epoch_batches(source, transform(pixel_config()), count, count=count)
    return to_float(batch["image"]).astype(np.float64).reshape(-1, 3)


@pytest.mark.parametrize("count", [0, 20])
def test_one_pass_measures_as_numpy_does(source, count):
    config = pixel_config()
    batches = latents.one_pass(config, source, count)
    found = latents.measure(config, FROZEN, batches, make_mesh()).summary()
    flat = pixels(source, count or len(source))
    expected = {
        "images": count or len(source),
        "mean": flat.mean(),
        "std": flat.std(ddof=1),
        "channel_mean": flat.mean(0),
        "channel_std": flat.std(0, ddof=1),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # pixels in float32
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


class Noisy(Identity):
    """Draws each latent from around its pixel, with variance 1."""

    def sample(self, moments, keys):
        return self.scaled(moments + random.normal(keys, moments.shape[1:]))


def test_draws_do_not_depend_on_batches(source, monkeypatch):
    monkeypatch.setattr(builders, "build_first_stage", lambda config: Noisy())

    def measure(**settings):
        config = pixel_config(**settings)
        batches = latents.one_pass(config, source, 30)
        return latents.measure(config, FROZEN, batches, make_mesh()).summary()

    found = measure()
    for name, value in measure(batch_size=8).items():  # sums in another order
        np.testing.assert_allclose(value, found[name], rtol=1e-6, err_msg=name)
    assert measure(seed=1)["mean"] != found["mean"]
    # The variance of 30 * 256 * 3 draws is within three times one per cent of 1.
    expected = pixels(source, 30).var(ddof=1) + 1
    np.testing.assert_allclose(found["std"] ** 2, expected, rtol=0.03)


def test_first_batch_is_what_training_sees_first(source):
    config = pixel_config()
    plain = Batches(source, transform(config), batch_size=12, seed=0, threads=0).batch(0)
    batches = latents.first_batch(config, source)
    statistics = latents.measure(config, FROZEN, batches, make_mesh())
    flat = to_float(plain["image"]).astype(np.float64)
    assert statistics.images == 12
    scaled = latents.rescale(FROZEN, "first_batch", statistics)["latents"]
    np.testing.assert_array_equal(scaled["shift"], 0)
    np.testing.assert_allclose(scaled["scale"], 1 / flat.std(ddof=1), rtol=1e-6)


def test_rules_scale_to_size_one(source):
    config = pixel_config()
    statistics = latents.measure(config, FROZEN, latents.one_pass(config, source), make_mesh())
    flat = pixels(source, len(source))
    whitened = latents.rescale(FROZEN, "channel", statistics)["latents"]
    whitened = (flat - whitened["shift"]) * whitened["scale"]
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(whitened.std(0, ddof=1), 1, rtol=1e-6)
    scaled = latents.rescale(FROZEN, "scalar", statistics)["latents"]
    np.testing.assert_array_equal(scaled["shift"], 0)
    np.testing.assert_allclose((flat * scaled["scale"]).std(ddof=1), 1, rtol=1e-6)


def test_number_and_stored_scale_need_nothing_measured():
    found = latents.rescale(FROZEN, "0.18215")
    np.testing.assert_array_equal(found["latents"]["scale"], np.full(3, 0.18215, np.float32))
    np.testing.assert_array_equal(found["latents"]["shift"], 0)
    assert latents.rescale(FROZEN, "stored") == FROZEN
    expected = {"rule": "stored", "images": 0, "shift": [9.0] * 3, "scale": [7.0] * 3}
    assert json.loads(json.dumps(latents.record(FROZEN, "stored"))) == expected


def test_cached_moments_equal_encoding_on_the_fly():
    config = config_lib.get_config()
    config.data.update(resolution=16, fields=("label",))
    config.train.batch_size = 48
    source = open_source("emoji", where="category=Smileys & Emotion")
    encode = lambda image: image.astype(np.float32) / 255  # noqa: E731
    cached = encode_source(config, source, encode, lambda: None)
    settings = dict(batch_size=8, seed=3, fields=("label",), threads=0)
    plain = Batches(source, transform(config), **settings)
    moments = Batches(cached, CachedTransform(), **settings)
    for step in (0, 30):  # the second is in the next epoch
        a, b = plain.batch(step), moments.batch(step)
        np.testing.assert_array_equal(encode(a["image"]), b["moments"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_a_signal_stops_the_encoding():
    config = config_lib.get_config()
    config.data.resolution = 16
    interrupts = Interrupts()
    interrupts.requested = True
    check = lambda: interrupts.check("while encoding the images")  # noqa: E731
    with pytest.raises(Interrupted, match="while encoding"):
        encode_source(config, open_source("emoji"), lambda image: image, check)
    with pytest.raises(Interrupted):
        config = pixel_config()
        batches = latents.one_pass(config, open_source("emoji"))
        latents.measure(config, FROZEN, batches, make_mesh(), check)
