"""What a weaker model must share with the one that it guides (Karras et al. 2024).

"Guiding a diffusion model with a bad version of itself": smaller, trained for less long, or an
average that reaches further back; their outputs are combined as they are, so they must mean the
same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import arguments
from ldm_jax import config as config_lib
from ldm_jax import pipeline_conditions as conditions
from ldm_jax.errors import UserError


class Model(Protocol):
    """What is known of a model; a `Pipeline` is one."""

    config: ConfigDict
    variables: dict[str, Any]
    label_names: Sequence[str] | None
    tokenizer: conditions.Tokenizer | None


def weak_fields(
    model: Model,
    weak: Model,
    condition: Mapping[str, Any],
    count: int,
    size: tuple[int, int],
    tile: int | None,
) -> conditions.Fields | None:
    """What a weaker model reads of the condition of `model`, by its own rules.

    Args:
        model: that is guided.
        weak: that it is guided away from.
        condition: fields of `count` images; none for the null condition.
        count: number of images.
        size: of the images, (height, width) in pixels.
        tile: side of the tiles in pixels, or None.

    Raises:
        UserError: see `check_weak`, or it cannot take the condition, the size or the tiles.
    """
    check_weak(model, weak)
    try:
        arguments.check_size(weak.config, size)
        arguments.choose_tile(weak.config, size, tile or 0)
        return conditions.check_condition(weak.config, condition, count, size, weak.tokenizer)
    except UserError as error:
        raise UserError(f"autoguidance, the weaker model: {error}") from error


def check_weak(model: Model, weak: Model) -> None:
    """Checks that the outputs of a weaker model stand for the same as those of `model`.

    Raises:
        UserError: they do not, and in what they differ; or it is no model.
    """
    if isinstance(weak, str | os.PathLike):
        raise UserError(f"autoguidance: load the weaker model: ldm_jax.load('{weak}')")
    for part in ("denoiser", "conditioner"):
        if part not in weak.variables:
            raise UserError(f"autoguidance: the weaker model has no weights of its {part}")
    ours, theirs = model.config, weak.config
    for name, of in (
        ("latents", _latents),
        ("conditioners", lambda config: ", ".join(config.conditioners) or "none"),
    ):
        _check_same(name, of(ours), of(theirs))
    if "label" in ours.conditioners:
        _check_same("label.num_classes", ours.label.num_classes, theirs.label.num_classes)
        names = model.label_names, weak.label_names
        if all(names) and list(names[0]) != list(names[1]):  # some models only know numbers
            raise UserError("autoguidance: the classes of the weaker model have other names")
    for key in config_lib.process_keys(ours):
        _check_same(f"diffusion.{key}", ours.diffusion[key], theirs.diffusion[key])
    _check_first_stages(model.variables, weak.variables)


def _check_same(name: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise UserError(
            f"autoguidance needs a weaker model of the same {name}: this one has {ours}, "
            f"the weaker {theirs}"
        )


def _latents(config: ConfigDict) -> str:
    factor, channels = config_lib.downsampling(config), config_lib.latent_channels(config)
    return f"{channels} channels at 1/{factor} of the pixels"


def _check_first_stages(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuses another first stage, where both models have theirs, or another scale of it."""
    if "first_stage" not in ours or "first_stage" not in theirs:
        return  # imported denoisers, which nothing more is known of
    pair = ours["first_stage"], theirs["first_stage"]
    if not _equal(*({n: x for n, x in part.items() if n != "latents"} for part in pair)):
        raise UserError(
            "autoguidance needs a weaker model of the same latents, but it has another first "
            "stage: train it with config.first_stage.weights set to the workdir of this one"
        )
    if not _equal(*(part.get("latents") for part in pair)):
        raise UserError(
            "autoguidance needs a weaker model of the same latents, but they are scaled otherwise: "
            "see latents.json in the folder first_stage of both"
        )


def _equal(a: Any, b: Any) -> bool:
    """Whether two trees hold the same numbers."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x is y or np.array_equal(x, y) for x, y in pairs)
