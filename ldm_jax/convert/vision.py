"""Image encoders from a folder of transformers: DINOv2 and CLIP.

A folder holds `config.json` and the weights, as the model hub has them and `save_pretrained` writes
them, and may hold `preprocessor_config.json`, of which only the colours' mean and standard
deviation are read: how images are resized belongs to what is measured, not to a folder.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ldm_jax.conditioners.clip import ClipText
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.convert.tables import Layer, StateDict, make_table, short, to_flax, within
from ldm_jax.convert.text import CLIP_LAYER, WEIGHTS, text_module, text_to_flax
from ldm_jax.errors import UserError
from ldm_jax.metrics.vit import DINO_OFFSET, DINO_SIZE, Tower, VisionTransformer
from ldm_jax.nn.encoder import ACTIVATIONS

# Colours that the published networks were trained with: ImageNet's, and CLIP's own.
COLOURS = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}
TITLES = {"dino": "DINOv2", "clip": "CLIP"}
# What files hold and an image encoder does not: a token for hidden patches, a classifier, texts.
LEFTOVERS = {
    "dino": re.compile(r"embeddings\.mask_token|classifier\..+"),
    "clip": re.compile(r"text_model\..+|text_projection\.weight|logit_scale|(.*\.)?position_ids"),
}
PREFIX = {"dino": "dinov2.", "clip": "vision_model."}

DINO_ENDS = {
    "class_token": Layer("embeddings.cls_token"),
    "positions": Layer("embeddings.position_embeddings"),
    "patches": Layer("embeddings.patch_embeddings.projection", "conv"),
    "norm_out": Layer("layernorm"),
}
DINO_LAYER = {
    "norm_0": Layer("norm1"),
    "q": Layer("attention.attention.query", "linear"),
    "k": Layer("attention.attention.key", "linear"),
    "v": Layer("attention.attention.value", "linear"),
    "out": Layer("attention.output.dense", "linear"),
    "scale_0": Layer("layer_scale1.lambda1"),
    "norm_1": Layer("norm2"),
    "scale_1": Layer("layer_scale2.lambda1"),
}
DINO_MLP = {
    False: {"mlp_in": Layer("mlp.fc1", "linear"), "mlp_out": Layer("mlp.fc2", "linear")},
    True: {
        "mlp_in": Layer("mlp.weights_in", "linear"),
        "mlp_out": Layer("mlp.weights_out", "linear"),
    },
}
CLIP_ENDS = {
    "class_token": Layer("embeddings.class_embedding"),
    "positions": Layer("embeddings.position_embedding.weight"),
    "patches": Layer("embeddings.patch_embedding", "conv"),
    "norm_in": Layer("pre_layrnorm"),  # their spelling
    "norm_out": Layer("post_layernorm"),
    "out": Layer("visual_projection", "linear"),
}
# What the config of a whole CLIP may leave out: transformers writes only what differs.
CLIP_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_DEFAULTS |= {"num_attention_heads": 12, "patch_size": 32, "image_size": 224}
CLIP_DEFAULTS |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3}


class ClipTexts(NamedTuple):
    """The text half of a CLIP: `module.pooled` of tokens, times `projection` (width, D)."""

    module: ClipText
    params: dict[str, Any]
    projection: np.ndarray


def load_tower(kind: str, folder: str | os.PathLike[str]) -> Tower:
    """Reads an image encoder with its weights, float32.

    Args:
        kind: 'dino' (model type dinov2: any of its four sizes) or 'clip'.
        folder: see the top of this file.

    Raises:
        UserError: a file is missing or unreadable, it is another network, or a variant of it that
            we do not have.
    """
    folder = pathlib.Path(folder).expanduser()
    config = _read_json(folder / "config.json", kind)
    make = {"dino": _dino, "clip": _clip}[kind]
    try:
        module, size = make(config)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks {error}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be used: {error}") from error
    params = vision_to_flax(_open_weights(folder, kind), module, kind)
    mean, std = _colours(folder, kind)
    return Tower(kind, module, params, size, kind == "clip", mean, std)


def load_clip_texts(folder: str | os.PathLike[str]) -> ClipTexts:
    """Reads the text half of a whole CLIP, float32.

    Raises:
        UserError: as `load_tower`.
    """
    folder = pathlib.Path(folder).expanduser()
    config = _read_json(folder / "config.json", "clip")
    _check_type(config, "clip")
    module, weights = text_module(config), _open_weights(folder, "clip")
    if "text_projection.weight" not in weights:
        raise UserError(f"the CLIP in {folder} has no text_projection: give a whole CLIP")
    params = jax.tree.map(np.asarray, text_to_flax(weights, module, "hf"))
    projection = np.asarray(weights["text_projection.weight"]).astype(np.float32)
    if projection.ndim != 2 or projection.shape[1] != module.width:
        raise UserError(f"the text_projection in {folder} does not fit its text encoder")
    return ClipTexts(module, params, projection.T)


def vision_to_flax(state_dict: StateDict, module: VisionTransformer, kind: str) -> dict:
    """Weights under their names as the params of `module`, float32.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape, and lists them.
    """
    kept = {}
    for name, weight in state_dict.items():
        name = name.removeprefix(PREFIX[kind])
        if not LEFTOVERS[kind].fullmatch(name):
            kept[name] = weight
    pixels = jnp.zeros((1, module.patch, module.patch, 3))
    abstract = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), pixels)["params"])
    ends, layer = (DINO_ENDS, DINO_LAYER | DINO_MLP[module.gated])
    place = "encoder.layer"
    if kind == "clip":
        ends, layer, place = CLIP_ENDS, CLIP_LAYER, "encoder.layers"
    layers = within("", "", ends)
    for i in range(module.depth):
        layers |= within(f"layers_{i}", f"{place}.{i}", layer)
    # Their tables have an axis of examples in front, of length 1, which ours have not.
    for path in ("class_token", "positions"):
        (name,), want = layers[path].theirs, abstract[(path,)].shape
        if name in kept and np.size(kept[name]) == np.prod(want):
            kept[name] = np.asarray(kept[name]).reshape(want)
    params = to_flax(kept, make_table(layers, abstract), abstract)
    return jax.tree.map(np.asarray, params)


def _dino(config: Mapping[str, Any]) -> tuple[VisionTransformer, int]:
    _check_type(config, "dinov2")
    width, patch = config["hidden_size"], config["patch_size"]
    gated = bool(config.get("use_swiglu_ffn", False))
    hidden = int(width * config["mlp_ratio"])
    if gated:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    if not config.get("qkv_bias", True):
        raise UserError("a DINOv2 whose queries have no bias cannot be used")
    module = VisionTransformer(
        width=width,
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=hidden,
        patch=patch,
        grid=config["image_size"] // patch,
        activation="silu" if gated else _activation(config.get("hidden_act", "gelu")),
        gated=gated,
        layer_scale=True,
        epsilon=config.get("layer_norm_eps", 1e-6),
        position_offset=DINO_OFFSET,
    )
    if DINO_SIZE % patch:
        raise UserError(f"a DINOv2 with patches of {patch}: they must divide {DINO_SIZE}")
    return module, DINO_SIZE


def _clip(config: Mapping[str, Any]) -> tuple[VisionTransformer, int]:
    _check_type(config, "clip")
    part = CLIP_DEFAULTS | config.get("vision_config", {})
    module = VisionTransformer(
        width=part["hidden_size"],
        depth=part["num_hidden_layers"],
        heads=part["num_attention_heads"],
        mlp_width=part["intermediate_size"],
        patch=part["patch_size"],
        grid=part["image_size"] // part["patch_size"],
        activation=_activation(part["hidden_act"]),
        epsilon=part["layer_norm_eps"],
        patch_bias=False,
        norm_in=True,
        projection=config.get("projection_dim", 512),
    )
    # Beyond whole patches the convolution of theirs sees nothing.
    return module, module.grid * module.patch


def _check_type(config: Mapping[str, Any], wanted: str) -> None:
    found = config.get("model_type")
    if found != wanted:
        raise UserError(
            f"the model type is {short(str(found))}, but must be {wanted}: give the folder of "
            f"{'a DINOv2 without registers' if wanted == 'dinov2' else 'a whole CLIP'}"
        )


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(
            f"no activation {short(name)} in an image encoder: choose from {', '.join(ACTIVATIONS)}"
        )
    return name


def _read_json(path: pathlib.Path, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no {TITLES[kind]} in {path.parent}: it has no {path.name}; give the folder of a "
            "model as transformers writes it, with config.json and model.safetensors"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it holds no settings by name")
    return found


def _open_weights(folder: pathlib.Path, kind: str) -> StateDict:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"no weights of a {TITLES[kind]} in {folder}: it has no {WEIGHTS[0]}")
    return open_checkpoint(found[0])


def _colours(folder: pathlib.Path, kind: str) -> tuple[tuple, tuple]:
    """The mean and standard deviation of the colours that a network was trained with."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return COLOURS[kind]
    given = _read_json(path, kind)
    found = []
    for name, default in zip(("image_mean", "image_std"), COLOURS[kind], strict=True):
        value = given.get(name, default)
        if not (
            isinstance(value, (list, tuple))
            and len(value) == 3
            and all(isinstance(x, (int, float)) for x in value)
        ):
            raise UserError(f"{path}: {name} is {short(value)}, but must be three numbers")
        found.append(tuple(float(x) for x in value))
    return found[0], found[1]
