"""Where the images of an evaluation come from: a model, files made elsewhere, or a data set."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from ldm_jax import config as config_lib
from ldm_jax.condition_figures import condition_inputs
from ldm_jax.data.bad import TolerantSource
from ldm_jax.data.decode import Limits
from ldm_jax.data.draws import Uniforms
from ldm_jax.data.folder import fingerprint as folder_fingerprint
from ldm_jax.data.folder import list_folder
from ldm_jax.data.order import epoch_order
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.errors import UserError
from ldm_jax.held_out import ExampleReader, choose_rows, fingerprint
from ldm_jax.image_features import Origin, own_rows
from ldm_jax.metrics.image_archive import open_images
from ldm_jax.pipeline import Pipeline
from ldm_jax.sample_settings import weights_digest
from ldm_jax.training.sharding import batch_parts

UNIT = 256  # images at a time, about
_THREADS = 8
_LABELS = 31  # stream of random numbers

# (first, count) -> arguments of `Pipeline.sample` with a row for each sample from number `first` on
Conditions = Callable[[int, int], dict[str, Any]]


# -- a model ----------------------------------------------------------------------------------


def no_conditions(start: int, count: int) -> dict[str, Any]:
    """Of a model that has none."""
    return {}


def data_conditions(config: ConfigDict, reader: ExampleReader, seed: int) -> Conditions:
    """Conditions of examples of the data, which sample n draws by the seed and n.

    All examples come once before one comes again: labels as often as in the data, one caption of an
    image, and maps, layouts, small images and holes as they are in the data.
    """
    with_images = "inpainting" in config.conditioners

    def reduce(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return arrays if with_images else arrays | {"image": arrays["image"][:, :0]}

    def conditions(start: int, count: int) -> dict[str, Any]:
        held = reader.read(choose_rows(seed, start, count, len(reader)), reduce)
        return condition_inputs(config, held)

    return conditions


def uniform_labels(config: ConfigDict, seed: int) -> Conditions:
    """Classes that are all as likely, which sample n draws by the seed and n.

    Raises:
        UserError: the model takes other conditions than a class.
    """
    if tuple(config.conditioners) != ("label",):
        takes = ", ".join(config.conditioners) or "none"
        raise UserError(
            f"--labels=uniform is for models whose only condition is a class; this one has {takes}"
        )
    last = config.label.num_classes - 1

    def conditions(start: int, count: int) -> dict[str, Any]:
        numbers = range(start, start + count)
        drawn = [Uniforms(seed, _LABELS, number).integer(0, last) for number in numbers]
        return {"condition": {"label": np.array(drawn, np.int32)}}

    return conditions


def samples(
    pipe: Pipeline,
    conditions: Conditions,
    count: int,
    seed: int,
    settings: dict[str, Any],
    drawn_from: dict[str, Any],
    batch_size: int | None = None,
) -> Origin:
    """Samples of a model; sample n comes from the seed `seed` + n and condition n alone.

    Args:
        pipe: the model.
        conditions: of the samples.
        count: of samples.
        seed: of the first.
        settings: other arguments of `Pipeline.sample`.
        drawn_from: what the conditions follow from besides the seed.
        batch_size: images at a time; never changes one.
    """
    batch = pipe.config.sample.batch_size if batch_size is None else batch_size
    if batch < 1:
        raise UserError(f"batch size is {batch}, but must be at least 1")
    parts_of_batch = batch_parts(pipe.mesh)
    batch = -(-min(batch, count) // parts_of_batch) * parts_of_batch
    unit = batch * max(1, UNIT // batch)
    side = pipe.config.data.resolution

    def parts(start: int) -> Iterator[np.ndarray]:
        for first in range(start, count, unit):
            valid = min(unit, count - first)
            whole = -(-valid // batch) * batch  # one compiled program for all
            made = pipe.sample(
                range(seed + first, seed + first + whole),
                batch_size=batch,
                **conditions(first, whole),
                **settings,
            )
            yield made[:valid][own_rows(unit, valid)]

    about = {
        "weights": weights_digest(pipe),
        "config": hashlib.sha256(config_lib.to_json(pipe.config).encode()).hexdigest(),
        "seed": seed,
        "conditions": drawn_from,
        **settings,
    }
    return Origin("samples", about, count, (side, side), unit, parts)


# -- files ------------------------------------------------------------------------------------


def sample_files(path: pathlib.Path, count: int) -> Origin:
    """Images made elsewhere: a folder, or an .npz file with them as its first array (arr_0).

    They are taken as they are: of one size, in RGB, with 8 bits. In a folder of the command
    `sample` the numbered ones count.

    Args:
        path: of the folder or file.
        count: the first ones; 0 = all.

    Raises:
        UserError: no such images, fewer than `count`, or images of several sizes, grey, or with
            alpha.
    """
    if path.is_dir():
        return _folder(path, count)
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"{path} is neither a folder of images nor an .npz file")
    archive = open_images(path)
    if archive is None:
        raise UserError(f"{path} has no images (arr_0): it cannot be what is evaluated")
    count, unit = _check_count(path, count, archive.shape[0]), _unit()
    stat = path.stat()
    about = {"file": [str(path.resolve()), stat.st_size, stat.st_mtime_ns]}

    def parts(start: int) -> Iterator[np.ndarray]:
        for first, batch in zip(
            range(start, count, unit), archive.batches(unit, start), strict=False
        ):
            batch = batch[: count - first]
            yield batch[own_rows(unit, len(batch))]

    return Origin(f"images of {path.name}", about, count, archive.shape[1:3], unit, parts)


def _folder(path: pathlib.Path, count: int) -> Origin:
    names = list_folder(path)[0]
    if (path / "samples.json").is_file():  # beside a grid, and pictures of conditions
        names = [name for name in names if pathlib.PurePath(name).stem.isdecimal()]
    count, unit = _check_count(path, count, len(names)), _unit()
    size = _read_rgb(path / names[0]).shape[:2]

    def read(name: str) -> np.ndarray:
        image = _read_rgb(path / name)
        if image.shape[:2] != size:
            sizes = ["x".join(map(str, s)) for s in (image.shape[:2], size)]
            raise UserError(
                f"{path / name} has {sizes[0]} pixels (height x width), but {names[0]} has "
                f"{sizes[1]}: the images must be of one size, so crop and resize them alike"
            )
        return image

    def parts(start: int) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            for first in range(start, count, unit):
                chosen = names[first : min(first + unit, count)]
                chosen = chosen[own_rows(unit, len(chosen))]
                read_in = list(threads.map(read, chosen))
                yield np.stack(read_in) if read_in else np.zeros((0, *size, 3), np.uint8)

    about = {"folder": str(path.resolve()), "files": folder_fingerprint(path)}
    return Origin(f"images in {path.name}", about, count, size, unit, parts)


def _read_rgb(path: pathlib.Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode == "P" and "transparency" not in image.info:
                image = image.convert("RGB")
            if image.mode != "RGB":
                raise UserError(
                    f"{path} has the mode {image.mode}, but must be RGB with 8 bits: repeat grey "
                    "to three channels, and lay images with alpha on a background"
                )
            return np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _check_count(path: pathlib.Path, wanted: int, found: int) -> int:
    if not found:
        raise UserError(f"{path} has no images")
    if wanted > found:
        raise UserError(f"--num_samples={wanted}, but {path} has {found} images: ask for fewer")
    return wanted or found


def _unit() -> int:
    return -(-UNIT // jax.process_count()) * jax.process_count()


# -- a data set -------------------------------------------------------------------------------


def data_images(config: ConfigDict, size: tuple[int, int], count: int = 0) -> Origin:
    """Images of the config's data as training sees them, but without augmentation.

    They are cropped around the centre and resized by the training loader's own code, and not
    mirrored. As in training, another image takes the place of one that cannot be read, and counts.

    Args:
        config: with the data.
        size: height and width of the images.
        count: so many, drawn evenly from all; 0 = all.

    Raises:
        UserError: no such data, or, as they are read, more bad images than config.data.max_bad
            allows.
    """
    data = config.data
    limits = Limits(data.min_side, data.max_pixels)
    source = open_source(data.source, split=data.split, where=data.where, label="", limits=limits)
    source = TolerantSource(source, data.max_bad, None)
    total, unit = len(source), _unit()
    count = min(count or total, total)
    rows = np.sort(epoch_order(0, 0, total)[:count]).tolist()
    transform = ImageTransform(size[0], "center", False)

    def parts(start: int) -> Iterator[np.ndarray]:
        for batch in epoch_batches(
            source,
            transform,
            unit,
            rows=rows[start:],
            size=size,
            replace=True,
            threads=data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            yield batch["image"][batch["valid"]]

    names = json.dumps([source.name(i) for i in rows]).encode()
    about = {name: data[name] for name in ("source", "split", "where")}
    about |= {"size": list(size), "files": fingerprint(data.source)}
    about |= {"images": hashlib.sha256(names).hexdigest(), "rule": "centre crop, bicubic"}
    where = f", {data.where}" if data.where else ""
    title = f"{data.source}, {data.split}{where}"
    return Origin(title, about, count, size, unit, parts)
