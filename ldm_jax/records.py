"""Evaluates the first stage of a workdir, and records what was measured with what."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax import config as config_lib
from ldm_jax import weights
from ldm_jax import workdir as files
from ldm_jax.data.bad import TolerantSource
from ldm_jax.data.sources import Source, open_source
from ldm_jax.errors import UserError
from ldm_jax.judges import load_networks
from ldm_jax.training.evaluation import Evaluation, evaluation_batches, evaluator
from ldm_jax.training.sharding import make_mesh

PER_DEVICE = 8  # images at a time, unless one says otherwise
# Of a record; what is of a first stage has none.
SECTIONS = ("condition", "likelihood", "samples", "foreign_samples", "memorisation")


def evaluate_first_stage(
    workdir: str | os.PathLike[str],
    *,
    source: str = "",
    split: str = "",
    num_images: int = 0,
    metrics: Sequence[str] = config_lib.METRICS,
    resolution: int = 0,
    batch_size: int = 0,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measures how well a first stage reconstructs images.

    Args:
        workdir: of a run or of an imported model, or the folder of a first stage.
        source: of the images; '' = the data of the workdir's config.
        split: part of the source; '' = what that config holds out for evaluation, or else its
            training images; of another source, 'train'.
        num_images: the first ones of the split; 0 = all.
        metrics: some of 'psnr', 'ssim', 'lpips' and 'rfid'.
        resolution: side of the square images; 0 = that of the config.
        batch_size: images at a time; 0 = 8 for each device. Never changes a result.

    Returns:
        What was found, and a record of it that JSON can hold.

    Raises:
        UserError: no first stage there, or one of pixels; no such metric, or not its weights; no
            such data; a size that does not fit; reconstructions that are not finite.
    """
    root = pathlib.Path(workdir)
    config = _config_at(files.read_config(root), resolution)
    file = files.first_stage_folder(root) / files.WEIGHTS
    networks = _networks(metrics)
    images, record = _open_images(config, source, split)
    mesh, count = make_mesh(), min(num_images or len(images), len(images))
    if "rfid" in metrics and count < 2:
        raise UserError("rfid needs two images at least: leave it out of --metrics")
    size = batch_size or PER_DEVICE * mesh.size
    evaluate = evaluator(config, metrics, networks, mesh)
    with tqdm(total=count, unit="image", disable=not sys.stderr.isatty(), leave=False) as bar:
        found = evaluate(
            files.load_first_stage(root, config),
            evaluation_batches(config, images, size, mesh, count),
            lambda done: bar.update(done - bar.n),
        )
    if not math.isfinite(found.scalars["mae"]):
        raise UserError(f"the reconstructions are not finite: {file} seems to hold NaNs")
    scalars = dict(found.scalars)
    return found, record | {
        "num_images": scalars.pop("images"),
        "resolution": config.data.resolution,
        "first_stage": {"file": str(file.relative_to(root)), "sha256": _sha256(file)},
        "networks": {name: weights.FILES[name] for name in sorted(networks)},
        "reconstruction": scalars,
    }


def write_record(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes what was measured as JSON; sections of other kinds of evaluation stay in it.

    Metrics of the same samples stay too, see `merge_samples`.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    before = before if isinstance(before, dict) else {}
    if any(name in record for name in SECTIONS):
        for name in ("samples", "foreign_samples"):
            if name in record and isinstance(before.get(name), dict):
                record = record | {name: merge_samples(before[name], record[name])}
        record = before | record
    else:
        record = record | {name: before[name] for name in SECTIONS if name in before}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def merge_samples(before: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of samples with the metrics of an earlier one, where both are of the same.

    They are where the samples (by their digest: weights, seeds, settings, conditions and number),
    the networks that both took and the references of these agree; else the earlier one is dropped.
    """

    def same(part: str, key: str) -> bool:
        old, new = before.get(part, {}), record.get(part, {})
        return all(old[name].get(key) == new[name].get(key) for name in old.keys() & new.keys())

    agree = record.get("samples_digest") and (
        before.get("samples_digest") == record["samples_digest"]
        and same("networks", "digest")
        and same("references", "digest")
    )
    if not agree:
        return dict(record)
    joined = {
        part: {**before.get(part, {}), **record.get(part, {})}
        for part in ("metrics", "networks", "references")
    }
    notes = [*before.get("notes", ()), *record.get("notes", ())]
    return {**record, **joined, "notes": list(dict.fromkeys(notes))}


def add_to_readme(workdir: pathlib.Path, line: str) -> None:
    """Adds a line to the list of evaluations in a workdir's README.md, unless it is there."""
    path, title = workdir / "README.md", "## Evaluations"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = f"# {workdir.resolve().name}\n"
    lines = text.splitlines()
    if line in lines:
        return
    if title not in lines:
        lines += ["", title, ""]
    place = lines.index(title) + 1
    # Behind the last line of the list, before what may follow it.
    while place < len(lines) and (not lines[place] or lines[place].startswith("- ")):
        place += 1
    while not lines[place - 1] and lines[place - 2] != title:
        place -= 1
    files.write_text(path, "\n".join([*lines[:place], line, *lines[place:]]) + "\n")


def _config_at(config: ConfigDict, resolution: int) -> ConfigDict:
    """The config of a first stage that can be evaluated, at another resolution than its own."""
    if config.first_stage.kind == "identity":
        raise UserError("this is a model of pixels: it has no first stage to evaluate")
    factor = config_lib.downsampling(config)
    if resolution % factor:
        raise UserError(
            f"the resolution is {resolution}, but the first stage divides it by {factor}: try "
            f"{max(1, round(resolution / factor)) * factor}"
        )
    config = ConfigDict(config).copy_and_resolve_references()
    config.data.resolution = resolution or config.data.resolution
    return config


def _networks(metrics: Sequence[str]) -> dict[str, Any]:
    """Loads the networks of the metrics, always with the published weights."""
    networks: dict[str, Any] = {}
    for metric in metrics:
        if metric not in config_lib.METRICS:
            known = ", ".join(config_lib.METRICS)
            raise UserError(f"unknown metric '{metric}': choose from {known}")
        try:
            networks |= load_networks([metric])
        except UserError as error:
            raise UserError(f"{error}, or leave '{metric}' out of --metrics") from error
    return networks


def _open_images(config: ConfigDict, spec: str, split: str) -> tuple[Source, dict[str, str]]:
    """Opens the images; also says, for the record, which these are."""
    data, own = config.data, not spec or spec == config.data.source
    default = (config.first_stage.eval.split or data.split) if own else "train"
    origin = {"source": spec or data.source, "split": split or default}
    origin["where"] = data.where if own else ""
    source, chosen, where = origin.values()
    opened = open_source(source, split=chosen, where=where, label="")
    return TolerantSource(opened, data.max_bad, None), origin


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
