"""The name tables, there and back; test_zoo.py has the published models."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import load

from ldm_jax.convert import compvis
from ldm_jax.denoisers.unet import UNet
from ldm_jax.errors import UserError
from ldm_jax.first_stage.kl import AutoencoderKL

SMALL = dict(width=32, out_channels=3, mult=(1, 2), depth=1, attn_downsample=(2,), head_dim=32)


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
