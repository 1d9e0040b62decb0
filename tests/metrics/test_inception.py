"""The Inception of the Frechet distance against pytorch-fid's."""

import functools

import jax
import numpy as np
import pytest
from golden_utils import load, quick_jit

from ldm_jax.convert.losses import inception_to_flax
from ldm_jax.errors import UserError
from ldm_jax.metrics.inception import FEATURES, Inception, average_pool, resize_bilinear


@functools.cache
def fixture_weights() -> dict:
    return inception_to_flax(load("inception_fid").weights())


def test_matches_the_original():
    golden = load("inception_fid")

    @quick_jit
    def evaluate(variables, images):
        return Inception().apply(
            variables, images, capture_intermediates=lambda _, method: method == "blocks"
        )

    features, seen = evaluate(fixture_weights(), golden.nhwc("in.x"))
    (blocks,) = seen["intermediates"]["blocks"]
    golden.check("out.pool3", features)
    for i, block in enumerate(blocks[:3]):
        golden.check(f"mid.block{i}_mean", block.mean((1, 2)))
        golden.check(f"mid.block{i}_corner", block[:, :2, :2])
    np.testing.assert_allclose(blocks.last.mean((1, 2)), features, rtol=1e-6)


def test_images_are_resized_as_by_the_original():
    golden = load("inception_fid")
    golden.check("mid.resized_corner", resize_bilinear(golden.nhwc("in.x"))[:, :8, :8])


@pytest.mark.parametrize("half_pixel", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (31, 40), (16, 16), (1, 9)])
def test_resize_interpolates_between_two_pixels_per_axis(half_pixel, shape):
    images = np.random.RandomState(0).uniform(0, 1, (2, *shape, 3)).astype(np.float32)
    offset = 0.5 if half_pixel else 0.0
    want = images.astype(np.float64)
    for axis in (1, 2):
        length = shape[axis - 1]
        place = np.clip((np.arange(16) + offset) * length / 16 - offset, 0, length - 1)
        want = np.apply_along_axis(
            lambda row, place=place: np.interp(place, np.arange(len(row)), row), axis, want
        )
    np.testing.assert_allclose(resize_bilinear(images, 16, half_pixel), want, rtol=0, atol=1e-6)


def test_average_pool_leaves_out_the_padding():
    ones = np.ones((1, 4, 5, 2), np.float32)
    np.testing.assert_allclose(average_pool(ones), ones, rtol=1e-6)


def test_logits_come_from_the_features():
    variables = fixture_weights()
    features = np.random.RandomState(0).standard_normal((2, FEATURES)).astype(np.float32)
    weights = load("inception_fid").weights("fc.")
    logits = Inception().apply(variables, features, method="logits")
    want = features @ weights["weight"].T + weights["bias"]
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_grey_images_are_refused():
    images = np.zeros((1, 64, 64, 1), np.float32)
    with pytest.raises(UserError, match="3 channels, got 1"):
        jax.eval_shape(Inception().init, jax.random.key(0), images)
