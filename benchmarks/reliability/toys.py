"""The runs at toy size on which the proofs are made, and the project's configs shrunk to such."""

from __future__ import annotations

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

from ldm_jax import config as config_lib

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
EXAMPLES = 20  # images of a set that is gone through several times in a few steps
DROPOUT = 0.1


def toy(name: str, steps: int, checkpoint_every: int = 2, **changes: Any) -> ConfigDict:
    """A run of a few seconds, most of them compilation, with dropout and dropped conditions.

    Args:
        name: its parts, joined by '_': 'kl' or 'vq', a first stage and its discriminator; 'unet' or
            'dit', a diffusion model, of 8x8 pixels where there is no first stage; 'classifier'.
        steps: of every stage.
        checkpoint_every: steps between checkpoints.
        **changes: values of other keys, 'a.b' -> value.
    """
    parts = set(name.split("_"))
    (first_stage,) = parts & {"kl", "vq"} or {"identity"}
    c = config_lib.get_config()
    c.name = name
    c.data.update(source="emoji", split=f"train[:{EXAMPLES}]", label="label", fields=("label",))
    c.data.update(resolution=8 if first_stage == "identity" else 16, threads=1)
    c.first_stage.update(kind=first_stage, width=16, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, codes=32, log_variance=-6.0, perceptual_weight=0.0)
    c.first_stage.update(dropout=DROPOUT, stats_images=16, latent_scale="scalar")
    c.first_stage.discriminator.update(weight=0.5, layers=1, width=8, start=3)
    c.denoiser.update(width=32, depth=1, dropout=DROPOUT, head_dim=16)
    c.conditioners = ("label",)
    c.label.update(num_classes=9, slot="vector")
    if "dit" in parts:
        c.denoiser.update(kind="dit", depth=2, num_heads=2)
        c.diffusion.update(schedule="flow", predict="flow")
    elif len(parts) == 1:
        c.denoiser.update(mult=(1,), attn_downsample=())
    else:  # more of what there is; it takes longer to compile
        c.denoiser.update(mult=(1, 2), attn_downsample=(2,), cross_attention=True)
        c.label.slot = "context"
    c.label.width = config_lib.vector_width(c)
    c.classifier.update(width=32, mult=(1,), depth=1, attn_downsample=(), dropout=DROPOUT)
    c.cond_drop_rate = 0.2
    c.ema_snapshots.update(stds=(0.1,), every=steps)
    c.sample.update(sampler="ddim", spacing="trailing", steps=2, batch_size=8, num_samples=8)
    c.sample.guidance_scale = 2.0
    for block in (c.first_stage.train, c.train, c.classifier.train):
        block.update(batch_size=8, lr=1e-3, log_every=1, checkpoint_every=checkpoint_every)
        block.update(steps=steps, picture_every=0)
    c.train.steps *= bool(parts & {"unet", "dit"})
    c.classifier.train.steps *= "classifier" in parts
    if not c.train.steps:
        c.data.fields = c.conditioners = ()
        c.denoiser.cross_attention, c.cond_drop_rate, c.sample.guidance_scale = False, 0.0, 1.0
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def names() -> list[str]:
    """The config files that train on the embedded data alone, without weights of others."""
    found = []
    for path in sorted(CONFIGS.glob("*.py")):
        if path.stem == "imported":  # which wants a workdir to start from
            continue
        config = load(path.stem)
        if "tokens" not in config.data.fields or config.text.encoder == "bert":
            found.append(path.stem)
    return found


def load(name: str, argument: str = "") -> ConfigDict:
    """The checked config of a file in configs/."""
    made = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](argument)
    return config_lib.check(made)


def shrunk(name: str, steps: int, checkpoint_every: int = 2) -> ConfigDict:
    """A config file's `:smoke` variant on a few images only, with dropout and dropped conditions.

    Its stages take `steps` steps each, and go through the images several times.
    """
    c = ConfigDict(load(name, "smoke")).copy_and_resolve_references()
    c.data.split = f"train[:{EXAMPLES}]"
    c.first_stage.dropout = c.denoiser.dropout = c.classifier.dropout = DROPOUT
    c.first_stage.stats_images = 16
    c.first_stage.discriminator.start = 3
    if config_lib.has_null(c):
        c.cond_drop_rate = 0.2
    for block in (c.first_stage.train, c.train, c.classifier.train):
        block.update(steps=min(block.steps, 1) * steps, picture_every=0)
        block.update(log_every=1, checkpoint_every=checkpoint_every)
    c.sample.nearest = False
    return config_lib.check(ConfigDict(c).lock())
