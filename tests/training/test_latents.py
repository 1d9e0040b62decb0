"""What happens between the stages: cached moments, and the rules of the latent scale."""

import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax.data.pipeline import Batches, epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.transforms import CachedTransform
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.latents import encode_source, measure_scale, transform

RNG = np.random.default_rng(0)
BATCH = (RNG.normal(size=(64, 4, 4, 3)) * [1.0, 2.0, 5.0] + [0.0, 1.0, -3.0]).astype(np.float32)
FROZEN = {"latents": {"shift": np.full(3, 9.0, np.float32), "scale": np.full(3, 7.0, np.float32)}}


def measured(rule, **changes):
    config = config_lib.get_config()
    config.first_stage.update(kind="identity", latent_scale=rule, **changes)
    batches = iter(
        [{"moments": part, "valid": np.ones(32, bool)} for part in (BATCH[:32], BATCH[32:])]
    )
    result = measure_scale(config, FROZEN, batches, None, None, lambda: None)["latents"]
    return np.asarray(result["shift"]), np.asarray(result["scale"])


@pytest.fixture(autouse=True)
def a_key_is_not_needed(monkeypatch):
    """The identity first stage draws nothing."""
    monkeypatch.setattr("ldm_jax.training.latents.random.example_keys", lambda key, count: None)
    monkeypatch.setattr("jax.random.fold_in", lambda key, data: None)


def test_channel_scale_whitens_each_channel():
    shift, scale = measured("channel")
    flat = ((BATCH - shift) * scale).reshape(-1, 3)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(flat.std(0, ddof=1), 1, rtol=1e-5)


def test_scalar_and_first_batch_scale_divide_by_the_standard_deviation():
    shift, scale = measured("scalar")
    np.testing.assert_array_equal(shift, 0)
    np.testing.assert_allclose(scale, 1 / BATCH.std(ddof=1), rtol=1e-5)
    shift, scale = measured("first_batch")
    np.testing.assert_allclose(scale, 1 / BATCH[:32].std(ddof=1), rtol=1e-5)
    _, scale = measured("scalar", stats_images=32)  # stops after the first batch
    np.testing.assert_allclose(scale, 1 / BATCH[:32].std(ddof=1), rtol=1e-5)


def test_number_and_stored_scale():
    shift, scale = measured("0.18215")
    np.testing.assert_allclose(scale, 0.18215, rtol=1e-6)
    np.testing.assert_array_equal(shift, 0)
    shift, scale = measured("stored")
    np.testing.assert_array_equal((shift, scale), [[9.0] * 3, [7.0] * 3])


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
    batches = epoch_batches(open_source("emoji"), transform(config), 8)
    config.first_stage.update(kind="identity", latent_scale="scalar")
    with pytest.raises(Interrupted):
        measure_scale(config, FROZEN, batches, None, None, check)
    batches.close()
