"""Our config as the YAML of the original code: the inverse of `compvis_config`."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.convert.compvis_config import (
    AUTOENCODER_FIELDS,
    CLIP_VIT_L,
    FIRST_STAGES,
    RESCALER_FIELDS,
    SCHEDULES,
    TRANSFORMER_FIELDS,
    UNCONDITIONAL,
    UNET_FIELDS,
)
from ldm_jax.convert.model import concat_channels
from ldm_jax.errors import UserError

AUTOENCODERS = "ldm.models.autoencoder."
ENCODERS = "ldm.modules.encoders.modules."
IDENTITY = {"target": "torch.nn.Identity"}


def to_yaml(config: ConfigDict, scale_factor: float) -> dict[str, Any]:
    """Returns the original code's YAML of a model: the inverse of `to_config`.

    Args:
        config: of the model.
        scale_factor: that the latents are multiplied by.

    Raises:
        UserError: the original code cannot build this model; names the key.
    """
    first_stage = _first_stage(config)
    if config.train.steps == 0:
        return {"model": first_stage}
    c = config.diffusion
    for key, known in (
        ("predict", ("eps", "x0")),
        ("schedule", tuple(SCHEDULES.values())),
        ("zero_terminal_snr", (False,)),
        ("loss", ("l1", "l2")),
    ):
        if c[key] not in known:
            raise UserError(f"the original code knows no config.diffusion.{key}={c[key]!r}")
    params = {
        "linear_start": c.beta[0],
        "linear_end": c.beta[1],
        "beta_schedule": next(name for name, ours in SCHEDULES.items() if ours == c.schedule),
        "timesteps": c.steps,
        "parameterization": c.predict,
        "loss_type": c.loss,
        "first_stage_key": "image",
        "image_size": config_lib.latent_size(config),
        "channels": config_lib.latent_channels(config),
        "scale_factor": scale_factor,
        "use_ema": False,  # the weights are the averaged ones
        **_conditioner(config),
        "unet_config": _unet(config),
        "first_stage_config": first_stage,
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _options(block: ConfigDict, fields: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """The options that a block of ours gives, tuples as lists."""
    values = {theirs: block[ours] for theirs, (ours, _) in fields.items()}
    return {key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}


def _first_stage(config: ConfigDict) -> dict[str, Any]:
    c = config.first_stage
    if c.kind == "identity":
        return {"target": AUTOENCODERS + "IdentityFirstStage"}
    if c.kind not in FIRST_STAGES.values():
        raise UserError(f"the original code has no first stage of kind '{c.kind}'")
    for key, value in (("patch", 1), ("norm_groups", 32)):
        if c[key] != value:
            raise UserError(
                f"config.first_stage.{key} is {c[key]}, but the original code only knows {value}"
            )
    if c.attn_downsample and not c.mid_attn:
        raise UserError("the original code has no attention in levels without first_stage.mid_attn")
    size = config.data.resolution
    dd = _options(c, AUTOENCODER_FIELDS) | {
        "double_z": c.kind == "kl",
        "resolution": size,
        "in_channels": 3,
        "out_ch": 3,
        "attn_resolutions": [size // factor for factor in c.attn_downsample],
        "attn_type": "vanilla" if c.mid_attn else "none",
    }
    params = {"embed_dim": c.channels, "ddconfig": dd, "lossconfig": dict(IDENTITY)}
    if c.kind == "kl":
        return {"target": AUTOENCODERS + "AutoencoderKL", "params": params}
    return {
        "target": AUTOENCODERS + "VQModelInterface",
        "params": params | {"n_embed": c.codes},
    }


def _unet(config: ConfigDict) -> dict[str, Any]:
    c, channels = config.denoiser, config_lib.latent_channels(config)
    params = _options(c, UNET_FIELDS) | {
        "use_checkpoint": c.remat != "none",
        "image_size": config_lib.latent_size(config),
        "in_channels": channels + concat_channels(config),
        "out_channels": channels,
    }
    params |= {"num_heads": c.num_heads} if c.num_heads else {"num_head_channels": c.head_dim}
    if c.cross_attention:
        params["context_dim"] = config[config.conditioners[0]].width
    elif "label" in config.conditioners:
        params["num_classes"] = config.label.num_classes + config.label.null
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _conditioner(config: ConfigDict) -> dict[str, Any]:
    if not config.conditioners:
        return {"cond_stage_config": UNCONDITIONAL}
    if len(config.conditioners) > 1:
        names = ", ".join(config.conditioners)
        raise UserError(f"the original code has one conditioner, but this model has {names}")
    key, slot, stage = CONDITIONERS[config.conditioners[0]](config)
    return {"cond_stage_key": key, "conditioning_key": slot, "cond_stage_config": stage}


# Each conditioner as (cond_stage_key, conditioning_key, cond_stage_config).
Stage = tuple[str, str, Any]


def _label(config: ConfigDict) -> Stage:
    c = config.label
    if c.slot == "vector":
        return "class_label", "adm", dict(IDENTITY)
    options = dict(n_classes=c.num_classes + c.null, embed_dim=c.width, key="class_label")
    return "class_label", "crossattn", {"target": ENCODERS + "ClassEmbedder", "params": options}


def _text(config: ConfigDict) -> Stage:
    c = config.text
    if c.encoder == "clip":
        wrong = [key for key, x in CLIP_VIT_L.items() if key != "length" and c[key] != x]
        if wrong:
            raise UserError(
                f"config.text.{wrong[0]} is {c[wrong[0]]}, but the original code only knows CLIP "
                f"ViT-L/14 with {CLIP_VIT_L[wrong[0]]}"
            )
        options = {"max_length": c.length}
        return "txt", "crossattn", {"target": ENCODERS + "FrozenCLIPEmbedder", "params": options}
    if c.encoder != "bert":
        raise UserError("the original code knows no sentence encoder (config.text.encoder)")
    if c.heads != 8:
        raise UserError(f"config.text.heads is {c.heads}, but the original code only knows 8")
    return "caption", "crossattn", _transformer(c, True)


def _layout(config: ConfigDict) -> Stage:
    return "coordinates_bbox", "crossattn", _transformer(config.layout, False)


def _transformer(block: ConfigDict, tokenizer: bool) -> dict[str, Any]:
    options = _options(block, TRANSFORMER_FIELDS) | dict(use_tokenizer=tokenizer)
    return {"target": ENCODERS + "BERTEmbedder", "params": options}


def _segmentation(config: ConfigDict) -> Stage:
    options = _options(config.segmentation, RESCALER_FIELDS)
    return "segmentation", "concat", {"target": ENCODERS + "SpatialRescaler", "params": options}


CONDITIONERS = {
    "label": _label,
    "text": _text,
    "layout": _layout,
    "segmentation": _segmentation,
    "low_res": lambda config: ("LR_image", "concat", dict(IDENTITY)),
    "inpainting": lambda config: ("masked_image", "concat", "__is_first_stage__"),
}
