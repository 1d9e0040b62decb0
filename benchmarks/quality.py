"""Trains small models and measures how close their samples come to the data; shared by comparisons.

The measure is the Frechet distance of scaled latents, all of their numbers (512 at 8x8x8): exact in
mean and covariance, and without a network that has never seen such images. What two halves of the
real latents have between each other is its floor.
"""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_jax.pipeline import Pipeline

CLASSES = 9  # of the embedded set
# All 1,852 embedded images by category, otherwise as in configs/quickstart.py.
SHARED = {
    "data.where": "",
    "data.label": "label",
    "label.num_classes": CLASSES,
    "label.width": 128,
    "denoiser.width": 32,  # so that a run takes a minute or two on two cores
    "train.picture_every": 0,
    "sample.nearest": False,
}


def train(workdir: pathlib.Path, changes: Mapping[str, object], flags: Sequence[str] = ()) -> None:
    """Trains a model of `SHARED` and `changes` with the command that it prints, unless it is done.

    `flags` are further ones of `ldm_jax.train`.

    Raises:
        UserError: it failed.
    """
    keys = [f"--config.{key}={value}" for key, value in (SHARED | dict(changes)).items()]
    command = ["-m", "ldm_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += [*keys, *flags]
    if (workdir / "samples" / "final.png").is_file():
        return
    print("$ " + shlex.join(["python", *command]), flush=True)
    if subprocess.run([sys.executable, *command], check=False).returncode:
        raise UserError("that failed: see above")


def first_stage(out: pathlib.Path) -> dict[str, object]:
    """Trains the first stage that all models share; returns the changes that reuse it."""
    folder = out / "first_stage_alone"
    if not (folder / "first_stage" / "latents.json").is_file():
        train(folder, {"train.steps": 0})
    return {"first_stage.weights": str(folder), "first_stage.latent_scale": "stored"}


def real_latents(pipe: Pipeline) -> np.ndarray:
    """Scaled latents (N, D) float32 of the data of a model and of their mirror images."""
    from ldm_jax.data.transforms import Draw, ImageTransform
    from ldm_jax.preflight import open_data

    source = open_data(pipe.config, pathlib.Path("."))
    transform = ImageTransform(pipe.config.data.resolution, "center", False)
    parts = []
    for start in range(0, len(source), 64):
        rows = range(start, min(start + 64, len(source)))
        pixels = np.stack([transform.apply(source[i], Draw())["image"] for i in rows])
        for shown in (pixels, pixels[:, :, ::-1]):
            latents = np.asarray(pipe.encode(np.ascontiguousarray(shown)))
            parts.append(latents.reshape(len(rows), -1))
    return np.concatenate(parts)


def statistics(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of latents (N, ...)."""
    flat = latents.reshape(len(latents), -1)
    running = FeatureStatistics(flat.shape[1])
    running.add(flat)
    return running.result()


def distance(latents: np.ndarray, real: tuple[np.ndarray, np.ndarray]) -> float:
    """The Frechet distance of latents (N, ...) and real statistics; infinite for broken latents."""
    if not np.isfinite(latents).all():
        return float("inf")
    return frechet_distance(*statistics(latents), *real)


def floor(real: np.ndarray, count: int) -> float:
    """The distance that `count` real latents, drawn at random, have from all others."""
    order = np.random.default_rng(0).permutation(len(real))
    return distance(real[order[:count]], statistics(real[order[count:]]))


def labels(count: int) -> dict[str, list[int]]:
    """Classes of `count` samples as they come in the data."""
    from ldm_jax.data.sources import open_source

    source = open_source("emoji")
    drawn = np.random.default_rng(0).integers(0, len(source), count)
    return {"label": [int(source[int(i)]["label"]) for i in drawn]}


def plot(
    path: pathlib.Path,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    logarithmic: bool = True,
) -> None:
    """Draws lines of (x, y) by name; y is logarithmic, and x too unless `logarithmic` is False."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    styles = ["-", "--", ":"]
    for number, (name, points) in enumerate(lines.items()):
        style = styles[number // 7 % len(styles)]
        axes.plot(*zip(*points, strict=True), style, marker="o", color=f"C{number % 7}", label=name)
    axes.set(yscale="log", xlabel=x_label, ylabel=y_label)
    if logarithmic:
        axes.set_xscale("log")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
