"""What callers of a pipeline give as a condition, as the batch fields that the model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import fields as fields_lib
from ldm_jax.data.degradation import add_noise
from ldm_jax.data.draws import Uniforms
from ldm_jax.data.task_fields import mask_out
from ldm_jax.errors import UserError

Fields = dict[str, np.ndarray]
Tokenizer = Callable[[list[str]], np.ndarray]
SAMPLED = 1  # the stream of random numbers for samples' conditions; training data have 0


def class_number(config: ConfigDict, names: Sequence[str], text: str | int) -> int:
    """Returns the class number that a number or a class name stands for.

    Raises:
        UserError: no such class.
    """
    if text in names:  # first, since a class may be called '2'
        return names.index(text)
    try:
        spec = fields_lib.label_field(config)
        return int(fields_lib.check_field("label", spec, [int(text)], 1)[0])
    except ValueError:
        known = ", ".join(names) or f"0 to {config.label.num_classes - 1}"
        raise UserError(f"no class '{text}': choose from {known}") from None


def check_condition(
    config: ConfigDict,
    given: Mapping[str, Any] | None,
    count: int,
    size: tuple[int, int],
    tokenizer: Tokenizer | None,
) -> Fields | None:
    """Checks a condition of `count` images of `size`; None where there is nothing to condition on.

    Captions, 'text', become 'tokens'.

    Raises:
        UserError: it does not fit the model, or there is no tokenizer for the captions.
    """
    if not given:
        if config.conditioners and not config_lib.has_null(config):
            wanted = ", ".join(fields_lib.specify(config))
            raise UserError(f"this model needs the condition {wanted}")
        return None
    given = dict(given)
    if "text" in given and "text" in config.conditioners:
        given["tokens"] = _tokens(given.pop("text"), tokenizer)
    return fields_lib.check(config, given, count, size)


def split_weights(also: Sequence[tuple[Mapping[str, Any], float]]) -> tuple[list, list]:
    """Returns further conditions and their weights; UserError unless they are pairs."""
    try:
        pairs = [(dict(condition), weight) for condition, weight in also]
    except (TypeError, ValueError):
        raise UserError(
            "`also` must be a list of pairs, each a condition and its weight: "
            "[({'label': [3, 3]}, 1.5)] for two seeds"
        ) from None
    return [condition for condition, _ in pairs], [weight for _, weight in pairs]


def further_conditions(
    config: ConfigDict,
    fields: Fields | None,
    also: Sequence[Mapping[str, Any]],
    count: int,
    size: tuple[int, int],
    tokenizer: Tokenizer | None,
) -> tuple[Fields, ...]:
    """Checks conditions that are composed with that of `fields`, whose fields complete them.

    Raises:
        UserError: one says nothing, or does not fit the model.
    """
    for given in also:
        if not given:
            raise UserError("a condition of `also` is empty: give its fields, or leave it away")
    both = [{**(fields or {}), **given} for given in also]
    return tuple(check_condition(config, given, count, size, tokenizer) for given in both)


def label_to_find(
    config: ConfigDict,
    condition: Mapping[str, Any],
    count: int,
    size: tuple[int, int],
    classifier: bool,
    tile: int | None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the classes (B,) of classifier guidance, and what is left for the denoiser.

    Args:
        config: of the model.
        condition: batch fields.
        count: number of images.
        size: of the images, (height, width) in pixels.
        classifier: whether the model has one.
        tile: side of the tiles in pixels, or None.

    Raises:
        UserError: there is no classifier, or none of this size, or no class for it, or tiles.
    """
    if not classifier:
        raise UserError(
            "classifier_scale needs a classifier of noisy latents: train one by "
            "config.classifier.train.steps"
        )
    if tile is not None:
        raise UserError(
            "classifier_scale is for images that are made at once, not in tiles: a classifier "
            "looks at all of an image"
        )
    unit = config_lib.downsampling(config) * 2 ** (len(config.classifier.mult) - 1)
    if size[0] % unit or size[1] % unit:
        raise UserError(
            f"images of {size[0]}x{size[1]} (height x width): the classifier of this model sees "
            f"multiples of {unit}: change the size, or leave classifier_scale away"
        )
    if "label" not in condition:
        raise UserError(
            "classifier_scale needs the class to find: give the condition 'label' (--label)"
        )
    label = fields_lib.check_field(
        "label", fields_lib.label_field(config), condition["label"], count
    )
    unread = () if "label" in config.conditioners else ("label",)
    return label, {name: x for name, x in condition.items() if name not in unread}


def _tokens(captions: Sequence[str], tokenizer: Tokenizer | None) -> np.ndarray:
    if tokenizer is None:
        raise UserError(
            "captions need a tokenizer: put its folder into the workdir as tokenizer/, or give "
            "the condition 'tokens'"
        )
    if isinstance(captions, str) or not all(isinstance(text, str) for text in captions):
        raise UserError("text must be a list of captions")
    return tokenizer(list(captions))


def inpainting_fields(images: np.ndarray, holes: np.ndarray) -> Fields:
    """The fields of images (B, H, W, 3) uint8 and their holes (B, H, W) bool; see `mask_out`."""
    rows = [mask_out(*pair) for pair in zip(images, holes, strict=True)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def noise_low_res(
    config: ConfigDict,
    condition: Mapping[str, Any],
    level: float | None,
    seeds: np.ndarray,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Noises the field 'low_res' to a level and says so in 'noise_level', as training does.

    The noise of an image follows from its seed. A condition that has 'noise_level' is noised
    already, and comes back as it is; so does that of a model that is not told the level.

    Args:
        config: of the model.
        condition: batch fields.
        level: from 0 to `config.data.low_res.noise`; None is 0.
        seeds: (B,).
        size: of the images.

    Raises:
        UserError: a level where there can be none, or outside its range; wrong small images.
    """
    condition, most = dict(condition), config.data.low_res.noise
    if "noise_level" not in config.conditioners:
        if level is not None:
            raise UserError(
                "noise_level is for models with the conditioner 'noise_level', which were trained "
                "with config.data.low_res.noise above 0"
            )
        return condition
    if "noise_level" in condition:
        if level is not None:
            raise UserError(
                "the condition has 'noise_level' and is noised already: leave the setting away"
            )
        return condition
    level = 0.0 if level is None else level
    if not 0 <= level <= most:
        raise UserError(
            f"noise_level is {level:g}, but this model was trained with levels from 0 to {most:g}"
        )
    if "low_res" not in condition:
        return condition  # and is refused for that
    clean = fields_lib.specify(config, size)["low_res"]._replace(low=-1, high=1)
    small = fields_lib.check_field("low_res", clean, condition["low_res"], len(seeds))
    noised = [
        add_noise(image, level, Uniforms(int(seed), SAMPLED))
        for image, seed in zip(small, seeds, strict=True)
    ]
    levels = np.full(len(seeds), level, np.float32)
    return condition | {"low_res": np.stack(noised), "noise_level": levels}
