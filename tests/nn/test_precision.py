"""With bfloat16 products, every reduction stays float32: norms, softmax, sums over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import builders
from ldm_jax import config as config_lib
from ldm_jax.nn.layers import Conv, Dense
from ldm_jax.types import Condition

# What sums many terms or is ill-conditioned; a sigmoid or a derivative of a GELU is not.
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_prod", "cumsum", "cumlogsumexp", "rsqrt", "log")
FEW = 8  # terms, such as the four pixels that one was repeated to


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def low_reductions(function, *arguments):
    """(primitive, shape) of every reduction of more than a few bfloat16 values."""
    found, seen = [], set()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        aval = equation.invars[0].aval if equation.invars else None
        seen.add(str(getattr(aval, "dtype", "")))
        if equation.primitive.name in REDUCTIONS and aval.dtype == jnp.bfloat16:
            terms = np.prod([aval.shape[axis] for axis in equation.params.get("axes", ())])
            if terms > FEW or not equation.params.get("axes"):
                found.append((equation.primitive.name, aval.shape))
    assert "bfloat16" in seen  # or else nothing was looked at
    return found


def network_config(**changes):
    c = config_lib.get_config()
    c.denoiser.update(width=32, mult=(1, 2), depth=1, attn_downsample=(1,), head_dim=16)
    c.denoiser.dit.context = "none"
    c.train.dtype = c.first_stage.train.dtype = "bfloat16"
    c.first_stage.update(kind="kl", width=32, mult=(1, 2), depth=1, mid_attn=True)
    c.update_from_flattened_dict(changes)
    return c


NETWORKS = {
    "unet": {},
    "unet_context": {"denoiser.cross_attention": True},
    "unet_scale_shift": {"denoiser.scale_shift": True, "denoiser.resblock_resample": True},
    "dit": {"denoiser.kind": "dit"},
    "dit_joint": {"denoiser.kind": "dit", "denoiser.dit.context": "joint"},
    "dit_cross": {"denoiser.kind": "dit", "denoiser.dit.context": "cross"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_low_reductions_in_denoisers(name):
    c = network_config(**NETWORKS[name])
    denoiser = builders.build_denoiser(c)
    size, has_context = 16, c.denoiser.cross_attention or c.denoiser.dit.context != "none"
    cond = Condition(
        context=jnp.zeros((2, 9, 32)) if has_context else None,
        context_mask=jnp.ones((2, 9), bool) if has_context else None,
        vector=jnp.zeros((2, 32 if c.denoiser.kind == "dit" else 128)),
    )
    arguments = jnp.zeros((2, size, size, 3)), jnp.zeros((2,), jnp.int32), cond
    params = jax.eval_shape(denoiser.init, jax.random.key(0), *arguments)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def loss(params):
        out = denoiser.apply(params, *arguments)
        assert out.dtype == jnp.float32
        return jnp.square(out).mean()

    assert low_reductions(jax.grad(loss), params) == []


def test_no_low_reductions_in_the_first_stage():
    first_stage = builders.build_first_stage(network_config())
    images = jnp.zeros((1, 32, 32, 3))
    keys = jax.random.split(jax.random.key(0), 1)
    arguments = dict(method="autoencode")
    params = jax.eval_shape(lambda: first_stage.init(jax.random.key(0), images, keys, **arguments))

    def loss(params):
        out = first_stage.apply(params, images, keys, **arguments)
        assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
        return sum(jnp.square(x).mean() for x in jax.tree.leaves(out))

    assert low_reductions(jax.grad(loss), params) == []


@pytest.mark.parametrize("layer", [Dense(4, dtype=jnp.bfloat16), Conv(4, dtype=jnp.bfloat16)])
def test_gradients_of_biases_and_kernels_are_sums_of_all_pixels(layer):
    x = jnp.ones((4, 64, 64, 2), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    sums = jax.grad(lambda p: layer.apply(p, x).astype(jnp.float32).sum())(params)["params"]
    # Sums of ones in bfloat16 end at 256, of 16 parts at 4096; the kernels' edges see less.
    np.testing.assert_array_equal(sums["bias"], np.full(4, 4 * 64**2))
    least = 4 * 64**2 if isinstance(layer, Dense) else 4 * 63**2
    assert (np.asarray(sums["kernel"]) >= 0.99 * least).all()
