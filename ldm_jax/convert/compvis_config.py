"""The YAML of the original code (CompVis `latent-diffusion`) as our config, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.errors import UserError

Yaml = Mapping[str, Any]

# Their names of the schedules; theirs of "linear" is linear in sqrt(beta).
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}
FIRST_STAGES = {
    "AutoencoderKL": "kl",
    "VQModel": "vq",
    "VQModelInterface": "vq",
    "IdentityFirstStage": "identity",
}
LATENT_DIFFUSION = "LatentDiffusion"
UNET_FIELDS = {
    "model_channels": "width",
    "channel_mult": "mult",
    "num_res_blocks": "depth",
    "attention_resolutions": "attn_downsample",
    "use_spatial_transformer": "cross_attention",
    "transformer_depth": "transformer_depth",
    "use_scale_shift_norm": "scale_shift",
    "resblock_updown": "resblock_resample",
    "conv_resample": "conv_resample",
    "use_new_attention_order": "split_qkv_first",
    "dropout": "dropout",
    "use_checkpoint": "remat",
}
# Their defaults, where they are not ours.
UNET_DEFAULTS = {"channel_mult": (1, 2, 4, 8), "num_heads": -1, "num_head_channels": -1}
# Read elsewhere, or without an effect on what the network computes.
UNET_OTHERS = {"image_size", "in_channels", "out_channels", "context_dim", "num_classes", "legacy"}
UNET_OTHERS |= {"num_heads", "num_head_channels", "use_fp16"}
# Values of the rest at which they change nothing.
UNET_NEUTRAL = {"dims": (2,), "n_embed": (None,), "num_heads_upsample": (-1, None)}
AUTOENCODER_FIELDS = {
    "ch": "width",
    "ch_mult": "mult",
    "num_res_blocks": "depth",
    "z_channels": "z_channels",
    "dropout": "dropout",
}
AUTOENCODER_OTHERS = {"double_z", "resolution", "attn_resolutions", "attn_type"}
AUTOENCODER_NEUTRAL = {
    "in_channels": (3,),
    "out_ch": (3,),
    "resamp_with_conv": (True,),
    "use_linear_attn": (False,),
    "give_pre_end": (False,),
    "tanh_out": (False,),
}
CLIP_VIT_L = dict(
    encoder="clip",
    vocab_size=49408,
    width=768,
    depth=12,
    heads=12,
    mlp_width=3072,
    length=77,
    activation="quick_gelu",
    null_tokens=(49406, 49407),
    pad_token=49407,
)


def kind_of(block: Yaml | str) -> str:
    """The class that a block of the YAML makes, without its modules.

    Raises:
        UserError: the block has no `target`.
    """
    if isinstance(block, str):
        return block
    target = block.get("target") if isinstance(block, Mapping) else None
    if not isinstance(target, str):
        raise UserError(
            "the YAML has no 'target': give the model's own config, with 'model:' in it"
        )
    return target.rsplit(".", 1)[-1]


def model_block(yaml: Yaml) -> Yaml:
    """The block of the model, of a whole YAML file or of the block itself."""
    if not isinstance(yaml, Mapping):
        raise UserError("the YAML is no mapping: give the model's own config, with 'model:' in it")
    return yaml.get("model", yaml)


def to_config(yaml: Yaml, null_class: bool | None = None) -> ConfigDict:
    """Returns our config of the model that a YAML describes; training data are not taken over.

    Args:
        yaml: the parsed file, or its part under `model`.
        null_class: whether the last class is the null condition; None decides that it is where
            there are 1001 classes, as in the published model.

    Raises:
        UserError: another kind of model, or an option that we do not have; names it.
    """
    block = model_block(yaml)
    kind, params = kind_of(block), block.get("params", {})
    config = config_lib.get_config()
    with config.unlocked():
        config.name = "imported"
        config.conditioners = ()
        config.data.fields = ()
    config.first_stage.latent_scale = "stored"
    config.sample.update(steps=50, eta=0.0)
    if kind in FIRST_STAGES:
        _first_stage(config, block)
        config.data.resolution = int(params.get("ddconfig", {}).get("resolution", 256))
        config.train.steps = 0
        return config_lib.check(config)
    if kind != LATENT_DIFFUSION:
        known = ", ".join((LATENT_DIFFUSION, *FIRST_STAGES))
        raise UserError(f"the YAML describes a {kind}, which cannot be imported: known are {known}")
    _first_stage(config, params.get("first_stage_config", {}))
    _diffusion(config, params)
    unet = params.get("unet_config", {})
    if kind_of(unet) != "UNetModel":
        raise UserError(f"unet_config is a {kind_of(unet)}, but only UNetModel can be imported")
    _unet(config, unet.get("params", {}))
    _conditioner(config, params, null_class)
    size = params.get("image_size", 256)
    if not isinstance(size, int):
        raise UserError(f"image_size is {size}, but only square latents (one number) are supported")
    config.data.resolution = size * config_lib.downsampling(config)
    return config_lib.check(config)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _take(
    block: ConfigDict, params: Yaml, where: str, names: Yaml, others: set, neutral: Yaml
) -> None:
    """Copies the known keys of a block of the YAML, and refuses what would change the network."""
    for key, value in params.items():
        if key in names:
            if value is not None:
                block[names[key]] = _plain(value)
        elif key in neutral:
            if value not in neutral[key]:
                raise UserError(
                    f"{where}.{key} is {value}, but only {neutral[key][0]} is supported"
                )
        elif key not in others:
            raise UserError(f"{where}.{key} is not supported")


def _first_stage(config: ConfigDict, block: Yaml) -> None:
    kind, params = kind_of(block), block.get("params") or {}
    if kind not in FIRST_STAGES:
        raise UserError(f"no first stage of kind {kind}: known are {', '.join(FIRST_STAGES)}")
    c = config.first_stage
    c.kind = FIRST_STAGES[kind]
    if c.kind == "identity":
        return
    dd = params.get("ddconfig")
    if not isinstance(dd, Mapping) or "embed_dim" not in params:
        raise UserError(f"the YAML's {kind} has no ddconfig or no embed_dim")
    _take(c, dd, "ddconfig", AUTOENCODER_FIELDS, AUTOENCODER_OTHERS, AUTOENCODER_NEUTRAL)
    c.dropout = float(c.dropout)
    if bool(dd.get("double_z", True)) != (c.kind == "kl"):
        raise UserError(f"ddconfig.double_z is {dd.get('double_z', True)}, which no {kind} has")
    attention = dd.get("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise UserError(
            f"ddconfig.attn_type is {attention}, but only vanilla and none are supported"
        )
    c.mid_attn = attention == "vanilla"
    resolutions = dd.get("attn_resolutions", ()) if c.mid_attn else ()
    c.attn_downsample = tuple(int(dd["resolution"]) // int(side) for side in resolutions)
    c.channels = int(params["embed_dim"])
    if c.kind == "vq":
        c.codes = int(params["n_embed"])


def _diffusion(config: ConfigDict, params: Yaml) -> None:
    c = config.diffusion
    schedule = params.get("beta_schedule", "linear")
    if schedule not in SCHEDULES:
        raise UserError(f"beta_schedule is {schedule}: known are {', '.join(SCHEDULES)}")
    c.schedule = SCHEDULES[schedule]
    c.beta = (float(params.get("linear_start", 1e-4)), float(params.get("linear_end", 2e-2)))
    c.steps = int(params.get("timesteps", 1000))
    config.sample.steps = min(config.sample.steps, c.steps)
    c.predict = params.get("parameterization", "eps")
    c.loss = params.get("loss_type", "l2")


def _unet(config: ConfigDict, params: Yaml) -> None:
    c, params = config.denoiser, UNET_DEFAULTS | dict(params)
    _take(c, params, "unet_config.params", UNET_FIELDS, UNET_OTHERS, UNET_NEUTRAL)
    c.dropout = float(c.dropout)
    c.attn_downsample = tuple(sorted(c.attn_downsample))
    head_dim, heads = int(params["num_head_channels"]), int(params["num_heads"])
    if head_dim <= 0 and heads <= 0:
        raise UserError("unet_config.params needs num_heads or num_head_channels")
    # The width of a head goes first in the original, too.
    c.num_heads = 0 if head_dim > 0 else heads
    if head_dim > 0:
        c.head_dim = head_dim


def _conditioner(config: ConfigDict, params: Yaml, null_class: bool | None) -> None:
    block = params.get("cond_stage_config", "__is_unconditional__")
    kind = kind_of(block)
    options = dict(block.get("params") or {}) if isinstance(block, Mapping) else {}
    classes = params["unet_config"].get("params", {}).get("num_classes")
    slot = params.get("conditioning_key")
    if slot is None:
        slot = "concat" if params.get("concat_mode", True) else "crossattn"
    if slot == "hybrid":
        raise UserError(
            "conditioning_key is hybrid, but only one kind of condition can be imported"
        )
    if slot == "adm" or (classes is not None and kind != "__is_unconditional__"):
        _label(config, int(classes or 0), 4 * config.denoiser.width, "vector", null_class)
    elif kind == "__is_unconditional__":
        return
    elif kind == "ClassEmbedder":
        width = int(options["embed_dim"])
        _label(config, int(options.get("n_classes", 1000)), width, "context", null_class)
    elif kind in ("BERTEmbedder", "TransformerEmbedder"):
        _transformer(config, kind, options)
    elif kind == "FrozenCLIPEmbedder":
        config.text.update(CLIP_VIT_L | {"length": int(options.get("max_length", 77))})
        _use(config, "text")
        config.sample.guidance_scale = 7.5
    elif kind == "SpatialRescaler":
        if options.get("method", "bilinear") != "bilinear" or options.get("multiplier", 0.5) != 0.5:
            raise UserError("SpatialRescaler is only supported with bilinear halvings")
        if options.get("bias") or not options.get("out_channels"):
            raise UserError("SpatialRescaler is only supported with out_channels and without bias")
        config.segmentation.update(
            num_classes=int(options["in_channels"]),
            channels=int(options["out_channels"]),
            stages=int(options.get("n_stages", 1)),
        )
        _use(config, "segmentation")
    elif kind == "Identity" and slot == "concat":
        _use(config, "low_res")
    elif kind == "__is_first_stage__" and slot == "concat":
        _use(config, "inpainting")
    else:
        raise UserError(f"cond_stage_config {kind} with conditioning_key {slot} cannot be imported")


def _use(config: ConfigDict, name: str) -> None:
    config.conditioners = (name,)
    config.data.fields = config_lib.FIELDS[name]


def _label(config: ConfigDict, rows: int, width: int, slot: str, null_class: bool | None) -> None:
    null = rows == 1001 if null_class is None else null_class
    config.label.update(num_classes=rows - null, width=width, slot=slot, null=null)
    _use(config, "label")
    if null:
        config.sample.guidance_scale = 3.0


def _transformer(config: ConfigDict, kind: str, options: Yaml) -> None:
    width, depth = int(options["n_embed"]), int(options["n_layer"])
    vocab_size, length = int(options.get("vocab_size", 30522)), int(options.get("max_seq_len", 77))
    shape = dict(vocab_size=vocab_size, width=width, depth=depth, length=length)
    if kind == "BERTEmbedder" and options.get("use_tokenizer", True):
        config.text.update(shape | dict(encoder="bert", mlp_width=4 * width))
        _use(config, "text")
        config.sample.guidance_scale = 5.0
    else:
        config.layout.update(shape)
        _use(config, "layout")


def to_yaml(config: ConfigDict, scale_factor: float) -> dict[str, Any]:
    """Returns the original code's YAML of a model: the inverse of `to_config`.

    Args:
        config: of the model.
        scale_factor: that the latents are multiplied by.

    Raises:
        UserError: the original code cannot build this model; names the key.
    """
    first_stage = _first_stage_yaml(config)
    if config.train.steps == 0:
        return {"model": first_stage}
    c = config.diffusion
    if c.predict == "v":
        raise UserError("the original code knows no v-prediction (diffusion.predict)")
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
        **_conditioner_yaml(config),
        "unet_config": _unet_yaml(config),
        "first_stage_config": first_stage,
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def _first_stage_yaml(config: ConfigDict) -> dict[str, Any]:
    c = config.first_stage
    if c.kind == "identity":
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    for key, value in (("patch", 1), ("norm_groups", 32)):
        if c[key] != value:
            raise UserError(
                f"config.first_stage.{key} is {c[key]}, but the original code only knows {value}"
            )
    if c.attn_downsample and not c.mid_attn:
        raise UserError("the original code has no attention in levels without first_stage.mid_attn")
    size = config.data.resolution
    dd = {theirs: _listed(c[ours]) for theirs, ours in AUTOENCODER_FIELDS.items()}
    dd |= {
        "double_z": c.kind == "kl",
        "resolution": size,
        "in_channels": 3,
        "out_ch": 3,
        "attn_resolutions": [size // factor for factor in c.attn_downsample],
        "attn_type": "vanilla" if c.mid_attn else "none",
    }
    params = {
        "embed_dim": c.channels,
        "ddconfig": dd,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    if c.kind == "kl":
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    params["n_embed"] = c.codes
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unet_yaml(config: ConfigDict) -> dict[str, Any]:
    c, channels = config.denoiser, config_lib.latent_channels(config)
    params = {theirs: _listed(c[ours]) for theirs, ours in UNET_FIELDS.items()}
    params |= {
        "image_size": config_lib.latent_size(config),
        "in_channels": channels + concat_channels(config),
        "out_channels": channels,
    }
    params |= {"num_heads": c.num_heads} if c.num_heads else {"num_head_channels": c.head_dim}
    if c.cross_attention:
        name = config.conditioners[0]
        params["context_dim"] = config[name].width
    elif "label" in config.conditioners:
        params["num_classes"] = config.label.num_classes + config.label.null
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def concat_channels(config: ConfigDict) -> int:
    """Channels that the conditioners join to x_t."""
    channels = {"segmentation": config.segmentation.channels, "low_res": 3}
    channels["inpainting"] = config_lib.latent_channels(config) + 1
    return sum(channels.get(name, 0) for name in config.conditioners)


def _conditioner_yaml(config: ConfigDict) -> dict[str, Any]:
    if not config.conditioners:
        return {"cond_stage_config": "__is_unconditional__"}
    if len(config.conditioners) > 1:
        names = ", ".join(config.conditioners)
        raise UserError(f"the original code has one conditioner, but this model has {names}")
    (name,) = config.conditioners
    encoders = "ldm.modules.encoders.modules."
    if name == "label" and config.label.slot == "vector":
        stage = {"target": "torch.nn.Identity"}
        return {
            "cond_stage_key": "class_label",
            "conditioning_key": "adm",
            "cond_stage_config": stage,
        }
    if name in ("low_res", "inpainting"):
        stage = {"target": "torch.nn.Identity"} if name == "low_res" else "__is_first_stage__"
        key = "LR_image" if name == "low_res" else "masked_image"
        return {"cond_stage_key": key, "conditioning_key": "concat", "cond_stage_config": stage}
    if name == "segmentation":
        c = config.segmentation
        options = dict(n_stages=c.stages, in_channels=c.num_classes, out_channels=c.channels)
        stage = {"target": encoders + "SpatialRescaler", "params": options}
        return {"cond_stage_key": name, "conditioning_key": "concat", "cond_stage_config": stage}
    if name == "text" and config.text.encoder == "clip":
        wrong = [k for k, v in CLIP_VIT_L.items() if k != "length" and config.text[k] != v]
        if wrong:
            raise UserError(
                f"config.text.{wrong[0]} is {config.text[wrong[0]]}, but the original code only "
                f"knows CLIP ViT-L/14 with {CLIP_VIT_L[wrong[0]]}"
            )
        stage = {
            "target": encoders + "FrozenCLIPEmbedder",
            "params": {"max_length": config.text.length},
        }
        key = "txt"
    elif name == "label":
        rows = config.label.num_classes + config.label.null
        options = dict(n_classes=rows, embed_dim=config.label.width, key="class_label")
        stage, key = {"target": encoders + "ClassEmbedder", "params": options}, "class_label"
    elif name == "text" and config.text.encoder == "sentence":
        raise UserError("the original code knows no sentence encoder (config.text.encoder)")
    else:
        c = config[name]
        if name == "text" and c.heads != 8:
            raise UserError(f"config.text.heads is {c.heads}, but the original code only knows 8")
        options = dict(n_embed=c.width, n_layer=c.depth, vocab_size=c.vocab_size)
        options |= dict(max_seq_len=c.length, use_tokenizer=name == "text")
        stage = {"target": encoders + "BERTEmbedder", "params": options}
        key = "caption" if name == "text" else "coordinates_bbox"
    return {"cond_stage_key": key, "conditioning_key": "crossattn", "cond_stage_config": stage}
