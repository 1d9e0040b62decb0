"""A whole run: first stage, latent statistics, diffusion model, classifier, final pictures."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from ldm_jax import (
    classifier_files,
    distributed,
    lock,
    machine,
    pictures,
    progress,
    stored_latents,
    watchdog,
)
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.data.bad import BAD_HELD_OUT, BAD_IMAGES, TolerantSource
from ldm_jax.data.buckets import Buckets, make_buckets
from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.latents_source import LatentsSource
from ldm_jax.data.pipeline import Batches, CachedSource
from ldm_jax.data.sources import Source
from ldm_jax.data.task_fields import passed_on
from ldm_jax.data.transforms import CachedTransform
from ldm_jax.judges import Judges
from ldm_jax.pipeline import Pipeline
from ldm_jax.preflight import check_parts, open_training_data
from ldm_jax.training import latents as latents_lib
from ldm_jax.training.alarms import first_stage_alarms
from ldm_jax.training.classifier_steps import classifier_functions
from ldm_jax.training.ema import profiles
from ldm_jax.training.evaluation import evaluation_batches, evaluator
from ldm_jax.training.first_stage_steps import first_stage_functions, trained_weights
from ldm_jax.training.interrupt import Interrupts, of_command
from ldm_jax.training.loop import fit
from ldm_jax.training.sharding import gather, local_part, make_mesh, put, replicated
from ldm_jax.training.snapshots import remove_later, write_snapshots
from ldm_jax.training.stage import Measure, Picture, Stage
from ldm_jax.training.state import TrainState
from ldm_jax.training.steps import diffusion_functions


def run(config: ConfigDict, workdir: pathlib.Path, allow_config_change: bool = False) -> None:
    """Trains what is not trained yet in `workdir`, and writes the final samples.

    Raises:
        UserError: the config, the data or the workdir cannot be used.
        Interrupted: a signal came; the same call goes on from there.
    """
    config_lib.check(config)
    begin = time.perf_counter()
    interrupts = of_command() or Interrupts()
    with distributed.agreed():
        mesh = make_mesh(config.mesh)
        source = open_training_data(config, workdir)
        judges = check_parts(config, workdir, source, mesh)
        progress.check(config, source, mesh)
    with contextlib.ExitStack() as stack, interrupts:
        with distributed.agreed():  # once all have read what is there
            if distributed.is_main():
                held = stack.enter_context(lock.hold(workdir))
                interrupts.leaving = held.release
            _claim(config, workdir, source, allow_config_change)
        interrupts.check("before the first step")
        examples, judges = _tolerant(config, workdir, source, judges)
        job = _Run(config, workdir, examples, mesh, interrupts)
        frozen = job.first_stage(judges)
        if config.train.steps == 0:
            print(f"\nDone: the first stage is in {workdir / 'first_stage'}")
            return
        pipe = job.diffusion(frozen)
        job.classifier(frozen)
        interrupts.check("before the final samples")
        with watchdog.phase("picture"):
            shown = pictures.final_pictures(config, examples, pipe, workdir / "samples")
    if isinstance(source, CaptionedSource) and source.cut_share > 0:
        print(
            f"captions: {source.cut_share:.1%} were longer than the {config.text.length} tokens of "
            "config.text.length, and were cut off"
        )
    if config.train.fid_every and (best := progress.read_best(workdir)):
        print(f"best FID of samples: {best.fid:.2f} at step {best.step}, in {workdir / 'best'}")
    looks = "\n".join(f"  {path}" for path in shown)
    print(f"\nDone in {(time.perf_counter() - begin) / 60:.1f} minutes. Look at:\n{looks}")
    print(f"Sample more:\n  python -m ldm_jax.sample --workdir={workdir} --num_samples=16")


def _claim(
    config: ConfigDict, workdir: pathlib.Path, source: Source, allow_config_change: bool
) -> None:
    """Makes a workdir this run's own, with what sampling needs besides weights."""
    if not distributed.is_main():
        return
    files.claim(workdir, config, allow_config_change)
    machine.add_start(workdir)
    if {"label", "boxes"} & set(config.data.fields) and source.label_names:
        files.write_labels(workdir, source.label_names)
    if "tokens" in config.data.fields:  # a run can then be sampled from anywhere
        _, folder = files.training_tokenizer(workdir, config)
        files.copy_tokenizer(folder, workdir / files.TOKENIZER)


def _tolerant(
    config: ConfigDict, workdir: pathlib.Path, source: Source, judges: Judges | None
) -> tuple[Source, Judges | None]:
    """Lets a share of the images that are trained on, and judged by, be bad."""
    if isinstance(source, LatentsSource):
        return source, judges
    examples = TolerantSource(source, config.data.max_bad, workdir / BAD_IMAGES)
    if judges is not None:
        own = judges.images is not source
        held_out = TolerantSource(judges.images, config.data.max_bad, workdir / BAD_HELD_OUT)
        judges = judges._replace(images=held_out if own else examples)
    return examples, judges


def _numbered(folder: pathlib.Path) -> Callable[[int], pathlib.Path]:
    """Step -> where its picture is."""
    return lambda number: folder / f"step_{number:07d}.png"


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
        self.encoded: Source | None = None  # by `_latents`

    # -- first stage ----------------------------------------------------------------------------

    def first_stage(self, judges: Judges | None) -> dict[str, Any]:
        """Returns the variables of the first stage: trained before, given, or trained now."""
        config, directory = self.config, self.workdir / "first_stage"
        if (directory / files.WEIGHTS).is_file():
            return files.load_first_stage(self.workdir, config)
        if given := stored_latents.given_first_stage(config):
            frozen = files.load_first_stage(given, config)
        elif config.first_stage.kind == "identity":
            frozen = {"latents": latents_lib.unscaled(config)}
        else:
            frozen = self._train_first_stage(directory, judges)
        frozen, record = self._measure(frozen)
        if distributed.is_main():
            files.save_first_stage(directory, config, frozen, record)
        return frozen

    def _train_first_stage(self, directory: pathlib.Path, judges: Judges) -> dict[str, Any]:
        config, block = self.config, self.config.first_stage.train
        init, step = first_stage_functions(config)
        networks = put(judges.networks, replicated(self.mesh))
        evaluate = evaluator(config, judges.metrics, networks, self.mesh)

        path = _numbered(directory / "reconstructions")

        def picture(state: TrainState, number: int) -> Picture:
            batches = evaluation_batches(
                config, judges.images, block.batch_size, self.mesh, config.first_stage.eval.images
            )
            found = evaluate(
                self._variables(state),
                batches,
                lambda done: self.interrupts.check("while evaluating the first stage"),
            )
            pictures.save_picture(path(number), found.grid())
            return Picture(
                path(number), {f"eval_{name}": value for name, value in found.scalars.items()}
            )

        stage = Stage(
            "first stage",
            directory,
            block,
            init,
            step,
            {"lpips": networks["lpips"]} if config.first_stage.perceptual_weight > 0 else {},
            picture,
            drawn=lambda number: path(number).exists(),
            picture_at_end=True,
            alarms=lambda scalars: first_stage_alarms(scalars, config),
            watched="reconstruction_mae",
            counts=self._counts,
        )
        state = self._fit(stage, self._batches(self.source, stage.block), 1)
        return gather(self._variables(state))

    def _variables(self, state: TrainState) -> dict[str, Any]:
        """A trained first stage's variables, with latents that are not scaled yet."""
        return {"params": trained_weights(state), "latents": latents_lib.unscaled(self.config)}

    def _measure(self, frozen: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the variables with the scale that the config asks for, and what it is made of."""
        config = self.config
        if isinstance(self.source, LatentsSource):
            return stored_latents.scaled(config, frozen, self.source)
        own = not config.first_stage.weights and config.first_stage.kind != "identity"
        check = lambda: self.interrupts.check("while measuring the latents")  # noqa: E731
        with watchdog.phase("measure"):
            return latents_lib.scaled(config, frozen, self.source, self.mesh, check, trained=own)

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
                names = self.source.label_names
                pipe.append(Pipeline(config, variables, 0, names, mesh=self.mesh))
            # The state's buffers are given to the next step, so the pipeline is only good until
            # then, unless this is the last one.
            pipe[0].variables, pipe[0].step = pipe[0].variables | weights, int(state.step)
            return pipe[0]

        path = _numbered(self.workdir / "samples")

        def picture(state: TrainState, number: int) -> Picture:
            made = pictures.samples(config, self.source, update(state))
            pictures.save_picture(path(number), pictures.sample_grid(made))
            return Picture(path(number))

        start = self._starting_weights()
        kept = profiles(config)

        def snapshot(state: TrainState, number: int) -> None:
            write_snapshots(self.workdir / files.AVERAGES, gather(state.averages), kept, number)

        stage = Stage(
            "diffusion",
            self.workdir,
            config.train,
            init,
            step,
            frozen | stored_latents.stored_null(config, source),
            picture,
            start,
            drawn=lambda number: path(number).exists(),
            watched="loss_simple",
            counts=self._counts,
            snapshot=snapshot if kept else None,
            snapshot_every=config.ema_snapshots.every,
            forget=functools.partial(remove_later, self.workdir / files.AVERAGES),
            measure=self._samples_fid(update, frozen) if config.train.fid_every else None,
        )
        return update(self._fit(stage, self._batches(source, stage.block), 3))

    def _samples_fid(self, update: Callable[[TrainState], Pipeline], frozen: Any) -> Measure:
        """The FID of samples, of which the best weights are kept."""
        fid = progress.SamplesFID(
            self.config,
            self.workdir,
            self.source,
            frozen,
            self.mesh,
            lambda: self.interrupts.check("while measuring samples"),
        )

        def take(state: TrainState, step: int) -> float:
            pipe = update(state)
            found = fid(pipe)
            fid.keep_if_best(pipe, found)
            return found

        return Measure("fid", self.config.train.fid_every, take)

    def _latents(self, frozen: dict[str, Any]) -> Source:
        """The data, with images encoded once if the config says so."""
        if self.config.data.cache_latents and self.encoded is None:
            with watchdog.phase("encode"):
                self.encoded = latents_lib.encode_source(
                    self.config,
                    self.source,
                    latents_lib.encoder(self.config, frozen, self.mesh),
                    lambda: self.interrupts.check("while encoding the images"),
                    self.buckets,
                    self.mesh,
                )
        return self.encoded or self.source

    @functools.cached_property
    def buckets(self) -> Buckets | None:
        """The sizes that the diffusion model is trained on, where they are several."""
        c = self.config.data
        if not c.buckets:
            return None
        made = make_buckets(self.source, c.buckets, c.threads)
        print(f"buckets (height x width): {made.summary()}")
        return made

    def _starting_weights(self) -> dict[str, Any] | None:
        """The weights to fine-tune, if any: a run that has a checkpoint goes on from there."""
        source = self.config.init_from
        if not source or files.has_checkpoint(self.workdir):
            return None
        print(f"diffusion: starting from the weights in {source}")
        start = files.load_weights(source, self.config)[1]
        stored_latents.check_text_encoder(self.config, self.source, start.get("conditioner", {}))
        return start

    # -- classifier -----------------------------------------------------------------------------

    def classifier(self, frozen: dict[str, Any]) -> None:
        """Trains the classifier of noisy latents and stores it, unless that is done, or unasked."""
        block = self.config.classifier.train
        if block.steps == 0 or (self.workdir / classifier_files.WEIGHTS).is_file():
            return
        directory = self.workdir / classifier_files.FOLDER
        functions = classifier_functions(self.config)
        stage = Stage(
            "classifier", directory, block, *functions, frozen, picture=None, counts=self._counts
        )
        state = self._fit(stage, self._batches(self._latents(frozen), block), 4)
        params = gather(state.params["classifier"])
        if distributed.is_main():
            classifier_files.save_classifier(self.workdir, params)

    # -- shared ---------------------------------------------------------------------------------

    def _key(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(self.key, purpose)

    def _fit(self, stage: Stage, batches: Any, purpose: int) -> TrainState:
        params = jax.eval_shape(stage.init, self.key).params
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        if distributed.is_main():
            stage.directory.mkdir(parents=True, exist_ok=True)
            (stage.directory / "parameters.txt").write_text(table + "\n", encoding="utf-8")
        parts = ", ".join(
            f"{name} {parameter_overview.count_parameters(tree):,}" for name, tree in params.items()
        )
        print(f"{stage.name}: parameters: {parts} (all in {stage.directory / 'parameters.txt'})")
        state = fit(stage, batches, self._key(purpose), self.mesh, self.interrupts)
        self.interrupts.check(f"after the last step of the {stage.name}")
        return state

    def _counts(self) -> dict[str, float]:
        """What is counted beside the steps, for the metrics."""
        bad = self.source.bad if isinstance(self.source, TolerantSource) else 0
        return {"bad_images": bad} if bad else {}

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

        index, processes = local_part(self.mesh)

        def start(step: int) -> Batches:
            return Batches(
                source,
                transform,
                batch_size=block.batch_size,
                seed=self.config.seed,
                start_step=step,
                fields=fields if conditional else (),
                threads=self.config.data.threads,
                process_index=index,
                process_count=processes,
                buckets=self.buckets if conditional else None,
            )

        return start
