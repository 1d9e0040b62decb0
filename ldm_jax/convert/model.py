"""What a conversion gives and takes: a whole model, whatever files it came from."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.convert.tables import short
from ldm_jax.errors import UserError

# Keys of the config that name places on this machine: they leave it with no file.
LOCAL = ("init_from", "first_stage.weights", "text.tokenizer", "data.source", "data.where")
# The authors' scale of guidance, by text encoder or conditioner.
GUIDANCE = {"clip": 7.5, "bert": 5.0, "label": 3.0}


class Model(NamedTuple):
    """A model between two formats; its weights may be LazyArrays that are not read yet.

    Attributes:
        config: checked, of the whole model; `train.steps` 0 marks a first stage on its own.
        weights: 'first_stage' (variables) and, unless it is a first stage only, 'denoiser' and
            'conditioner' (params), as `Pipeline.variables`; 'classifier' where there is one, which
            no other layout has a place for.
        tokenizer: folder with the vocabulary of the text encoder, or None.
        label_names: of the classes, or None.
        step: updates that the weights have seen; 0 where that is not known.
    """

    config: ConfigDict
    weights: dict[str, Any]
    tokenizer: pathlib.Path | None = None
    label_names: list[str] | None = None
    step: int = 0


@contextlib.contextmanager
def sense(what: str) -> Iterator[None]:
    """Turns what reading a foreign configuration may raise into a UserError that names it."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{what} makes no sense: {short(error)}") from error


def use_conditioners(config: ConfigDict, *names: str) -> None:
    """Makes these the conditioners of an unlocked config, whose blocks for them are already set.

    With them come their batch fields and, where there is a null condition, the usual guidance.
    """
    config.conditioners = names
    config.data.fields = tuple(field for name in names for field in config_lib.FIELDS[name])
    if "low_res" in names:  # in the published models it has the size of the latents
        config.data.low_res.factor = config_lib.downsampling(config)
    if config_lib.has_null(config):
        kind = config.text.encoder if names[0] == "text" else names[0]
        config.sample.guidance_scale = GUIDANCE.get(kind, 1.0)


def concat_channels(config: ConfigDict) -> int:
    """Channels that the conditioners join to x_t."""
    per_side = max(1, config_lib.downsampling(config) // config.data.low_res.factor)
    channels = {"segmentation": config.segmentation.channels, "low_res": 3 * per_side**2}
    channels["inpainting"] = config_lib.latent_channels(config) + 1
    return sum(channels.get(name, 0) for name in config.conditioners)


def latent_variables(config: ConfigDict, scale: Any = 1.0, shift: Any = 0.0) -> dict[str, Any]:
    """The collection 'latents' of a first stage whose latents are (z - shift) * scale.

    Raises:
        UserError: a scale that is not positive, or one of the two is not finite in float32.
    """
    shape = (config_lib.latent_channels(config),)
    with np.errstate(over="ignore"):
        full = lambda value: np.array(np.broadcast_to(np.float32(value), shape))  # noqa: E731
        latents = {"shift": full(shift), "scale": full(scale)}
    if not all(np.all(np.isfinite(x)) for x in latents.values()) or np.any(latents["scale"] <= 0):
        raise UserError(
            f"the latents are scaled by {short(scale)} and shifted by {short(shift)}, but the "
            "scale must be positive and both finite"
        )
    return latents


def scalar_latents(latents: Mapping[str, Any], code: str) -> tuple[float, float]:
    """Shift and scale of the latents as numbers.

    Raises:
        UserError: they differ from channel to channel, which `code` cannot hold.
    """
    shift, scale = (np.unique(np.asarray(latents[name])) for name in ("shift", "scale"))
    if len(shift) > 1 or len(scale) > 1:
        raise UserError(
            f"{code} knows one factor for all channels of the latents, but this first stage scales "
            "each on its own (first_stage.latent_scale='channel'): export to safetensors"
        )
    return float(shift[0]), float(scale[0])


def without_local(config: ConfigDict) -> ConfigDict:
    """Returns a copy whose keys that name places on this machine (`LOCAL`) have their defaults."""
    default = config_lib.flatten(config_lib.get_config())
    copy = ConfigDict(config).copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict({key: default[key] for key in LOCAL})
    return copy.lock()


def facts_of(model: Model, derived: ConfigDict) -> dict[str, Any]:
    """What the files of another code do not tell of a model, to be stored beside them.

    `derived` is the config that reading these files would give.
    """
    theirs = config_lib.flatten(derived)
    ours = config_lib.flatten(without_local(model.config))
    untold = {key: value for key, value in ours.items() if theirs.get(key) != value}
    facts = {"config": untold, "label_names": model.label_names, "step": model.step}
    return {key: value for key, value in facts.items() if value}


def add_facts(derived: ConfigDict, facts: Any) -> tuple[ConfigDict, list[str] | None, int]:
    """Returns (config, label_names, step) of a model whose facts `facts_of` has stored.

    Places on another machine are not believed.

    Raises:
        UserError: facts that were not stored by `facts_of`, or a config that cannot work.
    """
    what = "what is stored for ldm_jax beside the model"
    with sense(what):
        values = dict(facts.get("config", {}))
        for key, value in values.items():
            items = value if type(value) is list else [value]
            if len(items) > config_lib.MOST_LEVELS or not all(map(_is_plain, [key, *items])):
                raise ValueError(f"{short(key)}: {short(value)}")
        values = {key: value for key, value in values.items() if key not in LOCAL}
        flat = config_lib.flatten(derived.to_dict()) | values
        text = json.dumps(traverse_util.unflatten_dict(flat, sep="."))
        names, step = facts.get("label_names"), facts.get("step", 0)
        if type(step) is not int or step < 0:
            raise ValueError(f"step: {short(step)}")
        if names is not None and not (
            type(names) is list and all(type(name) is str and _is_plain(name) for name in names)
        ):
            raise ValueError(f"label_names: {short(names)}")
    config = config_lib.from_json(text)
    # A set need not have examples, and so names, of the last classes.
    classes = config.label.num_classes if "label" in config.conditioners else 0
    if names is not None and len(names) > classes:
        raise UserError(f"{what} has {len(names)} label_names, but the model has {classes} classes")
    return config, names, step


def _is_plain(value: Any) -> bool:
    """Whether a value is one that a config holds and that can be shown in a message."""
    if isinstance(value, str):
        return len(value) <= 300 and value.isprintable()
    return isinstance(value, bool | int | float)
