"""Folders as `diffusers` writes them: single networks and whole pipelines, both ways.

A pipeline has a folder for each part: `unet`, `vae` or `vqvae`, `text_encoder` or `bert`,
`tokenizer`, `scheduler`. What has no place in those, we keep beside them:
- `ldm_jax.json`: the values of our config that the other files do not tell, step and class names;
- `conditioner/weights.safetensors`: conditioners that no pipeline has, under our names.
Where no pipeline of theirs would give the same images, `model_index.json` is left out; the parts
load one by one.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from ldm_jax import builders, fields, tensors, workdir
from ldm_jax import config as config_lib
from ldm_jax.conditioners.clip import ClipText
from ldm_jax.conditioners.text import TextTransformer
from ldm_jax.convert import diffusers_names as names
from ldm_jax.convert.diffusers_configs import (
    read_first_stage,
    read_unet,
    write_first_stage,
    write_unet,
)
from ldm_jax.convert.diffusers_keys import FIRST_STAGES, FLOW, UNETS
from ldm_jax.convert.diffusers_parts import (
    SUPER_RESOLUTION,
    Parts,
    derive,
    write_scheduler,
    write_text,
)
from ldm_jax.convert.model import (
    Model,
    add_facts,
    concat_channels,
    facts_of,
    latent_variables,
    scalar_latents,
    sense,
)
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.convert.tables import Row, short, to_flax
from ldm_jax.convert.text import text_from_flax, text_to_flax
from ldm_jax.errors import UserError

WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = ("model", "pytorch_model")
OWN = "ldm_jax.json"
OWN_WEIGHTS = pathlib.Path("conditioner", workdir.WEIGHTS)
MOST_BYTES = 2**24  # of a JSON file
# What a part is for, and the folders that it may be in.
FOLDERS = {"unet": ("unet",), "first_stage": ("vae", "vqvae"), "text": ("text_encoder", "bert")}
FOLDERS |= {"scheduler": ("scheduler",), "tokenizer": ("tokenizer",)}
# Parts of a pipeline that do not change what its networks make.
LEFTOVERS = ("safety_checker", "feature_extractor", "image_encoder")


def read_folder(path: str | os.PathLike[str]) -> Model:
    """Reads a network (AutoencoderKL, VQModel, UNet2DModel, UNet2DConditionModel) or a pipeline.

    A pipeline is read by its parts, whatever its class: a UNet and, where there are any, a first
    stage, a text encoder, a tokenizer and a scheduler. Without a first stage it works on pixels.
    On its own, a UNet2DModel for three channels does so too; any other UNet gives a model without
    weights for the first stage, and without those of the text encoder that must give its context.

    Raises:
        UserError: missing or unreadable files, or a part or a setting of one that we have no
            counterpart for, by name.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UserError(f"no folder at {root}")
    own = _read_json(root / OWN) if (root / OWN).is_file() else {}
    with sense(f"a configuration in {root}"):
        folders, index = _find(root)
    parts = {
        part: _read_json(folder / _config_name(part))
        for part, folder in folders.items()
        if part != "tokenizer"
    }
    with sense(f"a configuration in {root}"):
        derived = derive(parts, index.get("_class_name", ""))
    config, label_names, step = add_facts(derived, own)
    weights = _read_weights(root, folders, parts, config)
    return Model(config, weights, folders.get("tokenizer"), label_names, step)


def write_folder(model: Model, out: str | os.PathLike[str]) -> None:
    """Writes a model as a folder that `diffusers` reads with `from_pretrained`.

    A first stage on its own becomes the folder of a network, any other model that of a pipeline.

    Raises:
        UserError: diffusers cannot express the model, or there is something at `out` already.
    """
    root, config = pathlib.Path(out), model.config
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not empty: choose another folder")
    parts, files, own_weights = _written(model)
    whole = "unet" in parts
    homes = _homes(config)
    pipeline = _pipeline(model) if whole else None
    for part, given in parts.items():  # all was refused that cannot be written
        folder = root / homes[part] if whole else root
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / _config_name(part), given)
        if part in files:
            stem = TEXT_WEIGHTS[0] if part == "text" else WEIGHTS
            tensors.save_tensors(folder / f"{stem}.safetensors", files[part], {"format": "pt"})
    if own_weights:
        tensors.save_tensors(root / OWN_WEIGHTS, own_weights)
    if model.tokenizer is not None:
        workdir.copy_tokenizer(model.tokenizer, root / "tokenizer")
    derived = derive(parts, (pipeline or {}).get("_class_name", ""))
    _write_json(root / OWN, facts_of(model, derived))
    if pipeline:
        _write_json(root / "model_index.json", pipeline)


def _find(root: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, Any]]:
    """The folder of each part, and the index of the pipeline if there is one."""
    if (root / "config.json").is_file():
        name = _read_json(root / "config.json").get("_class_name")
        if (root.parent / "model_index.json").is_file() and name in UNETS:
            raise UserError(f"{root} is a part of a pipeline: import all of {root.parent}")
        if name not in UNETS and name not in FIRST_STAGES:
            known = ", ".join((*UNETS, *FIRST_STAGES))
            raise UserError(f"{root} has a network of class {short(name)}: choose from {known}")
        return {"unet" if name in UNETS else "first_stage": root}, {}
    index = {}
    if (root / "model_index.json").is_file():
        index = _read_json(root / "model_index.json")
    known = {name for folders in FOLDERS.values() for name in folders}
    for name, value in index.items():
        present = isinstance(value, list) and any(value)
        if present and not name.startswith("_") and name not in known and name not in LEFTOVERS:
            raise UserError(
                f"the pipeline in {root} has a part {short(name)} {short(value)}: not supported"
            )
        if present and name in known and not (root / name).is_dir():
            raise UserError(f"the pipeline in {root} has a part '{name}', but no such folder")
    found = {
        part: [root / folder for folder in folders if (root / folder).is_dir()]
        for part, folders in FOLDERS.items()
    }
    for folders in found.values():
        if len(folders) > 1:
            raise UserError(f"{root} has both {folders[0].name} and {folders[1].name}: remove one")
    if not found["unet"]:
        raise UserError(f"{root} is no folder of diffusers: it has no config.json and no unet")
    return {part: folders[0] for part, folders in found.items() if folders}, index


def _read_weights(
    root: pathlib.Path, folders: dict[str, pathlib.Path], parts: Parts, config: ConfigDict
) -> dict[str, Any]:
    """The weights of all parts, not read yet."""
    weights = {}
    if "first_stage" in parts:
        facts = read_first_stage(parts["first_stage"])
        module = builders.build_first_stage(config)
        state_dict = _open(folders["first_stage"], WEIGHTS)
        weights["first_stage"] = {
            "params": names.first_stage_to_flax(state_dict, module),
            "latents": latent_variables(config, facts.scale, facts.shift),
        }
    elif config.first_stage.kind == "identity":
        weights["first_stage"] = {"latents": latent_variables(config)}
    if "unet" not in parts:
        return weights
    facts = read_unet(parts["unet"])
    in_channels = facts.out_channels + concat_channels(config)
    if facts.in_channels != in_channels:
        raise UserError(
            f"the UNet has in_channels={facts.in_channels}, but its conditions and the noise "
            f"have {in_channels}: the pipeline is none that can be imported"
        )
    state_dict = _open(folders["unet"], WEIGHTS)
    classes = {names.CLASS_EMBEDDING: state_dict.pop(names.CLASS_EMBEDDING, None)}
    weights["denoiser"] = names.unet_to_flax(
        state_dict,
        builders.build_denoiser(config),
        facts.in_channels,
        facts.context_width,
        facts.linear,
    )
    conditioner = _read_conditioner(root, folders, classes, config)
    if conditioner is not None:
        weights["conditioner"] = conditioner
    return weights


def _read_conditioner(
    root: pathlib.Path,
    folders: dict[str, pathlib.Path],
    classes: dict[str, Any],
    config: ConfigDict,
) -> dict[str, Any] | None:
    """The params of all conditioners; None if the text encoder is not there."""
    module = builders.build_conditioner(config)
    abstract = _abstract_params(config)
    params, own = {}, {}
    for i, name in enumerate(config.conditioners):
        part = f"parts_{i}"
        if name == "label" and config.label.slot == "vector":
            table = [Row((names.CLASS_EMBEDDING,), ("embedding",), "same")]
            params[part] = to_flax(classes, table, {("embedding",): abstract[part]["embedding"]})
        elif name == "text" and _is_theirs(module.parts[i]) and "text" in folders:
            state_dict = _open(folders["text"], *TEXT_WEIGHTS)
            params[part] = text_to_flax(state_dict, module.parts[i], "hf")
        elif part in abstract:
            own[part] = abstract[part]
    if own and not (root / OWN_WEIGHTS).is_file():
        return None
    return params | (tensors.load_tensors(root / OWN_WEIGHTS, own) if own else {})


def _written(model: Model) -> tuple[Parts, dict[str, dict[str, Any]], dict[str, Any]]:
    """Configurations and weights of the parts of a model, and the weights that stay ours."""
    config, weights = model.config, model.weights
    parts, files, own = {}, {}, {}
    shift, scale = scalar_latents(weights["first_stage"]["latents"], "diffusers")
    if config.first_stage.kind != "identity":
        parts["first_stage"] = write_first_stage(config, shift, scale)
        files["first_stage"] = names.first_stage_from_flax(
            weights["first_stage"]["params"], builders.build_first_stage(config)
        )
    elif (shift, scale) != (0, 1):
        raise UserError("diffusers has no scaling of pixels, but this model's are scaled")
    if "denoiser" not in weights:
        if not parts:
            raise UserError("this model is a first stage without weights: nothing to export")
        return parts, files, own
    params = traverse_util.flatten_dict(weights["denoiser"], sep="/")
    files["unet"] = names.unet_from_flax(weights["denoiser"], builders.build_denoiser(config))
    modules, classes = builders.build_conditioner(config).parts, 0
    for i, name in enumerate(config.conditioners):
        part = weights["conditioner"].get(f"parts_{i}", {})
        if name == "label" and config.label.slot == "vector":
            files["unet"][names.CLASS_EMBEDDING] = part["embedding"]
            classes = part["embedding"].shape[0]
        elif name == "text" and _is_theirs(modules[i]):
            parts["text"] = write_text(modules[i])
            files["text"] = text_from_flax(part, modules[i], "hf")
        elif part:
            own[f"parts_{i}"] = part
    contexts = [w.shape[0] for path, w in params.items() if path.endswith("cross/k/kernel")]
    in_channels = params["conv_in/kernel"].shape[2]
    parts["unet"] = write_unet(config, in_channels, contexts[0] if contexts else 0, classes)
    parts["scheduler"] = write_scheduler(config)
    return parts, files, own


def _homes(config: ConfigDict) -> dict[str, str]:
    """The folder of each part."""
    stable_diffusion = "text" in config.conditioners and config.text.encoder == "clip"
    return {
        "unet": "unet",
        "scheduler": "scheduler",
        "first_stage": "vae" if stable_diffusion else "vqvae",
        "text": "text_encoder" if stable_diffusion else "bert",
    }


def _pipeline(model: Model) -> dict[str, Any] | None:
    """The index of the pipeline that would give the same images; None if there is none."""
    config, homes = model.config, _homes(model.config)
    first_stage = {"kl": "AutoencoderKL", "vq": "VQModel"}.get(config.first_stage.kind)
    scheduler = write_scheduler(config)["_class_name"]
    unet = "UNet2DConditionModel" if config.denoiser.cross_attention else "UNet2DModel"
    parts = {"unet": ["diffusers", unet], "scheduler": ["diffusers", scheduler]}
    latent = {homes["first_stage"]: ["diffusers", first_stage]}
    if scheduler == FLOW or np.any(np.asarray(model.weights["first_stage"]["latents"]["shift"])):
        return None  # no pipeline of a UNet takes such a scheduler, or shifts latents
    if config.conditioners == () and not first_stage:
        name = "DDPMPipeline" if scheduler == "DDPMScheduler" else "DDIMPipeline"
        return {"_class_name": name} | parts
    if config.conditioners == ():
        return {"_class_name": "LDMPipeline"} | parts | latent
    if config.conditioners == ("low_res",) and first_stage:
        return {"_class_name": SUPER_RESOLUTION} | parts | latent
    if config.conditioners != ("text",) or not first_stage or model.tokenizer is None:
        return None
    if config.text.encoder == "clip" and first_stage == "AutoencoderKL":
        text = {homes["text"]: ["transformers", "CLIPTextModel"]}
        text |= {"tokenizer": ["transformers", "CLIPTokenizer"], "requires_safety_checker": False}
        text |= {name: [None, None] for name in LEFTOVERS}
        return {"_class_name": "StableDiffusionPipeline"} | parts | latent | text
    # Its pipeline takes every first stage to divide by 8.
    if config.text.encoder == "bert" and config_lib.downsampling(config) == 8:
        text = {homes["text"]: ["latent_diffusion", "LDMBertModel"]}
        text |= {"tokenizer": ["transformers", "BertTokenizer"]}
        return {"_class_name": "LDMTextToImagePipeline"} | parts | latent | text
    return None


def _is_theirs(module: Any) -> bool:
    """Whether pipelines of diffusers have such a text encoder."""
    return isinstance(module, (ClipText, TextTransformer))


def _abstract_params(config: ConfigDict) -> dict[str, Any]:
    """Shapes of the conditioners' params."""
    size, channels = config_lib.latent_size(config), config_lib.latent_channels(config)
    module = builders.build_conditioner(config)

    def init(key: jax.Array) -> dict[str, Any]:  # within which arrays take no memory
        latents = jnp.zeros((1, size, size, channels))
        batch = fields.add_latents(fields.examples(config, 1), lambda images: latents)
        return module.init(key, batch)

    return jax.eval_shape(init, jax.random.key(0)).get("params", {})


def _config_name(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def _open(folder: pathlib.Path, *stems: str) -> dict[str, Any]:
    """The weights in a folder, from the first file of the usual names that is there."""
    endings = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    candidates = [folder / f"{stem}{ending}" for stem in stems for ending in endings]
    for path in candidates:
        if path.is_file():
            return open_checkpoint(path)
    raise UserError(f"no weights in {folder}: it has no {candidates[0].name} or .bin")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES} bytes: refused")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=functools.partial(tensors.unique, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no configuration: it holds no keys")
    return value


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    workdir.write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
