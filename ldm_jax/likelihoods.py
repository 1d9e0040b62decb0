"""Measures how likely a workdir's model makes held-out images, and records it."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, images, random
from ldm_jax import pipeline_conditions as conditions
from ldm_jax import workdir as files
from ldm_jax.arguments import check_seeds
from ldm_jax.batches import in_batches
from ldm_jax.condition_figures import holes
from ldm_jax.diffusion import likelihood
from ldm_jax.diffusion.guidance import make_denoise
from ldm_jax.diffusion.schedule import Process
from ldm_jax.errors import UserError
from ldm_jax.fields import specify
from ldm_jax.held_out import Examples, choose_data, count_trained, read_examples
from ldm_jax.networks import Networks, Variables
from ldm_jax.pipeline import Pipeline
from ldm_jax.types import Array, Condition

NUM_IMAGES, STEPS = 128, 50  # unless one says otherwise
VARIANCE = "beta"  # of the bound
PARTS = ("prior", "kl", "decoder")


class Request(NamedTuple):
    """What the user asks for; '' is the workdir's own setting.

    Attributes:
        source: of the data.
        split: the held-out part of the data.
        num_images: how many; 0 = 128, or all if there are fewer.
        seed: image i has the seed + i, from which its latents, noise and probe are drawn.
        steps: of the ODE, and network calls of the bound, at least 2 and no more than time steps;
            None = 50.
        batch_size: images at a time; never changes a figure.
    """

    source: str = ""
    split: str = ""
    num_images: int = 0
    seed: int = 0
    steps: int | None = None
    batch_size: int | None = None


def evaluate_likelihood(workdir: pathlib.Path, request: Request) -> dict[str, Any]:
    """Measures the likelihood of held-out images under their own conditions, without guidance.

    Of a model of latents it is that of latents drawn from the first stage's posterior, as training
    draws them, and not that of pixels; of a model of pixels that of their 8 bits.

    Returns:
        a record that JSON can hold: for 'ode', and 'vlb' of a discrete schedule, 'bits_per_dim' and
        its 'standard_error' over the images, and what they are of.

    Raises:
        UserError: no whole model there, no such data, fewer than 2 images, or no finite figure.
    """
    steps = STEPS if request.steps is None else request.steps
    if steps < 1:
        raise UserError(f"--steps is {steps}, but must be at least 1")
    pipe = files.load(workdir)
    for part in ("denoiser", "conditioner", "first_stage"):
        if part not in pipe.variables:
            raise UserError(f"{workdir} has no weights of its {part}: train or import the whole")
    config, split = choose_data(pipe.config, request.source, request.split)
    own = config.data.source == pipe.config.data.source
    # Other data may number their classes otherwise.
    names = None if own else pipe.label_names
    held = read_examples(config, workdir, split, request.num_images or NUM_IMAGES, names)
    count = len(held.images)
    if count < 2:
        raise UserError(f"{count} images are too few (--num_images, --split={split}): give 2")
    notes = []
    seen = count_trained(config, held.names, split) if own else 0
    if seen:
        notes.append(
            f"{seen} of the {count} images are trained on: --split or "
            "config.first_stage.eval.split may name a part that is held out"
        )
    for line in notes:
        print(f"note: {line}")
    found, process = _measure(pipe, held, request, steps)
    scale = np.asarray(pipe.variables["first_stage"]["latents"]["scale"], np.float64)
    pixels = pipe.config.first_stage.kind == "identity"
    alpha, sigma = process.marginal(np.asarray([process.first]))
    record: dict[str, Any] = {
        "of": "8-bit pixels" if pixels else "latents",
        "shape": list(pipe.latent_shape),
        "log2_scale": float(np.log2(np.abs(scale)).mean()),
        "ode": _summary(found[:, 0]) | {"steps": steps, "noise": float((sigma / alpha)[0])},
    }
    if process.discrete:
        parts = {name: float(x) for name, x in zip(PARTS, found[:, 1:].mean(0), strict=True)}
        record["vlb"] = _summary(found[:, 1:].sum(1)) | parts
        record["vlb"] |= {"calls": _times(process, steps) + 1, "variance": VARIANCE}
    record |= {
        "num_images": count,
        "source": config.data.source,
        "split": split,
        "where": config.data.where,
        "seed": request.seed,
        "checkpoint_step": pipe.step,
        "notes": notes,
    }
    return record


def _times(process: Process, steps: int) -> int:
    """Time steps of the bound besides t = 0."""
    return min(max(steps - 1, 1), process.steps - 1)


def _summary(bits: np.ndarray) -> dict[str, float]:
    if not np.isfinite(bits).all():
        raise UserError("the likelihood is not finite: the model seems to hold NaNs")
    error = bits.std(ddof=1) / np.sqrt(len(bits))
    return {"bits_per_dim": float(bits.mean()), "standard_error": float(error)}


def _measure(
    pipe: Pipeline, held: Examples, request: Request, steps: int
) -> tuple[np.ndarray, Process]:
    """Returns bits per dimension (N, 1 or 4), of the ODE and of the parts of the bound."""
    config, process = pipe.config, builders.build_schedule(pipe.config)
    count, size = len(held.images), held.images.shape[1:3]
    seeds = check_seeds(request.seed + np.arange(count))
    given = {
        name: held.fields[name]
        for name in specify(config)
        if name in held.fields and name != "mask"  # which is made below, with the image in it
    }
    if "inpainting" in config.conditioners:
        given |= conditions.inpainting_fields(held.images, holes(held))
    given = conditions.noise_low_res(config, given, None, seeds, size)
    fields = conditions.check_condition(config, given, count, size, None)
    measure = functools.partial(measure_batch, Networks(config), process, steps)
    found = in_batches(
        jax.jit(measure),
        pipe.variables,
        {"image": held.images, "seeds": seeds, "fields": fields},
        (),
        config.sample.batch_size if request.batch_size is None else request.batch_size,
        pipe.mesh,
    )
    return found.astype(np.float64), process


def measure_batch(
    networks: Networks, process: Process, steps: int, variables: Variables, batch: dict[str, Any]
) -> Array:
    """Bits per dimension (B, 1), of the ODE, or (B, 4), with the bound's prior, KL and decoder.

    They are of unscaled latents, or of 8-bit pixels.

    Args:
        networks: of a model.
        process: its own.
        steps: see `Request`.
        variables: of the networks.
        batch: 'image' (B, H, W, 3) uint8, 'seeds' (B,), and 'fields' of the condition or None.
    """
    config: ConfigDict = networks.config
    of_pixels = config.first_stage.kind == "identity"
    first_stage = functools.partial(networks.first_stage.apply, variables["first_stage"])
    shift, scale = (variables["first_stage"]["latents"][name] for name in ("shift", "scale"))
    keys = random.seed_keys(batch["seeds"])
    pixels = images.to_float(batch["image"])

    def latents(pixels: Array) -> Array:
        moments = first_stage(pixels, method="moments")
        return first_stage(moments, random.fold_in(keys, 0), method="sample")

    z = latents(pixels)
    cond = Condition()
    if batch["fields"] is not None:
        cond = networks.condition(variables, batch["fields"])
    denoise = make_denoise(
        functools.partial(networks.denoise, variables),
        config.diffusion.predict,
        cond,
        sigma_data=config.diffusion.sigma_data,
    )
    probes = likelihood.rademacher(random.fold_in(keys, 1), 1, z.shape[1:])
    smooth = latents(likelihood.dequantized(random.fold_in(keys, 2), pixels)) if of_pixels else z
    rows = likelihood.ode_rows(process, steps)
    ode = likelihood.unscaled(likelihood.ode_nll(denoise, smooth, probes, rows), scale)
    if of_pixels:
        ode = ode + likelihood.LEVEL_BITS
    if not process.discrete:
        return ode[:, None]

    def pixel_nll(mean: Array, std: Array) -> Array:
        along = scale.reshape(1, 1, 1, -1)
        mean = mean / along + shift.reshape(1, 1, 1, -1)
        return likelihood.pixel_nll(pixels, mean, std / jnp.abs(along))

    bound = likelihood.variational_bound(
        denoise,
        z,
        random.fold_in(keys, 3),
        process,
        _times(process, steps),
        VARIANCE,
        pixel_nll if of_pixels else None,
    )
    if not of_pixels:
        bound = bound._replace(decoder=likelihood.unscaled(bound.decoder, scale))
    return jnp.stack([ode, *bound], axis=1)
