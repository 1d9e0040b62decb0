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
from ldm_jax.convert.compvis_config import Yaml, to_config, to_yaml
from ldm_jax.convert.model import Model, add_facts, facts_of, latent_variables
from ldm_jax.convert.tables import StateDict, to_flax
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
    rest = {name: weight for name, weight in state_dict.items() if name not in BUFFERS}
    if config.train.steps == 0:
        first = _averaged(_without_losses(rest), "")
        return {"first_stage": _first_stage(config, first, scale)}
    unet = _averaged({n: rest.pop(n) for n in list(rest) if n.startswith((UNET, EMA))}, "model.")
    unet = {name.removeprefix("diffusion_model."): weight for name, weight in unet.items()}
    first = _without_losses(_pop(rest, FIRST_STAGE))
    cond = _pop(rest, COND_STAGE)
    if rest:
        raise UserError(f"the checkpoint has weights of unknown use: {_listed(sorted(rest))}")
    label = None
    if config.label.slot == "vector" and "label" in config.conditioners:
        unet, label = compvis.split_label_embedding(unet)
    with_part = {"denoiser": lambda: compvis.unet_to_flax(unet, builders.build_denoiser(config))}
    with_part["first_stage"] = lambda: _first_stage(config, first, scale)
    with_part["conditioner"] = lambda: _conditioner(config, cond, label, first)
    weights = {}
    for part, read in with_part.items():
        try:
            weights[part] = read()
        except UserError as error:
            raise UserError(f"{part}: {error}") from error
    return weights


def _pop(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    names = [name for name in state_dict if name.startswith(prefix)]
    return {name.removeprefix(prefix): state_dict.pop(name) for name in names}


def _without_losses(state_dict: StateDict) -> dict[str, Any]:
    return {name: w for name, w in state_dict.items() if not name.startswith(LOSSES)}


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
            f"{_listed(unknown + [f'none for {name}' for name in missing])}"
        )
    return {full: averages[name] for name, full in short.items()}


def _listed(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _scale_factor(state_dict: StateDict, yaml: Yaml) -> float:
    if "scale_factor" in state_dict:  # measured on the first batch (scale_by_std)
        return float(np.asarray(state_dict["scale_factor"]))
    block = yaml.get("model", yaml)
    if block["params"].get("scale_by_std"):
        raise UserError("the YAML says scale_by_std, but the checkpoint has no scale_factor")
    return float(block["params"].get("scale_factor", 1.0))


def _first_stage(config: ConfigDict, state_dict: StateDict, scale: float) -> dict[str, Any]:
    latents = {"latents": latent_variables(config, scale)}
    if config.first_stage.kind == "identity":
        if state_dict:
            raise UserError(f"unexpected weights {_listed(sorted(state_dict))}")
        return latents
    module = builders.build_first_stage(config)
    return {"params": compvis.first_stage_to_flax(state_dict, module)} | latents


def _conditioner(
    config: ConfigDict, state_dict: StateDict, label: Any, first_stage: StateDict
) -> dict[str, Any]:
    """The params of the joint conditioner, of which the original has one part at most."""
    if not config.conditioners:
        params = {}
    elif config.conditioners == ("inpainting",):
        # The original registers its first stage a second time as the conditioner.
        return _refuse_rest(_pop_known(state_dict, first_stage))
    elif config.conditioners == ("low_res",):
        params = {}
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
    else:
        part = builders.build_conditioner(config).parts[0]
        return {"parts_0": text_to_flax(state_dict, part, "compvis")}
    _refuse_rest(state_dict)
    return params


def _pop_known(state_dict: StateDict, known: StateDict) -> dict[str, Any]:
    """What of a second copy of the first stage is no copy; its losses do not count."""
    return {n: w for n, w in _without_losses(state_dict).items() if n not in known}


def _refuse_rest(state_dict: StateDict) -> dict[str, Any]:
    if state_dict:
        names = [COND_STAGE + name for name in sorted(state_dict)]
        raise UserError(f"unexpected weights {_listed(names)}")
    return {}


def write_model(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (state dict, YAML) of a model in the original code's layout.

    The weights of the UNet are the averaged ones, as in the released files of which it is known.

    Raises:
        UserError: the original code cannot build this model.
    """
    config, weights = model.config, model.weights
    scale = _one_scale(weights["first_stage"]["latents"])
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


def _one_scale(latents: Mapping[str, Any]) -> float:
    scale, shift = np.asarray(latents["scale"]), np.asarray(latents["shift"])
    if np.any(shift != 0) or np.any(scale != scale[0]):
        raise UserError(
            "the original code knows one factor for all latent channels, but this model scales "
            "each of them (first_stage.latent_scale='channel'): export to safetensors, or train "
            "with 'scalar'"
        )
    return float(scale[0])


def _conditioner_names(config: ConfigDict, params: Mapping[str, Any]) -> dict[str, Any]:
    if not flatten_dict(params):
        return {}
    if config.conditioners == ("label",):
        vector = config.label.slot == "vector"
        name = compvis.LABEL_EMBEDDING if vector else "embedding.weight"
        return {name: params["parts_0"]["embedding"]}
    part = builders.build_conditioner(config).parts[0]
    return text_from_flax(params["parts_0"], part, "compvis")
