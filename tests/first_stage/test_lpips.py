"""LPIPS against the original code."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load, quick_jit
from PIL import Image

from ldm_jax.convert.losses import lpips_to_flax
from ldm_jax.data.decode import decode_image
from ldm_jax.errors import UserError
from ldm_jax.first_stage.lpips import LPIPS, to_colours, unit_length
from ldm_jax.images import to_float


@functools.cache
def fixture_weights() -> dict:
    """The variables of `LPIPS` for the fixtures: VGG16 by the formula, the heads of v0.1."""
    golden = load("lpips_vgg16")
    heads = {f"lin{i}.model.1.weight": golden[f"heads.lin{i}"] for i in range(5)}
    return lpips_to_flax(golden.weights() | heads)


@quick_jit
def evaluate(variables, images, others):
    """Gradient of the sum of the distances by `others`, and every stored output."""

    def everything(others):
        distances, seen = LPIPS().apply(
            variables,
            images,
            others,
            capture_intermediates=lambda _, method: method in ("layer_distances", "features"),
        )
        out = {"out.lpips": distances}
        (shares,), (a, b) = (seen["intermediates"][k] for k in ("layer_distances", "features"))
        for i in range(5):
            out[f"out.layer{i}_head"] = shares[:, i, None]
            difference = jnp.square(unit_length(a[i]) - unit_length(b[i]))
            out[f"out.layer{i}_unweighted"] = difference.sum(-1).mean((1, 2))
            out[f"out.feat{i}_rms"] = jnp.sqrt(jnp.square(a[i]).mean())
        return out["out.lpips"].sum(), out

    return jax.grad(everything, has_aux=True)(others)


def test_matches_the_original():
    golden = load("lpips_vgg16")
    images, others = golden.nhwc("in.x0"), golden.nhwc("in.x1")
    gradient, out = evaluate(fixture_weights(), images, others)
    out["out.lpips"] = out["out.lpips"][:, None, None, None]
    assert out.keys() == {name for name in golden.arrays if name.startswith("out.")}
    for key, value in out.items():
        golden.check(key, value)
    golden.check("grad.in1", gradient)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images_are_compared_by_their_colours(channels):
    shape = (1, 16, 16, channels)
    given = np.random.RandomState(0).uniform(-1, 1, shape).astype(np.float32)
    coloured = to_colours(given)
    if channels == 1:
        np.testing.assert_array_equal(coloured, np.repeat(given, 3, axis=-1))

    @quick_jit
    def distances(variables, coloured, given):
        both = jnp.concatenate([given, -given])
        return LPIPS().apply(variables, jnp.concatenate([coloured, coloured]), both)

    same, other = distances(fixture_weights(), coloured, given)
    assert same < 1e-10 < 1e-3 < other


def test_transparent_images_are_laid_on_white_as_the_data_sources_do():
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 4), np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    loaded = to_float(decode_image(file.getvalue(), "x"))
    # The loader rounds to grey levels, of which there are 127.5 in one unit.
    np.testing.assert_allclose(to_colours(to_float(pixels)), loaded, atol=1.01 / 127.5)
    np.testing.assert_array_equal(to_colours(to_float(pixels))[0], 1.0)
    np.testing.assert_array_equal(to_colours(to_float(pixels))[1], loaded[1])


def test_colours_and_alpha_have_their_gradients():
    """By the rule for products: colours through their alpha, alpha by what it lifts off white."""
    images = np.random.RandomState(1).uniform(-1, 1, (2, 3, 3, 4)).astype(np.float32)
    cotangent = np.random.RandomState(2).normal(size=(2, 3, 3, 3)).astype(np.float32)
    (found,) = jax.vjp(to_colours, images)[1](cotangent)
    alpha = 0.5 * (images[..., 3:] + 1)
    np.testing.assert_allclose(found[..., :3], alpha * cotangent, rtol=1e-6)
    by_alpha = (0.5 * (images[..., :3] - 1) * cotangent).sum(-1)
    np.testing.assert_allclose(found[..., 3], by_alpha, rtol=1e-5, atol=1e-6)  # order of the sum


def test_features_that_are_all_zero_have_a_gradient():
    features = np.zeros((2, 3, 4), np.float32)
    features[0] = 1.0
    gradient = quick_jit(jax.grad(lambda x: (unit_length(x) * 3.0).sum()))(features)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(unit_length(features)[0], 0.5)
    np.testing.assert_array_equal(unit_length(features)[1], 0.0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 32, 32, 2), "1, 3 or 4 channels, got 2"), ((1, 32, 15, 3), "at least 16x16, got 32x15")],
)
def test_images_that_it_cannot_take_are_refused(shape, message):
    images = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)


def test_the_map_is_large_where_images_differ_and_has_the_distance_as_its_mean(monkeypatch):
    monkeypatch.setattr("ldm_jax.first_stage.lpips.VGG16", ((1, 4), (1, 4), (1, 4)))
    random = np.random.RandomState(0)
    a = random.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    b = a.copy()
    b[:, :6, :6] *= -1
    module = LPIPS()
    variables = quick_jit(module.init)(jax.random.key(0), a, b)
    # The heads that are trained have no negative weights.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.abs(x) if "head" in str(path) else x, variables
    )
    found = module.apply(variables, a, b, method="distance_map")
    assert found.shape == (2, 32, 32)
    # Bilinear enlargement by whole factors keeps means; the rest is float32.
    np.testing.assert_allclose(found.mean((1, 2)), module.apply(variables, a, b), rtol=1e-5)
    assert found[:, :6, :6].mean() > 10 * found[:, 16:, 16:].mean()
