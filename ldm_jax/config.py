"""What shrinks, reads and writes a config; what checks it is in checks.py.

A config file is a short function over `get_config()` (in defaults.py): it only says what differs.
The default is locked, so a misspelt key raises, in the file as well as on the command line
(`--config.train.lr=1e-4`).
"""

from __future__ import annotations

import json

from ml_collections import ConfigDict

from ldm_jax.checks import (
    FIELDS,
    METRICS,
    MOST_LEVELS,
    check,
    denoiser_unit,
    downsampling,
    flatten,
    has_null,
    suggest,
    vector_width,
)
from ldm_jax.checks_diffusion import CONTINUOUS
from ldm_jax.defaults import get_config
from ldm_jax.errors import UserError
from ldm_jax.published import use_first_stage
from ldm_jax.small import use_small_model

__all__ = ["FIELDS", "METRICS", "MOST_LEVELS", "check", "downsampling", "flatten", "get_config"]
__all__ += ["denoiser_unit", "has_null", "use_first_stage", "use_small_model", "vector_width"]

# Of the block `denoiser`, what a transformer has no use for.
UNET_KEYS = ("mult", "attn_downsample", "cross_attention", "transformer_depth", "scale_shift")
UNET_KEYS += ("resblock_resample", "conv_resample", "split_qkv_first")
# How the same updates are computed: a run may go on with other values, on other devices.
SAME_RESULTS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.dcn_data", "denoiser.remat")
SAME_RESULTS += ("train.accumulate", "classifier.train.accumulate", "data.max_bad")


def shrink(config: ConfigDict) -> ConfigDict:
    """Returns the config at toy size on the embedded images: the same code path in seconds.

    Objective, conditioning and kinds of blocks stay. Each network keeps two levels, since compiling
    deep ones takes longer than running them; widths, steps and resolution fall.
    """
    c = ConfigDict(config).copy_and_resolve_references()
    words = "tokens" in c.data.fields and c.text.encoder == "bert" and not c.text.tokenizer
    if c.data.source == "scenes" or words or {"boxes", "segmentation"} & set(c.data.fields):
        c.data.update(source="scenes", split="train[:256]", flip=False)
        c.data.update(where="", label="label", caption="text")
    elif not c.data.source.startswith("emoji"):
        c.data.update(source="emoji", split="train")
        c.data.update(where="", label="label", caption="text")
    c.data.update(resolution=32, crop="center", threads=2)
    c.data.buckets = ((32, 32), (32, 64)) if c.data.buckets else ()
    c.first_stage.update(width=32, depth=1, mult=c.first_stage.mult[:2], norm_groups=8)
    c.first_stage.update(codes=min(c.first_stage.codes, 64))
    if c.first_stage.perceptual_weight > 0:
        c.first_stage.lpips = "random"
    c.first_stage.eval.update(split="", images=8)
    # Those that need trained weights stay away, and so does what would need a download.
    c.first_stage.eval.metrics = tuple(
        name for name in c.first_stage.eval.metrics if name in ("psnr", "ssim")
    )
    c.first_stage.discriminator.update(width=8, start=1, warmup=0, ramp=0)
    c.first_stage.update(stats_images=min(c.first_stage.stats_images or 64, 64))
    c.denoiser.update(width=32, depth=1)
    networks = [c.first_stage, c.classifier]
    if c.denoiser.kind == "dit":
        c.denoiser.update(depth=2, num_heads=2)
    else:
        c.denoiser.mult = c.denoiser.mult[:2]
        networks.append(c.denoiser)
    for network in networks:
        reached = tuple(factor for factor in network.attn_downsample if factor <= 2)
        network.attn_downsample = reached or ((2,) if network.attn_downsample else ())
    c.label.width = vector_width(c) if c.label.slot == "vector" else 32
    c.text.update(vocab_size=min(c.text.vocab_size, 1000), width=64, depth=1, heads=2)
    c.text.update(mlp_width=256, length=16)
    if words:
        c.text.tokenizer = "scenes"  # which comes with the package
    if c.text.null_tokens:
        c.text.update(null_tokens=(2, 3), pad_token=0)  # as in that vocabulary
    c.layout.update(vocab_size=min(c.layout.vocab_size, 64), width=64, depth=1, length=12)
    # The map must arrive at the latents' size, which has changed with the first stage's levels.
    c.segmentation.update(num_classes=min(c.segmentation.num_classes, 16))
    c.segmentation.stages = (downsampling(c) - 1).bit_length()
    c.classifier.update(width=32, depth=1, mult=c.classifier.mult[:2], head_dim=32)
    for block in (c.first_stage.train, c.train, c.classifier.train):
        steps = min(block.steps, 2)  # 0 means that there is no such stage
        block.update(batch_size=8, steps=steps, warmup_steps=min(block.warmup_steps, 1))
        block.update(log_every=1, picture_every=2, checkpoint_every=2)
    c.classifier.train.picture_every = 0  # there is nothing to show
    c.train.fid_every = 0  # it needs trained weights of another network
    c.sample.update(steps=2, batch_size=8, num_samples=8)
    c.ema_snapshots.every = 1
    return ConfigDict(c).lock()


def modern(config: ConfigDict) -> ConfigDict:
    """Sets what was measured to help beyond the paper's recipe for first stages.

    docs/first_stages.md has the measurements, all of them short runs of narrow networks.
    """
    c = config.first_stage
    c.train.update(optimizer="muon", lr=0.01, warmup_steps=20, lr_decay="cosine")
    c.discriminator.lr = 5e-4
    if c.kind == "vq":
        c.codebook.update(rule="ema", reset=0.05)
    return config


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Ends a config file: applies its argument, `file.py:smoke`, `file.py:modern` or both."""
    options = {"modern": modern, "smoke": shrink}
    chosen = arg.split(",") if arg else []
    for name in chosen:
        if name not in options:
            known = ", ".join(options)
            raise UserError(f"unknown config argument '{name}': choose from {known}")
    for name, apply in options.items():  # in this order, whatever the one that was given
        config = apply(config) if name in chosen else config
    return config


def latent_size(config: ConfigDict) -> int:
    """Side of the latents at the training resolution."""
    return config.data.resolution // downsampling(config)


def latent_channels(config: ConfigDict) -> int:
    """Channels of the latents; 3 for pixels."""
    return 3 if config.first_stage.kind == "identity" else config.first_stage.channels


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
            raise UserError(f"unknown config key '{key}'{suggest(key, known)}")
        if isinstance(known[key], list) and isinstance(value, list):
            value = tuple(tuple(x) if isinstance(x, list) else x for x in value)
        if key == "denoiser.remat" and isinstance(value, bool):  # of older files
            value = "block" if value else "none"
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"config key '{key}' cannot be {value!r}") from error
    return check(config)  # keys that are younger than the file keep their defaults


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
    """Lists the keys in which two configs differ, as 'key: ours -> theirs'.

    Names do not count, nor keys that change no result, nor those that neither's denoiser reads.
    """
    a, b = flatten(ours), flatten(theirs)
    skipped = {"name", *SAME_RESULTS} | set(unread_keys(ours)) & set(unread_keys(theirs))
    keys = sorted(key for key in a | b if a.get(key) != b.get(key) and key not in skipped)
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in keys]


def unread_keys(config: ConfigDict) -> list[str]:
    """Keys of the denoiser that only another `denoiser.kind` than the config's reads."""
    if config.denoiser.kind == "dit":
        return [f"denoiser.{name}" for name in UNET_KEYS]
    return list(flatten({"denoiser": {"dit": config.denoiser.dit}}))


def process_keys(config: ConfigDict) -> list[str]:
    """Keys of `config.diffusion` that decide what an output means; others are of training."""
    c = config.diffusion
    keys = ["predict", "schedule", "steps"]
    if c.schedule not in CONTINUOUS:
        keys += ["zero_terminal_snr"] if c.schedule == "cosine" else ["beta", "zero_terminal_snr"]
    keys += ["ratios"] if c.schedule == "log_snr" else []
    return keys + (["sigma_data"] if c.predict == "edm" else [])


def frozen_parts(config: ConfigDict) -> tuple[str, ...]:
    """Names, among the conditioner's params, of the parts that are not trained.

    CLIP and sentence encoders come with weights that have seen far more text.
    """
    return tuple(
        f"parts_{i}"
        for i, name in enumerate(config.conditioners)
        if name == "text" and config.text.encoder in ("clip", "sentence")
    )
