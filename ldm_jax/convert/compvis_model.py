"""Whole models of the original code (CompVis `latent-diffusion`, `stable-diffusion` v1), both ways.

A checkpoint is a state dict and a YAML. Every name in it is accounted for: what is neither a weight
of ours nor a known leftover is listed and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ldm_jax import builders
from ldm_jax.convert import compvis
from ldm_jax.convert.compvis_config import Yaml, model_block, option, params_of, to_config
from ldm_jax.convert.compvis_yaml import to_yaml
from ldm_jax.convert.model import Model, add_facts, facts_of, latent_variables, scalar_latents
from ldm_jax.convert.tables import StateDict, listed, to_flax
from ldm_jax.convert.text import text_from_flax, text_to_flax
from ldm_jax.errors import UserError

UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
EMA = "model_ema."
# What a checkpoint holds besides weights: the schedule and the counters of the average.
BUFFERS = {"betas", "logvar", "scale_factor", "lvlb_weights", "cond_ids"}
BUFFERS |= {"alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"}
BUFFERS |= {"sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"}
BUFFERS |= {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}
BUFFERS |= {"posterior_variance", "posterior_log_variance_clipped"}
BUFFERS |= {"posterior_mean_coef1", "posterior_mean_coef2"}
BUFFERS |= {"model_ema.decay", "model_ema.num_updates"}
LOSSES = "loss."
OWN = "ldm_jax"  # block of the YAML with what the original code does not know; it is ignored there


def read_model(state_dict: StateDict, yaml: Yaml, null_class: bool | None = None) -> Model:
    """Makes a model of the original code's weights and YAML.

    The averaged weights are taken where there are any. Weights that are not read yet (LazyArray)
    stay so.

    Args:
        state_dict: their names and weights.
        yaml: the parsed file, or its part under `model`.
        null_class: whether the last class is the null condition; None decides that it is where
            there are 1001 classes, as in the published model.

    Raises:
        UserError: a model that we do not have, or weights that do not fit it; lists them.
    """
    config = to_config(yaml, null_class)
    config, label_names, step = add_facts(config, yaml.get(OWN) or {})
    scale = 1.0 if config.train.steps == 0 else _scale_factor(state_dict, yaml)
    weights = read_weights(state_dict, config, scale)
    return Model(config, weights, label_names=label_names, step=step)


def read_weights(state_dict: StateDict, config: ConfigDict, scale: float = 1.0) -> dict[str, Any]:
    """Makes the weights of a `Model` with this config; `scale` multiplies its latents.

    Raises:
        UserError: weights that do not fit the config; lists them.
    """
    if config.train.steps == 0:
        return {"first_stage": _first_stage(config, _autoencoder(state_dict), scale)}
    rest = {name: weight for name, weight in state_dict.items() if name not in BUFFERS}
    unet = _averaged({n: rest.pop(n) for n in list(rest) if n.startswith((UNET, EMA))}, "model.")
    unet = {name.removeprefix("diffusion_model."): weight for name, weight in unet.items()}
    first = _autoencoder(_pop(rest, FIRST_STAGE))
    cond = _pop(rest, COND_STAGE)
    if rest:
        raise UserError(f"the checkpoint has weights of unknown use: {listed(sorted(rest), 20)}")
    label = None
    if config.label.slot == "vector" and "label" in config.conditioners:
        unet, label = compvis.split_label_embedding(unet)
    parts = {
        "first_stage": lambda: _first_stage(config, first, scale),
        "denoiser": lambda: compvis.unet_to_flax(unet, builders.build_denoiser(config)),
        "conditioner": lambda: _conditioner(config, cond, label, first),
    }
    weights = {}
    for part, read in parts.items():
        try:
            weights[part] = read()
        except UserError as error:
            raise UserError(f"{part}: {error}") from error
    return weights


def _pop(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    names = [name for name in state_dict if name.startswith(prefix)]
    return {name.removeprefix(prefix): state_dict.pop(name) for name in names}


def _autoencoder(state_dict: StateDict) -> dict[str, Any]:
    """The weights of a first stage: without its training losses, averaged where there are such."""
    kept = {n: w for n, w in state_dict.items() if n not in BUFFERS and not n.startswith(LOSSES)}
    return _averaged(kept, "")


def _averaged(state_dict: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The averaged weights under the names of the raw ones, without `root`; else the raw ones.

    The average drops the dots of a name: 'model_ema.diffusion_modelout2bias'.
    """
    raw = {n.removeprefix(root): w for n, w in state_dict.items() if not n.startswith(EMA)}
    averages = {n.removeprefix(EMA): w for n, w in state_dict.items() if n.startswith(EMA)}
    if not averages:
        return raw
    short = {name.replace(".", ""): name for name in raw}
    unknown = sorted(EMA + name for name in averages.keys() - short.keys())
    # Loss networks of a first stage are averaged, too, and dropped with the raw ones.
    unknown = [name for name in unknown if not name.startswith(EMA + "loss")]
    missing = sorted(short[name] for name in short.keys() - averages.keys())
    if unknown or missing:
        raise UserError(
            "the averaged weights (model_ema) do not match the raw ones: "
            f"{listed(unknown + [f'none for {name}' for name in missing], 20)}"
        )
    return {full: averages[name] for name, full in short.items()}


def _scale_factor(state_dict: StateDict, yaml: Yaml) -> float:
    if "scale_factor" in state_dict:  # measured on the first batch (scale_by_std)
        weight = np.asarray(state_dict["scale_factor"])
        if weight.size != 1:
            raise UserError(f"scale_factor has the shape {weight.shape}, but must be one number")
        return float(weight.reshape(()))
    params = params_of(model_block(yaml), "params")
    if params.get("scale_by_std"):
        raise UserError("the YAML says scale_by_std, but the checkpoint has no scale_factor")
    return option(params, "params", "scale_factor", 1.0)


def _first_stage(config: ConfigDict, state_dict: StateDict, scale: float) -> dict[str, Any]:
    latents = {"latents": latent_variables(config, scale)}
    if config.first_stage.kind == "identity":
        if state_dict:
            raise UserError(f"unexpected weights {listed(sorted(state_dict), 20)}")
        return latents
    module = builders.build_first_stage(config)
    return {"params": compvis.first_stage_to_flax(state_dict, module)} | latents


def _conditioner(
    config: ConfigDict, state_dict: StateDict, label: Any, first_stage: StateDict
) -> dict[str, Any]:
    """The params of the joint conditioner, of which the original has one part at most."""
    params = {}
    if config.conditioners == ("inpainting",):
        # The original registers its first stage a second time as the conditioner.
        copy = _autoencoder(state_dict)
        state_dict = {name: w for name, w in copy.items() if name not in first_stage}
    elif config.conditioners == ("label",):
        if label is None:
            label = state_dict.get("embedding.weight")
            state_dict = {n: w for n, w in state_dict.items() if n != "embedding.weight"}
        shape = (config.label.num_classes + config.label.null, config.label.width)
        if label is None or np.shape(label) != shape:
            found = "none" if label is None else f"one of shape {np.shape(label)}"
            raise UserError(
                f"the class embedding must have the shape {shape}, but there is {found}"
            )
        table = [compvis.LABEL_ROW]
        abstract = {compvis.LABEL_ROW.ours: np.broadcast_to(np.float32(0), shape)}
        params = {"parts_0": to_flax({compvis.LABEL_ROW.theirs[0]: label}, table, abstract)}
    elif config.conditioners not in ((), ("low_res",)):
        part = builders.build_conditioner(config).parts[0]
        return {"parts_0": text_to_flax(state_dict, part, "compvis")}
    if state_dict:
        names = [COND_STAGE + name for name in sorted(state_dict)]
        raise UserError(f"unexpected weights {listed(names, 20)}")
    return params


def write_model(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (state dict, YAML) of a model in the original code's layout.

    The weights of the UNet are the averaged ones, as in the released files of which it is known.

    Raises:
        UserError: the original code cannot build this model.
    """
    config, weights = model.config, model.weights
    shift, scale = scalar_latents(weights["first_stage"]["latents"], "the original code")
    if shift:
        raise UserError(f"the original code knows no shift of the latents, but it is {shift}")
    yaml = to_yaml(config, scale)
    yaml[OWN] = facts_of(model, to_config(yaml))
    first = {}
    if config.first_stage.kind != "identity":
        module = builders.build_first_stage(config)
        first = compvis.first_stage_from_flax(weights["first_stage"]["params"], module)
    if config.train.steps == 0:
        return first, yaml
    unet = compvis.unet_from_flax(weights["denoiser"], builders.build_denoiser(config))
    cond = _conditioner_names(config, weights["conditioner"])
    if compvis.LABEL_EMBEDDING in cond:
        unet[compvis.LABEL_EMBEDDING] = cond.pop(compvis.LABEL_EMBEDDING)
    state_dict = {UNET + name: weight for name, weight in unet.items()}
    state_dict |= {FIRST_STAGE + name: weight for name, weight in first.items()}
    return state_dict | {COND_STAGE + name: weight for name, weight in cond.items()}, yaml


def _conditioner_names(config: ConfigDict, params: Mapping[str, Any]) -> dict[str, Any]:
    if not flatten_dict(params):
        return {}
    if config.conditioners == ("label",):
        vector = config.label.slot == "vector"
        name = compvis.LABEL_EMBEDDING if vector else "embedding.weight"
        return {name: params["parts_0"]["embedding"]}
    part = builders.build_conditioner(config).parts[0]
    return text_from_flax(params["parts_0"], part, "compvis")
