"""The complete default config, and what checks and shrinks a config.

A config file is a short function over `get_config()`: it only says what differs. The default is
locked, so a misspelt key raises, in the file as well as on the command line
(`--config.train.lr=1e-4`).
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.errors import UserError

DTYPES = ("float32", "bfloat16")


def _train_block(**changes: Any) -> ConfigDict:
    """Optimisation of one stage; both stages have the same keys."""
    return ConfigDict(
        dict(
            batch_size=48,  # images per update, over all devices and hosts
            steps=100_000,  # updates of the whole stage
            lr=1e-4,  # peak learning rate, absolute (not scaled by batch or devices)
            lr_decay="constant",  # after the warm-up: constant | cosine (to zero at `steps`)
            warmup_steps=0,  # linear warm-up from zero
            optimizer="adamw",  # adamw (the paper's) | muon
            betas=(0.9, 0.999),  # of Adam
            weight_decay=0.0,  # decoupled, as in AdamW
            grad_clip=0.0,  # largest global gradient norm; 0 = no clipping
            dtype="float32",  # compute type of the networks: float32 | bfloat16
            log_every=100,  # steps between lines of metrics
            picture_every=5000,  # steps between grids of samples or reconstructions; 0 = none
            checkpoint_every=5000,  # steps between checkpoints
            keep_checkpoints=3,  # how many of them stay on disk
        )
        | changes
    )


def get_config() -> ConfigDict:
    """Returns the complete default, locked: every key that exists, with the paper's usual value."""
    config = ConfigDict(
        dict(
            name="",  # the config file's name; set by the command line, names the workdir
            seed=0,  # of initial weights, data order and all noise
            data=dict(
                source="emoji",  # emoji | folder:PATH | tfds:NAME
                split="train",  # part of the source, e.g. train, test, train[:90%]
                where="",  # keep the examples with COLUMN=VALUE in the metadata; '' = all
                label="label",  # metadata column that serves as the field `label`
                fields=(),  # columns besides the image that reach the model, e.g. ('label',)
                resolution=256,  # side of the square training images, pixels
                crop="center",  # center | random (a square of 0.5 to 1.0 of the shorter side)
                flip=True,  # mirror half of the images
                threads=8,  # that read and decode
                cache_latents=False,  # encode the set once and keep its moments in host memory
            ),
            first_stage=dict(
                kind="vq",  # kl | vq | identity (diffusion on pixels)
                weights="",  # '' = train it first; or a workdir or an exported folder
                width=128,  # channels at full resolution; a multiple of norm_groups
                mult=(1, 2, 4),  # channel multiplier per level; f = patch * 2**(levels - 1)
                depth=2,  # residual blocks per encoder level; the decoder has one more
                attn_downsample=(),  # downsampling factors at which attention is used
                mid_attn=True,  # attention at the lowest resolution
                patch=1,  # pixels per side that enter as channels; 1 in the published models
                norm_groups=32,  # of group normalisation; fewer for narrow networks
                z_channels=3,  # between encoder and decoder and their 1x1 convolutions
                channels=3,  # of the latents
                codes=8192,  # size of the codebook (vq)
                dropout=0.0,
                loss="l1",  # reconstruction: l1 | l2
                log_variance=0.0,  # at which the posterior's starts; low in short runs (kl)
                kl_weight=1e-6,  # of the KL term, summed over C, h, w (kl)
                codebook_weight=1.0,  # of the codebook and commitment term (vq)
                # Latents are multiplied by: stored (what the first stage holds; 1 if just
                # trained) | first_batch (1/std of the first batch) | scalar (1/std of the set)
                # | channel (each channel to mean 0 and std 1) | a number such as 0.18215
                latent_scale="stored",
                stats_images=0,  # images measured for scalar and channel; 0 = the whole set
                train=_train_block(lr=3.6e-5, betas=(0.5, 0.9), picture_every=1000),
            ),
            denoiser=dict(
                width=224,  # channels at full latent resolution; multiples of 32
                mult=(1, 2, 3, 4),  # channel multiplier per level
                depth=2,  # residual blocks per encoder level; the decoder has one more
                attn_downsample=(2, 4, 8),  # downsampling factors at which attention is used
                num_heads=0,  # attention heads; 0 = as many as fit heads of head_dim
                head_dim=32,  # channels per head, used where num_heads is 0
                cross_attention=False,  # transformer blocks that attend to the context
                transformer_depth=1,  # layers per transformer block
                scale_shift=False,  # the time embedding scales and shifts instead of adding
                resblock_resample=False,  # residual blocks instead of convolutions resample
                dropout=0.0,
                remat=False,  # recompute activations of each block in the backward pass
            ),
            conditioners=(),  # which of the blocks below are used, e.g. ('label',)
            label=dict(
                num_classes=1000,
                width=512,  # of the embedding; slot vector needs 4 * denoiser.width
                slot="context",  # context (one token for cross-attention) | vector (with time)
                null=True,  # one more row: the null condition for classifier-free guidance
            ),
            diffusion=dict(
                schedule="scaled_linear",  # scaled_linear (the paper's) | linear | cosine | sqrt
                beta=(0.0015, 0.0195),  # first and last
                steps=1000,  # T
                predict="eps",  # what the network's output means: eps | x0 | v
                loss="l2",  # l2 | l1
            ),
            train=_train_block(
                lr=9.6e-5,
                weight_decay=0.01,
            ),
            ema_decay=0.9999,  # of the denoiser's weights, reached by min(decay, (1+n)/(10+n))
            cond_drop_rate=0.0,  # share of training examples that see the null condition
            sample=dict(
                sampler="ddim",
                steps=200,
                eta=1.0,  # 0 = deterministic, 1 = as noisy as ancestral sampling
                spacing="leading",  # leading | uniform (the reference's grid) | quad
                guidance_scale=1.0,  # 1 = off
                batch_size=16,  # images at a time, over all devices
                num_samples=16,  # images in the grids that training writes
                nearest=False,  # show the nearest training images beside the final grid
            ),
        )
    )
    return config.lock()


def shrink(config: ConfigDict) -> ConfigDict:
    """Returns the config at toy size on the embedded images: the same code path in seconds.

    Objective, conditioning and kinds of blocks stay. Each network keeps two levels, since compiling
    deep ones takes longer than running them; widths, steps and resolution fall.
    """
    c = ConfigDict(config).copy_and_resolve_references()
    if not c.data.source.startswith("emoji"):
        c.data.update(source="emoji", split="train", where="", label="label")
    c.data.update(resolution=32, crop="center", threads=2)
    c.first_stage.update(width=32, depth=1, mult=c.first_stage.mult[:2], norm_groups=8)
    c.first_stage.update(codes=min(c.first_stage.codes, 64))
    c.first_stage.update(stats_images=min(c.first_stage.stats_images or 64, 64))
    c.denoiser.update(width=32, depth=1, mult=c.denoiser.mult[:2])
    for network in (c.first_stage, c.denoiser):
        reached = tuple(factor for factor in network.attn_downsample if factor <= 2)
        network.attn_downsample = reached or ((2,) if network.attn_downsample else ())
    c.label.width = 4 * c.denoiser.width if c.label.slot == "vector" else 32
    for block in (c.first_stage.train, c.train):
        block.update(batch_size=8, steps=2, warmup_steps=min(block.warmup_steps, 1))
        block.update(log_every=1, picture_every=2, checkpoint_every=2)
    c.sample.update(steps=2, batch_size=8, num_samples=8)
    return ConfigDict(c).lock()


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Ends a config file: applies its argument (`file.py:smoke`); refuses any other."""
    if arg == "smoke":
        return shrink(config)
    if arg:
        raise UserError(f"unknown config argument '{arg}': the only one is 'smoke'")
    return config


def downsampling(config: ConfigDict) -> int:
    """Pixels per latent along one side, 1 for the identity first stage."""
    c = config.first_stage
    return 1 if c.kind == "identity" else c.patch * 2 ** (len(c.mult) - 1)


def latent_size(config: ConfigDict) -> int:
    """Side of the latents at the training resolution."""
    return config.data.resolution // downsampling(config)


def latent_channels(config: ConfigDict) -> int:
    """Channels of the latents; 3 for pixels."""
    return 3 if config.first_stage.kind == "identity" else config.first_stage.channels


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Returns {'data.source': ..., ...}; tuples become lists, as JSON knows no tuples."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def to_json(config: ConfigDict) -> str:
    """Returns the config as indented JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Rebuilds a locked, checked config from `to_json`'s text.

    Raises:
        UserError: the text is no JSON, or names a key that no longer exists.
    """
    config = get_config()
    known = flatten(config)
    try:
        values = flatten(json.loads(text))
    except (ValueError, AttributeError) as error:
        raise UserError(f"not a config written by ldm_jax: {error}") from error
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown config key '{key}'{_suggest(key, known)}")
        if isinstance(known[key], list) and isinstance(value, list):
            value = tuple(value)
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"config key '{key}' cannot be {value!r}") from error
    for key in sorted(known.keys() - values.keys()):
        raise UserError(f"the config key '{key}' is missing")
    return check(config)


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
    """Lists the keys in which two configs differ, as 'key: ours -> theirs'; names do not count."""
    a, b = flatten(ours), flatten(theirs)
    keys = sorted(key for key in a | b if a.get(key) != b.get(key) and key != "name")
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in keys]


def _suggest(key: str, known: Any) -> str:
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
            raise UserError(f"unknown config key '{key}'{_suggest(key, default)}")
        if type(value) is not type(default[key]):
            want = type(default[key]).__name__.replace("list", "tuple")
            raise UserError(f"config.{key} is {value!r}, but must be of type {want}")
    for key in default.keys() - flat.keys():
        raise UserError(f"config.{key} is missing: start from ldm_jax.config.get_config()")
    _check_tuples(flat)
    _check_choices(flat)
    for key in flat:
        name = key.split(".")[-1]
        low = 1 if name in _AT_LEAST_ONE else 0 if name in _AT_LEAST_ZERO | _SHARES else None
        if low is not None and flat[key] < low:
            raise UserError(f"config.{key} is {flat[key]}, but must be at least {low}")
        if name in _SHARES and flat[key] > 1:
            raise UserError(f"config.{key} is {flat[key]}, but must be at most 1")
    for key, groups in (
        ("first_stage.width", flat["first_stage.norm_groups"]),
        ("denoiser.width", 32),
    ):
        if flat[key] % groups:
            raise UserError(f"config.{key} is {flat[key]}, but must be a multiple of {groups}")
    _check_sizes(config)
    return config


_AT_LEAST_ONE = {"batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "num_samples"}
_AT_LEAST_ONE |= {"resolution", "width", "depth", "codes", "channels", "z_channels", "threads"}
_AT_LEAST_ONE |= {"patch", "norm_groups"}
_AT_LEAST_ONE |= {"num_classes", "transformer_depth"}
_AT_LEAST_ZERO = {
    "steps",
    "warmup_steps",
    "grad_clip",
    "picture_every",
    "stats_images",
    "eta",
    "lr",
}
_SHARES = {"dropout", "ema_decay", "cond_drop_rate", "eta"}
_PAIRS = {"betas", "beta"}
_CHOICES = {
    "data.crop": ("center", "random"),
    "first_stage.kind": ("kl", "vq", "identity"),
    "first_stage.loss": ("l1", "l2"),
    "first_stage.train.dtype": DTYPES,
    "train.dtype": DTYPES,
    "first_stage.train.optimizer": ("adamw", "muon"),
    "train.optimizer": ("adamw", "muon"),
    "first_stage.train.lr_decay": ("constant", "cosine"),
    "train.lr_decay": ("constant", "cosine"),
    "label.slot": ("context", "vector"),
    "diffusion.schedule": ("scaled_linear", "linear", "cosine", "sqrt"),
    "diffusion.predict": ("eps", "x0", "v"),
    "diffusion.loss": ("l2", "l1"),
    "sample.sampler": ("ddim",),
    "sample.spacing": ("leading", "uniform", "quad"),
}


def _check_tuples(flat: dict[str, Any]) -> None:
    for key, value in flat.items():
        if not isinstance(value, list):
            continue
        name = key.split(".")[-1]
        kind = float if name in _PAIRS else str if name in ("fields", "conditioners") else int
        if any(type(x) is not kind and not (kind is float and type(x) is int) for x in value):
            raise UserError(f"config.{key} is {tuple(value)}, but must hold {kind.__name__}s")
        if name in _PAIRS and len(value) != 2:
            raise UserError(f"config.{key} is {tuple(value)}, but must be two numbers")
        if name == "mult" and (not value or min(value) < 1):
            raise UserError(f"config.{key} is {tuple(value)}, but needs a number >= 1 per level")
    for field in flat["data.fields"]:
        if field not in flat["conditioners"]:
            raise UserError(f"config.data.fields has '{field}', but no conditioner reads it")


def _check_choices(flat: dict[str, Any]) -> None:
    for key, choices in _CHOICES.items():
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
    for name in flat["conditioners"]:
        if name != "label":
            raise UserError(f"config.conditioners names '{name}': choose from label")


def _check_sizes(c: ConfigDict) -> None:
    """Checks the values that only make sense together."""
    size, f = c.data.resolution, downsampling(c)
    unet = 2 ** (len(c.denoiser.mult) - 1)
    if size % (f * unet):
        raise UserError(
            f"config.data.resolution is {size}, but the first stage divides it by {f} and the "
            f"denoiser by another {unet}: choose a multiple of {f * unet}"
        )
    if c.sample.steps < 1 or c.sample.steps > c.diffusion.steps:
        raise UserError(
            f"config.sample.steps is {c.sample.steps}: choose from 1 to {c.diffusion.steps}"
        )
    if "label" in c.conditioners:
        if "label" not in c.data.fields:
            raise UserError("config.conditioners has 'label': add it to config.data.fields too")
        if c.label.slot == "vector" and c.label.width != 4 * c.denoiser.width:
            raise UserError(
                f"config.label.width is {c.label.width}, but slot 'vector' needs "
                f"4 * denoiser.width = {4 * c.denoiser.width}"
            )
        if c.label.slot == "context" and not c.denoiser.cross_attention:
            raise UserError(
                "config.label.slot is 'context', but denoiser.cross_attention is False: "
                "set it, or use label.slot='vector'"
            )
        if c.cond_drop_rate > 0 and not c.label.null:
            raise UserError("config.cond_drop_rate needs a null condition: set config.label.null")
    elif c.denoiser.cross_attention:
        raise UserError(
            "config.denoiser.cross_attention is set, but no conditioner gives a context"
        )
    if c.data.cache_latents and c.data.crop != "center":
        raise UserError("config.data.cache_latents needs config.data.crop='center'")
