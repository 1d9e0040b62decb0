"""Residual and transformer blocks and the time embedding against the original code."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import load, quick_jit

from ldm_jax.convert import compvis
from ldm_jax.nn.attention import SelfAttention, SpatialTransformer
from ldm_jax.nn.embed import timestep_embedding
from ldm_jax.nn.layers import GroupNorm
from ldm_jax.nn.resnet import Downsample, ResBlock, Upsample, average_pool, repeat_pixels


def params_of(golden, layers, module, *inputs):
    """The params of a block from the fixture's weights, by the table of its layers."""
    init = functools.partial(module.init, jax.random.key(0))
    abstract = flatten_dict(jax.eval_shape(lambda: init(*inputs))["params"])
    table = compvis.make_table(compvis.within("", "", layers), abstract)
    return compvis.to_flax(golden.weights(), table, abstract)


def test_res_block():
    golden = load("resblock_small_weights")
    module = ResBlock(golden.meta["config"]["out_channels"], epsilon=1e-5)
    inputs = golden.nhwc("in.x"), golden["in.emb"], False
    params = params_of(golden, compvis.UNET_RES, module, *inputs)
    golden.check("out", quick_jit(lambda params: module.apply({"params": params}, *inputs))(params))


@pytest.mark.parametrize("name", ["spatial_transformer", "spatial_transformer_small_weights"])
def test_spatial_transformer(name):
    golden = load(name)
    config = golden.meta["config"]
    module = SpatialTransformer(config["n_heads"], config["depth"])
    inputs = golden.nhwc("in.x"), golden["in.context"], None
    params = params_of(golden, compvis.transformer_layers(config["depth"]), module, *inputs)
    golden.check("out", quick_jit(module.apply)({"params": params}, *inputs))
    golden.check("mid.norm", GroupNorm(1e-6).apply({"params": params["norm"]}, inputs[0]))


@pytest.mark.parametrize("dim", [32, 64, 65, 320])
def test_timestep_embedding(dim):
    golden = load("timestep_embedding")
    embedding = timestep_embedding(golden["in.t"], dim)
    np.testing.assert_allclose(embedding, golden[f"openai_{dim}"], atol=2e-4)


def test_qkv_orders_differ_by_a_permutation():
    rng = np.random.RandomState(0)
    x = rng.standard_normal((2, 4, 4, 64)).astype(np.float32)
    legacy = SelfAttention(heads=4, epsilon=1e-5)
    params = legacy.init(jax.random.key(0), x)["params"]
    # (head, q/k/v, channel) -> (q/k/v, head, channel)
    order = np.arange(192).reshape(4, 3, 16).transpose(1, 0, 2).reshape(-1)
    permuted = params | {"qkv": jax.tree.map(lambda p: p[..., order], params["qkv"])}
    want = legacy.apply({"params": params}, x)
    got = legacy.clone(split_qkv_first=True).apply({"params": permuted}, x)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_resampling_without_parameters():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(average_pool(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    up = repeat_pixels(x)
    np.testing.assert_array_equal(up, x.repeat(2, 1).repeat(2, 2))
    np.testing.assert_array_equal(average_pool(up), x)


@pytest.mark.parametrize(("padding", "first"), [((1, 1), 4), ((0, 1), 9)])
def test_downsample_padding_decides_where_windows_start(padding, first):
    x = np.ones((1, 4, 4, 1), np.float32)
    params = {
        "conv": {"kernel": np.ones((3, 3, 1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    }
    out = Downsample(padding).apply({"params": params}, x)
    assert out.shape == (1, 2, 2, 1)
    assert out[0, 0, 0, 0] == first
    up = Upsample().apply({"params": params}, x)
    assert up.shape == (1, 8, 8, 1) and up[0, 4, 4, 0] == 9
