"""A whole run: first stage, latent statistics, diffusion model, classifier, final pictures."""

from __future__ import annotations

import functools
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from ldm_jax import classifier_files, images
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.pipeline import Batches, CachedSource, epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.data.task_fields import passed_on
from ldm_jax.data.transforms import CachedTransform
from ldm_jax.errors import UserError
from ldm_jax.fields import specify
from ldm_jax.judges import Judges
from ldm_jax.pipeline import Pipeline
from ldm_jax.preflight import check_parts, open_data
from ldm_jax.training import latents as latents_lib
from ldm_jax.training.alarms import first_stage_alarms
from ldm_jax.training.classifier_steps import classifier_functions
from ldm_jax.training.ema import profiles
from ldm_jax.training.evaluation import evaluation_batches, evaluator
from ldm_jax.training.first_stage_steps import first_stage_functions, trained_weights
from ldm_jax.training.interrupt import Interrupts
from ldm_jax.training.loop import Picture, Stage, fit
from ldm_jax.training.sharding import make_mesh, replicated
from ldm_jax.training.snapshots import remove_later, write_snapshots
from ldm_jax.training.state import TrainState
from ldm_jax.training.steps import diffusion_functions

RECORDED_IMAGES = 10_000  # at most so many are measured where the latent scale does not need it
COMPARED_IMAGES = 20_000  # at most so many training images are searched for nearest neighbours


def run(config: ConfigDict, workdir: pathlib.Path, allow_config_change: bool = False) -> None:
    """Trains what is not trained yet in `workdir`, and writes the final samples.

    Raises:
        UserError: the config, the data or the workdir cannot be used.
        Interrupted: a signal came; the same call goes on from there.
    """
    config_lib.check(config)
    begin, mesh = time.perf_counter(), make_mesh()
    source = open_data(config, workdir)
    judges = check_parts(config, workdir, source, mesh)
    files.claim(workdir, config, allow_config_change)
    if {"label", "boxes"} & set(config.data.fields) and source.label_names:
        files.write_labels(workdir, source.label_names)
    if "tokens" in config.data.fields:  # a run can then be sampled from anywhere
        _, folder = files.training_tokenizer(workdir, config)
        files.copy_tokenizer(folder, workdir / files.TOKENIZER)
    with Interrupts() as interrupts:
        job = _Run(config, workdir, source, mesh, interrupts)
        frozen = job.first_stage(judges)
        if config.train.steps == 0:
            print(f"\nDone: the first stage is in {workdir / 'first_stage'}")
            return
        pipe = job.diffusion(frozen)
        job.classifier(frozen)
        interrupts.check("before the final samples")
        shown = job.final_pictures(pipe)
    if isinstance(source, CaptionedSource) and source.cut_share > 0:
        print(
            f"captions: {source.cut_share:.1%} were longer than the {config.text.length} tokens of "
            "config.text.length, and were cut off"
        )
    print(f"\nDone in {(time.perf_counter() - begin) / 60:.1f} minutes. Look at:")
    for path in shown:
        print(f"  {path}")
    print(f"Sample more:\n  python -m ldm_jax.sample --workdir={workdir} --num_samples=16")


class _Run:
    """What the steps of one run share."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        source: Source,
        mesh: jax.sharding.Mesh,
        interrupts: Interrupts,
    ) -> None:
        self.config, self.workdir, self.source = config, workdir, source
        self.mesh, self.interrupts = mesh, interrupts
        self.key = jax.random.key(config.seed)
        self.encoded: Source | None = None  # what `_latents` has made

    # -- first stage ----------------------------------------------------------------------------

    def first_stage(self, judges: Judges | None) -> dict[str, Any]:
        """Returns the variables of the first stage: trained before, given, or trained now."""
        config, directory = self.config, self.workdir / "first_stage"
        if (directory / files.WEIGHTS).is_file():
            return files.load_first_stage(self.workdir, config)
        if config.first_stage.weights:
            frozen = files.load_first_stage(config.first_stage.weights, config)
        elif config.first_stage.kind == "identity":
            frozen = {
                "latents": {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}
            }
        else:
            frozen = self._train_first_stage(directory, judges)
        frozen, record = self._measure(frozen)
        files.save_first_stage(directory, config, jax.device_get(frozen), record)
        return frozen

    def _train_first_stage(self, directory: pathlib.Path, judges: Judges) -> dict[str, Any]:
        config, block = self.config, self.config.first_stage.train
        init, step = first_stage_functions(config)
        networks = jax.device_put(judges.networks, replicated(self.mesh))
        evaluate = evaluator(config, judges.metrics, networks, self.mesh)

        def picture(state: TrainState, number: int) -> Picture:
            batches = evaluation_batches(
                config, judges.images, block.batch_size, self.mesh, config.first_stage.eval.images
            )
            found = evaluate(
                self._variables(state),
                batches,
                lambda done: self.interrupts.check("while evaluating the first stage"),
            )
            path = directory / "reconstructions" / f"step_{number:07d}.png"
            images.save_png(path, found.grid())
            return Picture(path, {f"eval_{name}": value for name, value in found.scalars.items()})

        stage = Stage(
            "first stage",
            directory,
            block,
            init,
            step,
            {"lpips": networks["lpips"]} if config.first_stage.perceptual_weight > 0 else {},
            picture,
            picture_at_end=True,
            alarms=lambda scalars: first_stage_alarms(scalars, config),
        )
        trained = self._variables(self._fit(stage, self._batches(self.source, stage.block), 1))
        _check_finite(trained, stage, "first_stage")
        return trained

    def _variables(self, state: TrainState) -> dict[str, Any]:
        """A trained first stage's variables, with latents that are not scaled yet."""
        return {"params": trained_weights(state), "latents": self._unscaled()}

    def _unscaled(self) -> dict[str, np.ndarray]:
        channels = config_lib.latent_channels(self.config)
        return {"shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}

    def _measure(self, frozen: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the variables with the scale that the config asks for, and what it is made of."""
        config, rule, statistics = self.config, self.config.first_stage.latent_scale, None
        own = not config.first_stage.weights and config.first_stage.kind != "identity"
        if rule in latents_lib.RULES or own:
            count = config.first_stage.stats_images
            if rule not in latents_lib.RULES:  # for the record
                count = count or RECORDED_IMAGES
            batches = (
                latents_lib.first_batch(config, self.source)
                if rule == "first_batch"
                else latents_lib.one_pass(config, self.source, count)
            )
            check = lambda: self.interrupts.check("while measuring the latents")  # noqa: E731
            statistics = latents_lib.measure(config, frozen, batches, self.mesh, check)
            print(
                f"latents: mean {statistics.mean:.4f}, standard deviation {statistics.std:.4f} "
                f"over {statistics.images} images"
            )
        frozen = latents_lib.rescale(frozen, rule, statistics)
        print(f"latents: {rule} scale, mean {np.mean(frozen['latents']['scale']):.4f}")
        return frozen, latents_lib.record(frozen, rule, statistics)

    # -- diffusion ------------------------------------------------------------------------------

    def diffusion(self, frozen: dict[str, Any]) -> Pipeline:
        """Trains the diffusion model; returns it with its averaged weights."""
        config, source = self.config, self._latents(frozen)
        init, step = diffusion_functions(config)
        pipe: list[Pipeline] = []

        def update(state: TrainState) -> Pipeline:
            weights = {
                "denoiser": state.ema_params["denoiser"],
                "conditioner": state.params["conditioner"],
            }
            if not pipe:
                variables = weights | {"first_stage": frozen}
                pipe.append(Pipeline(config, variables, 0, self.source.label_names))
            # The state's buffers are given to the next step, so the pipeline is only good until
            # then, unless this is the last one.
            pipe[0].variables, pipe[0].step = pipe[0].variables | weights, int(state.step)
            return pipe[0]

        def picture(state: TrainState, number: int) -> Picture:
            path = self.workdir / "samples" / f"step_{number:07d}.png"
            images.save_png(path, self._grid(self._samples(update(state))))
            return Picture(path)

        start = self._starting_weights()
        kept = profiles(config)

        def snapshot(state: TrainState, number: int) -> None:
            write_snapshots(self.workdir / files.AVERAGES, state.averages, kept, number)

        stage = Stage(
            "diffusion",
            self.workdir,
            config.train,
            init,
            step,
            frozen,
            picture,
            start,
            snapshot=snapshot if kept else None,
            snapshot_every=config.ema_snapshots.every,
            forget=functools.partial(remove_later, self.workdir / files.AVERAGES),
        )
        return update(self._fit(stage, self._batches(source, stage.block), 3))

    def _latents(self, frozen: dict[str, Any]) -> Source:
        """The data, with images encoded once if the config says so."""
        if self.config.data.cache_latents and self.encoded is None:
            self.encoded = latents_lib.encode_source(
                self.config,
                self.source,
                latents_lib.encoder(self.config, frozen, self.mesh),
                lambda: self.interrupts.check("while encoding the images"),
            )
        return self.encoded or self.source

    def _starting_weights(self) -> dict[str, Any] | None:
        """The weights to fine-tune, if any: a run that has a checkpoint goes on from there."""
        source = self.config.init_from
        if not source or files.has_checkpoint(self.workdir):
            return None
        print(f"diffusion: starting from the weights in {source}")
        return files.load_weights(source, self.config)[1]

    def _samples(self, pipe: Pipeline) -> np.ndarray:
        """The same seeds and classes throughout a run, (N, H, W, 3) uint8."""
        count = self.config.sample.num_samples
        condition = None
        fields = set(specify(self.config))  # a classifier's label may be no condition
        if fields == {"label"}:
            classes = min(self.config.label.num_classes, count)
            # Sorted, so that a row of the grid shows one class.
            condition = {"label": sorted(i % classes for i in range(count))}
        elif fields:
            condition = self._conditions(count)
        return pipe.sample(range(count), condition)

    def _conditions(self, count: int) -> dict[str, np.ndarray]:
        """The conditions of the data's first examples, over and over if there are too few."""
        fields = tuple(specify(self.config))
        batches = epoch_batches(
            self.source,
            latents_lib.task_transform(self.config),
            min(count, len(self.source)),
            count=count,
            fields=passed_on(fields),
            threads=self.config.data.threads,
        )
        (batch,) = batches
        return {name: batch[name][np.arange(count) % len(batch[name])] for name in fields}

    def _grid(self, pixels: np.ndarray) -> np.ndarray:
        return images.make_grid(pixels, columns=_columns(len(pixels)))

    # -- classifier -----------------------------------------------------------------------------

    def classifier(self, frozen: dict[str, Any]) -> None:
        """Trains the classifier of noisy latents and stores it, unless that is done, or unasked."""
        block = self.config.classifier.train
        if block.steps == 0 or (self.workdir / classifier_files.WEIGHTS).is_file():
            return
        directory = self.workdir / classifier_files.FOLDER
        functions = classifier_functions(self.config)
        stage = Stage("classifier", directory, block, *functions, frozen, picture=None)
        state = self._fit(stage, self._batches(self._latents(frozen), block), 4)
        params = jax.device_get(state.params["classifier"])
        _check_finite(params, stage, "classifier")
        classifier_files.save_classifier(self.workdir, params)

    def final_pictures(self, pipe: Pipeline) -> list[pathlib.Path]:
        """Writes the final grid and, if asked for, each sample's nearest training image."""
        samples = self._samples(pipe)
        paths = [self.workdir / "samples" / "final.png"]
        images.save_png(paths[0], self._grid(samples))
        if self.config.sample.nearest:
            count = min(len(self.source), COMPARED_IMAGES)
            references = self._examples(count)
            if self.config.data.flip:
                references = np.concatenate([references, references[:, :, ::-1]])
            indices, distances = images.nearest(samples, references)
            paths.append(self.workdir / "samples" / "final_nearest.png")
            pairs = images.pairs_grid(samples, references[indices], columns=_columns(len(samples)))
            images.save_png(paths[1], pairs)
            middle, least = np.median(distances), distances.min()
            print(
                f"nearest of {count} training images: root mean square difference {middle:.1f} "
                f"grey levels in the median, {least:.1f} at least"
            )
        return paths

    # -- shared ---------------------------------------------------------------------------------

    def _key(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(self.key, purpose)

    def _fit(self, stage: Stage, batches: Any, purpose: int) -> TrainState:
        params = jax.eval_shape(stage.init, self.key).params
        stage.directory.mkdir(parents=True, exist_ok=True)
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        (stage.directory / "parameters.txt").write_text(table + "\n", encoding="utf-8")
        parts = ", ".join(
            f"{name} {parameter_overview.count_parameters(tree):,}" for name, tree in params.items()
        )
        print(f"{stage.name}: parameters: {parts} (all in {stage.directory / 'parameters.txt'})")
        return fit(stage, batches, self._key(purpose), self.mesh, self.interrupts)

    def _batches(self, source: Source, block: ConfigDict) -> Any:
        """Returns start_step -> endless batches."""
        conditional = block is not self.config.first_stage.train
        fields = self.config.data.fields
        if isinstance(source, CachedSource):
            transform = CachedTransform(flip=self.config.data.flip)
        elif conditional:
            transform, fields = latents_lib.task_transform(self.config), passed_on(fields)
        else:
            transform = latents_lib.transform(self.config)

        def start(step: int) -> Batches:
            return Batches(
                source,
                transform,
                batch_size=block.batch_size,
                seed=self.config.seed,
                start_step=step,
                fields=fields if conditional else (),
                threads=self.config.data.threads,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )

        return start

    def _epoch(self, batch_size: int, count: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return epoch_batches(
            self.source,
            latents_lib.transform(self.config),
            batch_size,
            count=count,
            threads=self.config.data.threads,
        )

    def _examples(self, count: int) -> np.ndarray:
        """The first images of the set, (count, H, W, 3) uint8, without augmentation."""
        batches = self._epoch(min(count, 256), count)
        return np.concatenate([batch["image"][batch["valid"]] for batch in batches])


def _check_finite(weights: Any, stage: Stage, key: str) -> None:
    """Raises UserError if the last update of a stage has broken its weights."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(weights))):
        raise UserError(
            f"the weights of the {stage.name} in {stage.directory} are not finite: remove its "
            f"checkpoints, and start again with a lower config.{key}.train.lr"
        )


def _columns(count: int) -> int:
    """Columns of a grid that is wider than high, and full where that is possible."""
    best = math.ceil(math.sqrt(count))
    return next((c for c in range(best, 2 * best + 1) if count % c == 0), best)
