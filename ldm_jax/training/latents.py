"""Between the stages: encodes a data set once, and measures the scale of its latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, images
from ldm_jax import config as config_lib
from ldm_jax.data.pipeline import Batch, Batches, CachedSource, epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.data.task_fields import TaskTransform, make_transform, passed_on
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.first_stage.statistics import RULES, LatentStatistics
from ldm_jax.training.sharding import batch_sharding, replicated
from ldm_jax.types import Array

KEY = 2  # of the draws here, derived from a run's; its stages have 1, 3 and 4


def encoder(config: ConfigDict, frozen: Any, mesh: jax.sharding.Mesh) -> Callable[[Any], Array]:
    """Returns images (B, H, W, 3) uint8 -> moments (B, h, w, M), compiled once."""
    module, everywhere = builders.build_first_stage(config), replicated(mesh)

    def moments(frozen: Any, image: Array) -> Array:
        return module.apply(frozen, images.to_float(image), method="moments")

    compiled = jax.jit(moments, in_shardings=(everywhere, batch_sharding(mesh)))
    frozen = jax.device_put(frozen, everywhere)
    return lambda image: compiled(frozen, image)


def transform(config: ConfigDict) -> ImageTransform:
    """Returns what the config asks to be done to each image."""
    return ImageTransform(config.data.resolution, config.data.crop, config.data.flip)


def task_transform(config: ConfigDict) -> TaskTransform:
    """Returns that, and what makes the fields of the diffusion model's conditions."""
    return make_transform(transform(config), config.data.fields, config)


def encode_source(
    config: ConfigDict, source: Source, encode: Callable[[Any], Array], check: Callable[[], None]
) -> CachedSource:
    """Encodes every image, and its mirror image if flips are on, into host memory.

    `check` is called between batches and may raise to leave.
    """
    names, flips = config.data.fields, (False, True) if config.data.flip else (False,)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    moments = []
    for flip in flips:
        moments.append([])
        for batch in epoch_batches(
            source,
            task_transform(config),
            config.train.batch_size,
            flip=flip,
            fields=passed_on(names),
            threads=config.data.threads,
        ):
            check()
            valid = batch["valid"]
            moments[-1].append(np.asarray(encode(batch["image"]))[valid])
            if not flip:
                for name in names:
                    parts[name].append(batch[name][valid])
    cached = np.stack([np.concatenate(one) for one in moments], axis=1)
    fields = {name: np.concatenate(values) for name, values in parts.items()}
    return CachedSource(source, {"moments": cached}, fields)


def draw_latents(first_stage: nn.Module, frozen: Any, batch: Batch, keys: Array) -> Array:
    """The scaled latents (B, h, w, C) that a step of training sees.

    Each is drawn from its posterior by its key in `keys` (B,), of the batch's cached 'moments' or
    else of its 'image'; `frozen` holds the variables of the first stage.
    """
    moments = batch.get("moments")
    if moments is None:
        image = images.to_float(batch["image"])
        moments = first_stage.apply(frozen, image, method="moments")
    return jax.lax.stop_gradient(first_stage.apply(frozen, moments, keys, method="sample"))


def first_batch(config: ConfigDict, source: Source) -> Iterator[Batch]:
    """The one batch of images that the diffusion model sees first."""
    size, seed = config.train.batch_size, config.seed
    yield Batches(source, transform(config), batch_size=size, seed=seed).batch(0)


def one_pass(config: ConfigDict, source: Source, count: int = 0) -> Iterator[Batch]:
    """Batches of the first `count` images (0: all), in order and without augmentation."""
    count = min(count or len(source), len(source))
    size, threads = min(config.train.batch_size, count), config.data.threads
    return epoch_batches(source, transform(config), size, count=count, threads=threads)


def measure(
    config: ConfigDict,
    frozen: Any,
    batches: Iterator[Batch],
    mesh: jax.sharding.Mesh,
    check: Callable[[], None] = lambda: None,
) -> LatentStatistics:
    """Measures the unscaled latents of images, each drawn once from its posterior.

    A draw follows from the config's seed and the image's place in the pass: neither the size of
    the batches nor the number of devices changes a result, up to rounding.

    Args:
        config: of the first stage.
        frozen: its variables; their shift and scale do not matter.
        batches: 'image' (B, H, W, 3) uint8, and 'valid' (B,) where only some count.
        mesh: the devices.
        check: called between batches; may raise to leave.
    """
    module, channels = builders.build_first_stage(config), config_lib.latent_channels(config)
    everywhere, split = replicated(mesh), batch_sharding(mesh)
    key = jax.random.fold_in(jax.random.key(config.seed), KEY)

    def draw(variables: Any, image: Array, places: Array) -> Array:
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
        moments = module.apply(variables, images.to_float(image), method="moments")
        return module.apply(variables, moments, keys, method="sample")

    compiled = jax.jit(draw, in_shardings=(everywhere, split, split))
    unscaled = {"latents": _latents(np.zeros(channels), np.ones(channels))}
    variables = jax.device_put(frozen | unscaled, everywhere)
    statistics = LatentStatistics(channels)
    with contextlib.closing(batches):
        for batch in batches:
            check()
            size = len(batch["image"])
            rows = np.arange(-(-size // mesh.size) * mesh.size)  # so that the devices divide them
            image = batch["image"][np.minimum(rows, size - 1)]
            latents = np.asarray(compiled(variables, image, statistics.images + rows))[:size]
            statistics.add(latents[batch["valid"]] if "valid" in batch else latents)
    return statistics


def rescale(frozen: Any, rule: str, statistics: LatentStatistics | None = None) -> dict[str, Any]:
    """Returns a first stage's variables with the scale of a rule of `first_stage.latent_scale`.

    `statistics` are those that a rule in `RULES` is made of.

    Raises:
        UserError: the latents do not vary, or are not finite.
    """
    if rule == "stored":
        return frozen
    channels = len(frozen["latents"]["scale"])
    shift, scale = np.zeros(channels), np.ones(channels)
    if rule in RULES:
        shift, scale = statistics.result(rule)
    else:
        scale = scale * float(rule)
    return frozen | {"latents": _latents(shift, scale)}


def record(frozen: Any, rule: str, statistics: LatentStatistics | None = None) -> dict[str, Any]:
    """What `latents.json` says of a first stage's variables, as `rescale` gave them.

    'images', 'mean', 'std', 'channel_mean' and 'channel_std' of the unscaled latents ('images' 0
    alone where the rule measures nothing), 'rule', and its 'shift' and 'scale' by channel.
    """
    latents = {name: np.asarray(frozen["latents"][name]).tolist() for name in ("shift", "scale")}
    return {"rule": rule, **(statistics.summary() if statistics else {"images": 0}), **latents}


def _latents(shift: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    return {"shift": np.asarray(shift, np.float32), "scale": np.asarray(scale, np.float32)}
