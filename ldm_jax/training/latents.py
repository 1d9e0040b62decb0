"""Between the stages: encodes a data set once, and measures the scale of its latents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, images
from ldm_jax import config as config_lib
from ldm_jax.data.buckets import Buckets, Size
from ldm_jax.data.latents_source import LatentsTransform, latents_folder, make_latents_transform
from ldm_jax.data.pipeline import Batch, Batches, CachedSource, epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.data.task_fields import TaskTransform, make_transform, passed_on
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.first_stage.statistics import RULES, LatentStatistics
from ldm_jax.training.sharding import (
    batch_parts,
    batch_sharding,
    gather,
    local_part,
    put,
    state_shardings,
    whole_batch,
)
from ldm_jax.types import Array

RECORDED_IMAGES = 10_000  # at most so many are measured where the latent scale does not need it
KEY = 2  # of the draws here, derived from a run's; its stages have 1, 3 and 4


def encoder(config: ConfigDict, frozen: Any, mesh: jax.sharding.Mesh) -> Callable[[Any], Array]:
    """Returns images (b, H, W, 3) uint8 -> moments (B, h, w, M) on the host, compiled once.

    Of several processes, each gives its part of a batch, and gets the moments of all of it.
    """
    module, split = builders.build_first_stage(config), batch_sharding(mesh)

    def moments(frozen: Any, image: Array) -> Array:
        return module.apply(frozen, images.to_float(image), method="moments")

    compiled = jax.jit(moments, out_shardings=split)
    frozen = put(frozen, state_shardings(frozen, mesh))
    move = functools.partial(jax.make_array_from_process_local_data, split)
    return lambda image: gather(compiled(frozen, move(image)))


def transform(config: ConfigDict) -> ImageTransform:
    """Returns what the config asks to be done to each image."""
    return ImageTransform(config.data.resolution, config.data.crop, config.data.flip)


def task_transform(config: ConfigDict) -> TaskTransform | LatentsTransform:
    """Returns that, and what makes the fields of the diffusion model's conditions.

    For stored latents it is what picks from them.
    """
    if latents_folder(config.data.source):
        return make_latents_transform(config, config.data.fields)
    return make_transform(transform(config), config.data.fields, config)


def encode_source(
    config: ConfigDict,
    source: Source,
    encode: Callable[[Any], Array],
    check: Callable[[], None],
    buckets: Buckets | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> CachedSource:
    """Encodes every image, and its mirror image if flips are on, into host memory.

    With `buckets` each has the size of its own. `check` is called between batches and may raise to
    leave. Of several processes, each reads its part along `mesh` and gets everything.
    """
    if buckets is None:
        moments, fields = _encode_rows(config, source, encode, check, mesh)
        return CachedSource(source, {"moments": moments}, fields)
    moments = [None] * len(source)
    fields = {name: [None] * len(source) for name in config.data.fields}
    for size, rows in zip(buckets.sizes, buckets.members, strict=True):
        if len(rows) == 0:
            continue
        encoded, made = _encode_rows(config, source, encode, check, mesh, rows, size)
        for place, row in enumerate(rows):
            moments[row] = encoded[place]
            for name, values in made.items():
                fields[name][row] = values[place]
    return CachedSource(source, {"moments": moments}, fields)


def _encode_rows(
    config: ConfigDict,
    source: Source,
    encode: Callable[[Any], Array],
    check: Callable[[], None],
    mesh: jax.sharding.Mesh | None,
    rows: Sequence[int] | None = None,
    size: Size | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Moments (N, flips, h, w, M) and fields of the images at the places `rows`, or of all."""
    names, flips = config.data.fields, (False, True) if config.data.flip else (False,)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    moments, (index, processes) = [], (0, 1) if mesh is None else local_part(mesh)
    for flip in flips:
        moments.append([])
        for batch in epoch_batches(
            source,
            task_transform(config),
            config.train.batch_size,
            rows=rows,
            size=size,
            flip=flip,
            fields=passed_on(names),
            replace=True,
            threads=config.data.threads,
            process_index=index,
            process_count=processes,
        ):
            check()
            encoded = np.asarray(encode(batch["image"]))
            batch = whole_batch({name: batch[name] for name in (*names, "valid")}, mesh)
            valid = batch["valid"]
            moments[-1].append(encoded[valid])
            if not flip:
                for name in names:
                    parts[name].append(batch[name][valid])
    cached = np.stack([np.concatenate(one) for one in moments], axis=1)
    return cached, {name: np.concatenate(values) for name, values in parts.items()}


def draw_latents(first_stage: nn.Module, frozen: Any, batch: Batch, keys: Array) -> Array:
    """The scaled latents (B, h, w, C) that a step of training sees.

    Each is drawn from its posterior by its key in `keys` (B,), of the batch's cached 'moments' or
    else of its 'image'; `frozen` holds the variables of the first stage.
    """
    moments = batch.get("moments")
    if moments is None:
        image = images.to_float(batch["image"])
        moments = first_stage.apply(frozen, image, method="moments")
    moments = moments.astype(jnp.float32)  # they may be stored in 16 bits
    return jax.lax.stop_gradient(first_stage.apply(frozen, moments, keys, method="sample"))


def first_batch(
    config: ConfigDict, source: Source, mesh: jax.sharding.Mesh | None = None
) -> Iterator[Batch]:
    """The one batch of images that the diffusion model sees first; each process gets its part."""
    options = dict(batch_size=config.train.batch_size, seed=config.seed)
    yield Batches(source, transform(config), **options, **_part(mesh)).batch(0)


def one_pass(
    config: ConfigDict, source: Source, count: int = 0, mesh: jax.sharding.Mesh | None = None
) -> Iterator[Batch]:
    """Batches of the first `count` images (0: all), in order and without augmentation; each
    process gets its part."""
    count = min(count or len(source), len(source))
    size, unit = min(config.train.batch_size, count), 1 if mesh is None else batch_parts(mesh)
    options = dict(count=count, threads=config.data.threads, **_part(mesh))
    return epoch_batches(source, transform(config), -(-size // unit) * unit, **options)


def _part(mesh: jax.sharding.Mesh | None) -> dict[str, int]:
    """What this process reads of each batch, as `Batches` takes it."""
    index, count = (0, 1) if mesh is None else local_part(mesh)
    return {"process_index": index, "process_count": count}


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
        batches: this process's part of 'image' (B, H, W, 3) uint8, and of 'valid' (B,) where only
            some count.
        mesh: the devices.
        check: called between batches; may raise to leave.
    """
    module, channels = builders.build_first_stage(config), config_lib.latent_channels(config)
    move = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    index, processes = local_part(mesh)
    unit = batch_parts(mesh) // processes
    key = jax.random.fold_in(jax.random.key(config.seed), KEY)

    def draw(variables: Any, image: Array, places: Array) -> Array:
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
        moments = module.apply(variables, images.to_float(image), method="moments")
        return module.apply(variables, moments, keys, method="sample")

    compiled = jax.jit(draw)
    unscaled = {"latents": _latents(np.zeros(channels), np.ones(channels))}
    frozen = frozen | unscaled
    variables = put(frozen, state_shardings(frozen, mesh))
    statistics = LatentStatistics(channels)
    with contextlib.closing(batches):
        for batch in batches:
            check()
            size = len(batch["image"])
            # So that the devices divide them; those of several processes always do.
            rows = np.arange(-(-size // unit) * unit, dtype=np.int32)
            image = batch["image"][np.minimum(rows, size - 1)]
            places = np.int32(statistics.images + index * size) + rows
            latents = gather(compiled(variables, move(image), move(places)))[: size * processes]
            valid = whole_batch({name: batch[name] for name in batch if name == "valid"}, mesh)
            statistics.add(latents[valid["valid"]] if valid else latents)
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


def unscaled(config: ConfigDict) -> dict[str, np.ndarray]:
    """The variables 'latents' of a first stage whose latents are not scaled yet."""
    channels = config_lib.latent_channels(config)
    return _latents(np.zeros(channels), np.ones(channels))


def scaled(
    config: ConfigDict,
    frozen: dict[str, Any],
    source: Source,
    mesh: jax.sharding.Mesh,
    check: Callable[[], None],
    trained: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the variables with the scale that the config asks for, and what it is made of.

    `check` is that of `measure`; `trained` measures some for the record in any case.
    """
    rule, statistics = config.first_stage.latent_scale, None
    if rule in RULES or trained:
        count = config.first_stage.stats_images
        if rule not in RULES:  # for the record
            count = count or RECORDED_IMAGES
        batches = (
            first_batch(config, source, mesh)
            if rule == "first_batch"
            else one_pass(config, source, count, mesh)
        )
        statistics = measure(config, frozen, batches, mesh, check)
        print(
            f"latents: mean {statistics.mean:.4f}, standard deviation {statistics.std:.4f} "
            f"over {statistics.images} images"
        )
    frozen = rescale(frozen, rule, statistics)
    print(f"latents: {rule} scale, mean {np.mean(frozen['latents']['scale']):.4f}")
    return frozen, record(frozen, rule, statistics)


def _latents(shift: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    return {"shift": np.asarray(shift, np.float32), "scale": np.asarray(scale, np.float32)}
