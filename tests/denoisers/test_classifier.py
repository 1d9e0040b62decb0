"""The classifier of noisy latents: its logits, its half of a UNet and its pooling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import quick_jit

from ldm_jax.denoisers.classifier import AttentionPool, NoisyClassifier
from ldm_jax.denoisers.unet import UNet
from ldm_jax.errors import UserError
from ldm_jax.types import Condition

from .helpers import normal

NET = NoisyClassifier(
    num_classes=5, width=32, mult=(1, 2), depth=1, attn_downsample=(2,), head_dim=16, side=8
)
Z, T = normal(0, 3, 8, 8, 4), np.array([3, 500, 990])


@pytest.fixture(scope="module")
def params():
    """Random, with nothing left at zero, so that the logits depend on all of it."""
    shapes = jax.eval_shape(NET.init, jax.random.key(0), Z, T)
    rng = np.random.RandomState(0)
    return jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype(x.dtype),
        shapes,
    )


@pytest.fixture(scope="module")
def logits(params):
    return quick_jit(NET.apply)(params, Z, T)


def test_an_example_has_its_own_logits(params, logits):
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    assert np.abs(np.diff(logits, axis=0)).max() > 1e-2
    order = np.array([2, 0, 1])
    # Sums of float32 in another order; logits are of size 1.
    np.testing.assert_allclose(quick_jit(NET.apply)(params, Z[order], T[order]), logits[order],
                               atol=1e-5)  # fmt: skip
    np.testing.assert_allclose(quick_jit(NET.apply)(params, Z[1:2], T[1:2]), logits[1:2], atol=1e-5)


def test_the_time_is_read(params, logits):
    assert np.abs(quick_jit(NET.apply)(params, Z, T[::-1].copy()) - logits)[[0, 2]].min() > 1e-4


def test_logits_stay_float32_in_low_precision(params, logits):
    half = dataclasses.replace(NET, dtype=jnp.bfloat16)
    low = quick_jit(half.apply)(params, Z, T)
    assert low.dtype == jnp.float32
    # bfloat16 has 8 bits; a dozen layers amplify its rounding.
    assert 0 < np.abs(low - logits).max() < 0.1 * np.abs(logits).max()


def test_dropout_needs_its_stream_in_training_only(params, logits):
    dropping = dataclasses.replace(NET, dropout=0.5)
    np.testing.assert_array_equal(quick_jit(dropping.apply)(params, Z, T), logits)
    rngs = {"dropout": jax.random.key(0)}
    trained = quick_jit(lambda p: dropping.apply(p, Z, T, train=True, rngs=rngs))(params)
    assert np.abs(trained - logits).max() > 1e-3


def test_other_sizes_interpolate_the_positions(params, logits):
    larger = quick_jit(NET.apply)(params, normal(1, 2, 16, 8, 4), T[:2])
    assert larger.shape == (2, 5) and np.isfinite(larger).all()
    with pytest.raises(UserError, match="multiples of 2, got 9x8"):
        NET.apply(params, normal(1, 1, 9, 8, 4), T[:1])


def test_it_is_the_first_half_of_the_unet(params):
    unet = UNet(32, 4, (1, 2), 1, (2,), head_dim=16)
    whole = flatten_dict(jax.eval_shape(unet.init, jax.random.key(0), Z, T, Condition())["params"])
    own = flatten_dict(params["params"])
    first = {path for path in whole if not path[0].startswith(("up_", "conv_out", "norm_out"))}
    assert {path for path in own if path[0] not in ("norm_out", "pool", "logits")} == first
    assert all(own[path].shape == whole[path].shape for path in first)


def test_the_size_is_that_of_the_paper():
    net = NoisyClassifier(1000, 256, (1, 2, 4), 2, (1, 2, 4), 32, 32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    # Table 10: 506M with the classifier, 395M without, each rounded to millions.
    assert abs(count - (506e6 - 394.98e6)) < 1e6


def test_attention_pool_equals_its_formula():
    pool, x = AttentionPool(heads=2, side=3), normal(2, 2, 3, 3, 8)
    params = pool.init(jax.random.key(0), x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    pixels = (x + p["positions"]).reshape(2, 9, 8)
    mean = x.mean((1, 2)) + p["mean_position"]
    tokens = np.concatenate([mean[:, None], pixels], 1)
    q, k, v = ((tokens @ p[n]["kernel"] + p[n]["bias"]).reshape(2, 10, 2, 4) for n in "qkv")
    scores = np.exp(np.einsum("bnd,bsnd->bns", q[:, 0], k) / 2)
    weights = scores / scores.sum(-1, keepdims=True)
    want = np.einsum("bns,bsnd->bnd", weights, v).reshape(2, 8)
    np.testing.assert_allclose(pool.apply(params, x), want, atol=1e-5)
