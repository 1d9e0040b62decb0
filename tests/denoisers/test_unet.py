"""The UNet against the original code, and what it refuses; test_contract.py has the rest."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import load, quick_jit

from ldm_jax.convert import compvis
from ldm_jax.denoisers.unet import UNet
from ldm_jax.errors import UserError
from ldm_jax.types import Condition

from .helpers import normal

FIXTURES = [
    "unet_uncond",
    "unet_uncond_stored",
    "unet_small_weights_uncond",
    "unet_num_heads_legacy",
    "unet_noconv_resample",
    "unet_scale_shift",
    "unet_concat",
    "unet_class_label",
    "unet_crossattn",
    "unet_small_weights_crossattn",
    "unet_crossattn_heads8",
]
# Each takes long to compile, so `pytest -m slow` checks variants that no config uses, and those
# whose blocks others have, too.
SLOW = {"unet_num_heads_legacy", "unet_noconv_resample", "unet_concat", "unet_class_label"}
SLOW |= {"unet_uncond", "unet_crossattn_heads8"}
# Their names of fields that are simply copied.
FIELDS = {
    "model_channels": "width",
    "out_channels": "out_channels",
    "num_res_blocks": "depth",
    "num_heads": "num_heads",
    "num_head_channels": "head_dim",
    "use_spatial_transformer": "cross_attention",
    "transformer_depth": "transformer_depth",
    "use_scale_shift_norm": "scale_shift",
    "resblock_updown": "resblock_resample",
    "conv_resample": "conv_resample",
    "use_new_attention_order": "split_qkv_first",
}
TINY = UNet(width=32, out_channels=3, mult=(1,), depth=1, attn_downsample=(1,), head_dim=32)
TINY_CROSS = dataclasses.replace(TINY, cross_attention=True)
T = np.array([3, 700])


X = normal(0, 2, 8, 8, 3)


def from_config(config: dict) -> UNet:
    fields = {FIELDS[key]: value for key, value in config.items() if key in FIELDS}
    mult, attn = tuple(config["channel_mult"]), tuple(config["attention_resolutions"])
    return UNet(mult=mult, attn_downsample=attn, **fields)


def block_outputs(net: UNet) -> dict[str, str]:
    """Our submodule whose output is each stored intermediate value."""
    first = "down_0_attn_0" if 1 in net.attn_downsample else "down_0_res_0"
    names = {"time_embed": "time_embed", "input_blocks.1": first, "middle_block": "mid_res_1"}
    return {f"mid.{theirs}": ours for theirs, ours in names.items()}


@functools.partial(quick_jit, static_argnums=0)
def evaluate(net, params, x, t, cond, cotangent):
    """Gradients of sum(out * cotangent) for params and x, the output and block outputs.

    Channels of x beyond the cotangent's go through the slot `concat`.
    """

    def scalar(params, x):
        wanted, channels = set(block_outputs(net).values()), cotangent.shape[-1]
        joined = cond.replace(concat=x[..., channels:] if x.shape[-1] > channels else None)
        out, state = net.apply(
            {"params": params},
            x[..., :channels],
            t,
            joined,
            capture_intermediates=lambda module, method: module.name in wanted,
            mutable=["intermediates"],
        )
        return (out * cotangent).sum(), (out, state["intermediates"])

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in FIXTURES],
)
def test_matches_the_original(name):
    golden = load(name)
    net = from_config(golden.meta["config"])
    state_dict, labels = compvis.split_label_embedding(golden.weights())
    params = compvis.unet_to_flax(state_dict, net)
    context = golden.arrays.get("in.context")
    cond = Condition(context=context, vector=None if labels is None else labels[golden["in.y"]])

    (grad_params, grad_x), (out, blocks) = evaluate(
        net, params, golden.nhwc("in.x"), golden["in.t"], cond, golden.nhwc("in.cotangent")
    )

    golden.check("out", out)
    golden.check("grad.x", grad_x)
    for theirs, ours in block_outputs(net).items():
        golden.check(theirs, blocks[ours]["__call__"][0])
    golden.check_gradients(compvis.unet_from_flax(grad_params, net), skip=[compvis.LABEL_EMBEDDING])


def test_parameter_count_of_lsun_bedrooms():
    net = UNet(
        width=224,
        out_channels=3,
        mult=(1, 2, 3, 4),
        depth=2,
        attn_downsample=(8, 4, 2),
        head_dim=32,
    )
    x = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), Condition())
    assert sum(p.size for p in jax.tree.leaves(shapes)) == 274_056_163


def test_starts_as_the_original_does():
    params = quick_jit(TINY.init)(jax.random.key(0), X, T, Condition())["params"]
    for path, value in flatten_dict(params, sep="/").items():
        layer, leaf = path.rsplit("/", 1)
        if re.search(r"conv_out$|res_\d/conv_1$|attn_\d/out$|mid_attn/out$", layer):
            assert not value.any(), path
        elif leaf == "kernel":
            bound = 1 / np.sqrt(np.prod(value.shape[:-1]))
            assert 0.9 * bound < np.abs(value).max() <= bound, path
            np.testing.assert_allclose(np.std(value), bound / np.sqrt(3), rtol=0.1, err_msg=path)
        elif leaf == "bias" and "norm" not in layer:
            bound = 1 / np.sqrt(np.prod(params_at(params, layer)["kernel"].shape[:-1]))
            assert 0.5 * bound < np.abs(value).max() <= bound, path


def params_at(params, layer):
    for name in layer.split("/"):
        params = params[name]
    return params


@pytest.mark.parametrize(
    ("net", "shape", "cond", "message"),
    [
        (dataclasses.replace(TINY, mult=(1, 2)), (2, 7, 8, 3), Condition(), "of 2, got 7x8"),
        (TINY_CROSS, X.shape, Condition(), "no context"),
        (TINY, X.shape, Condition(context=jnp.zeros((2, 1, 8))), "cross_attention=True"),
        (TINY, X.shape, Condition(vector=jnp.zeros((2, 64))), "must be 128 wide"),
        (dataclasses.replace(TINY, width=48), X.shape, Condition(), "multiple of 32 channels"),
        (dataclasses.replace(TINY, num_heads=2), X.shape, Condition(), "either num_heads or"),
        (dataclasses.replace(TINY, head_dim=24), X.shape, Condition(), "head_dim=24 does not"),
    ],
)
def test_input_that_does_not_fit_is_refused(net, shape, cond, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2), cond)
