"""Folders of `diffusers`: there and back, what is read without our own notes, what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.models import (
    MODELS,
    UNET,
    VQ,
    assert_same,
    flat,
    make_config,
    make_model,
    make_tokenizer,
)
from ldm_jax import builders
from ldm_jax import config as config_lib
from ldm_jax.convert import diffusers, diffusers_configs, diffusers_parts
from ldm_jax.convert.model import scalar_latents
from ldm_jax.convert.torch_file import save_checkpoint
from ldm_jax.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small unconditional model and the folder it was written to."""
    model = make_model(MODELS["uncond"], scale=0.5)
    out = tmp_path_factory.mktemp("diffusers") / "uncond"
    diffusers.write_folder(model, out)
    return model, out


def copied(folder, tmp_path):
    """A copy of the folder that a test may change, without our own notes."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != diffusers.OWN:
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


SLOW = {"layout", "super_resolution", "inpainting"}  # which differ little from others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS]
)
def test_there_and_back_is_exact(name, tmp_path):
    scale = 1.0 if name == "pixels" else 0.18215
    model = make_model(MODELS[name], scale=scale)._replace(step=7)
    if "label" in MODELS[name]:
        model = model._replace(label_names=["a", "b"])
    if "text" in name:
        model = model._replace(tokenizer=make_tokenizer(tmp_path / "words", "bert"))
    diffusers.write_folder(model, tmp_path / "out")
    back = diffusers.read_folder(tmp_path / "out")
    assert_same(model, back)
    if "text" in name:
        assert (back.tokenizer / "vocab.txt").read_text() == (
            model.tokenizer / "vocab.txt"
        ).read_text()


PIPELINES = {
    "uncond": "LDMPipeline",
    "text_bert": "LDMTextToImagePipeline",
    "text_clip": "StableDiffusionPipeline",
    "super_resolution": "LDMSuperResolutionPipeline",
    "pixels": "DDIMPipeline",
    "class_vector": None,
    "segmentation": None,
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name, tmp_path):
    config = make_config(MODELS[name])
    latents = {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}
    weights = {"first_stage": {"latents": latents}}
    model = diffusers.Model(config, weights, tokenizer=tmp_path)
    index = diffusers._pipeline(model)
    assert (index and index["_class_name"]) == PIPELINES[name]
    if index:  # which gives other images where the latents are shifted
        latents["shift"] += 1
        assert diffusers._pipeline(model) is None


def test_their_files_tell_the_architecture(folder, tmp_path):
    model, out = folder
    back = diffusers.read_folder(copied(out, tmp_path))
    assert config_lib.differences(model.config, back.config) == ["sample.steps: 4 -> 50"]
    assert back.weights["first_stage"]["latents"]["scale"].tolist() == [0.5] * 3
    ours = flat(model.weights)
    assert all(np.array_equal(ours[path], leaf) for path, leaf in flat(back.weights).items())


def test_heads_are_split_before_q_k_and_v(folder):
    _, out = folder
    weights = load_file(out / "unet" / WEIGHTS)
    place = "mid_block.attentions.0.to_"
    q, k, v = (weights[f"{place}{name}.weight"] for name in "qkv")
    rows = [w[16 * head : 16 * (head + 1)] for head in range(4) for w in (q, k, v)]
    kernel = flat(folder[0].weights)["denoiser", "mid_attn", "qkv", "kernel"]
    np.testing.assert_array_equal(kernel, np.concatenate(rows).T)


def test_published_pipelines_of_vq_models_do_not_scale(folder, tmp_path):
    root = copied(folder[1], tmp_path)
    edit(root / "vqvae/config.json", scaling_factor=None)
    latents = diffusers.read_folder(root).weights["first_stage"]["latents"]
    assert latents["scale"].tolist() == [1.0] * 3


def test_old_names_shards_and_pytorch_files_are_read(folder, tmp_path):
    root = copied(folder[1], tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(root / "vqvae" / WEIGHTS)
    for theirs, before in old.items():
        for name in [name for name in weights if f".{theirs}." in name]:
            weights[name.replace(theirs, before)] = weights.pop(name)
    assert "encoder.mid_block.attentions.0.query.weight" in weights
    (root / "vqvae" / WEIGHTS).unlink()
    save_checkpoint(root / "vqvae/diffusion_pytorch_model.bin", weights)

    weights, shards = load_file(root / "unet" / WEIGHTS), ("a.safetensors", "b.safetensors")
    places = {name: shards[i % 2] for i, name in enumerate(weights)}
    for shard in shards:
        part = {name: w for name, w in weights.items() if places[name] == shard}
        save_file(part, root / "unet" / shard)
    (root / "unet" / WEIGHTS).unlink()
    (root / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))

    ours, back = flat(folder[0].weights), flat(diffusers.read_folder(root).weights)
    assert all(np.array_equal(ours[path], leaf) for path, leaf in back.items())


def test_misfits_are_listed(folder, tmp_path):
    root = copied(folder[1], tmp_path)
    weights = load_file(root / "unet" / WEIGHTS)
    weights["extra.weight"] = weights.pop("conv_out.bias")
    save_file(weights, root / "unet" / WEIGHTS)
    with pytest.raises(UserError, match=r"conv_out\.bias missing; extra\.weight unexpected"):
        diffusers.read_folder(root)


def test_pixels_are_read_without_a_first_stage(folder, tmp_path):
    root = copied(folder[1], tmp_path)
    for path in [*(root / "vqvae").iterdir()]:
        path.unlink()
    (root / "vqvae").rmdir()
    with pytest.raises(UserError, match="has a part 'vqvae', but no such folder"):
        diffusers.read_folder(root)
    edit(root / "model_index.json", vqvae=None)
    config = diffusers.read_folder(root).config
    assert (config.first_stage.kind, config.data.resolution) == ("identity", 8)


def test_a_part_of_a_pipeline_is_refused(folder):
    with pytest.raises(UserError, match="part of a pipeline: import all of"):
        diffusers.read_folder(folder[1] / "unet")
    back = diffusers.read_folder(folder[1] / "vqvae")  # but a first stage can be of use alone
    assert back.config.train.steps == 0 and back.weights.keys() == {"first_stage"}


def test_folders_that_make_no_sense_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no folder at"):
        diffusers.read_folder(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.json and no unet"):
        diffusers.read_folder(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        diffusers.write_folder(folder[0], folder[1])
    root = copied(folder[1], tmp_path)
    edit(root / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(UserError, match="part 'text_encoder_2'"):
        diffusers.read_folder(root)
    edit(root / "model_index.json", text_encoder_2=None, safety_checker=[None, None])
    edit(root / "unet/config.json", in_channels=9)
    with pytest.raises(UserError, match="in_channels=9"):
        diffusers.read_folder(root)
    edit(root / "unet/config.json", in_channels=3, down_block_types=7)
    with pytest.raises(UserError, match="makes no sense"):
        diffusers.read_folder(root)
    edit(root / "unet/config.json", _class_name="Transformer2DModel")
    with pytest.raises(UserError, match="class 'Transformer2DModel'"):
        diffusers.read_folder(root)
    (root / "unet/config.json").write_text("[1")
    with pytest.raises(UserError, match="is no JSON file"):
        diffusers.read_folder(root)


REFUSED_UNETS = [
    ("uncond", {"freq_shift": 1}, "freq_shift=1"),
    ("uncond", {"flip_sin_to_cos": False}, "flip_sin_to_cos=False"),
    ("uncond", {"act_fn": "gelu"}, "act_fn='gelu'"),
    ("uncond", {"norm_num_groups": 16}, "norm_num_groups=16"),
    ("uncond", {"norm_eps": 1e-6}, "norm_eps=1e-06"),
    ("uncond", {"add_attention": False}, "add_attention=False"),
    ("uncond", {"downsample_padding": 0}, "downsample_padding=0"),
    ("uncond", {"time_embedding_dim": 7}, "time_embedding_dim=7"),
    ("uncond", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
    ("uncond", {"block_out_channels": [32, 48]}, "block_out_channels=.32, 48."),
    ("uncond", {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "'KDownBlock2D'"),
    ("uncond", {"down_block_types": ["AttnDownBlock2D"] * 2}, "mirror image"),
    ("uncond", {"layers_per_block": 10**9}, "layers_per_block=1000000000"),
    ("uncond", {"new_feature": 3}, "unknown setting new_feature=3"),
    ("resampling", {"attn_norm_num_groups": None}, "attn_norm_num_groups=None"),
    ("resampling", {"upsample_type": "conv"}, "by conv, resnet"),
    ("text_bert", {"dual_cross_attention": True}, "dual_cross_attention=True"),
    ("text_bert", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
    ("text_bert", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
    ("text_bert", {"only_cross_attention": [True, False]}, "only_cross_attention"),
    ("text_bert", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
    ("text_bert", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "'AttnDownBlock2D'"),
]


@pytest.mark.parametrize(("name", "change", "match"), REFUSED_UNETS)
def test_unets_without_counterpart_are_refused(name, change, match):
    given = diffusers_configs.write_unet(make_config(MODELS[name]), 3, 32) | change
    with pytest.raises(UserError, match=match) as error:
        diffusers_configs.read_unet(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("kl", {"use_quant_conv": False}, "use_quant_conv=False"),
        ("kl", {"latents_mean": [0.0] * 4}, "latents_mean"),
        ("kl", {"in_channels": 4}, "in_channels=4"),
        ("kl", {"up_block_types": ["UpDecoderBlock2D"] * 4}, "mirror image"),
        ("vq", {"norm_type": "spatial"}, "norm_type='spatial'"),
    ],
)
def test_first_stages_without_counterpart_are_refused(name, change, match):
    given = diffusers_configs.write_first_stage(make_config(MODELS[name]), 0, 1) | change
    with pytest.raises(UserError, match=match):
        diffusers_configs.read_first_stage(given)


@pytest.mark.parametrize(
    ("block", "match"),
    [
        (dict(num_heads=8, attn_downsample=(1, 2)), "num_heads=8 makes them differ"),
        (dict(conv_resample=False), "conv_resample=False"),
        (dict(cross_attention=True, resblock_resample=True), "cross_attention and .*resample"),
    ],
)
def test_unets_that_they_do_not_have_are_refused(block, match):
    text = dict(conditioners=("label",)) if "cross_attention" in block else {}
    config = make_config(dict(first_stage=VQ, denoiser=UNET | block) | text)
    with pytest.raises(UserError, match=match):
        diffusers_configs.write_unet(config, 3, 8)


def test_what_else_they_cannot_hold_is_refused():
    write, z = diffusers_configs.write_first_stage, dict(kind="kl", z_channels=4)
    with pytest.raises(UserError, match="has 4 and 3"):
        write(make_config(dict(first_stage=VQ | z)), 0, 1)
    with pytest.raises(UserError, match="patch=2"):
        write(make_config(dict(first_stage=VQ | dict(patch=2))), 0, 1)
    with pytest.raises(UserError, match="kind 'fsq'"):
        write(make_config(dict(first_stage=VQ | dict(kind="fsq", levels=(5, 5, 5)))), 0, 1)
    with pytest.raises(UserError, match=r"shift 0\.5"):
        write(make_config(dict(first_stage=VQ)), 0.5, 1)
    with pytest.raises(UserError, match="scales each on its own"):
        scalar_latents({"shift": np.zeros(3), "scale": np.arange(3)}, "diffusers")
    schedule = dict(first_stage=VQ, denoiser=UNET, diffusion=dict(schedule="sqrt"))
    with pytest.raises(UserError, match="schedule='sqrt'"):
        diffusers_parts.write_scheduler(make_config(schedule))


def test_heads_of_a_conditional_unet_are_given_by_their_number():
    given = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}
    assert diffusers_configs.read_unet(given).denoiser["num_heads"] == 8
    given |= {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    found = diffusers_configs.read_unet(given)
    assert found.denoiser["head_dim"] == 64 and "num_heads" not in found.denoiser
    assert found.linear and found.context_width == 768
    with pytest.raises(UserError, match="attention_head_dim"):
        diffusers_configs.read_unet(given | {"attention_head_dim": [5, 10, 20, 8]})


@pytest.mark.parametrize(("name", "scale"), [("text_clip", 7.5), ("text_bert", 5.0)])
def test_guidance_is_that_of_the_authors(name, scale):
    config = make_config(MODELS[name])
    unet = diffusers_configs.write_unet(config, 4, 32)
    text = diffusers_parts.write_text(builders.build_conditioner(config).parts[0])
    first_stage = diffusers_configs.write_first_stage(config, 0, 1)
    parts = {"unet": unet, "text": text, "first_stage": first_stage}
    assert diffusers_parts.derive(parts, "").sample.guidance_scale == scale


def test_sizes_without_reason_are_refused(folder, tmp_path):
    root = copied(folder[1], tmp_path)
    edit(root / "unet/config.json", layers_per_block=10**6)
    with pytest.raises(UserError, match=r"denoiser\.depth is 1000000, but must be at most"):
        diffusers.read_folder(root)
    edit(root / "unet/config.json", layers_per_block=1, block_out_channels=[32] * 11)
    with pytest.raises(UserError, match="1 to 10 whole numbers"):
        diffusers.read_folder(root)
    edit(root / "unet/config.json", _class_name=[1])
    with pytest.raises(UserError, match="makes no sense"):
        diffusers.read_folder(root)
