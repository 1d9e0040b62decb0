"""Measures whether samples are copies of training images: their nearest ones, in three spaces.

The distance of a sample to the nearest training image says little by itself: a flat picture is near
to many. It is therefore compared with that of real images that the model has never seen, of the
same number and under the same conditions.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax import images, memory
from ldm_jax import workdir as files
from ldm_jax.condition_figures import condition_inputs
from ldm_jax.data.bad import TolerantSource
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.errors import UserError
from ldm_jax.extractors import load_extractor
from ldm_jax.held_out import Examples, choose_data, count_trained, read_examples
from ldm_jax.image_features import Origin
from ldm_jax.image_origins import sample_files
from ldm_jax.metrics.features import Extractor
from ldm_jax.metrics.neighbours import calibrated, nearer, no_neighbours
from ldm_jax.perceptual import Perceptual, load_perceptual
from ldm_jax.pipeline import Pipeline
from ldm_jax.preflight import open_data
from ldm_jax.sample_settings import MADE_HERE, described, refuse, sample_settings
from ldm_jax.training import latents

NUM_IMAGES = 256  # unless one says otherwise
LEAST = 20  # held-out images: one of so many is 5 %
TAKEN = 0.05  # share of new real images that the threshold takes for copies
CANDIDATES = 8  # nearest in pixels, and as many by Inception, among which LPIPS chooses
SHOWN = 32  # samples in the picture
SPACES = ("pixels", "lpips", "inception")
_BATCH = 256  # training images at a time
_COMPARED = 16  # images whose candidates are in memory
# Of a value of a pixel: samples alone and with the held-out images, as uint8, and float32 here and
# on the device, which may be this memory; of an image: Inception's features, likewise, and centred.
_BYTES, _FEATURE_BYTES = 2 + 2 * 4, 3 * 4 * 2048


class Request(NamedTuple):
    """What the user asks for; None or '' is the workdir's own setting.

    Attributes:
        samples: a folder or an .npz file of samples made elsewhere; '' samples the model.
        source: of the held-out images.
        split: of the held-out images.
        num_images: held-out images, and samples under their conditions; 0 = 256, or all if there
            are fewer.
        num_training: training images that are searched, the first ones; 0 = all.
        seed: sample i comes from seed + i.
        sampler: see `Pipeline.sample`, as for `steps` and `guidance_scale`.
        batch_size: samples at a time; never changes one.
    """

    samples: str = ""
    source: str = ""
    split: str = ""
    num_images: int = 0
    num_training: int = 0
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None


class Found(NamedTuple):
    """The nearest training image of each of N images in a space.

    Attributes:
        distances: (N,) float64.
        numbers: (N,) twice the place in the source, and 1 more if it is the mirrored image.
    """

    distances: np.ndarray
    numbers: np.ndarray


def evaluate_memorisation(
    workdir: pathlib.Path, request: Request
) -> tuple[dict[str, Any], np.ndarray]:
    """Finds the nearest training images of samples and of held-out real images.

    Distances are the root mean square difference in grey levels, LPIPS, and the distance of
    Inception's features. In pixels and by Inception all training images are searched (and, if
    training mirrors, the mirrored ones); LPIPS chooses among the nearest `CANDIDATES` of both.

    Returns:
        a record that JSON can hold, and a picture (H, W, 3) uint8: the samples that are nearest to
        training images, and below each one its nearest in each space.

    Raises:
        UserError: no whole model there, no such data, fewer than 20 held-out images, held-out
            images that are trained on, or more samples than memory holds.
    """
    if request.samples:
        refuse(request, MADE_HERE, "is of samples that are made here")
    pipe = files.load(workdir)
    config = pipe.config
    held = _held_out(config, workdir, request, pipe.label_names)
    samples, made = _samples(pipe, held, request)
    source = TolerantSource(open_data(config, workdir), config.data.max_bad, None)
    spaces, notes = _networks(config, pipe.mesh)
    digests = {name: network.digest for name, network in spaces.items() if network is not None}
    for line in notes:
        print(f"note: {line}")
    training = Training(config, source, request.num_training)
    queries = np.concatenate([samples, held.images])
    found = search(training, queries, **spaces)
    record, nearness = _figures(found, len(samples))
    shown = np.argsort(nearness, kind="stable")[:SHOWN]
    closest = [
        {"sample": int(i), "as_near": round(float(nearness[i]), 4)}
        | {name: training.name(space.numbers[i]) for name, space in found.items()}
        for i in shown
    ]
    sheet = _picture(training, samples, found, shown)
    record = {
        "spaces": record,
        "num_samples": len(samples),
        "held_out": {
            "num_images": len(held.images),
            "source": request.source or config.data.source,
            "split": choose_data(config, request.source, request.split)[1],
        },
        "training": {
            "num_images": training.count,
            "mirrored": bool(config.data.flip),
            **{name: config.data[name] for name in ("source", "split", "where")},
        },
        **made,
        "networks": digests,
        "closest": closest,
        "notes": notes,
    }
    return record, sheet


def _held_out(
    config: ConfigDict, workdir: pathlib.Path, request: Request, labels: Sequence[str] | None
) -> Examples:
    """Real images that the model has not seen, with what its conditions take."""
    data, split = choose_data(config, request.source, request.split)
    own = data.data.source == config.data.source
    # Other data may number their classes otherwise.
    names = None if own else labels
    held = read_examples(data, workdir, split, request.num_images or NUM_IMAGES, names)
    seen = count_trained(data, held.names, split) if own else 0
    if seen:
        raise UserError(
            f"{seen} of the {len(held.names)} images of --split={split} are trained on: copies are "
            "told by images that are not, so name a part that is held out by --split or "
            "config.first_stage.eval.split"
        )
    if len(held.images) < LEAST:
        raise UserError(
            f"{len(held.images)} held-out images are too few (--num_images, --split={split}): "
            f"{TAKEN:.0%} of them set the threshold, so give {LEAST} at least, better {NUM_IMAGES}"
        )
    return held


def _samples(pipe: Pipeline, held: Examples, request: Request) -> tuple[np.ndarray, dict[str, Any]]:
    """Samples under the conditions of the held-out images, or those of a file; and how made."""
    if request.samples:
        if jax.process_count() > 1:
            raise UserError("--samples are compared with training images by one process: start one")
        origin = sample_files(pathlib.Path(request.samples).expanduser(), 0)
        side = pipe.config.data.resolution
        if tuple(origin.size) != (side, side):
            raise UserError(
                f"{request.samples} has images of {origin.size[0]}x{origin.size[1]}, but training "
                f"images have {side}x{side}"
            )
        _check_memory(origin, len(held.images))
        return np.concatenate(list(origin.parts(0))), {"samples": request.samples}
    for part in ("denoiser", "conditioner", "first_stage"):
        if part not in pipe.variables:
            raise UserError(
                f"the workdir has no weights of its {part}, so there is nothing to sample: train "
                "or import the whole, or give --samples"
            )
    inputs = condition_inputs(pipe.config, held)
    settings = sample_settings(pipe.config, request, inputs.get("condition"))
    seeds = range(request.seed, request.seed + len(held.images))
    made = pipe.sample(seeds, batch_size=request.batch_size, **inputs, **settings)
    return made, described(pipe, request.seed, settings)


def _check_memory(origin: Origin, held: int) -> None:
    """Says what the search takes for samples of a file and `held` images, and refuses too much."""
    total = origin.count + held
    need = total * (_BYTES * math.prod(origin.size) * 3 + _FEATURE_BYTES)
    free = memory.free_on_host()
    known = "" if free is None else f", {free / 1e9:.1f} GB are free"
    text = f"memory for {total:,} samples and held-out images at most: {need / 1e9:.2f} GB{known}"
    print(text, flush=True)
    if free is not None and need > free:
        raise UserError(f"{text}: give --samples with fewer images")


def _networks(config: ConfigDict, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], list[str]]:
    """The networks of the spaces, as arguments of `search`, and why one is missing."""
    lpips, note = load_perceptual(config)
    notes, inception = [note] if note else [], None
    try:
        inception = load_extractor("inception", mesh=mesh, outputs=("pool",))
    except UserError as error:
        notes.append(f"no distances by Inception: {error}")
    return {"lpips": lpips, "inception": inception}, notes


# -- training images --------------------------------------------------------------------------


class Training:
    """The images that a model was trained on, as training sees them but for augmentation.

    Args:
        config: of the run.
        source: of its images.
        count: only the first ones; 0 = all.
    """

    def __init__(self, config: ConfigDict, source: Source, count: int = 0) -> None:
        self.count = min(count or len(source), len(source))
        self._config, self._source = config, source
        self._transform = latents.transform(config)

    def name(self, number: int) -> str:
        """What the source calls an image, of which the number is as in `Found`."""
        return self._source.name(int(number) // 2) + (" (mirrored)" if number % 2 else "")

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Parts of all images, each mirrored too if training mirrors: (b, R, R, 3) uint8, their
        numbers (b,), -1 for what does not count, and how many examples were read for it."""
        for batch in self._read(range(self.count)):
            valid, numbers = batch["valid"], 2 * batch["index"]
            yield batch["image"], np.where(valid, numbers, -1), int(valid.sum())
            if self._config.data.flip:
                yield batch["image"][:, :, ::-1], np.where(valid, numbers + 1, -1), 0

    def images(self, numbers: np.ndarray) -> np.ndarray:
        """The images of numbers (N,): (N, R, R, 3) uint8."""
        rows = np.unique(numbers // 2).tolist()
        known = {}
        for batch in self._read(rows):
            known |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
        return np.stack(
            [known[number // 2][:, :: -1 if number % 2 else 1] for number in numbers.tolist()]
        )

    def _read(self, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        size, threads = min(_BATCH, len(rows)), self._config.data.threads
        return epoch_batches(self._source, self._transform, size, rows=rows, threads=threads)


def search(
    training: Training,
    queries: np.ndarray,
    lpips: Perceptual | None,
    inception: Extractor | None,
) -> dict[str, Found]:
    """Finds the nearest training images.

    Args:
        training: what is searched.
        queries: (N, R, R, 3) uint8.
        lpips: distances of images, or None.
        inception: features of images, or None.
    """
    k = min(CANDIDATES, training.count)
    see: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pixels": _flat}
    if inception is not None:
        see["inception"] = lambda pixels: inception.extract(np.ascontiguousarray(pixels))["pool"]
    own, centres, on_device = {}, {}, {}
    for name, look in see.items():
        vectors = look(queries) if name == "inception" else _flat_in_parts(queries)
        if name == "inception":
            own[name] = vectors.copy()
        centres[name] = vectors.mean(0)  # around 0, products lose the least
        vectors -= centres[name]
        on_device[name] = jax.device_put(vectors)
    best = {name: no_neighbours(len(queries), k) for name in see}
    with tqdm(
        total=training.count, unit="image", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        for pixels, numbers, read in training.batches():
            for name, look in see.items():
                part = look(pixels) - centres[name]
                best[name] = nearer(best[name], on_device[name], part, numbers.astype(np.int32))
            bar.update(read)
    numbers = {name: np.asarray(found.numbers) for name, found in best.items()}
    found = {name: Found(np.empty(len(queries)), n[:, 0].copy()) for name, n in numbers.items()}
    for name, look in see.items():
        for rows in _chunks(len(queries), _BATCH):
            others = look(training.images(found[name].numbers[rows]))
            mine = own[name][rows] if name in own else look(queries[rows])
            difference = mine.astype(np.float64) - others
            squares = np.square(difference)
            # In pixels the root of the mean square in grey levels, 0 to 255.
            sums = squares.mean(1) * 127.5**2 if name == "pixels" else squares.sum(1)
            found[name].distances[rows] = np.sqrt(sums)
    if lpips is not None:
        found["lpips"] = _by_lpips(
            training, queries, np.concatenate(list(numbers.values()), 1), lpips
        )
    return {name: found[name] for name in SPACES if name in found}


def _by_lpips(
    training: Training, queries: np.ndarray, candidates: np.ndarray, lpips: Perceptual
) -> Found:
    """The nearest of candidates (N, C) to each query."""
    distances, numbers = [], []
    for rows in _chunks(len(queries), _COMPARED):
        chosen = candidates[rows]
        valid = chosen >= 0
        others = training.images(np.where(valid, chosen, chosen[:, :1]).reshape(-1))
        own = np.repeat(queries[rows], chosen.shape[1], axis=0)
        found = np.where(valid, lpips(own, others).reshape(chosen.shape), np.inf)
        place = found.argmin(1)[:, None]
        distances.append(np.take_along_axis(found, place, 1)[:, 0])
        numbers.append(np.take_along_axis(chosen, place, 1)[:, 0])
    return Found(np.concatenate(distances).astype(np.float64), np.concatenate(numbers))


def _flat(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 as (N, D) float32 around 0."""
    return images.to_float(pixels).reshape(len(pixels), -1)


def _flat_in_parts(pixels: np.ndarray) -> np.ndarray:
    """The same of many images, without more memory than the result takes."""
    vectors = np.empty((len(pixels), math.prod(pixels.shape[1:])), np.float32)
    for rows in _chunks(len(pixels), _BATCH):
        vectors[rows] = _flat(pixels[rows])
    return vectors


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


# -- what is made of it -----------------------------------------------------------------------


def _figures(found: dict[str, Found], count: int) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of each space; and, of each of the `count` samples, which come first, the share
    of held-out images that are as near, its mean over the spaces.

    The share's variance is that of a share of so many samples, and that of the threshold: a share
    of samples like the held-out images moves with it as the share below it of other such images
    does, of which M drawn ones leave TAKEN (1 - TAKEN) / M open.
    """
    record, nearness = {}, np.zeros(count)
    for name, space in found.items():
        own, others = space.distances[:count], space.distances[count:]
        threshold, below, as_near = calibrated(own, others, TAKEN)
        share = float(below.mean())
        record[name] = {
            "threshold": threshold,
            "share": share,
            "standard_error": float(
                np.sqrt(share * (1 - share) / count + TAKEN * (1 - TAKEN) / len(others))
            ),
            "held_out_share": float((others <= threshold).mean()),
            "median": float(np.median(own)),
            "held_out_median": float(np.median(others)),
            "least": float(own.min()),
            "held_out_least": float(others.min()),
        }
        nearness += as_near / len(found)
    return record, nearness


def _picture(
    training: Training, samples: np.ndarray, found: dict[str, Found], shown: np.ndarray
) -> np.ndarray:
    """Samples, and below each one its nearest training image in each space."""
    rows = [samples[shown]]
    rows += [training.images(space.numbers[shown]) for space in found.values()]
    tiles = np.concatenate(rows, axis=1)
    padding = max(4, samples.shape[1] // 8)  # wide enough to tell one sample from the next
    return images.make_grid(tiles, images.wide_columns(len(shown)), padding)
