"""Whether what a workdir holds fits a config: its weights, and the states of its training."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax import classifier_files
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.errors import UserError
from ldm_jax.training.checkpoint import state_items
from ldm_jax.training.classifier_steps import classifier_functions
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.state import Init, Step
from ldm_jax.training.steps import diffusion_functions

# Keys of the denoiser and the conditioners that may differ where weights are reused.
NOT_WEIGHTS = ("denoiser.dropout", "denoiser.remat", "text.tokenizer")


def check_same_architecture(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
    """Checks that the denoiser and the conditioners of a workdir are those of a config.

    Keys that only another kind of denoiser reads may differ.

    Raises:
        UserError: no workdir there, or another architecture, named by its first key.
    """
    theirs, ours = files.read_config(pathlib.Path(workdir)), config
    skipped = {*NOT_WEIGHTS, *config_lib.unread_keys(ours)}
    blocks = ("denoiser", *(name for name in ours.conditioners if name in ours))
    for key in ("denoiser.kind", "conditioners", *blocks):
        # The kind comes first, as it says which of the other keys count.
        pair = (config_lib.flatten({key: _value(block, key)}) for block in (theirs, ours))
        for (name, value), wanted in zip(*(sorted(flat.items()) for flat in pair), strict=True):
            if value != wanted[1] and name not in skipped:
                raise UserError(
                    f"config.{name} is {wanted[1]!r}, but the model in {workdir} has {value!r}: "
                    "set config.init_from='', or the key to that value"
                )


def check_resumable(
    workdir: pathlib.Path, config: ConfigDict, label_names: Sequence[str] | None = None
) -> None:
    """Checks that what a workdir holds, if anything, is what a config's training goes on from.

    Args:
        workdir: of the run.
        config: to go on with.
        label_names: of the classes of its data, if they have any.

    Raises:
        UserError: it is not; names the keys that make the difference.
    """
    first_stage = workdir / "first_stage"
    stages = []
    if files.has_checkpoint(first_stage) and not (first_stage / files.WEIGHTS).is_file():
        stages.append((first_stage, first_stage_functions))
    if files.has_checkpoint(workdir):
        stages.append((workdir, diffusion_functions))
    classifier = workdir / classifier_files.FOLDER
    if files.has_checkpoint(classifier) and not (workdir / classifier_files.WEIGHTS).is_file():
        stages.append((classifier, classifier_functions))
    classified = files.has_checkpoint(classifier) or (workdir / classifier_files.WEIGHTS).is_file()
    if not (stages or classified) or not (workdir / "config.json").is_file():
        return
    theirs = files.read_config(workdir)
    start = f", which can start from these weights (config.init_from='{workdir}')"
    process = _changed(theirs, config, [f"diffusion.{x}" for x in config_lib.process_keys(theirs)])
    if process and files.has_checkpoint(workdir):
        raise UserError(
            f"the outputs of the model in {workdir} are those of another {_shown(process)}: set "
            f"{_these(process)} as it was, or choose another --workdir{start}"
        )
    if classified:
        _check_classifier(workdir, theirs, config, label_names)
    for folder, functions in stages:
        keys = changed_state(theirs, config, functions)
        if keys:
            raise UserError(
                f"the checkpoints in {folder / 'checkpoints'} hold a training state of another "
                f"{_shown(keys)}: set {_these(keys)} as it was, or choose another "
                f"--workdir{'' if folder != workdir else start}"
            )


def _check_classifier(
    workdir: pathlib.Path, theirs: ConfigDict, ours: ConfigDict, label_names: Sequence[str] | None
) -> None:
    """Refuses a classifier of other classes or noise levels, of which alone it is told."""
    levels = [x for x in config_lib.process_keys(theirs) if x not in ("predict", "sigma_data")]
    keys = ["label.num_classes", "data.label", *(f"diffusion.{x}" for x in levels)]
    keys = _changed(theirs, ours, keys)
    known = files.read_labels(workdir)
    renamed = bool(known and label_names) and list(known) != list(label_names)
    if keys or renamed:
        raise UserError(
            f"the classifier in {workdir / classifier_files.FOLDER} was trained with "
            f"{'another ' + _shown(keys) if keys else 'classes of other names'}: remove that "
            "folder to train it anew, or choose another --workdir"
        )


def _changed(theirs: ConfigDict, ours: ConfigDict, keys: Sequence[str]) -> list[str]:
    """Those of the keys in which two configs differ."""
    return [key for key in keys if _value(theirs, key) != _value(ours, key)]


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(f"config.{key}" for key in keys)


def _these(keys: Sequence[str]) -> str:
    return "these" if len(keys) > 1 else "it"


def changed_state(
    theirs: ConfigDict, ours: ConfigDict, functions: Callable[[ConfigDict], tuple[Init, Step]]
) -> list[str]:
    """The changed keys for which a state of training with `theirs` lacks what `ours` needs.

    functions: makes (init, step) of a config. A state may hold more parts than are needed.
    """

    @functools.cache
    def shapes(key: str | None) -> dict[str, Any]:
        config = ours
        if key is not None:  # that key of ours alone, all others of theirs
            config = theirs.copy_and_resolve_references()
            with config.unlocked():
                config.update_from_flattened_dict({key: _value(ours, key)})
        return _shapes(config, functions)

    def fits(key: str | None) -> bool:
        try:
            needed = shapes(key)
        except Exception:  # a key may only make sense along with others that changed too
            return False
        return all(stored.get(name) == tree for name, tree in needed.items())

    changed = [line.split(": ")[0] for line in config_lib.differences(theirs, ours)]
    if not changed:
        return []
    stored = _shapes(theirs, functions)
    if fits(None):
        return []
    return [key for key in changed if not fits(key)] or changed


def _shapes(
    config: ConfigDict, functions: Callable[[ConfigDict], tuple[Init, Step]]
) -> dict[str, Any]:
    """What a checkpoint holds, by item: structure, and shapes and types of the arrays."""
    state = jax.eval_shape(functions(config)[0], jax.random.key(0))
    found = {}
    for name, tree in state_items(state).items():
        leaves, structure = jax.tree.flatten(tree)
        found[name] = structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
    return found


def _value(config: ConfigDict, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config
