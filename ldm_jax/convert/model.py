"""What a conversion gives and takes: a whole model, whatever files it came from."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.errors import UserError


class Model(NamedTuple):
    """A model between two formats; its weights may be LazyArrays that are not read yet.

    Attributes:
        config: checked, of the whole model; `train.steps` 0 marks a first stage on its own.
        weights: 'first_stage' (variables) and, unless it is a first stage only, 'denoiser' and
            'conditioner' (params), as `Pipeline.variables`.
        tokenizer: folder with the vocabulary of the text encoder, or None.
        label_names: of the classes, or None.
        step: updates that the weights have seen; 0 where that is not known.
    """

    config: ConfigDict
    weights: dict[str, Any]
    tokenizer: pathlib.Path | None = None
    label_names: list[str] | None = None
    step: int = 0


def latent_variables(config: ConfigDict, scale: Any = 1.0, shift: Any = 0.0) -> dict[str, Any]:
    """The collection 'latents' of a first stage whose latents are (z - shift) * scale."""
    shape = (config_lib.latent_channels(config),)
    full = lambda value: np.array(np.broadcast_to(np.float32(value), shape))  # noqa: E731
    return {"shift": full(shift), "scale": full(scale)}


def facts_of(model: Model, derived: ConfigDict) -> dict[str, Any]:
    """What the files of another code do not tell of a model, to be stored beside them.

    `derived` is the config that reading these files would give.
    """
    theirs = config_lib.flatten(derived)
    ours = config_lib.flatten(model.config)
    untold = {key: value for key, value in ours.items() if theirs.get(key) != value}
    facts = {"config": untold, "label_names": model.label_names, "step": model.step}
    return {key: value for key, value in facts.items() if value}


def add_facts(derived: ConfigDict, facts: Any) -> tuple[ConfigDict, list[str] | None, int]:
    """Returns (config, label_names, step) of a model whose facts `facts_of` has stored.

    Raises:
        UserError: facts that were not stored by `facts_of`, or a config that cannot work.
    """
    try:
        flat = config_lib.flatten(derived.to_dict()) | dict(facts.get("config", {}))
        text = json.dumps(traverse_util.unflatten_dict(flat, sep="."))
        names, step = facts.get("label_names"), int(facts.get("step", 0))
        names = None if names is None else [str(name) for name in names]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the stored facts of ldm_jax make no sense: {error!r}") from error
    return config_lib.from_json(text), names, step
