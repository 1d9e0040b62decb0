"""What every denoiser promises, whatever is inside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax.denoisers.dit import DiT
from ldm_jax.denoisers.unet import UNet
from ldm_jax.types import Condition

from .helpers import normal, randomised

UNET = UNet(width=32, out_channels=3, mult=(1,), depth=1, attn_downsample=(1,), head_dim=32)
DIT = DiT(width=32, out_channels=3, depth=2, head_dim=16)
READERS = {
    "unet": dataclasses.replace(UNET, cross_attention=True),
    "dit_cross": dataclasses.replace(DIT, context="cross", mlp="swiglu"),
    "dit_joint": dataclasses.replace(DIT, context="joint", positions="sincos", patch=1),
}
# This narrow UNet has groups of one channel: what is added before them is normalised away.
PLAIN = {"unet": dataclasses.replace(UNET, attn_downsample=(), scale_shift=True), "dit": DIT}
VECTOR = {"unet": 4 * 32, "dit_cross": 32, "dit_joint": 32}
T = np.array([3, 700])
X = normal(0, 2, 8, 8, 3)

readers = pytest.mark.parametrize("name", READERS)
plain = pytest.mark.parametrize("net", PLAIN.values(), ids=PLAIN.keys())


@readers
def test_every_slot_reaches_the_output(name):
    net = dataclasses.replace(READERS[name], **({"scale_shift": True} if name == "unet" else {}))
    cond = Condition(
        context=normal(1, 2, 6, 8), concat=normal(2, 2, 8, 8, 5), vector=normal(3, 2, VECTOR[name])
    )
    params = randomised(net, X, T, cond)
    apply = quick_jit(lambda cond: net.apply({"params": params}, X, T, cond))
    out = apply(cond)
    assert out.shape == X.shape and out.dtype == jnp.float32
    for slot in ("context", "concat", "vector"):
        other = apply(cond.replace(**{slot: getattr(cond, slot)[::-1]}))
        assert np.abs(other - out).max() > 1e-2, slot


@readers
def test_context_mask_equals_a_shorter_context(name):
    net = READERS[name]
    context, keep = normal(1, 2, 6, 8), np.tile(np.arange(6) < 4, (2, 1))
    params = randomised(net, X, T, Condition(context=context))
    apply = quick_jit(lambda cond: net.apply({"params": params}, X, T, cond))
    full = apply(Condition(context=context, context_mask=np.ones_like(keep)))
    masked = apply(Condition(context=context, context_mask=keep))
    short = apply(Condition(context=context[:, :4]))
    # Float32 sums of other lengths.
    np.testing.assert_allclose(masked, short, atol=5e-5)
    assert np.abs(full - short).max() > 1e-2


@plain
def test_starts_at_zero(net):
    params = quick_jit(net.init)(jax.random.key(0), X, T, Condition())
    assert not quick_jit(net.apply)(params, X, T, Condition()).any()


@plain
def test_bfloat16_keeps_params_and_output_in_float32(net):
    half = dataclasses.replace(net, dtype=jnp.bfloat16)
    params = randomised(half, X, T, Condition())
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    low = quick_jit(half.apply)({"params": params}, X, T, Condition())
    full = quick_jit(net.apply)({"params": params}, X, T, Condition())
    assert low.dtype == jnp.float32
    assert 0 < np.sqrt(np.mean((low - full) ** 2)) < 0.05 * np.sqrt(np.mean(full**2))


@pytest.mark.parametrize("remat", ["block", "dots"])
@pytest.mark.parametrize("name", ["unet", "dit_joint"])
def test_remat_changes_no_parameter_and_no_gradient(name, remat):
    cond = Condition(context=normal(2, 2, 3, 8))
    fields = {"attn_downsample": ()} if name == "unet" else {}
    net = dataclasses.replace(READERS[name], dropout=0.1, **fields)
    params = randomised(net, X, T, cond)

    def loss(params, net):
        rngs = {"dropout": jax.random.key(1)}
        return jnp.square(net.apply({"params": params}, X, T, cond, train=True, rngs=rngs)).sum()

    gradient = quick_jit(jax.grad(loss), static_argnums=1)
    want, got = (gradient(params, dataclasses.replace(net, remat=r)) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), want, got)


@plain
def test_times_may_be_fractions(net):
    params = randomised(net, X, T, Condition())
    apply = quick_jit(lambda t: net.apply({"params": params}, X[:1].repeat(3, 0), t, Condition()))
    low, middle, high = apply(np.array([10.0, 10.5, 11.0], np.float32))
    assert np.abs(middle - low).max() > 0
    difference = np.abs(high - low).max()
    np.testing.assert_allclose(middle, (low + high) / 2, atol=0.2 * difference)
