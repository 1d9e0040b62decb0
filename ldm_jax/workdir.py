"""The files of a run, and how they become a model again.

workdir/
  config.json            of the run
  weights.safetensors    denoiser and conditioner of an imported or exported model
  tokenizer/             vocabulary of its text encoder, where it has one
  labels.json            names of the classes, where they have any
  first_stage/           weights.safetensors + config.json, and the files of its own training
    latents.json         rule, shift and scale of its latents z, which become (z - shift) * scale;
                         mean, std, channel_mean and channel_std of z over a number of `images`,
                         or `images` 0 alone where the rule measures nothing
  classifier/            weights.safetensors of noisy latents, and the files of its own training
  checkpoints/<step>/    of the diffusion model
  ema/                   averages of the weights kept along the run, and what `ema` makes of them
  best/                  the model of the step with the best FID, if config.train.fid_every asks
  progress/              the statistics of real images that this is measured with
  samples/               grids
  evaluation/            what `evaluate` writes; reconstructions/ is of `reconstruct`
    features/            what it has done of samples and real images; may be deleted
  README.md              a line for each evaluation of samples
  starts.jsonl           when training was started, and on what machine
  metrics.jsonl, events.out.tfevents.*, parameters.txt
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, random, tensors
from ldm_jax import config as config_lib
from ldm_jax.classifier_files import open_classifier, save_classifier
from ldm_jax.data import scenes_vocabulary
from ldm_jax.data.tokenizers import Tokenizer, load_tokenizer
from ldm_jax.errors import UserError
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.checkpoint import abstract_like
from ldm_jax.training.checkpoint_files import restore_newest, stored_steps
from ldm_jax.training.sharding import make_mesh, replicated
from ldm_jax.training.steps import diffusion_functions

WEIGHTS = "weights.safetensors"
LATENTS = "latents.json"
TOKENIZER = "tokenizer"
AVERAGES = "ema"
# What a first stage's weights depend on; how it was trained does not matter to who uses it.
ARCHITECTURE = ("kind", "width", "mult", "depth", "attn_downsample", "mid_attn", "z_channels")
ARCHITECTURE += ("channels", "codes", "levels", "patch", "norm_groups")


def claim(workdir: pathlib.Path, config: ConfigDict, allow_change: bool = False) -> None:
    """Makes a workdir this config's own, or checks that it already is.

    Raises:
        UserError: it cannot be written, or it belongs to another config.
    """
    path = workdir / "config.json"
    if os.path.exists(path):  # unlike Path.exists, it is also False where one may not look
        theirs = read_config(workdir)
        changes = config_lib.differences(theirs, config)
        if changes and not allow_change:
            shown = "; ".join(changes[:3]) + (" ..." if len(changes) > 3 else "")
            raise UserError(
                f"{workdir} belongs to a run with another config ({shown}): choose another "
                "--workdir, or add --allow_config_change to go on with the new values"
            )
        for line in changes:
            print(f"config changed: {line}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, config_lib.to_json(config))
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir} ({error.strerror}): choose another --workdir"
        ) from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file, all or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the config of a run.

    Raises:
        UserError: no workdir there.
    """
    try:
        text = (workdir / "config.json").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{workdir} is no workdir: it has no config.json; train first, or check --workdir"
        ) from error
    try:
        return config_lib.from_json(text)
    except UserError as error:
        raise UserError(f"{workdir / 'config.json'}: {error}") from error


def save_first_stage(
    directory: pathlib.Path,
    config: ConfigDict,
    variables: dict,
    latents: Mapping[str, Any] | None = None,
) -> None:
    """Writes a first stage and what `latents.json` says, if it is known; its weights come last."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "config.json", config_lib.to_json(config))
    if latents is None:
        (directory / LATENTS).unlink(missing_ok=True)  # of an earlier one
    else:
        write_text(directory / LATENTS, json.dumps(latents, indent=2) + "\n")
    tensors.save_tensors(directory / WEIGHTS, variables)


def set_latent_scale(
    path: str | os.PathLike[str], variables: dict, latents: Mapping[str, Any]
) -> None:
    """Replaces the first stage at `path` by `variables` of another scale, all or nothing.

    Raises:
        UserError: a diffusion model there was trained on the old scale, or it cannot be written.
    """
    directory = first_stage_folder(path)
    check_unused_scale(path)
    try:
        tensors.save_tensors(directory / WEIGHTS, variables)
        write_text(directory / LATENTS, json.dumps(latents, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror})") from error


def check_unused_scale(path: str | os.PathLike[str]) -> None:
    """Checks that the scale of the first stage at `path` may change.

    Raises:
        UserError: a diffusion model there was trained on it.
    """
    directory = first_stage_folder(path)
    # `directory/checkpoints` are those of the first stage itself; a link may hide whose it is.
    for place in (directory.absolute(), directory.resolve()):
        root = place.parent
        if place.name == "first_stage" and (has_checkpoint(root) or (root / WEIGHTS).is_file()):
            raise UserError(
                f"{root} holds a diffusion model that was trained on these latents as they are "
                f"scaled: copy {directory} elsewhere and change the copy"
            )


def load_first_stage(path: str | os.PathLike[str], config: ConfigDict) -> dict:
    """Reads a first stage as `open_first_stage` opens it; raises UserError likewise."""
    return jax.tree.map(np.asarray, open_first_stage(path, config))


def open_first_stage(path: str | os.PathLike[str], config: ConfigDict) -> dict:
    """Opens the first stage of a workdir or an exported folder, for use with `config`.

    Its leaves are LazyArrays.

    Raises:
        UserError: nothing there, or another architecture than the config's, named by its keys.
    """
    directory = first_stage_folder(path)
    theirs, ours = read_config(directory).first_stage, config.first_stage
    for key in ARCHITECTURE:
        if key == "codes" and ours.kind != "vq":
            continue
        if theirs[key] != ours[key]:
            raise UserError(
                f"config.first_stage.{key} is {ours[key]!r}, but the first stage in {directory} "
                f"has {theirs[key]!r}"
            )
    return tensors.open_tree(directory / WEIGHTS, abstract_first_stage(config))


def first_stage_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns where the first stage of a workdir lies, which may be the folder itself.

    Raises:
        UserError: nowhere there.
    """
    root = pathlib.Path(path)
    directory = next((d for d in (root / "first_stage", root) if (d / WEIGHTS).is_file()), None)
    if directory is None:
        raise UserError(
            f"no first stage in {root}: it has no {WEIGHTS}, nor has {root / 'first_stage'}"
        )
    return directory


def abstract_first_stage(config: ConfigDict) -> dict:
    """Returns the shapes of a first stage's variables without making them."""
    module, size = builders.build_first_stage(config), config.data.resolution

    def init(key: jax.Array) -> dict:
        images = jnp.zeros((1, size, size, 3))
        return module.init(key, images, random.example_keys(key, 1))

    return jax.eval_shape(init, jax.random.key(0))


def write_labels(workdir: pathlib.Path, names: Sequence[str]) -> None:
    """Writes the class names of a run."""
    write_text(workdir / "labels.json", json.dumps(list(names), indent=2) + "\n")


def read_labels(workdir: pathlib.Path) -> list[str] | None:
    """Returns the class names of a run, if its classes have names."""
    path = workdir / "labels.json"
    if not path.exists():
        return None
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no list of names: {error}") from error


def save_model(
    workdir: pathlib.Path,
    config: ConfigDict,
    weights: Mapping[str, Any],
    step: int = 0,
    label_names: Sequence[str] | None = None,
    tokenizer: pathlib.Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a whole model so that `load` reads it, tensor by tensor.

    `weights` has 'first_stage', 'denoiser', 'conditioner' and 'classifier', as in
    `Pipeline.variables`, or some of them; `metadata` is stored with the denoiser's. The config
    comes last: without it, a folder whose writing was interrupted is no workdir.
    """
    if "first_stage" in weights:
        save_first_stage(workdir / "first_stage", config, weights["first_stage"])
    parts = {name: weights[name] for name in ("denoiser", "conditioner") if name in weights}
    if parts:
        tensors.save_tensors(workdir / WEIGHTS, parts, {"step": str(step)} | dict(metadata or {}))
    if "classifier" in weights:
        save_classifier(workdir, weights["classifier"])
    if label_names:
        write_labels(workdir, label_names)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, workdir / TOKENIZER)
    write_text(workdir / "config.json", config_lib.to_json(config))


def copy_tokenizer(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Copies the files of a tokenizer; weights that lie beside them stay where they are."""
    if source.resolve() == destination.resolve():
        return
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".txt", ".gz") and path.is_file():
            shutil.copyfile(path, destination / path.name)


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Tells whether a run has stored a step of its diffusion model, damaged or not."""
    return bool(stored_steps(workdir / "checkpoints"))


def load_weights(workdir: str | os.PathLike[str], config: ConfigDict) -> tuple[int, dict[str, Any]]:
    """Reads weights as `open_weights` opens them; raises UserError likewise."""
    step, weights = open_weights(workdir, config)
    return step, jax.tree.map(np.asarray, weights)


def open_weights(workdir: str | os.PathLike[str], config: ConfigDict) -> tuple[int, dict[str, Any]]:
    """Opens 'denoiser' (averaged weights) and 'conditioner' of a workdir; also gives their step.

    Those of an imported model are LazyArrays.

    Raises:
        UserError: none there yet, or weights that do not fit the config.
    """
    root = pathlib.Path(workdir)
    if has_checkpoint(root):
        return _load_checkpoint(root / "checkpoints", config)
    if not (root / WEIGHTS).is_file():
        raise UserError(f"no checkpoint in {root}: run ldm_jax.train first")
    names, metadata = tensors.open_tensors(root / WEIGHTS)
    stored = {name.split("/")[0] for name in names}
    abstract = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    # A UNet may have been imported on its own.
    abstract = {n: tree for n, tree in abstract.items() if n in stored or not jax.tree.leaves(tree)}
    step = metadata.get("step", "0")
    if not step.isdecimal():
        raise UserError(f"{root / WEIGHTS} says that its step is '{step[:20]}'")
    return int(step), tensors.open_tree(root / WEIGHTS, abstract)


def load(workdir: str | os.PathLike[str]) -> Pipeline:
    """Loads a model: the newest checkpoint of a run, with the averaged (EMA) weights of the
    denoiser, or an imported one.

    Raises:
        UserError: no workdir, no checkpoint yet, or files that do not fit the config.
    """
    root = pathlib.Path(workdir)
    config = read_config(root)
    variables, step = {}, 0
    if (root / "first_stage" / WEIGHTS).is_file():
        variables["first_stage"] = load_first_stage(root, config)
    elif not (root / WEIGHTS).is_file():  # else a denoiser was imported on its own
        raise UserError(f"the first stage in {root} is not trained yet: run ldm_jax.train again")
    if config.train.steps > 0:  # else it is a first stage only
        step, weights = load_weights(root, config)
        variables |= weights | jax.tree.map(np.asarray, open_classifier(root, config))
    return Pipeline(config, variables, step, read_labels(root), read_tokenizer(root, config))


def read_tokenizer(workdir: pathlib.Path, config: ConfigDict) -> Tokenizer | None:
    """Returns the tokenizer of a text-conditional model; None where there is none.

    Raises:
        UserError: it cannot be read, or it has more tokens than the model.
    """
    folder = tokenizer_folder(workdir, config)
    if folder is None:
        return None
    tokenizer = load_tokenizer(config.text.encoder, folder, config.text.length)
    if len(tokenizer.backend) > config.text.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer.backend)} tokens, but "
            f"config.text.vocab_size is {config.text.vocab_size}"
        )
    return tokenizer


def tokenizer_folder(workdir: pathlib.Path, config: ConfigDict) -> pathlib.Path | None:
    """The folder of a model's tokenizer: the workdir's own, else the config's; None if neither."""
    if "text" not in config.conditioners:
        return None
    own, named = workdir / TOKENIZER, config.text.tokenizer
    if own.is_dir():
        return own
    if named == scenes_vocabulary.NAME:
        return scenes_vocabulary.FOLDER
    return pathlib.Path(named) if named else None


def training_tokenizer(workdir: pathlib.Path, config: ConfigDict) -> tuple[Tokenizer, pathlib.Path]:
    """Returns the tokenizer to train with and its folder: the run's own, or its start's.

    Raises:
        UserError: none is given, or it cannot be read.
    """
    for root in (workdir, *([pathlib.Path(config.init_from)] if config.init_from else [])):
        tokenizer = read_tokenizer(root, config)
        if tokenizer is not None:
            return tokenizer, tokenizer_folder(root, config)
    raise UserError(
        "captions need a tokenizer: set config.text.tokenizer to a folder with its vocabulary, or "
        f"to '{scenes_vocabulary.NAME}' for captions of scenes"
    )


def _load_checkpoint(directory: pathlib.Path, config: ConfigDict) -> tuple[int, dict[str, Any]]:
    everywhere = replicated(make_mesh())
    abstract = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))
    wanted = {
        "ema_params.denoiser": abstract.ema_params["denoiser"],
        "params.conditioner": abstract.params["conditioner"],
    }
    step, weights, _ = restore_newest(directory, abstract_like(wanted, everywhere))
    return step, {
        "denoiser": weights["ema_params.denoiser"],
        "conditioner": weights["params.conditioner"],
    }
