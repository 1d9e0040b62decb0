"""Encodes a data set once and for all, to files that any number of runs train from.

Work is divided by shards: each process writes its own, and a shard that is there is not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from ldm_jax import builders, images, tensors
from ldm_jax.data import latents_index
from ldm_jax.data.latents_index import TEXT_CONTEXT, TEXT_MASK, Index, Spec
from ldm_jax.data.latents_variants import Variants, check_storable
from ldm_jax.data.pipeline import Batch, check_fields, epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.data.task_fields import columns, passed_on
from ldm_jax.errors import UserError
from ldm_jax.training.latents import transform as image_transform
from ldm_jax.training.sharding import AXES, batch_sharding, replicated
from ldm_jax.training.text_outputs import Embed, padded

SHARD_BYTES = 2**28  # of a shard, unless its number is given
SECONDS = 10  # between two lines of progress
# Examples are read one at a time.
_WRITER = "group_size:1"
# Images (B, H, W, 3) uint8 -> moments (B, h, w, M), and perhaps more of the last one
Encode = Callable[[np.ndarray], jax.Array]


class Settings(NamedTuple):
    """What the command line says.

    Attributes:
        crops: random crops of each image.
        dtype: of moments and of text encoders' outputs.
        shards: number of files; 0 = of about SHARD_BYTES each.
        batch_size: images at a time on this host's devices.
        process_index: this process.
        process_count: number of processes that share the work.
    """

    crops: int = 1
    dtype: str = "float16"
    shards: int = 0
    batch_size: int = 16
    process_index: int = 0
    process_count: int = 1


def check_settings(config: ConfigDict, settings: Settings) -> None:
    """Refuses what cannot be stored.

    Raises:
        UserError: a field that is made anew each time, crops of a centred crop, or a number or a
            type that cannot be.
    """
    for name, least in (("crops", 1), ("shards", 0), ("batch_size", 1)):
        if getattr(settings, name) < least:
            raise UserError(f"--{name} is {getattr(settings, name)}, but must be at least {least}")
    if settings.dtype not in latents_index.DTYPES:
        known = ", ".join(latents_index.DTYPES)
        raise UserError(f"--dtype is '{settings.dtype}': choose from {known}")
    if settings.crops > 1 and config.data.crop == "center":
        raise UserError("--crops needs config.data.crop='random'; there is only one centred crop")
    if config.data.buckets:
        raise UserError("config.data.buckets cannot be stored, only one size: set it to ()")
    check_storable(config)


def make_index(
    config: ConfigDict,
    source: Source,
    encode: Encode,
    settings: Settings,
    first_stage: str,
    vocabulary: str = "",
    embed: Embed | None = None,
    text_encoder: str = "",
) -> Index:
    """Says what will be stored, from the first example; the digests are those of `Index`."""
    fields = tuple(config.data.fields)
    check_fields(source, columns(fields))
    flips = 1 + config.data.flip
    index = Index(
        count=len(source),
        shards=1,
        arrays=(),
        flips=flips,
        crops=settings.crops,
        fields=fields,
        made_of={"data.source": config.data.source} | latents_index.made_of(config, fields),
        first_stage=first_stage,
        vocabulary=vocabulary,
        text_encoder=text_encoder,
        label_names=source.label_names,
        num_labels=source.num_labels,
    )
    example = next(_examples(config, source, encode, settings, range(1), embed))
    stored = {"moments": settings.dtype, TEXT_CONTEXT: settings.dtype, "label": "int32"}
    stored["segmentation"] = _least_type(config.segmentation.num_classes)
    specs = []
    for name, array in example.items():
        varies = name in ("tokens", "boxes", TEXT_CONTEXT, TEXT_MASK)
        shape = (None, *array.shape[1:]) if varies else array.shape
        specs.append(Spec(name, shape, stored.get(name, array.dtype.name)))
    index = dataclasses.replace(index, arrays=tuple(specs))
    shards = settings.shards or max(
        # All processes have something to do, and a small set is not in crumbs.
        min(settings.process_count, len(source)),
        -(-index.count * index.bytes() // SHARD_BYTES),
    )
    if shards > len(source):
        raise UserError(f"--shards is {shards}, but there are {len(source)} images")
    return dataclasses.replace(index, shards=shards)


def _least_type(classes: int) -> str:
    return next(t for t in ("uint8", "uint16", "int32") if classes - 1 <= np.iinfo(t).max)


def my_shards(index: Index, settings: Settings) -> list[int]:
    """The shards of this process: every `process_count`-th."""
    return list(range(settings.process_index, index.shards, settings.process_count))


def write_shards(
    folder: pathlib.Path,
    index: Index,
    config: ConfigDict,
    source: Source,
    encode: Encode,
    settings: Settings,
    check: Callable[[], None],
    embed: Embed | None = None,
) -> None:
    """Writes the shards of this process that are not there yet.

    `check` is called between batches and may raise to leave; what is left of a shard is made again.

    Raises:
        UserError: an example cannot be read, or its moments do not fit the type.
    """
    shards = my_shards(index, settings)
    missing = [shard for shard in shards if not (folder / index.file(shard)).is_file()]
    total = sum(len(index.rows(shard)) for shard in missing)
    begin = printed = time.perf_counter()
    done = 0
    if len(missing) < len(shards):
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are there", flush=True)
    for shard in missing:
        path = folder / index.file(shard)
        temporary = path.with_name(path.name + ".tmp")
        writer = ArrayRecordWriter(str(temporary), _WRITER)
        try:
            for example in _examples(config, source, encode, settings, index.rows(shard), embed):
                check()
                record = latents_index.pack(example, index.arrays)
                with _writing(temporary):
                    writer.write(record)
                done += 1
                if time.perf_counter() - printed > SECONDS:
                    printed = time.perf_counter()
                    rate = done / (printed - begin)
                    print(f"encoded {done} of {total} images, {rate:.0f} a second", flush=True)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error is the one that counts
                writer.close()
            raise
        with _writing(temporary):
            writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the name must not outlive a crash without its bytes
        os.replace(temporary, path)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Turns what ArrayRecord says of a file into a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def _examples(
    config: ConfigDict,
    source: Source,
    encode: Encode,
    settings: Settings,
    rows: range,
    embed: Embed | None,
) -> Iterator[dict[str, np.ndarray]]:
    """What is stored of the examples at the places `rows`, as arrays."""
    fields = tuple(config.data.fields)
    variants = Variants(image_transform(config), settings.crops, config, fields)
    shape = (1 + config.data.flip, settings.crops)
    batches = epoch_batches(
        source,
        variants,
        -(-settings.batch_size // (shape[0] * shape[1])),
        rows=rows,
        fields=passed_on(fields),
        replace=True,
        threads=config.data.threads,
    )
    finish = lambda batch, moments: _finish(batch, moments, shape, settings.dtype, embed)  # noqa: E731
    waiting = None
    for batch in batches:
        pixels = batch.pop("image")
        # The devices work on this batch while the one before is written.
        moments = encode(pixels.reshape(-1, *pixels.shape[2:]))
        if waiting:
            yield from finish(*waiting)
        waiting = batch, moments
    yield from finish(*waiting)


def _finish(
    batch: Batch, moments: jax.Array, shape: tuple[int, int], dtype: str, embed: Embed | None
) -> Iterator[dict[str, np.ndarray]]:
    """Single examples of a batch and its moments (B * flips * crops, h, w, M)."""
    count = len(batch["valid"]) * shape[0] * shape[1]
    whole = np.asarray(moments)[:count].astype(jnp.dtype(dtype))
    if not np.isfinite(whole.astype(np.float32)).all():
        raise UserError(
            f"moments of the first stage are beyond the range of {dtype}, or not finite: use "
            "--dtype=float32, or check the first stage"
        )
    valid = batch.pop("valid")
    batch.pop("index")
    whole = whole.reshape(len(valid), *shape, *whole.shape[1:])
    outputs = _embedded(batch["tokens"][valid], embed) if embed else {}
    for i in np.flatnonzero(valid):
        example = {"moments": whole[i]}
        for name, values in batch.items():
            value = np.asarray(values[i])
            if name in ("segmentation", "low_res"):
                value = value.reshape(*shape, *value.shape[1:])
            example[name] = value
        yield example | {name: values[i] for name, values in outputs.items()}


def _embedded(tokens: Sequence[np.ndarray], embed: Embed) -> dict[str, list[np.ndarray]]:
    """The outputs for each example's captions (K, L), of which each has its own number K."""
    ends = np.cumsum([len(rows) for rows in tokens])[:-1]
    outputs = embed(np.concatenate(list(tokens)))
    return {name: np.split(array, ends) for name, array in outputs.items()}


def moments_encoder(config: ConfigDict, frozen: Any, mesh: Mesh) -> Encode:
    """Returns images (B, H, W, 3) uint8 -> moments (B, h, w, M) for any B, and
    of the last image again until the devices divide their number."""
    module, everywhere = builders.build_first_stage(config), replicated(mesh)

    def moments(frozen: Any, image: jax.Array) -> jax.Array:
        return module.apply(frozen, images.to_float(image), method="moments")

    compiled = jax.jit(moments, in_shardings=(everywhere, batch_sharding(mesh)))
    frozen = jax.device_put(frozen, everywhere)
    return lambda image: compiled(frozen, padded(image, mesh.size))


def digest_of(variables: Any) -> str:
    """The digest of a first stage, whatever the scale of its latents."""
    return tensors.digest(variables.get("params", {}))


def local_mesh() -> Mesh:
    """This host's devices, all along the batch: hosts encode by themselves."""
    devices = np.array(jax.local_devices())[:, None, None]
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
