"""Whole models in the original code's layout: there and back, and what cannot go there."""

import re

import numpy as np
import pytest
import yaml
from golden_utils import load

from ldm_jax import workdir as files
from ldm_jax.convert import import_compvis
from ldm_jax.convert.compvis_config import to_config
from ldm_jax.convert.compvis_model import read_model, write_model
from ldm_jax.convert.export import export_compvis, export_safetensors, open_model
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.errors import UserError

from .models import MODELS, UNET, VQ, assert_same, make_model

UNKNOWN_THERE = {
    "text_clip": "ViT-L/14",
    "text_bert": "only knows 8",
    "kl": "norm_groups is 16",
}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - UNKNOWN_THERE.keys()))
def test_round_trip_is_bit_equal(name, tmp_path):
    first_stage_only = MODELS[name].keys() == {"first_stage"}
    model = make_model(MODELS[name], scale=1.0 if first_stage_only else 0.7)
    model = model._replace(step=7, label_names=["a", "é"] if "label" in MODELS[name] else None)
    export_compvis(model, tmp_path)
    block = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    for file in ("model.ckpt", "model.safetensors"):
        assert_same(read_model(open_checkpoint(tmp_path / file), block), model)


@pytest.mark.parametrize("name", sorted(UNKNOWN_THERE))
def test_what_the_original_cannot_build_is_refused(name):
    with pytest.raises(UserError, match=UNKNOWN_THERE[name]):
        write_model(make_model(MODELS[name]))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (dict(first_stage=VQ, denoiser=UNET, diffusion=dict(predict="v")), "no v-prediction"),
        (dict(first_stage=VQ | dict(patch=2), denoiser=UNET), "patch is 2"),
    ],
)
def test_settings_that_the_original_lacks_are_refused(blocks, message):
    with pytest.raises(UserError, match=message):
        write_model(make_model(blocks))


def test_scales_of_single_channels_are_refused():
    model = make_model(dict(first_stage=VQ, denoiser=UNET), scale=np.float32([1, 2, 3]))
    with pytest.raises(UserError, match="one factor"):
        write_model(model)


def test_a_workdir_holds_the_same_model(tmp_path):
    model = make_model(MODELS["class_vector"], scale=0.5)._replace(label_names=list("abcde"))
    export_safetensors(model, tmp_path / "out")
    assert_same(open_model(tmp_path / "out"), model)
    assert files.load(tmp_path / "out").label("c") == 2


def test_a_first_stage_on_its_own_encodes_and_decodes():
    golden = load("ae_kl_stored")
    config = golden.meta["config"]
    block = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": config}
    leftovers = {"loss.logvar": np.zeros(()), "loss.discriminator.main.0.bias": np.zeros(4)}
    pipe = import_compvis(golden.weights() | leftovers, block)
    z = pipe.encode(golden.nhwc("in.x"))
    golden.check("out.decode_mode", np.asarray(pipe._decode_jit(pipe.variables, z)))
    with pytest.raises(UserError, match="no weights of its denoiser"):
        pipe.sample([0])


def unet(**changes) -> dict:
    params = dict(model_channels=32, num_res_blocks=1, attention_resolutions=[2], num_heads=2)
    params |= dict(channel_mult=[1, 2], in_channels=3, out_channels=3, image_size=8)
    return {"target": "a.UNetModel", "params": params | changes}


def latent_diffusion(**changes) -> dict:
    params = dict(image_size=8, first_stage_config={"target": "a.IdentityFirstStage"})
    params |= dict(unet_config=unet(), cond_stage_config="__is_unconditional__")
    return {"model": {"target": "a.LatentDiffusion", "params": params | changes}}


def autoencoder(**changes) -> dict:
    dd = dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32)
    dd |= dict(ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[16])
    return {"target": "a.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": dd | changes}}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([], "no mapping"),
        ({}, "no 'target'"),
        ({"target": "a.Net2NetTransformer"}, "describes a Net2NetTransformer"),
        (latent_diffusion(unet_config={"target": "a.UViT"}), "unet_config is a UViT"),
        (latent_diffusion(unet_config=unet(dims=3)), "dims is 3"),
        (latent_diffusion(unet_config=unet(magic=1)), "magic is not supported"),
        (latent_diffusion(unet_config=unet(num_heads=-1)), "num_heads or num_head_channels"),
        (latent_diffusion(image_size=[8, 16]), "square"),
        (latent_diffusion(beta_schedule="odd"), "beta_schedule is odd"),
        (latent_diffusion(parameterization="u"), "diffusion.predict is 'u'"),
        (latent_diffusion(cond_stage_config={"target": "a.FrozenT5"}), "FrozenT5"),
        (latent_diffusion(first_stage_config={"target": "a.Wavelet"}), "no first stage of kind"),
        (latent_diffusion(scale_by_std=True), "no scale_factor"),
        (autoencoder(attn_type="linear"), "attn_type is linear"),
        (autoencoder(double_z=False), "double_z is False"),
        (autoencoder(out_ch=1), "out_ch is 1"),
    ],
)
def test_other_models_are_refused_by_name(block, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_model({}, block)


def test_attention_resolutions_of_an_autoencoder_are_pixels():
    assert to_config(autoencoder()).first_stage.attn_downsample == (2,)
