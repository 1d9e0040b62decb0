"""What can be checked of a run before anything is written, and the data that it opens."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, memory, stored_latents
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.arguments import make_guidance
from ldm_jax.classifier_files import open_classifier
from ldm_jax.compatibility import check_resumable, check_same_architecture
from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.decode import Limits
from ldm_jax.data.latents_source import LatentsSource, latents_folder, open_latents
from ldm_jax.data.pipeline import check_fields
from ldm_jax.data.sources import Source, open_source
from ldm_jax.data.task_fields import columns
from ldm_jax.diffusion.samplers import make_table, nearest_eta
from ldm_jax.errors import UserError
from ldm_jax.judges import Judges, first_stage_judges
from ldm_jax.training.checkpoint import abstract_like
from ldm_jax.training.classifier_steps import classifier_functions
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.sharding import bytes_per_device, check_batch, state_shardings
from ldm_jax.training.state import TrainState
from ldm_jax.training.steps import diffusion_functions


def check_parts(
    config: ConfigDict, workdir: pathlib.Path, source: Source, mesh: jax.sharding.Mesh
) -> Judges | None:
    """Refuses, before anything is written, what would only fail hours later.

    Returns what a first stage that is to be trained is judged by.
    """
    check_batch(config.train.batch_size, mesh, "train.batch_size", config.train.accumulate)
    if (workdir / files.WEIGHTS).is_file():
        raise UserError(
            f"{workdir} holds an imported model: choose another --workdir, and "
            f"--config=configs/imported.py:{workdir} to start from its weights"
        )
    check_resumable(workdir, config, getattr(source, "label_names", None))
    judges, given = None, stored_latents.given_first_stage(config)
    begun = (workdir / "first_stage" / files.WEIGHTS).is_file()
    if begun or given:
        opened = files.open_first_stage(workdir if begun else given, config)  # not read yet
        if isinstance(source, LatentsSource):
            where = files.first_stage_folder(workdir if begun else given)
            stored_latents.check_first_stage(source, opened, where)
            if not begun:
                stored_latents.scaled(config, jax.tree.map(np.asarray, opened), source)
    elif config.first_stage.kind != "identity":
        block = config.first_stage.train
        check_batch(block.batch_size, mesh, "first_stage.train.batch_size")
        _check_codebook(config)
        judges = first_stage_judges(config, source)
        jax.eval_shape(first_stage_functions(config)[0], jax.random.key(0))
        d = config.first_stage.discriminator
        if d.weight > 0 and d.start + d.warmup >= block.steps:
            print(
                f"warning: the adversarial term starts at step {d.start + d.warmup} "
                f"(config.first_stage.discriminator.start + .warmup), but the first stage ends at "
                f"{block.steps}: it is never used"
            )
    if config.train.steps > 0:
        _check_diffusion(config, workdir)
        _check_state_fits(jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)), mesh)
    open_classifier(workdir, config)
    if config.classifier.train.steps > 0:
        block, key = config.classifier.train, "classifier.train.batch_size"
        check_batch(block.batch_size, mesh, key, block.accumulate)
        jax.eval_shape(classifier_functions(config)[0], jax.random.key(0))
    return judges


def _check_codebook(config: ConfigDict) -> None:
    """Refuses a codebook that cannot be trained in the memory that is free."""
    c, free = config.first_stage, memory.free_on_device() or memory.free_on_host()
    # float32 numbers: the codes, their gradient, two moments of it, running means, the next codes
    need = 4 * 6 * c.codes * c.channels
    if c.kind == "vq" and free is not None and need > free:
        raise UserError(
            f"config.first_stage.codes is {c.codes}: training so many codes of {c.channels} "
            f"channels takes {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: use fewer"
        )


def _check_state_fits(state: TrainState, mesh: jax.sharding.Mesh) -> None:
    """Refuses accelerators that cannot hold their part of a training state, which is abstract."""
    free = memory.free_on_device()
    held = bytes_per_device(abstract_like(state, state_shardings(state, mesh)))
    if free is not None and held > free:
        raise UserError(
            f"weights, averages and optimiser alone take {held / 2**30:.2f} GiB of each device, "
            f"but {free / 2**30:.2f} GiB are free: raise config.mesh.fsdp or take more devices"
        )


def _check_diffusion(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Refuses what only the second stage would find."""
    default, given = (config_lib.flatten(c) for c in (config_lib.get_config(), config))
    unread = [key for key in config_lib.unread_keys(config) if given[key] != default[key]]
    if unread:
        print(
            f"note: config.denoiser.kind='{config.denoiser.kind}' does not read "
            f"{', '.join(f'config.{key}' for key in unread)}"
        )
    if not files.has_checkpoint(workdir):
        start = {}
        if config.init_from:
            check_same_architecture(config.init_from, config)
            start = files.open_weights(config.init_from, config)[1]
        if config_lib.frozen_parts(config) and "conditioner" not in start:
            raise UserError(
                f"config.text.encoder '{config.text.encoder}' is not trained here: set "
                "config.init_from to an imported model that has its weights"
            )
    s = config.sample
    eta = nearest_eta(s.sampler, s.eta)
    make_table(s.sampler, builders.build_schedule(config), s.steps, eta, s.spacing)
    if s.guidance_scale != 1 and not config_lib.has_null(config):
        raise UserError(
            f"config.sample.guidance_scale is {s.guidance_scale}, but there is no null condition: "
            "use 1, or a conditioner with one"
        )
    if s.guidance_scale != 1:
        make_guidance(config, s.guidance_scale, s.guidance_rescale, s.guidance_interval, False)


def open_data(config: ConfigDict, workdir: pathlib.Path) -> Source:
    """Opens the data set and checks that the model's fields fit it.

    Raises:
        UserError: no such data, a missing field, labels that the config has no room for, or
            captions without a tokenizer.
    """
    c = config.data
    label = c.label if "label" in c.fields else ""
    limits = Limits(c.min_side, c.max_pixels)
    source = open_source(c.source, split=c.split, where=c.where, label=label, limits=limits)
    if "tokens" in c.fields:
        tokenizer, _ = files.training_tokenizer(workdir, config)
        source = CaptionedSource(source, c.caption, tokenizer.encode)
    check_fields(source, columns(c.fields))
    if c.flip and not getattr(source, "flippable", True):
        raise UserError(
            f"the images of config.data.source='{c.source}' must not be mirrored: set "
            "config.data.flip=False"
        )
    return _check_classes(config, source)


def open_training_data(config: ConfigDict, workdir: pathlib.Path) -> Source:
    """Opens what the diffusion model is trained on: images, or stored latents.

    Raises:
        UserError: as `open_data`, and where what is stored is not what the config asks for.
    """
    if latents_folder(config.data.source) is None:
        return open_data(config, workdir)
    source = open_latents(config)
    if "tokens" in config.data.fields:
        tokenizer, folder = files.training_tokenizer(workdir, config)
        if tokenizer.digest() != source.index.vocabulary:
            raise UserError(
                f"the vocabulary in {folder} is not that of the captions in {source.folder}: use "
                "that, or encode the data again"
            )
    return _check_classes(config, source)


def _check_classes(config: ConfigDict, source: Source) -> Source:
    """Returns a source whose classes the config has room for; UserError if it has not."""
    c, names, room = config.data, source.label_names or (), config.layout.vocab_size - 1
    if "boxes" in c.fields and "label" not in c.fields and len(names) > room:
        raise UserError(
            f"the boxes of the data have {len(names)} classes, but config.layout.vocab_size is "
            f"{room + 1}, which has room for {room}: set it to {len(names) + 1} or more"
        )
    if "label" in c.fields and source.num_labels > config.label.num_classes:
        raise UserError(
            f"the data has labels up to {source.num_labels - 1}, but config.label.num_classes is "
            f"{config.label.num_classes}: set it to {source.num_labels}"
        )
    return source
