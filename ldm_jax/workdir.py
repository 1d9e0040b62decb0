"""The files of a run, and how they become a model again.

workdir/
  config.json            of the run
  labels.json            names of the classes, where they have any
  first_stage/           weights.safetensors + config.json, and the files of its own training
  checkpoints/<step>/    of the diffusion model
  samples/               grids
  metrics.jsonl, events.out.tfevents.*, parameters.txt
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax import builders, random, tensors
from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.sharding import make_mesh, replicated
from ldm_jax.training.steps import diffusion_functions

WEIGHTS = "weights.safetensors"
# What a first stage's weights depend on; how it was trained does not matter to who uses it.
ARCHITECTURE = ("kind", "width", "mult", "depth", "attn_downsample", "mid_attn", "z_channels")
ARCHITECTURE += ("channels", "codes", "patch", "norm_groups")


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


def save_first_stage(directory: pathlib.Path, config: ConfigDict, variables: dict) -> None:
    """Writes the weights and latent statistics of a first stage; its config comes first."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "config.json", config_lib.to_json(config))
    tensors.save_tensors(directory / WEIGHTS, variables)


def load_first_stage(path: str | os.PathLike[str], config: ConfigDict) -> dict:
    """Reads the first stage of a workdir or an exported folder, for use with `config`.

    Raises:
        UserError: nothing there, or another architecture than the config's, named by its keys.
    """
    root = pathlib.Path(path)
    directory = next((d for d in (root / "first_stage", root) if (d / WEIGHTS).is_file()), None)
    if directory is None:
        raise UserError(
            f"no first stage in {root}: it has no {WEIGHTS}, nor has {root / 'first_stage'}"
        )
    theirs, ours = read_config(directory).first_stage, config.first_stage
    for key in ARCHITECTURE:
        if key == "codes" and ours.kind != "vq":
            continue
        if theirs[key] != ours[key]:
            raise UserError(
                f"config.first_stage.{key} is {ours[key]!r}, but the first stage in {directory} "
                f"has {theirs[key]!r}"
            )
    return tensors.load_tensors(directory / WEIGHTS, abstract_first_stage(config))


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
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def load(workdir: str | os.PathLike[str]) -> Pipeline:
    """Loads the newest checkpoint of a run, with the averaged (EMA) weights of the denoiser.

    Raises:
        UserError: no workdir, no checkpoint yet, or files that do not fit the config.
    """
    root = pathlib.Path(workdir)
    config = read_config(root)
    if not (root / "first_stage" / WEIGHTS).is_file():
        raise UserError(f"the first stage in {root} is not trained yet: run ldm_jax.train again")
    if not (root / "checkpoints").is_dir():
        raise UserError(f"no checkpoint in {root}: run ldm_jax.train first")
    everywhere = replicated(make_mesh())
    abstract = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))
    wanted = {
        "ema_params.denoiser": abstract.ema_params["denoiser"],
        "params.conditioner": abstract.params["conditioner"],
    }
    checkpoints = Checkpoints(root / "checkpoints")
    try:
        step, weights = checkpoints.restore_items(abstract_like(wanted, everywhere))
    finally:
        checkpoints.close()
    variables = {
        "first_stage": load_first_stage(root, config),
        "denoiser": weights["ema_params.denoiser"],
        "conditioner": weights["params.conditioner"],
    }
    return Pipeline(config, variables, step, read_labels(root))
