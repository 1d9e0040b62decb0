"""The name tables: against the published models' own lists, and there and back."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import load, load_manifest

from ldm_jax.convert import compvis
from ldm_jax.denoisers.unet import UNet
from ldm_jax.errors import UserError
from ldm_jax.first_stage.kl import AutoencoderKL
from ldm_jax.first_stage.vq import VQModel

LDM_4 = dict(width=224, out_channels=3, mult=(1, 2, 3, 4), attn_downsample=(8, 4, 2), head_dim=32)
UNETS = {
    "lsun_beds256": LDM_4,
    "celeba256": LDM_4,
    "lsun_churches256": dict(
        width=192,
        out_channels=4,
        mult=(1, 2, 2, 4, 4),
        attn_downsample=(1, 2, 4, 8),
        num_heads=8,
        scale_shift=True,
        resblock_resample=True,
    ),
    "cin256": dict(
        width=256,
        out_channels=4,
        mult=(1, 2, 4),
        attn_downsample=(4, 2, 1),
        head_dim=32,
        cross_attention=True,
    ),
    "cin256-v2": dict(
        width=192,
        out_channels=3,
        mult=(1, 2, 3, 5),
        attn_downsample=(8, 4, 2),
        num_heads=1,
        cross_attention=True,
    ),
}
VQ_4 = VQModel(
    width=128, mult=(1, 2, 4), depth=2, attn_downsample=(), z_channels=3, channels=3, codes=8192
)
FIRST_STAGES = {
    "lsun_beds256": VQ_4,
    "celeba256": VQ_4,
    "cin256-v2": VQ_4,
    "lsun_churches256": AutoencoderKL(
        width=128, mult=(1, 2, 4, 4), depth=2, attn_downsample=(), z_channels=4, channels=4
    ),
    "cin256": VQModel(
        width=128,
        mult=(1, 2, 2, 4),
        depth=2,
        attn_downsample=(8,),
        z_channels=4,
        channels=4,
        codes=16384,
    ),
}
SMALL = dict(width=32, out_channels=3, mult=(1, 2), depth=1, attn_downsample=(2,), head_dim=32)


def published(name: str, prefix: str) -> dict[str, np.ndarray]:
    """A published model's weights, all zero and without memory behind them."""
    shapes = load_manifest(name)["state_dict"].items()
    zero = np.float32(0)
    return {
        key.removeprefix(prefix): np.broadcast_to(zero, shape)
        for key, shape in shapes
        if key.startswith(prefix)
    }


def shapes_of(weights: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize("name", UNETS)
def test_unet_has_the_names_shapes_and_count_of_the_published(name):
    net, theirs = UNet(depth=2, **UNETS[name]), published(name, "model.diffusion_model.")
    params = compvis.unet_to_flax(theirs, net)
    counts = load_manifest(name)["submodules"]["model.diffusion_model"]
    assert sum(p.size for p in jax.tree.leaves(params)) == counts["params"]
    assert shapes_of(compvis.unet_from_flax(params, net)) == shapes_of(theirs)


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stage_has_the_names_shapes_and_count_of_the_published(name):
    net, theirs = FIRST_STAGES[name], published(name, "first_stage_model.")
    params = compvis.first_stage_to_flax(theirs, net)
    counts = load_manifest(name)["submodules"]["first_stage_model"]
    assert sum(p.size for p in jax.tree.leaves(params)) == counts["params"]
    assert shapes_of(compvis.first_stage_from_flax(params, net)) == shapes_of(theirs)


def test_parameter_count_of_vq_f4():
    params = compvis.first_stage_to_flax(published("lsun_beds256", "first_stage_model."), VQ_4)
    assert sum(p.size for p in jax.tree.leaves(params)) == 55_322_782


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("unet_uncond_stored", UNet(**SMALL)),
        ("ae_kl_stored", AutoencoderKL(32, (1, 1), 1, (), z_channels=3, channels=3)),
    ],
)
def test_there_and_back_is_exact(name, net):
    theirs = load(name).weights()
    kind = "unet" if isinstance(net, UNet) else "first_stage"
    to_flax, from_flax = (getattr(compvis, f"{kind}_{way}_flax") for way in ("to", "from"))
    params = to_flax(theirs, net)
    back = from_flax(params, net)
    assert back.keys() == theirs.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
    again = flatten_dict(to_flax(back, net))
    for path, value in flatten_dict(params).items():
        np.testing.assert_array_equal(again[path], value, err_msg=str(path))


def test_misfits_are_listed():
    theirs = load("unet_uncond_stored").weights()
    theirs["extra.weight"] = theirs.pop("out.2.bias")
    theirs["input_blocks.3.1.qkv.weight"] = theirs["input_blocks.3.1.qkv.weight"][:, :32]
    theirs["middle_block.1.proj_out.weight"] = np.zeros((64, 64, 3), np.float32)
    theirs["input_blocks.1.0.in_layers.2.weight"] = np.zeros((32, 32), np.float32)
    with pytest.raises(UserError) as error:
        compvis.unet_to_flax(theirs, UNet(**SMALL))
    message = str(error.value)
    assert "out.2.bias missing" in message
    assert "extra.weight unexpected" in message
    assert "input_blocks.3.1.qkv.weight (192, 32, 1) (does not give (64, 192))" in message
    assert "middle_block.1.proj_out.weight (64, 64, 3)" in message
    assert "input_blocks.1.0.in_layers.2.weight (32, 32)" in message
    assert "\n" not in message


def test_weights_of_another_model_are_refused_briefly():
    with pytest.raises(UserError, match=r"and 1\d\d more missing"):
        compvis.unet_to_flax({"bert.weight": np.zeros(3)}, UNet(**SMALL))


def test_label_embedding_is_split_off():
    theirs = load("unet_class_label").weights()
    rest, table = compvis.split_label_embedding(theirs)
    np.testing.assert_array_equal(table, theirs["label_emb.weight"])
    assert rest.keys() == theirs.keys() - {"label_emb.weight"}
    assert compvis.split_label_embedding(rest) == (rest, None)
