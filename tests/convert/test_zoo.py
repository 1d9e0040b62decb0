"""Every published model: its config has exactly the parameters of the authors' own list."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from golden_utils import load_manifest
from test_configs import CONFIGS
from test_configs import load as load_config

from ldm_jax.convert.compvis_model import read_weights, write_model
from ldm_jax.convert.model import Model
from ldm_jax.tensors import LazyArray
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.steps import diffusion_functions

# The authors' list: our config. Where two lists are of one model, both are checked.
ZOO = {
    "celebahq-ldm-vq-4": "celebahq",
    "celeba256": "celebahq",
    "lsun_bedrooms-ldm-vq-4": "lsun_bedrooms",
    "lsun_beds256": "lsun_bedrooms",
    "lsun_churches-ldm-kl-8": "lsun_churches",
    "lsun_churches256": "lsun_churches",
    "cin256": "imagenet_ldm8",
    "cin256-v2": "imagenet_ldm4",
    "text2img256": "text2img256",
    "txt2img-1p4B-eval": "text2img_1p4b",
    "semantic_synthesis256": "semantic_landscapes",
    "bsr_sr": "sr_bsr",
    "kl-f4": "autoencoder_kl_f4",
    "autoencoder_kl_64x64x3": "autoencoder_kl_f4",
    "kl-f8": "autoencoder_kl_f8",
    "autoencoder_kl_32x32x4": "autoencoder_kl_f8",
    "kl-f16": "autoencoder_kl_f16",
    "autoencoder_kl_8x8x64": "autoencoder_kl_f32",
    "vq-f4": "autoencoder_vq_f4",
    "vq-f4-noattn": "autoencoder_vq_f4_noattn",
    "vq-f8": "autoencoder_vq_f8",
}
# Training losses, averages, schedules and the logits that nothing reads.
LEFTOVER = re.compile(
    r"(first_stage_model\.)?loss\..+|model_ema\..+|.*\.to_logits\..+|scale_factor|cond_ids|logvar"
    r"|(log_|sqrt_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|lvlb_weights"
    r"|posterior_\w+"
)
FIRST_STAGE_PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
# Published, but without a list: their parameters by the paper or the model card.
COUNTS = {
    "layout_openimages": ("denoiser", 246.28e6),
    "layout_coco": ("denoiser", 312e6),
    "inpainting_big": ("denoiser", 387.25e6),
    "inpainting": ("denoiser", 215.23e6),
    "semantic_landscapes512": ("denoiser", 215.23e6),
    "sr_bicubic": ("denoiser", 113.6e6),
    "stable_diffusion_v1": ("denoiser", 859.52e6),
    "autoencoder_vq_f8_n256": ("first_stage", 67.65e6),
    "autoencoder_vq_f16": ("first_stage", 69.59e6),
}


@functools.cache
def config_of(name: str):
    return load_config(next(path for path in CONFIGS if path.stem == name))


def unread(shape) -> LazyArray:
    return LazyArray(tuple(shape), np.dtype(np.float32), None)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_list_has_a_config(golden_dir):
    lists = {path.name.removesuffix(".json.gz") for path in (golden_dir / "manifests").iterdir()}
    assert lists == ZOO.keys()


def marked(names, slow):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names]


# Lists with the same names as another one, and what takes long to trace.
SAME = {"celeba256", "lsun_beds256", "lsun_bedrooms-ldm-vq-4", "lsun_churches256"}
SAME |= {"autoencoder_kl_64x64x3", "autoencoder_kl_32x32x4"}
SAME |= {"text2img256", "cin256", "autoencoder_kl_8x8x64"}  # the blocks of others, but long
LONG = {"layout_openimages", "layout_coco", "semantic_landscapes512", "sr_bicubic"}
LONG |= {"inpainting"}


@pytest.mark.parametrize("name", marked(ZOO, SAME))
def test_parameters_are_the_published_ones(name):
    """Reading is strict: each name is a weight of ours or a known leftover, and none is missing."""
    manifest = load_manifest(name)
    state_dict = {key: unread(shape) for key, shape in manifest["state_dict"].items()}
    config = config_of(ZOO[name])
    weights = read_weights(state_dict, config)
    written, _ = write_model(Model(config, weights))
    assert {key: w.shape for key, w in written.items()} == {
        key: w.shape for key, w in state_dict.items() if not LEFTOVER.fullmatch(key)
    }
    sizes = {part: sub.get("params", 0) for part, sub in manifest["submodules"].items()}
    if config.train.steps == 0:
        want = sum(sizes.get(part, 0) for part in FIRST_STAGE_PARTS)
        assert count(weights["first_stage"]["params"]) == want
        return
    assert count(weights["denoiser"]) == sizes["model.diffusion_model"]
    assert count(weights["first_stage"]["params"]) == sizes["first_stage_model"]
    unused = count([unread(s) for key, s in manifest["state_dict"].items() if "to_logits" in key])
    assert count(weights["conditioner"]) == sizes.get("cond_stage_model", 0) - unused


@pytest.mark.parametrize("name", marked(COUNTS, LONG))
def test_size_is_the_published_one(name):
    part, want = COUNTS[name]
    functions = first_stage_functions if part == "first_stage" else diffusion_functions
    params = jax.eval_shape(functions(config_of(name))[0], jax.random.key(0)).params
    assert count(params[part]) == pytest.approx(want, rel=2e-3)
