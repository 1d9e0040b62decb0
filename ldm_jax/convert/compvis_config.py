"""The YAML of the original code (CompVis `latent-diffusion`) as our config.

Every option is accounted for: it is used, it may only have the value that our networks stand for,
or it is of no importance for what the model computes; any other is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.convert.model import concat_channels, sense, use_conditioners
from ldm_jax.convert.tables import short
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
UNCONDITIONAL = "__is_unconditional__"
# The slot of the UNet that each kind of conditioner fills.
SLOTS = {
    "ClassEmbedder": "crossattn",
    "BERTEmbedder": "crossattn",
    "TransformerEmbedder": "crossattn",
    "FrozenCLIPEmbedder": "crossattn",
    "SpatialRescaler": "concat",
    "Identity": "concat",
    "__is_first_stage__": "concat",
}

# Below, their option: our key and their default, which is a type where they have none.
UNET_FIELDS = {
    "model_channels": ("width", int),
    "channel_mult": ("mult", (1, 2, 4, 8)),
    "num_res_blocks": ("depth", int),
    "attention_resolutions": ("attn_downsample", tuple),
    "use_spatial_transformer": ("cross_attention", False),
    "transformer_depth": ("transformer_depth", 1),
    "use_scale_shift_norm": ("scale_shift", False),
    "resblock_updown": ("resblock_resample", False),
    "conv_resample": ("conv_resample", True),
    "use_new_attention_order": ("split_qkv_first", False),
    "dropout": ("dropout", 0.0),
}
AUTOENCODER_FIELDS = {
    "ch": ("width", int),
    "ch_mult": ("mult", (1, 2, 4, 8)),
    "num_res_blocks": ("depth", int),
    "z_channels": ("z_channels", int),
    "dropout": ("dropout", 0.0),
}
TRANSFORMER_FIELDS = {
    "n_embed": ("width", int),
    "n_layer": ("depth", int),
    "vocab_size": ("vocab_size", 30522),
    "max_seq_len": ("length", 77),
}
RESCALER_FIELDS = {
    "in_channels": ("num_classes", 3),
    "out_channels": ("channels", int),
    "n_stages": ("stages", 1),
}
# Read elsewhere, or without an effect on what is computed with trained weights.
MODEL_OTHERS = (
    *("timesteps", "beta_schedule", "linear_start", "linear_end", "parameterization", "loss_type"),
    *("image_size", "channels", "scale_factor", "scale_by_std", "conditioning_key", "concat_mode"),
    *("unet_config", "first_stage_config", "cond_stage_config", "first_stage_key"),
    *("cond_stage_key", "cond_stage_trainable", "monitor", "log_every_t", "use_ema", "ckpt_path"),
    *("ignore_keys", "load_only_unet", "scheduler_config", "original_elbo_weight"),
    *("l_simple_weight", "learn_logvar", "logvar_init"),
    # These the original code takes, too, but does not use.
    *("clip_denoised", "use_positional_encodings"),
)
UNET_OTHERS = ("image_size", "in_channels", "out_channels", "context_dim", "num_classes", "legacy")
UNET_OTHERS += ("num_heads", "num_head_channels", "use_fp16", "use_checkpoint")
FIRST_STAGE_OTHERS = ("ddconfig", "embed_dim", "lossconfig", "monitor", "ckpt_path", "ignore_keys")
FIRST_STAGE_OTHERS += ("image_key", "colorize_nlabels", "scheduler_config", "use_ema")
VQ_OTHERS = ("n_embed", "batch_resize_range", "lr_g_factor")
AUTOENCODER_OTHERS = ("double_z", "resolution", "attn_resolutions", "attn_type")
TRANSFORMER_OTHERS = ("device", "use_tokenizer", "embedding_dropout")
# The values of the rest at which they change nothing.
MODEL_NEUTRAL = {
    "given_betas": (None,),
    "cosine_s": (8e-3,),
    "v_posterior": (0,),
    "num_timesteps_cond": (1, None),
    "cond_stage_forward": (None,),
}
UNET_NEUTRAL = {"dims": (2,), "n_embed": (None,), "num_heads_upsample": (-1, None)}
FIRST_STAGE_NEUTRAL = {"remap": (None,), "sane_index_shape": (False,)}
AUTOENCODER_NEUTRAL = {
    "in_channels": (3,),
    "out_ch": (3,),
    "resamp_with_conv": (True,),
    "use_linear_attn": (False,),
    "give_pre_end": (False,),
    "tanh_out": (False,),
}
CLIP_NEUTRAL = {"version": ("openai/clip-vit-large-patch14",)}
RESCALER_NEUTRAL = {"method": ("bilinear",), "multiplier": (0.5,), "bias": (False,)}
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
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    tuple: f"a list of at most {config_lib.MOST_LEVELS} whole numbers",
}


def kind_of(block: Any) -> str:
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


def params_of(block: Any, where: str) -> Yaml:
    """The options of a block; none where they are left out.

    Raises:
        UserError: they are no mapping.
    """
    params = block.get("params") if isinstance(block, Mapping) else None
    if params is None:
        return {}
    if not isinstance(params, Mapping):
        raise UserError(f"{where} is {short(params)}, but must be a mapping")
    return params


def option(params: Yaml, where: str, key: str, default: Any) -> Any:
    """An option, of the type of its default; a type in its place means that there is none.

    Raises:
        UserError: it is missing or of another type.
    """
    kind = default if isinstance(default, type) else type(default)
    if key not in params:
        if default is kind:
            raise UserError(f"{where}.{key} is missing")
        return default
    value = params[key]
    if kind is float and type(value) in (int, float, str):  # YAML takes 1e-4 for a text
        try:
            value = float(value)
        except (ValueError, OverflowError):
            value = params[key]
        if value != value or value in (math.inf, -math.inf):
            value = None
    if kind is tuple and type(value) in (list, tuple) and len(value) <= config_lib.MOST_LEVELS:
        if all(type(x) is int for x in value):
            value = tuple(value)
    if type(value) is not kind:
        raise UserError(f"{where}.{key} is {short(params[key])}, but must be {KINDS[kind]}")
    return value


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
    kind = kind_of(block)
    config = config_lib.get_config()
    with config.unlocked(), sense("the YAML"):
        config.name = "imported"
        use_conditioners(config)
        config.first_stage.latent_scale = "stored"
        config.sample.update(steps=50, eta=0.0)
        if kind in FIRST_STAGES:
            side = _first_stage(config, block, "params")
            config.data.resolution = side or 256
            config.train.steps = 0
        elif kind == LATENT_DIFFUSION:
            _latent_diffusion(config, params_of(block, "params"), null_class)
        else:
            known = ", ".join((LATENT_DIFFUSION, *FIRST_STAGES))
            raise UserError(
                f"the YAML describes a {short(kind)}, which cannot be imported: known are {known}"
            )
    return config_lib.check(config)


def _take(
    params: Yaml, where: str, fields: Yaml, neutral: Yaml, others: Collection[str] = ()
) -> dict[str, Any]:
    """Our keys and values; refuses what would change what is computed."""
    for key, value in params.items():
        if key in neutral:
            if value not in neutral[key]:
                raise UserError(
                    f"{where}.{key} is {short(value)}, but only {neutral[key][0]} is supported"
                )
        elif key not in fields and key not in others:
            raise UserError(f"{where} has the option {short(key)}, which is not supported")
    return {ours: option(params, where, key, default) for key, (ours, default) in fields.items()}


def _first_stage(config: ConfigDict, block: Any, where: str) -> int | None:
    """Sets the block of the first stage; returns the side of the images it was made for."""
    kind, params = kind_of(block), params_of(block, where)
    if kind not in FIRST_STAGES:
        raise UserError(
            f"no first stage of kind {short(kind)}: known are {', '.join(FIRST_STAGES)}"
        )
    c = config.first_stage
    c.kind = FIRST_STAGES[kind]
    if c.kind == "identity":
        return None
    others = (*FIRST_STAGE_OTHERS, *(VQ_OTHERS if c.kind == "vq" else ()))
    _take(params, where, {}, FIRST_STAGE_NEUTRAL, others)
    c.channels = option(params, where, "embed_dim", int)
    if c.kind == "vq":
        c.codes = option(params, where, "n_embed", int)
    dd = params_of({"params": params.get("ddconfig")}, "ddconfig")
    c.update(_take(dd, "ddconfig", AUTOENCODER_FIELDS, AUTOENCODER_NEUTRAL, AUTOENCODER_OTHERS))
    double = option(dd, "ddconfig", "double_z", True)
    if double != (c.kind == "kl"):
        raise UserError(f"ddconfig.double_z is {double}, which no {kind} has")
    attention = option(dd, "ddconfig", "attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise UserError(
            f"ddconfig.attn_type is {short(attention)}, but only vanilla and none are supported"
        )
    c.mid_attn = attention == "vanilla"
    side = option(dd, "ddconfig", "resolution", int)
    sides = option(dd, "ddconfig", "attn_resolutions", tuple) if c.mid_attn else ()
    factors = [2**level for level in range(len(c.mult))]
    if side < 1 or side % factors[-1]:
        raise UserError(f"ddconfig.resolution is {side}, but must be a multiple of {factors[-1]}")
    c.attn_downsample = tuple(factor for factor in factors if side // factor in sides)
    return side


def _latent_diffusion(config: ConfigDict, params: Yaml, null_class: bool | None) -> None:
    _take(params, "params", {}, MODEL_NEUTRAL, MODEL_OTHERS)
    _first_stage(config, params.get("first_stage_config"), "first_stage_config.params")
    _diffusion(config, params)
    kind, where = kind_of(params.get("unet_config")), "unet_config.params"
    if kind != "UNetModel":
        raise UserError(f"unet_config is a {short(kind)}, but only UNetModel can be imported")
    unet = params_of(params["unet_config"], where)
    _unet(config, unet, where)
    _conditioner(config, params, unet, null_class)
    channels, size = config_lib.latent_channels(config), option(params, "params", "image_size", 256)
    config.data.resolution = size * config_lib.downsampling(config)
    context = config.get(config.conditioners[0]) if config.conditioners else None
    width = context.get("width") if context and config.denoiser.cross_attention else None
    for key, value, want in (
        ("params.channels", params.get("channels", channels), channels),
        (f"{where}.in_channels", unet.get("in_channels"), channels + concat_channels(config)),
        (f"{where}.out_channels", unet.get("out_channels"), channels),
        (f"{where}.context_dim", unet.get("context_dim"), width),
    ):
        if value != want:
            raise UserError(
                f"{key} is {short(value)}, but first stage and conditioner make it {want}"
            )


def _diffusion(config: ConfigDict, params: Yaml) -> None:
    c = config.diffusion
    schedule = option(params, "params", "beta_schedule", "linear")
    if schedule not in SCHEDULES:
        raise UserError(f"beta_schedule is {short(schedule)}: known are {', '.join(SCHEDULES)}")
    c.schedule = SCHEDULES[schedule]
    start = option(params, "params", "linear_start", 1e-4)
    c.beta = (start, option(params, "params", "linear_end", 2e-2))
    c.steps = option(params, "params", "timesteps", 1000)
    config.sample.steps = min(config.sample.steps, c.steps)
    c.predict = option(params, "params", "parameterization", "eps")
    c.loss = option(params, "params", "loss_type", "l2")


def _unet(config: ConfigDict, params: Yaml, where: str) -> None:
    c = config.denoiser
    c.update(_take(params, where, UNET_FIELDS, UNET_NEUTRAL, UNET_OTHERS))
    c.attn_downsample = tuple(sorted(c.attn_downsample))
    c.remat = "block" if option(params, where, "use_checkpoint", False) else "none"
    head_dim = option(params, where, "num_head_channels", -1)
    heads = option(params, where, "num_heads", -1)
    if head_dim <= 0 and heads <= 0:
        raise UserError(f"{where} needs num_heads or num_head_channels")
    # The width of a head goes first in the original, too.
    c.num_heads = 0 if head_dim > 0 else heads
    if head_dim > 0:
        c.head_dim = head_dim


def _conditioner(config: ConfigDict, params: Yaml, unet: Yaml, null_class: bool | None) -> None:
    block, where = params.get("cond_stage_config", UNCONDITIONAL), "cond_stage_config.params"
    kind, options = kind_of(block), params_of(block, where)
    slot = _slot(params) if kind != UNCONDITIONAL else None
    classes = unet.get("num_classes")
    if (classes is not None) != (slot == "adm"):
        raise UserError(
            f"unet_config.params.num_classes is {short(classes)}, but conditioning_key is {slot}"
        )
    if slot == "adm":
        rows = option(unet, "unet_config.params", "num_classes", int)
        _label(config, rows, 4 * config.denoiser.width, "vector", null_class)
    elif slot is not None and SLOTS.get(kind) != slot:
        raise UserError(
            f"cond_stage_config {short(kind)} with conditioning_key {short(slot)} cannot be "
            "imported"
        )
    elif kind == "ClassEmbedder":
        _take(options, where, {}, {}, ("embed_dim", "n_classes", "key"))
        rows = option(options, where, "n_classes", 1000)
        _label(config, rows, option(options, where, "embed_dim", int), "context", null_class)
    elif kind in ("BERTEmbedder", "TransformerEmbedder"):
        others = TRANSFORMER_OTHERS[: 3 if kind == "BERTEmbedder" else 1]
        shape = _take(options, where, TRANSFORMER_FIELDS, {}, others)
        if kind == "BERTEmbedder" and option(options, where, "use_tokenizer", True):
            config.text.update(shape | dict(encoder="bert", mlp_width=4 * shape["width"]))
            use_conditioners(config, "text")
        else:
            config.layout.update(shape)
            use_conditioners(config, "layout")
    elif kind == "FrozenCLIPEmbedder":
        given = _take(options, where, {"max_length": ("length", 77)}, CLIP_NEUTRAL, ("device",))
        config.text.update(CLIP_VIT_L | given)
        use_conditioners(config, "text")
    elif kind == "SpatialRescaler":
        config.segmentation.update(_take(options, where, RESCALER_FIELDS, RESCALER_NEUTRAL))
        use_conditioners(config, "segmentation")
    elif kind in SLOTS:
        use_conditioners(config, "low_res" if kind == "Identity" else "inpainting")


def _slot(params: Yaml) -> str:
    """What the condition is given to the UNet as."""
    if params.get("conditioning_key") is not None:
        return option(params, "params", "conditioning_key", str)
    return "concat" if option(params, "params", "concat_mode", True) else "crossattn"


def _label(config: ConfigDict, rows: int, width: int, slot: str, null_class: bool | None) -> None:
    null = rows == 1001 if null_class is None else null_class
    config.label.update(num_classes=rows - null, width=width, slot=slot, null=null)
    use_conditioners(config, "label")
