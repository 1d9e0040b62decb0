"""Small models with random weights, for the conversions."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ldm_jax import builders, config, fields
from ldm_jax.convert.model import Model, latent_variables

VQ = dict(kind="vq", width=32, mult=(1, 2, 2), depth=1, norm_groups=32, codes=16)
VQ |= dict(attn_downsample=(), mid_attn=True, z_channels=3, channels=3)
KL = VQ | dict(kind="kl", mult=(1, 2, 1, 1), z_channels=4, channels=4)
UNET = dict(width=32, mult=(1, 2), depth=1, attn_downsample=(2,), num_heads=0, head_dim=16)
LABEL = dict(num_classes=5, width=24, slot="context", null=True)
TEXT = dict(vocab_size=40, width=32, depth=2, heads=2, length=8, mlp_width=128)
TEXT |= dict(null_tokens=(38, 39), pad_token=39)
CLIP = TEXT | dict(encoder="clip", activation="quick_gelu")
BERT = TEXT | dict(encoder="bert", length=77, null_tokens=(1, 2), pad_token=0)

# What differs from the default, by the name of a block.
RESAMPLING = UNET | dict(num_heads=1, scale_shift=True, resblock_resample=True)
MODELS = {
    "uncond": dict(first_stage=VQ, denoiser=UNET),
    "resampling": dict(first_stage=VQ, denoiser=RESAMPLING | dict(mult=(1, 2, 2))),
    "class_context": dict(
        first_stage=VQ | dict(mid_attn=False),
        denoiser=UNET | dict(cross_attention=True, num_heads=2),
        label=LABEL,
        conditioners=("label",),
    ),
    "class_vector": dict(
        first_stage=VQ,
        denoiser=UNET,
        label=LABEL | dict(slot="vector", width=128),
        conditioners=("label",),
    ),
    "text_bert": dict(
        first_stage=KL,
        denoiser=UNET | dict(cross_attention=True, transformer_depth=2, head_dim=32, mult=(1, 3)),
        text=BERT,
        conditioners=("text",),
    ),
    "text_clip": dict(
        first_stage=KL | dict(mult=(1, 1)),
        denoiser=UNET | dict(cross_attention=True, num_heads=4),
        text=CLIP,
        conditioners=("text",),
    ),
    "segmentation": dict(
        first_stage=VQ,
        denoiser=UNET | dict(num_heads=8, attn_downsample=()),
        segmentation=dict(num_classes=6, channels=3, stages=2),
        conditioners=("segmentation",),
    ),
    "super_resolution": dict(first_stage=VQ, denoiser=UNET, conditioners=("low_res",)),
    "inpainting": dict(first_stage=VQ, denoiser=RESAMPLING, conditioners=("inpainting",)),
    "layout": dict(
        first_stage=VQ,
        denoiser=UNET | dict(cross_attention=True),
        layout=dict(vocab_size=20, width=32, depth=1, length=6),
        conditioners=("layout",),
    ),
    "pixels": dict(first_stage=dict(kind="identity"), denoiser=UNET | dict(split_qkv_first=True)),
    "kl": dict(first_stage=KL | dict(attn_downsample=(4, 8), norm_groups=16)),
    "vq": dict(first_stage=VQ | dict(z_channels=4, mid_attn=False)),
}


def make_config(blocks: dict) -> ConfigDict:
    """The default with some blocks changed, checked."""
    c = config.get_config()
    c.unlock()
    alone = list(blocks) == ["first_stage"]
    c.data.resolution = 128 if alone else 32
    for name, block in blocks.items():
        if name == "conditioners":
            c.conditioners = block
        else:
            c[name].update(block)
    c.data.fields = tuple(field for name in c.conditioners for field in config.FIELDS[name])
    c.train.steps = 0 if alone else c.train.steps
    c.sample.update(steps=4, eta=0.0)
    return config.check(ConfigDict(c).lock())


def make_model(blocks: dict, scale: float = 1.0, shift: float = 0.0) -> Model:
    """A model of such a config whose every weight is random; no layer is left at zero."""
    c = make_config(blocks)
    abstract, random = shapes(c), np.random.default_rng(0)

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        values = random.standard_normal(shape, np.float32)
        if path[-1] == "scale":  # of a normalisation
            return 1 + 0.1 * values
        if path[-1] == "bias":
            return 0.1 * values
        return values / np.float32(max(1, np.prod(shape[:-1])) ** 0.5)

    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw(tuple(key.key for key in path), leaf.shape), abstract
    )
    latents = latent_variables(c, np.float32(scale), np.float32(shift))
    weights["first_stage"] = {**weights["first_stage"], "latents": latents}
    return Model(c, weights)


def shapes(c: ConfigDict) -> dict:
    """Shapes of all weights but the latents' scale."""
    key, size = jax.random.key(0), c.data.resolution
    images = jnp.zeros((1, size, size, 3))
    first_stage = jax.eval_shape(
        builders.build_first_stage(c).init, key, images, jax.random.split(key, 1)
    )
    found = {"first_stage": {k: v for k, v in first_stage.items() if k == "params"}}
    if c.train.steps == 0:
        return found
    side, channels = config.latent_size(c), config.latent_channels(c)
    x_t, t = jnp.zeros((1, side, side, channels)), jnp.zeros((1,))
    batch = fields.add_latents(fields.examples(c, 1), lambda images: x_t)
    module = builders.build_conditioner(c)
    found["conditioner"] = jax.eval_shape(module.init, key, batch).get("params", {})
    cond = jax.eval_shape(
        lambda params: module.apply(params, batch), {"params": found["conditioner"]}
    )
    found["denoiser"] = jax.eval_shape(builders.build_denoiser(c).init, key, x_t, t, cond)["params"]
    return found


def flat(weights: dict) -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(weights).items()}


def assert_same(ours: Model, theirs: Model) -> None:
    """Asserts that two models are the same to the bit, their configs included."""
    assert config.differences(ours.config, theirs.config) == []
    a, b = flat(ours.weights), flat(theirs.weights)
    assert a.keys() == b.keys()
    for path, value in a.items():
        assert b[path].dtype == value.dtype, path
        np.testing.assert_array_equal(b[path], value, err_msg="/".join(path))
    assert (ours.label_names, ours.step) == (theirs.label_names, theirs.step)


def make_tokenizer(folder: pathlib.Path, encoder: str) -> pathlib.Path:
    """A vocabulary of 40 tokens for 'bert' or 'clip'."""
    folder.mkdir()
    if encoder == "clip":
        letters = [chr(ord("a") + i) for i in range(19)]
        tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
        tokens += ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT["length"]}
        settings |= {"pad_token": tokens[-1], "unk_token": tokens[-1]}
        settings |= {"bos_token": tokens[-2], "eos_token": tokens[-1]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(35))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder
