"""What a config must obey: types, ranges, and values that fit each other."""

from __future__ import annotations

import difflib
import math
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.checks_buckets import check_buckets
from ldm_jax.checks_classifier import check_classifier
from ldm_jax.checks_diffusion import CONTINUOUS, SAMPLERS, SPACINGS, check_diffusion
from ldm_jax.checks_latents import check_latents
from ldm_jax.checks_mesh import check_mesh
from ldm_jax.checks_training import check_training
from ldm_jax.defaults import get_config
from ldm_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
# The batch fields that each conditioner reads.
FIELDS = {
    "label": ("label",),
    "text": ("tokens",),
    "layout": ("boxes",),
    "segmentation": ("segmentation",),
    "low_res": ("low_res",),
    "noise_level": ("noise_level",),
    "inpainting": ("masked_image", "mask"),
}
_AT_LEAST_ONE = {"batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "num_samples"}
_AT_LEAST_ONE |= {"min_side", "max_pixels"}
_AT_LEAST_ONE |= {"every", "max_skipped", "max_rollbacks"}
_AT_LEAST_ONE |= {"resolution", "width", "depth", "codes", "channels", "z_channels", "threads"}
_AT_LEAST_ONE |= {"patch", "norm_groups", "heads", "head_dim", "images", "accumulate"}
_AT_LEAST_ONE |= {"num_classes", "transformer_depth", "vocab_size", "length", "mlp_width"}
_AT_LEAST_ZERO = {
    "steps",
    "warmup_steps",
    "decay_steps",
    "grad_clip",
    "picture_every",
    "fid_every",
    "stats_images",
    "stages",
    "num_heads",
    "pad_token",
    "eta",
    "lr",
    "start",
    "warmup",
    "ramp",
    "lecam",
    "factor",
    "weight",
    "kl_weight",
    "codebook_weight",
    "perceptual_weight",
}
_SHARES = {"dropout", "ema_decay", "cond_drop_rate", "eta", "lr_start", "lr_end"}
_SHARES |= {"decay", "reset", "guidance_rescale", "max_bad"}
# Far above what any model has; anything larger is a mistake that would take all time or memory.
MOST_LEVELS = 10
MOST_BLOCKS = 500
MOST_CODES = 2**24
_AT_MOST = dict.fromkeys(_SHARES, 1) | {"stages": MOST_LEVELS, "patch": 64}
_AT_MOST |= dict.fromkeys(("depth", "transformer_depth"), 100) | {"mlp_width": 2**18}
_AT_MOST |= dict.fromkeys(("width", "channels", "z_channels", "norm_groups"), 2**16)
_AT_MOST |= dict.fromkeys(("heads", "num_heads", "head_dim", "length", "resolution"), 2**16)
_AT_MOST |= dict.fromkeys(("num_classes", "vocab_size", "codes"), MOST_CODES)
# Beyond it Pillow opens nothing.
_AT_MOST |= {"diffusion.steps": 10**6, "data.max_pixels": 178_956_970}
_PAIRS = {"betas", "beta", "ratios", "p2", "guidance_interval"}
_ABOVE_ZERO = {"sigma_data", "huber_delta", "snr_gamma", "times_std", "times_shift"}
_FLOATS = _PAIRS | {"stds", "decays"}
# Standard deviation of a uniform distribution over [0, 1], the flattest of the averages' profiles.
WIDEST_STD = 12**-0.5
_NAMES = {"fields", "conditioners", "metrics"}
METRICS = ("psnr", "ssim", "lpips", "rfid")  # of reconstructions
CHOICES = {
    "data.crop": ("center", "random"),
    "data.low_res.degradation": ("bicubic", "bsr"),
    "data.mask": ("thin", "medium", "thick", "box", "mixed"),
    "first_stage.kind": ("kl", "vq", "fsq", "identity"),
    "first_stage.loss": ("l1", "l2"),
    "first_stage.discriminator.loss": ("hinge", "vanilla"),
    "first_stage.codebook.rule": ("gradient", "ema"),
    "label.slot": ("context", "vector"),
    "text.encoder": ("bert", "clip", "sentence"),
    "text.activation": ("gelu", "quick_gelu"),
    "denoiser.kind": ("unet", "dit"),
    "denoiser.remat": ("none", "block", "dots"),
    "denoiser.dit.positions": ("rotary", "sincos"),
    "denoiser.dit.context": ("none", "cross", "joint"),
    "denoiser.dit.mlp": ("swiglu", "gelu"),
    "diffusion.schedule": ("scaled_linear", "linear", "sqrt", "cosine", *CONTINUOUS),
    "diffusion.predict": ("eps", "x0", "v", "flow", "edm"),
    "diffusion.loss": ("l2", "l1", "huber"),
    "diffusion.weighting": ("simple", "min_snr", "soft_min_snr", "p2", "edm", "vlb"),
    "diffusion.times": ("uniform", "logit_normal", "log_normal"),
    "sample.sampler": SAMPLERS,
    "sample.spacing": SPACINGS,
}
for _block in ("first_stage.train", "train", "classifier.train"):
    CHOICES[f"{_block}.dtype"] = CHOICES[f"{_block}.moment_dtype"] = DTYPES
    CHOICES[f"{_block}.optimizer"] = ("adamw", "muon")
    CHOICES[f"{_block}.lr_decay"] = ("constant", "cosine", "linear")


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Returns {'data.source': ..., ...}; tuples become lists, as JSON knows no tuples."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def downsampling(config: ConfigDict) -> int:
    """Pixels per latent along one side, 1 for the identity first stage."""
    c = config.first_stage
    return 1 if c.kind == "identity" else c.patch * 2 ** (len(c.mult) - 1)


def denoiser_unit(config: ConfigDict) -> int:
    """Latents per side of which the denoiser takes multiples."""
    c = config.denoiser
    return c.dit.patch if c.kind == "dit" else 2 ** (len(c.mult) - 1)


def vector_width(config: ConfigDict) -> int:
    """Channels of the condition's slot `vector`."""
    c = config.denoiser
    return c.width if c.kind == "dit" else 4 * c.width


def has_null(config: ConfigDict) -> bool:
    """Tells whether every conditioner has a null condition, so that guidance is possible."""
    null = {"label": config.label.null, "text": bool(config.text.null_tokens)}
    null["layout"] = config.layout.null
    return bool(config.conditioners) and all(null.get(name, False) for name in config.conditioners)


def suggest(key: str, known: Any) -> str:
    """The known key that is nearest to a misspelt one, as the end of a message; or ''."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f": did you mean '{close[0]}'?" if close else ""


def check(config: ConfigDict) -> ConfigDict:
    """Refuses a config that cannot work, with the key and the rule in one line.

    Raises:
        UserError: unknown or missing keys, a wrong type, or values that do not fit each other.
    """
    default, flat = flatten(get_config()), flatten(config)
    for key, value in flat.items():
        if key not in default:
            raise UserError(f"unknown config key '{key}'{suggest(key, default)}")
        if type(value) is not type(default[key]):
            want = type(default[key]).__name__.replace("list", "tuple")
            raise UserError(f"config.{key} is {value!r}, but must be of type {want}")
    for key in default.keys() - flat.keys():
        raise UserError(f"config.{key} is missing: start from ldm_jax.config.get_config()")
    _check_tuples(flat)
    _check_choices(flat)
    for key, value in flat.items():
        name = key.split(".")[-1]
        low = 1 if name in _AT_LEAST_ONE else 0 if name in _AT_LEAST_ZERO | _SHARES else None
        if low is not None and value < low:
            raise UserError(f"config.{key} is {value}, but must be at least {low}")
        if name in _ABOVE_ZERO and not value > 0:
            raise UserError(f"config.{key} is {value}, but must be above 0")
        most = _AT_MOST.get(key, _AT_MOST.get(name))
        if most is not None and value > most:
            raise UserError(f"config.{key} is {value}, but must be at most {most}")
        if any(type(x) is float and not math.isfinite(x) for x in _listed(value)):
            raise UserError(f"config.{key} is {value}, but must be finite")
    for key, groups in (
        ("first_stage.width", flat["first_stage.norm_groups"]),
        ("denoiser.width", 32),
        ("classifier.width", 32),
    ):
        if flat[key] % groups:
            raise UserError(f"config.{key} is {flat[key]}, but must be a multiple of {groups}")
    _check_sizes(config)
    return config


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_tuples(flat: dict[str, Any]) -> None:
    for key, value in flat.items():
        if not isinstance(value, list) or key == "data.buckets":
            continue
        if len(value) > MOST_LEVELS:
            raise UserError(
                f"config.{key} has {len(value)} values, but at most {MOST_LEVELS} can be"
            )
        name = key.split(".")[-1]
        kind = float if name in _FLOATS else str if name in _NAMES else int
        if any(type(x) is not kind and not (kind is float and type(x) is int) for x in value):
            raise UserError(f"config.{key} is {tuple(value)}, but must hold {kind.__name__}s")
        if name in _PAIRS and len(value) != 2:
            raise UserError(f"config.{key} is {tuple(value)}, but must be two numbers")
        if name == "mult" and (not value or min(value) < 1 or max(value) > 64):
            raise UserError(f"config.{key} is {tuple(value)}, but needs 1 to 64 per level")
    read = {field for name in flat["conditioners"] for field in FIELDS.get(name, ())}
    read |= {"label"} if flat["classifier.train.steps"] > 0 else set()
    for field in flat["data.fields"]:
        if field not in read:
            raise UserError(f"config.data.fields has '{field}', but no conditioner reads it")


def _check_choices(flat: dict[str, Any]) -> None:
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"config.{key} is '{flat[key]}': choose from {', '.join(choices)}")
    rule = flat["first_stage.latent_scale"]
    if rule not in ("stored", "first_batch", "scalar", "channel"):
        try:
            valid = float(rule) > 0
        except ValueError:
            valid = False
        if not valid:
            raise UserError(
                f"config.first_stage.latent_scale is '{rule}': choose from stored, first_batch, "
                "scalar, channel or a positive number"
            )
    for name in flat["first_stage.eval.metrics"]:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise UserError(
                f"config.first_stage.eval.metrics names '{name}': choose from {known}, written as "
                "\"('psnr','ssim')\""
            )
    for name in flat["conditioners"]:
        if name not in FIELDS:
            known = ", ".join(FIELDS)
            raise UserError(f"config.conditioners names '{name}': choose from {known}")


def _check_codes(c: ConfigDict) -> None:
    """Checks how codes are made: by a codebook, or by the values of rounded latents."""
    codebook = c.first_stage.codebook
    if c.first_stage.kind != "vq" and (codebook.rule != "gradient" or codebook.reset > 0):
        raise UserError(
            "config.first_stage.codebook.rule and .reset are for first_stage.kind='vq' only"
        )
    levels, channels = tuple(c.first_stage.levels), c.first_stage.channels
    if c.first_stage.kind != "fsq":
        if levels:
            raise UserError("config.first_stage.levels are for first_stage.kind='fsq' only")
        return
    if len(levels) != channels or min(levels) < 3 or math.prod(levels) > MOST_CODES:
        raise UserError(
            f"config.first_stage.levels is {levels}, but must be {channels} numbers "
            f"(first_stage.channels) of at least 3, with a product of at most {MOST_CODES}"
        )


def _check_sizes(c: ConfigDict) -> None:
    """Checks the values that only make sense together."""
    _check_codes(c)
    for name in ("first_stage", "denoiser", "classifier"):
        blocks = len(c[name].mult) * c[name].depth * c[name].get("transformer_depth", 1)
        if blocks > MOST_BLOCKS:
            raise UserError(
                f"config.{name} has {blocks} blocks (levels * depth * transformer_depth), but at "
                f"most {MOST_BLOCKS} can be"
            )
    check_diffusion(c)
    size, f = c.data.resolution, downsampling(c)
    if size % f:
        raise UserError(
            f"config.data.resolution is {size}, but the first stage divides it by {f}: choose a "
            f"multiple of {f}"
        )
    unit = denoiser_unit(c)
    if c.train.steps > 0 and size % (f * unit):
        raise UserError(
            f"config.data.resolution is {size}, but the first stage divides it by {f} and the "
            f"denoiser by another {unit}: choose a multiple of {f * unit}"
        )
    if c.sample.steps < 1 or c.sample.steps > c.diffusion.steps:
        raise UserError(
            f"config.sample.steps is {c.sample.steps}: choose from 1 to {c.diffusion.steps}"
        )
    for name in c.conditioners:
        for field in FIELDS[name]:
            if field not in c.data.fields:
                raise UserError(
                    f"config.conditioners has '{name}': add '{field}' to config.data.fields too"
                )
    _check_conditions(c)
    check_classifier(c, size // f)
    check_buckets(c, f, unit)
    _check_averages(c)
    check_mesh(c)
    check_training(c)
    check_latents(c)
    if "low_res" in c.conditioners:
        factor, latent = c.data.low_res.factor, size // f
        small = size // factor if factor >= 1 and size % factor == 0 else 0
        if not small or (small % latent and latent % small):
            raise UserError(
                f"config.data.low_res.factor is {factor}: it must divide data.resolution {size} "
                f"into a side that divides that of the latents, {latent}, or is divided by it"
            )


def _check_noise(c: ConfigDict) -> None:
    """Checks noise-level augmentation, of which the model must be told."""
    noise, told = c.data.low_res.noise, "noise_level" in c.conditioners
    if not 0 <= noise < 1:
        raise UserError(f"config.data.low_res.noise is {noise}, but must be in [0, 1)")
    if told and "low_res" not in c.conditioners:
        raise UserError(
            "config.conditioners has 'noise_level', which is that of low_res: add 'low_res' too"
        )
    if told != (noise > 0):
        raise UserError(
            f"config.data.low_res.noise is {noise:g}, but must be above 0 with the conditioner "
            "'noise_level', and 0 without"
        )


def _check_averages(c: ConfigDict) -> None:
    """Checks the averages that are kept beside the one of `ema_decay`."""
    for name, most in (("stds", WIDEST_STD), ("decays", 1)):
        values = c.ema_snapshots[name]
        if not all(0 < value < most for value in values) or len(set(values)) < len(values):
            raise UserError(
                f"config.ema_snapshots.{name} is {tuple(values)}, but must hold different numbers "
                f"between 0 and {most:.4g}"
            )


def _check_conditions(c: ConfigDict) -> None:
    """Checks that the slots which the conditioners fill are those that the denoiser reads."""
    _check_noise(c)
    vector = "label" in c.conditioners and c.label.slot == "vector"
    transformer = c.denoiser.kind == "dit"
    if vector and c.label.width != vector_width(c):
        formula = "denoiser.width" if transformer else "4 * denoiser.width"
        raise UserError(
            f"config.label.width is {c.label.width}, but slot 'vector' needs "
            f"{formula} = {vector_width(c)}"
        )
    givers = [name for name in c.conditioners if name in ("label", "text", "layout")]
    givers = [name for name in givers if not (name == "label" and vector)]
    ways = {"unet": ("cross_attention", False, "True"), "dit": ("dit.context", "none", "'cross'")}
    for kind, (key, off, on) in ways.items():
        value = c.denoiser.dit.context if kind == "dit" else c.denoiser.cross_attention
        if kind != c.denoiser.kind:
            if value != off:
                raise UserError(f"config.denoiser.{key} is for denoiser.kind='{kind}' only")
        elif givers and value == off:
            hint = ", or use label.slot='vector'" if givers == ["label"] else ""
            raise UserError(
                f"the conditioner '{givers[0]}' gives a context, but config.denoiser.{key} is "
                f"{off}: set it to {on}{hint}"
            )
        elif value != off and not givers:
            raise UserError(f"config.denoiser.{key} is set, but no conditioner gives a context")
    if "segmentation" in c.conditioners and 2**c.segmentation.stages != downsampling(c):
        raise UserError(
            f"config.segmentation.stages is {c.segmentation.stages}, which shrinks the map by "
            f"{2**c.segmentation.stages}, but the first stage shrinks images by {downsampling(c)}"
        )
    if "text" in c.conditioners and c.text.encoder == "bert":
        if c.text.mlp_width != 4 * c.text.width:
            raise UserError(
                f"config.text.mlp_width is {c.text.mlp_width}, but encoder 'bert' has "
                f"4 * text.width = {4 * c.text.width}"
            )
    if "text" in c.conditioners and len(c.text.null_tokens) > c.text.length:
        raise UserError(
            f"config.text.null_tokens has {len(c.text.null_tokens)} tokens, but text.length is "
            f"{c.text.length}"
        )
    if c.cond_drop_rate > 0 and not has_null(c):
        raise UserError(
            "config.cond_drop_rate needs a null condition: set config.label.null or "
            "config.text.null_tokens, and use no conditioner without one"
        )
