"""Losses, step by step, of short trainings that go well: alarms must not go off in any of them.

python -m benchmarks.healthy_curves [--only=unet] [--steps=600]

Writes tests/training/curves/NAME.json: the watched loss of each step, and those of the quarters of
the noise where there are any (None: no example in a quarter). All have small batches, and so noisy
losses; a discriminator starts in the middle of one, and the classifier learns its few images by
heart, after which its loss varies by orders of magnitude.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
from typing import NamedTuple

import jax
from absl import app, flags
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.task_fields import passed_on
from ldm_jax.training import latents as latents_lib
from ldm_jax.training.classifier_steps import classifier_functions
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.spikes import QUARTERS
from ldm_jax.training.steps import diffusion_functions

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "training" / "curves"

_ONLY = flags.DEFINE_string("only", "", "One of the curves; '' = all.")
_STEPS = flags.DEFINE_integer("steps", 600, "Of each training.")


class Curve(NamedTuple):
    """A training: what is trained, its changes to the config, and the metric that is watched."""

    stage: str
    watched: str
    changes: dict


PIXELS = {
    "data.resolution": 16,
    "first_stage.kind": "identity",
    "denoiser.width": 32,
    "denoiser.mult": (1, 2),
    "denoiser.depth": 1,
    "denoiser.attn_downsample": (),
    "train.batch_size": 8,
    "train.lr": 1e-3,
}
AUTOENCODER = {
    "data.resolution": 16,
    "first_stage.width": 16,
    "first_stage.mult": (1, 2),
    "first_stage.depth": 1,
    "first_stage.mid_attn": False,
    "first_stage.norm_groups": 8,
    "first_stage.perceptual_weight": 0.0,
    "first_stage.discriminator.layers": 1,
    "first_stage.discriminator.width": 8,
    "first_stage.train.batch_size": 4,
    "first_stage.train.lr": 1e-3,
}
CURVES = {
    "unet": Curve("diffusion", "loss_simple", PIXELS),
    "unet_two_images": Curve(
        "diffusion",
        "loss_simple",
        PIXELS
        | {
            "seed": 1,
            "train.batch_size": 2,
            "train.warmup_steps": 100,
            "diffusion.predict": "v",
            "diffusion.weighting": "min_snr",
        },
    ),
    "dit_flow": Curve(
        "diffusion",
        "loss_simple",
        PIXELS
        | {
            "seed": 2,
            "denoiser.kind": "dit",
            "denoiser.attn_downsample": (2, 4, 8),
            "denoiser.mult": (1, 2, 3, 4),
            "denoiser.width": 64,
            "denoiser.depth": 2,
            "diffusion.schedule": "flow",
            "diffusion.predict": "flow",
            "diffusion.times": "logit_normal",
            "sample.sampler": "flow_heun",
            "sample.spacing": "linspace",
            "train.optimizer": "muon",
            "train.lr": 0.01,
        },
    ),
    "kl_discriminator": Curve(
        "first_stage",
        "reconstruction_mae",
        AUTOENCODER | {"first_stage.kind": "kl", "first_stage.discriminator.start": 200},
    ),
    "vq_muon": Curve(
        "first_stage",
        "reconstruction_mae",
        AUTOENCODER
        | {
            "seed": 3,
            "first_stage.codes": 64,
            "first_stage.codebook.rule": "ema",
            "first_stage.codebook.reset": 0.05,
            "first_stage.discriminator.start": 100,
            "first_stage.discriminator.lecam": 0.001,
            "first_stage.train.optimizer": "muon",
            "first_stage.train.lr": 0.01,
            "first_stage.train.warmup_steps": 20,
        },
    ),
    "classifier": Curve(
        "classifier",
        "loss",
        PIXELS
        | {
            "seed": 4,
            "data.where": "category=Flags",
            "data.label": "subcategory",
            "label.num_classes": 3,
            "classifier.width": 32,
            "classifier.mult": (1, 2),
            "classifier.depth": 1,
            "classifier.attn_downsample": (),
            "classifier.train.batch_size": 8,
            "classifier.train.lr": 1e-3,
        },
    ),
}
FUNCTIONS = {
    "diffusion": diffusion_functions,
    "first_stage": first_stage_functions,
    "classifier": classifier_functions,
}


def make_config(curve: Curve, steps: int) -> ConfigDict:
    """The whole config of a training."""
    c = config_lib.get_config()
    c.update_from_flattened_dict(curve.changes)
    if curve.stage == "classifier":
        c.data.fields = ("label",)
        c.classifier.train.steps = steps
    c.train.steps = steps
    return config_lib.check(c)


def record(curve: Curve, steps: int) -> dict[str, list[float | None]]:
    """The losses of each step, by name."""
    config = make_config(curve, steps)
    block = {"diffusion": config.train, "first_stage": config.first_stage.train}
    block = block.get(curve.stage, config.classifier.train)
    init, step = FUNCTIONS[curve.stage](config)
    frozen = {} if curve.stage == "first_stage" else {"latents": latents_lib.unscaled(config)}
    source = open_source(config.data.source, where=config.data.where, label=config.data.label)
    batches = Batches(
        source,
        latents_lib.transform(config),
        batch_size=block.batch_size,
        seed=config.seed,
        fields=passed_on(config.data.fields),
        threads=2,
    )
    key = jax.random.key(config.seed)
    state = jax.jit(functools.partial(init, jax.random.fold_in(key, 0)))()
    run = jax.jit(step, donate_argnums=0)
    names, columns = (curve.watched, *QUARTERS), {}
    for batch in itertools.islice(batches, steps):
        state, metrics = run(state, frozen, batch, jax.random.fold_in(key, 1))
        row = jax.device_get({name: metrics[name] for name in names if name in metrics})
        for name, value in row.items():
            value = float(f"{value:.5g}")
            columns.setdefault(name, []).append(value if math.isfinite(value) else None)
    return columns


def main(_: list[str]) -> None:
    """Trains and writes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, curve in CURVES.items():
        if _ONLY.value in ("", name):
            columns = record(curve, _STEPS.value)
            text = json.dumps({"watched": curve.watched, "steps": columns})
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            print(f"{name}: from {columns[curve.watched][0]} to {columns[curve.watched][-1]}")


if __name__ == "__main__":
    app.run(main)
