"""The files of the classifier of noisy latents in a workdir."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax import tensors
from ldm_jax.errors import UserError
from ldm_jax.training.classifier_steps import classifier_functions

FOLDER = "classifier"  # of its weights, and of the files of its training
WEIGHTS = f"{FOLDER}/weights.safetensors"


def save_classifier(workdir: pathlib.Path, params: Mapping[str, Any]) -> None:
    """Writes the weights of a classifier, all or nothing."""
    (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    tensors.save_tensors(workdir / WEIGHTS, {"classifier": params})


def open_classifier(workdir: str | os.PathLike[str], config: ConfigDict) -> dict[str, Any]:
    """Opens {'classifier': params} of a workdir, as LazyArrays; {} where it has no classifier.

    Raises:
        UserError: they do not fit the config.
    """
    path = pathlib.Path(workdir) / WEIGHTS
    if not path.is_file():
        return {}
    abstract = jax.eval_shape(classifier_functions(config)[0], jax.random.key(0)).params
    try:
        return tensors.open_tree(path, abstract)
    except UserError as error:
        raise UserError(
            f"{error}: set config.classifier as it was, or remove {path.parent} to train it anew"
        ) from error
