"""The pictures of a run: grids of samples, and their nearest training images."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import distributed, images
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.data.task_fields import passed_on
from ldm_jax.fields import specify
from ldm_jax.pipeline import Pipeline
from ldm_jax.training import latents

COMPARED_IMAGES = 20_000  # at most so many training images are searched for nearest neighbours


def save_picture(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes a picture (H, W, 3) uint8 as PNG, from process 0."""
    if distributed.is_main():
        images.save_png(path, image)


def samples(config: ConfigDict, source: Source, pipe: Pipeline) -> np.ndarray:
    """Makes the samples of the config, (N, H, W, 3) uint8.

    Seeds and conditions are the same throughout a run: the classes in turn, or what the data's
    first examples have.
    """
    count = config.sample.num_samples
    condition = None
    fields = set(specify(config))  # a classifier's label may be no condition
    if fields == {"label"}:
        classes = min(config.label.num_classes, count)
        # Sorted, so that a row of the grid shows one class.
        condition = {"label": sorted(i % classes for i in range(count))}
    elif fields:
        condition = conditions(config, source, [i % len(source) for i in range(count)])
    return pipe.sample(range(count), condition)


def sample_grid(pixels: np.ndarray) -> np.ndarray:
    """Lays samples (N, H, W, 3) out in rows, as one picture (H', W', 3)."""
    return images.make_grid(pixels, columns=images.wide_columns(len(pixels)))


def final_pictures(
    config: ConfigDict, source: Source, pipe: Pipeline, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Writes the final grid and, if asked for, each sample's nearest training image."""
    made = samples(config, source, pipe)
    paths = [folder / "final.png"]
    save_picture(paths[0], sample_grid(made))
    if config.sample.nearest:
        count = min(len(source), COMPARED_IMAGES)
        references = _examples(config, source, count)
        if config.data.flip:
            references = np.concatenate([references, references[:, :, ::-1]])
        indices, distances = images.nearest(made, references)
        paths.append(folder / "final_nearest.png")
        pairs = images.pairs_grid(made, references[indices], columns=images.wide_columns(len(made)))
        save_picture(paths[1], pairs)
        middle, least = np.median(distances), distances.min()
        print(
            f"nearest of {count} training images: root mean square difference {middle:.1f} "
            f"grey levels in the median, {least:.1f} at least"
        )
    return paths


def conditions(
    config: ConfigDict, source: Source, rows: Sequence[int]
) -> dict[str, np.ndarray] | None:
    """The conditions of the data's examples at `rows`, by field, (N, ...) each; None where the
    model has no condition."""
    fields = tuple(specify(config))
    if not fields:
        return None
    batches = epoch_batches(
        source,
        latents.task_transform(config),
        len(rows),
        rows=rows,
        fields=passed_on(fields),
        threads=config.data.threads,
    )
    (batch,) = batches
    return {name: batch[name] for name in fields}


def _examples(config: ConfigDict, source: Source, count: int) -> np.ndarray:
    """The first images of the set, (count, H, W, 3) uint8, without augmentation; fewer where some
    are bad."""
    batches = epoch_batches(
        source,
        latents.transform(config),
        min(count, 256),
        count=count,
        threads=config.data.threads,
    )
    return np.concatenate([batch["image"][batch["valid"]] for batch in batches])
