import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load, quick_jit

from ldm_jax import random
from ldm_jax.convert.compvis import unet_to_flax
from ldm_jax.denoisers.unet import UNet
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.guidance import make_denoise
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.diffusion.tiles import (
    Tiling,
    apply_in_tiles,
    border_distance,
    crop,
    scan_tiles,
    stitch,
    tiled,
    tiled_in_turn,
)
from ldm_jax.errors import UserError
from ldm_jax.first_stage.tiled import map_tiles
from ldm_jax.types import Condition

TILING = Tiling((8, 8), (4, 4))
SIZE = (16, 24)


def images(channels=3, seed=0):
    return jnp.asarray(np.random.RandomState(seed).randn(2, *SIZE, channels), jnp.float32)


def summed(weights, size, tiling):
    """Sum of the weights on each pixel of the image, crop by crop."""
    total, numbers = np.zeros(size), iter(weights)
    for top in range(0, size[0] - tiling.kernel[0] + 1, tiling.stride[0]):
        for left in range(0, size[1] - tiling.kernel[1] + 1, tiling.stride[1]):
            total[top : top + tiling.kernel[0], left : left + tiling.kernel[1]] += next(numbers)
    return total


@pytest.mark.parametrize("factor, tag", [(1, ""), (4, "_uf4")])
def test_weights_of_the_original_code(factor, tag):
    golden = load("patchwise_apply")
    tiling, size = TILING.scaled(factor), (factor * SIZE[0], factor * SIZE[1])
    weights = tiling.weights(size)
    stored = golden[f"out.weighting{tag}"][0, 0]
    for name, ours, want in (
        ("weighting", weights[: stored.shape[-1]], np.moveaxis(stored, -1, 0)),
        ("normalization", summed(weights, size, tiling), golden[f"out.normalization{tag}"][0, 0]),
    ):
        atol = golden.meta["tolerance"][f"out.{name}{tag}"]["suggested_atol"]
        np.testing.assert_allclose(ours, want, rtol=0, atol=atol)


def test_crops_of_the_original_code():
    golden = load("patchwise_apply")
    crops = np.asarray(crop(jnp.asarray(golden.nhwc("in.x")), TILING))
    stored = golden["out.crops"].reshape(2, 3, 8, 8, 15).transpose(4, 0, 2, 3, 1)
    np.testing.assert_array_equal(crops, stored.reshape(30, 8, 8, 3))


def test_a_denoiser_on_crops_is_that_of_the_original_code():
    golden = load("patchwise_apply")
    config = golden.meta["config"]
    module = UNet(
        width=config["model_channels"],
        out_channels=config["out_channels"],
        mult=tuple(config["channel_mult"]),
        depth=config["num_res_blocks"],
        attn_downsample=tuple(config["attention_resolutions"]),
        head_dim=config["num_head_channels"],
    )
    params = unet_to_flax(golden.weights(), module)
    apply = tiled(lambda *x: module.apply({"params": params}, *x), *TILING[:2])
    cond = Condition(concat=jnp.asarray(golden.nhwc("in.c_concat")))
    x, t = jnp.asarray(golden.nhwc("in.x")), jnp.asarray(golden["in.t"])
    golden.check("out.apply_model", quick_jit(apply)(x, t, cond))


@pytest.mark.parametrize("tie_clip", [None, (0.01, 0.5)])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_pointwise_function_is_not_disturbed(factor, tie_clip):
    def enlarge(x):
        return jnp.sin(x).repeat(factor, axis=1).repeat(factor, axis=2)

    x, calls = images(), []
    out = apply_in_tiles(
        lambda crops: calls.append(crops.shape) or enlarge(crops),
        x,
        (8, 12),
        (4, 6),
        factor,
        tie_clip=tie_clip,
    )
    np.testing.assert_allclose(out, enlarge(x), rtol=1e-5, atol=1e-6)
    assert calls == [(2 * 3 * 3, 8, 12, 3)]  # one call on all crops


def test_stitching_is_the_weighted_mean_of_overlapping_crops():
    tiling = Tiling((4, 4), (2, 2), tie_clip=(0.1, 0.3))
    crops = np.random.RandomState(0).randn(6, 4, 4, 1)  # 2 x 3 places, one image
    out = stitch(jnp.asarray(crops, jnp.float32), (6, 8), tiling)[0, :, :, 0]
    weights = tiling.weights((6, 8))
    expected = summed(weights * crops[..., 0], (6, 8), tiling) / summed(weights, (6, 8), tiling)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_tie_weights_favour_the_crops_in_the_middle():
    tiling = Tiling((4, 4), (2, 2), clip=(0.2, 0.2), tie_clip=(0.1, 0.3))
    weights = tiling.weights((8, 12))[:, 0, 0].reshape(3, 5) / 0.2
    expected = [[0.1] * 5, [0.1, 0.25, 0.3, 0.25, 0.1], [0.1] * 5]
    np.testing.assert_allclose(weights, expected)


def test_distances_to_the_border():
    np.testing.assert_allclose(border_distance(3, 5)[1], [0, 0.25, 0.5, 0.25, 0])
    np.testing.assert_array_equal(border_distance(1, 4), np.zeros((1, 4)))


def test_conditions_go_along_with_their_crops():
    def apply(x_t, t, cond):
        told = t + cond.vector[:, 0] + cond.context[:, 0, 0]
        return x_t + cond.concat + told.reshape(-1, 1, 1, 1)

    t, number = jnp.array([10.0, 20.0]), jnp.array([1.0, 2.0])
    cond = Condition(
        context=number.reshape(2, 1, 1) / 100, concat=images(seed=1), vector=number[:, None]
    )
    out = tiled(apply, (8, 8), (8, 8))(images(), t, cond)
    np.testing.assert_allclose(out, apply(images(), t, cond), rtol=1e-5, atol=1e-5)
    plain = tiled(lambda x_t, t, cond: x_t * t.reshape(-1, 1, 1, 1), (8, 8), (4, 8))
    expected = images() * t.reshape(2, 1, 1, 1)
    np.testing.assert_allclose(plain(images(), t, None), expected, rtol=1e-5, atol=1e-5)


def test_it_is_differentiable_and_compiles():
    total = functools.partial(apply_in_tiles, jnp.square, kernel=(8, 8), stride=(4, 4))
    gradient = quick_jit(jax.grad(lambda x: total(x).sum()))(images())
    np.testing.assert_allclose(gradient, 2 * images(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel, stride", [((8, 8), (5, 4)), ((8, 32), (4, 4)), ((4, 4), (6, 4))])
def test_crops_that_do_not_cover_the_image(kernel, stride):
    with pytest.raises(UserError, match="do not cover a side of"):
        apply_in_tiles(jnp.sin, images(), kernel, stride)


def test_weights_of_zero_are_refused():
    with pytest.raises(UserError, match="tie_clip must be two numbers 0 < smallest"):
        apply_in_tiles(jnp.sin, images(), (8, 8), (4, 4), tie_clip=(0.0, 0.5))


# One tile after the other


@pytest.mark.parametrize("size", [(17, 30), (12, 5), (9, 8), (3, 3)])
@pytest.mark.parametrize("scale", [(1, 1), (1, 2), (2, 1)])
def test_what_does_not_depend_on_the_tile_comes_back_from_a_scan(size, scale):
    a, b = scale
    x = np.random.RandomState(0).uniform(-1, 1, (2, a * size[0], a * size[1], 3))
    x = jnp.asarray(x, jnp.float32)

    def whole(x):
        return jnp.sin(x)[:, ::a, ::a].repeat(b, 1).repeat(b, 2)

    run = quick_jit(lambda x: scan_tiles(whole, x, 8, scale))
    # A sum of at most nine products of two float32 weights.
    np.testing.assert_allclose(run(x), whole(x), rtol=0, atol=5e-7)


def test_a_scan_is_what_the_host_does_tile_by_tile():
    def apply(x):  # depends on all of the tile
        return (x - x.mean((1, 2, 3), keepdims=True)).repeat(2, 1).repeat(2, 2)

    x = images()
    expected = map_tiles(apply, np.asarray(x), 8, (1, 2))
    np.testing.assert_allclose(scan_tiles(apply, x, 8, (1, 2)), expected, rtol=0, atol=1e-6)
    # One tile is the untiled result.
    np.testing.assert_array_equal(scan_tiles(apply, x, 24, (1, 2)), apply(x))


def test_the_network_of_a_scan_sees_one_tile_at_a_time():
    shapes = []
    scan_tiles(lambda x: shapes.append(x.shape) or x, images(), 8)
    assert set(shapes) == {(2, 8, 8, 3)}


def test_a_pointwise_denoiser_samples_the_same_in_tiles():
    keys = random.example_keys(jax.random.key(0), 2)
    x_T = samplers.initial_noise(keys, (13, 18, 3))  # a side that strides of 8 do not divide
    cond = Condition(concat=jnp.cos(x_T), vector=jnp.array([[0.1], [0.3]]))
    null = Condition(concat=jnp.zeros_like(x_T), vector=jnp.zeros((2, 1)))
    table = samplers.make_table("ddpm", make_schedule(), 5, spacing="trailing")

    def network(x_t, t, cond):
        told = cond.concat + cond.vector[:, :, None, None] + 0.001 * t.reshape(-1, 1, 1, 1)
        return 0.8 * jnp.tanh(x_t + told)

    outs = []
    for apply in (network, tiled_in_turn(network, 8)):
        denoise = make_denoise(apply, "eps", cond, null, 2.0)
        run = functools.partial(samplers.sample, denoise, sampler=samplers.SAMPLERS["ddpm"])
        outs.append(quick_jit(run)(x_T, keys, table))
    # Five steps, each with the rounding of the weights.
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-4)
    plain = tiled_in_turn(lambda x_t, t, cond: x_t * t.reshape(-1, 1, 1, 1), 8)
    t = jnp.array([10.0, 20.0])
    np.testing.assert_allclose(plain(x_T, t, None), x_T * t.reshape(2, 1, 1, 1), rtol=1e-5)
