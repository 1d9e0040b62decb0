"""The Frechet distance of samples while a diffusion model trains, and the best weights of a run.

Of few samples it is biased, by more the fewer there are, and so is no figure to compare with
others': it is for comparing the steps of one run, which all see the same seeds, conditions and real
images. `ldm_jax.evaluate --metrics=fid` takes the figure to report.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import distributed, pictures, tensors
from ldm_jax import workdir as files
from ldm_jax.data.latents_source import LatentsSource
from ldm_jax.data.order import epoch_order
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.errors import UserError
from ldm_jax.extractors import load_extractor
from ldm_jax.held_out import choose_rows
from ldm_jax.metrics.features import Extractor, Features
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_jax.metrics.references import (
    Reference,
    digest_of,
    fingerprint,
    from_features,
    load_reference,
    save_reference,
)
from ldm_jax.metrics.sets import Needed
from ldm_jax.pipeline import Pipeline
from ldm_jax.sample_references import References, open_references
from ldm_jax.training import latents
from ldm_jax.training.sharding import gather

FOLDER = "progress"  # in the workdir, with the statistics of the real images
REFERENCE = "reference.npz"
REFERENCE_IMAGES = 10_000  # real images at most
BEST = "best"  # the folder of the best weights, in the workdir
_FRESH, _FORMER = "best.new", "best.former"  # while one takes the place of the other
_BATCH_SIZE = 64  # real images at a time
# What samples follow from; the other keys of config.sample say how many are made at a time, in what
# memory, and what is shown.
_SAMPLE_KEYS = ("sampler", "steps", "eta", "spacing", "guidance_scale", "guidance_rescale")
_SAMPLE_KEYS += ("guidance_interval",)


def check(config: ConfigDict, source: Source, mesh: jax.sharding.Mesh) -> None:
    """Checks, before any work, that the FID of samples can be measured where that is asked for.

    Raises:
        UserError: no Inception weights, no real images, or a reference that does not fit.
    """
    c = config.train
    if c.fid_every == 0 or c.steps == 0:
        return
    try:
        extractor = load_extractor("inception", mesh=mesh, outputs=("pool",))
    except UserError as error:
        raise UserError(f"{error}, or set config.train.fid_every=0") from error
    if c.fid_reference:
        _given(config, extractor)
    elif isinstance(source, LatentsSource):
        raise UserError(
            "config.train.fid_every needs real images, but config.data.source holds latents: set "
            "config.train.fid_reference to a folder or statistics of them, or fid_every=0"
        )
    elif len(source) < 2:
        raise UserError(f"config.train.fid_every needs 2 images at least, there is {len(source)}")


class SamplesFID:
    """The FID of a model's samples, by config.train: the same measurement at every step.

    Sample i has seed i and the condition of an example of the data; these are drawn evenly from all
    of it, as are the real images, which are centred crops, not mirrored. Each host has the features
    of all samples, since these are few, and process 0 the figure. Nothing is loaded or read before
    it is needed.

    Args:
        config: of the run.
        workdir: where the statistics of the real images are kept.
        source: of the training images.
        first_stage: its variables, in the host's memory.
        mesh: the devices.
        interrupted: called between batches; may raise to give up.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        source: Source,
        first_stage: Mapping[str, Any],
        mesh: jax.sharding.Mesh,
        interrupted: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._workdir, self._source = config, workdir, source
        self._first_stage, self._mesh, self._interrupted = first_stage, mesh, interrupted

    def __call__(self, pipe: Pipeline) -> float:
        """Samples and measures: NaN but on process 0; raises what `interrupted` does."""
        count, size = self._config.train.fid_samples, self._config.sample.batch_size
        found = FeatureStatistics(self.extractor.outputs["pool"])
        reference = self.reference
        for start in range(0, count, size):
            self._interrupted()
            # The last batch is as large as all others: its program is there already.
            rows = choose_rows(0, start, size, len(self._source))
            conditions = pictures.conditions(self._config, self._source, rows)
            made = pipe.sample(range(start, start + size), conditions)[: count - start]
            found.add(self.extractor.extract(made)["pool"])
        if reference is None:
            return math.nan
        return frechet_distance(*found.result(), reference.mean, reference.covariance)

    @functools.cached_property
    def extractor(self) -> Extractor:
        """Inception-v3."""
        return load_extractor("inception", mesh=self._mesh, outputs=("pool",))

    @functools.cached_property
    def reference(self) -> Reference | None:
        """Statistics of the real images: given, kept in the workdir, or made and kept there; on
        process 0, which alone compares."""
        folder = self._workdir / FOLDER
        if self._config.train.fid_reference:
            return _given(self._config, self.extractor).collect(folder).get("inception")
        if not distributed.is_main():
            return None
        rows = np.sort(epoch_order(0, 0, len(self._source))[:REFERENCE_IMAGES]).tolist()
        path, origin = folder / REFERENCE, _origin(self._config, self._source, rows)
        if path.is_file():
            try:
                kept = load_reference(path, self.extractor)
            except UserError:  # of other weights, or damaged: it is made again
                kept = None
            if kept and kept.origin == origin:
                return kept
        made = from_features(
            self._real_features(rows),
            self.extractor,
            resolution=self._config.data.resolution,
            origin=origin,
            made_of=digest_of(origin),
        )
        save_reference(path, made)
        return made

    def _real_features(self, rows: Sequence[int]) -> Iterator[Features]:
        batches = epoch_batches(
            self._source,
            latents.transform(self._config),
            _BATCH_SIZE,
            rows=rows,
            threads=self._config.data.threads,
        )
        for batch in batches:
            self._interrupted()
            yield self.extractor.extract(batch["image"][batch["valid"]])

    @functools.cached_property
    def settings(self) -> str:
        """SHA-256, in hex, of all that the figure depends on but for the weights that are trained:
        figures of equal settings can be compared. On process 0."""
        c = self._config
        parts = {
            "samples": c.train.fid_samples,
            "sample": {name: config_lib.flatten(c.sample)[name] for name in _SAMPLE_KEYS},
            "resolution": c.data.resolution,
            "conditions": _conditions(c),
            "reference": fingerprint(self.reference),
            "network": self.extractor.digest,
            "first_stage": tensors.digest(self._first_stage),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def keep_if_best(self, pipe: Pipeline, fid: float) -> None:
        """Writes the model to the workdir's folder `best` unless there is a better one.

        What was measured with other settings is replaced, once the new model is written whole. All
        hosts must call it.

        Raises:
            UserError: it cannot be written.
        """
        folder, before, better = self._workdir / BEST, None, False
        if distributed.is_main():
            _recover(self._workdir)
            before = read_best(self._workdir, self.settings)
            better = before is None or fid < before.fid
        if not distributed.any_host(better):
            return
        weights = gather({name: pipe.variables[name] for name in ("denoiser", "conditioner")})
        if not distributed.is_main():
            return
        # What was measured otherwise may be of another first stage: a whole model takes its place.
        target = folder if before else self._workdir / _FRESH
        if before is None:
            weights["first_stage"] = self._first_stage
        try:
            if target != folder:
                shutil.rmtree(target, ignore_errors=True)  # of a run that was cut off
            files.save_model(
                target,
                self._config,
                weights,
                pipe.step,
                files.read_labels(self._workdir),
                files.tokenizer_folder(self._workdir, self._config),
                {"fid": repr(fid), "fid_settings": self.settings},
            )
            if target != folder:
                _replace(folder, target, self._workdir / _FORMER)
        except OSError as error:
            raise UserError(
                f"cannot write the best weights to {folder} ({error.strerror}): make room and "
                "start the same command again, or set config.train.fid_every=0"
            ) from error


def _replace(folder: pathlib.Path, fresh: pathlib.Path, former: pathlib.Path) -> None:
    """Puts the whole folder `fresh` in the place of `folder`, which is removed once that is done.

    Where this was cut off, the same call goes on.
    """
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(folder, former)
    os.replace(fresh, folder)
    shutil.rmtree(former, ignore_errors=True)


def _recover(workdir: pathlib.Path) -> None:
    """Ends a replacement that was cut off between its two renames, when the fresh one is whole."""
    if (workdir / _FORMER).exists() and not (workdir / BEST).exists():
        _replace(workdir / BEST, workdir / _FRESH, workdir / _FORMER)


def _conditions(config: ConfigDict) -> dict[str, Any] | None:
    """What the conditions of samples come from; None of a model without any."""
    c = config.data
    if not config.conditioners:
        return None
    return {"fields": list(c.fields), "source": c.source, "split": c.split, "where": c.where}


def _given(config: ConfigDict, extractor: Extractor) -> References:
    """The reference that the config names, a folder or an .npz file."""
    side = config.data.resolution
    return open_references(
        config.train.fid_reference,
        {"inception": extractor},
        {"inception": Needed(features=False, spatial=False)},
        config=config,
        size=(side, side),
        count=0,
    )


def _origin(config: ConfigDict, source: Source, rows: Sequence[int]) -> str:
    """Which images of the data a reference is made of, in words and by a digest of their names."""
    c = config.data
    where = f", {c.where}" if c.where else ""
    names = hashlib.sha256("\n".join(source.name(row) for row in rows).encode()).hexdigest()
    return (
        f"{c.source}, {c.split}{where}: {len(rows):,} of {len(source):,} images, centred crops of "
        f"{c.resolution}x{c.resolution}, names {names[:12]}"
    )


class Best(NamedTuple):
    """The best weights of a run: of which step, and their FID."""

    step: int
    fid: float


def read_best(workdir: pathlib.Path, settings: str = "") -> Best | None:
    """What is kept in a workdir's folder `best`; None if nothing is, or, if `settings` are given,
    if it was measured with others."""
    path = workdir / BEST / files.WEIGHTS
    if not path.is_file():
        return None
    try:
        metadata = tensors.open_tensors(path)[1]
        found = Best(int(metadata["step"]), float(metadata["fid"]))
    except (UserError, KeyError, ValueError):
        return None
    return None if settings and metadata.get("fid_settings") != settings else found
