"""Between the stages: encodes a data set once, and measures the scale of its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, images, random
from ldm_jax.data.pipeline import CachedSource, epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.first_stage.statistics import LatentStatistics, first_batch_scale
from ldm_jax.training.sharding import batch_sharding, replicated
from ldm_jax.types import Array


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
            transform(config),
            config.train.batch_size,
            flip=flip,
            fields=names,
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


def measure_scale(
    config: ConfigDict,
    frozen: Any,
    batches: Iterator[dict[str, np.ndarray]],
    encode: Callable[[Any], Array],
    key: Array,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Returns the first stage's variables with the latent scale that the config asks for.

    `batches` holds 'image' or 'moments'; the rules are those of `first_stage.latent_scale`.
    """
    rule, module = config.first_stage.latent_scale, builders.build_first_stage(config)
    channels = frozen["latents"]["scale"].shape[0]
    unscaled = frozen | {"latents": _latents(np.zeros(channels), np.ones(channels))}

    def draw(step: int, batch: dict[str, np.ndarray]) -> np.ndarray:
        moments = batch["moments"] if "moments" in batch else encode(batch["image"])
        keys = random.example_keys(jax.random.fold_in(key, step), len(moments))
        return np.asarray(sample(unscaled, moments, keys))

    sample = jax.jit(lambda v, moments, keys: module.apply(v, moments, keys, method="sample"))
    if rule == "stored":
        return frozen
    if rule == "first_batch":
        shift, scale = (
            np.zeros(channels),
            np.full(channels, first_batch_scale(draw(0, next(batches)))),
        )
    elif rule in ("scalar", "channel"):
        statistics, seen = LatentStatistics(channels), 0
        for step, batch in enumerate(batches):
            check()
            latents = draw(step, batch)
            latents = latents[batch["valid"]] if "valid" in batch else latents
            statistics.add(latents)
            seen += len(latents)
            if 0 < config.first_stage.stats_images <= seen:
                break
        shift, scale = statistics.result(rule)
    else:
        shift, scale = np.zeros(channels), np.full(channels, float(rule))
    return frozen | {"latents": _latents(shift, scale)}


def _latents(shift: np.ndarray, scale: np.ndarray) -> dict[str, Array]:
    return {"shift": jnp.asarray(shift, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)}
