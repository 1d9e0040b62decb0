"""Whole models in the original code's layout: there and back, and what cannot go there."""

import re

import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_utils import load

from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.convert import import_compvis
from ldm_jax.convert.compvis_config import to_config
from ldm_jax.convert.compvis_model import _autoencoder, read_model, write_model
from ldm_jax.convert.export import export_compvis, export_safetensors, open_model
from ldm_jax.convert.model import LOCAL, add_facts, without_local
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
    model = model._replace(step=7, label_names=[*"abcd", "é"] if "label" in MODELS[name] else None)
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
        (dict(first_stage=VQ, denoiser=UNET, diffusion=dict(predict="v")), "predict='v'"),
        (dict(first_stage=VQ | dict(patch=2), denoiser=UNET), "patch is 2"),
        (dict(first_stage=VQ | dict(kind="fsq", levels=(5, 5, 5)), denoiser=UNET), "kind 'fsq'"),
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
    golden.check("out.decode_mode", np.asarray(pipe._jit["decode"](pipe.variables, z)))
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
        ({"target": "a.Net2NetTransformer"}, "describes a 'Net2NetTransformer'"),
        (latent_diffusion(unet_config={"target": "a.UViT"}), "unet_config is a 'UViT'"),
        (latent_diffusion(unet_config=unet(dims=3)), "dims is 3"),
        (latent_diffusion(unet_config=unet(magic=1)), "'magic', which is not supported"),
        (latent_diffusion(unet_config=unet(num_heads=-1)), "num_heads or num_head_channels"),
        (latent_diffusion(image_size=[8, 16]), "image_size is [8, 16]"),
        (latent_diffusion(beta_schedule="odd"), "beta_schedule is 'odd'"),
        (latent_diffusion(parameterization="u"), "diffusion.predict is 'u'"),
        (latent_diffusion(cond_stage_config={"target": "a.FrozenT5"}), "FrozenT5"),
        (latent_diffusion(first_stage_config={"target": "a.Wavelet"}), "no first stage of kind"),
        (latent_diffusion(scale_by_std=True), "no scale_factor"),
        (autoencoder(attn_type="linear"), "attn_type is 'linear'"),
        (autoencoder(double_z=False), "double_z is False"),
        (autoencoder(out_ch=1), "out_ch is 1"),
    ],
)
def test_other_models_are_refused_by_name(block, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_model({}, block)


def test_attention_resolutions_of_an_autoencoder_are_pixels():
    assert to_config(autoencoder()).first_stage.attn_downsample == (2,)
    assert to_config(autoencoder(attn_resolutions=[15, 8])).first_stage.attn_downsample == ()


CLASSES = {"target": "a.ClassEmbedder", "params": {"embed_dim": 16, "n_classes": 1001}}
CLIP = {"target": "a.FrozenCLIPEmbedder"}
FIRST_STAGE = {"embed_dim": 4, "ddconfig": autoencoder()["params"]["ddconfig"]}
BERT = {"target": "a.BERTEmbedder", "params": {"n_embed": 16, "n_layer": 1}}
RESCALER = {"target": "a.SpatialRescaler", "params": {"out_channels": 3}}


def conditioned(stage, width: int, **changes) -> dict:
    network = unet(use_spatial_transformer=True, context_dim=width)
    changes = dict(conditioning_key="crossattn", unet_config=network) | changes
    return latent_diffusion(cond_stage_config=stage, **changes)


def test_wrong_options_get_one_line():
    """Every option of a YAML in turn is missing or has a value of another kind."""
    blocks = [latent_diffusion(), autoencoder(), conditioned(CLASSES, 16)]
    refused = 0
    for block in map(flatten_dict, [*blocks, conditioned(BERT, 16), conditioned(RESCALER, 16)]):
        for place in {path[:i] for path in block for i in range(1, len(path) + 1)}:
            rest = {path: x for path, x in block.items() if path[: len(place)] != place}
            for changed in ({}, *({place: x} for x in (None, "a\n" * 99, [[1]], 10**8))):
                try:
                    to_config(unflatten_dict(rest | changed))
                except UserError as error:
                    refused += 1
                    assert len(str(error).splitlines()) == 1 and len(str(error)) < 300
    assert refused > 400


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (latent_diffusion(unet_config=unet(num_res_blocks=[1, 1])), "must be a whole number"),
        (latent_diffusion(unet_config=unet(num_res_blocks=10**8)), "must be at most 100"),
        (latent_diffusion(unet_config=unet(channel_mult=[1] * 11)), "list of at most 10"),
        (latent_diffusion(unet_config=unet(use_spatial_transformer=1)), "true or false"),
        (latent_diffusion(linear_start="a"), "linear_start is 'a', but must be a number"),
        (latent_diffusion(given_betas=[0.1]), "given_betas is [0.1]"),
        (latent_diffusion(cosine_s=0.01), "cosine_s is 0.01"),
        (latent_diffusion(v_posterior=0.5), "v_posterior is 0.5"),
        (latent_diffusion(num_timesteps_cond=2), "num_timesteps_cond is 2"),
        (latent_diffusion(magic=1), "'magic', which is not supported"),
        (latent_diffusion(channels=4), "params.channels is 4"),
        (latent_diffusion(unet_config=unet(in_channels=4)), "in_channels is 4"),
        (latent_diffusion(unet_config=unet(out_channels=6)), "out_channels is 6"),
        (latent_diffusion(unet_config=unet(num_classes=10)), "num_classes is 10"),
        (conditioned(CLASSES, 17), "context_dim is 17"),
        (conditioned(CLASSES, 16, conditioning_key="concat"), "'ClassEmbedder' with"),
        (conditioned({"target": "a.ClassEmbedder"}, 16), "embed_dim is missing"),
        (conditioned(CLIP | {"params": {"version": "openai/x"}}, 768), "version is 'openai/x'"),
        (conditioned(CLIP | {"params": {"layer": "hidden"}}, 768), "'layer', which"),
        (conditioned(BERT | {"params": {"magic": 1}}, 16), "'magic', which"),
        (latent_diffusion(scale_factor=0), "scaled by 0.0"),
        (latent_diffusion(scale_factor=float("inf")), "scale_factor is inf"),
        (autoencoder(attn_resolutions=8), "attn_resolutions is 8"),
        (autoencoder(ch=None), "ch is None, but must be a whole number"),
        (FIRST_STAGE | {"remap": "x"}, "remap is 'x'"),
        (FIRST_STAGE | {"sane_index_shape": True}, "sane_index_shape is True"),
        (FIRST_STAGE | {"magic": 1}, "'magic', which"),
    ],
)
def test_options_that_change_the_model_are_refused_by_name(block, message):
    if "target" not in block and "model" not in block:
        block = {"target": "a.AutoencoderKL", "params": block}
    with pytest.raises(UserError, match=re.escape(message)):
        read_model({}, block)


@pytest.mark.parametrize(
    ("stage", "width", "scale"), [(CLIP, 768, 7.5), (BERT, 16, 5.0), (CLASSES, 16, 3.0)]
)
def test_guidance_is_that_of_the_authors(stage, width, scale):
    assert to_config(conditioned(stage, width)).sample.guidance_scale == scale
    assert to_config(latent_diffusion()).sample.guidance_scale == 1.0


@pytest.mark.parametrize("key", LOCAL)
def test_places_on_this_machine_do_not_travel(key):
    model = make_model(MODELS["uncond"])
    default = config_lib.flatten(config_lib.get_config())[key]
    with model.config.unlocked():
        model.config.update_from_flattened_dict({key: "/home/me"})
    assert config_lib.flatten(without_local(model.config))[key] == default
    state_dict, block = write_model(model)
    assert "/home/me" not in str(block)
    block["ldm_jax"]["config"][key] = "/home/other"
    assert config_lib.flatten(read_model(state_dict, block).config)[key] == default


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "makes no sense"),
        ({"config": [1]}, "makes no sense"),
        ({"config": {"data.crop": ["center", {}]}}, "data.crop"),
        ({"config": {"data.crop": "a\nb"}}, "data.crop"),
        ({"config": {"denoiser.depth": 10**8}}, "config.denoiser.depth is 100000000, but"),
        ({"config": {"denoiser.depth": 100, "denoiser.mult": [1] * 10}}, "1000 blocks"),
        ({"config": {"denoiser.mult": [1] * 11}}, "'denoiser.mult': [1, 1,"),
        ({"config": {"denoiser.dropout": float("nan")}}, "must be finite"),
        ({"step": -1}, "step: -1"),
        ({"step": "7"}, "step: '7'"),
        ({"label_names": "ab"}, "label_names: 'ab'"),
        ({"label_names": [1]}, "label_names: [1]"),
        ({"label_names": ["a", "b"]}, "2 label_names, but the model has 0 classes"),
    ],
)
def test_foreign_facts_are_not_believed(facts, message):
    config = to_config(latent_diffusion())
    with pytest.raises(UserError, match=re.escape(message)):
        add_facts(config, facts)


def test_averaged_weights_of_a_first_stage_are_taken():
    state_dict = {"a.b": 1, "loss.c": 2, "model_ema.ab": 3, "model_ema.lossc": 4}
    state_dict |= {"model_ema.decay": 5, "model_ema.num_updates": 6}
    assert _autoencoder(state_dict) == {"a.b": 3}
