"""The batch fields that conditions are made of: their shapes, and checks of what a user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.types import Array

Encode = Callable[[Array], Array]  # images (B, H, W, 3) -> unscaled latents (B, h, w, C)


class Field(NamedTuple):
    """One example of a field.

    Attributes:
        shape: without the batch axis.
        dtype: int32 or float32.
        low: the least value.
        high: the largest value.
    """

    shape: tuple[int, ...]
    dtype: type
    low: float
    high: float


# Noise of unit variance by the method of Box and Muller stays within 8.6.
MOST_NOISE = 9


def specify(config: ConfigDict, size: tuple[int, int] | None = None) -> dict[str, Field]:
    """Returns what each field that the config's conditioners read must look like.

    `size` is (height, width) of the images that are made, by default that of training.
    """
    size = (config.data.resolution,) * 2 if size is None else tuple(size)
    small = tuple(side // config.data.low_res.factor for side in size)
    noise = config.data.low_res.noise
    bound = 1 + MOST_NOISE * noise
    all_fields = {
        "label": label_field(config),
        "tokens": Field((config.text.length,), np.int32, 0, config.text.vocab_size - 1),
        "boxes": Field((config.layout.length,), np.int32, 0, config.layout.vocab_size - 1),
        "segmentation": Field(size, np.int32, 0, config.segmentation.num_classes - 1),
        "low_res": Field((*small, 3), np.float32, -bound, bound),
        "noise_level": Field((), np.float32, 0, noise),
        "masked_image": Field((*size, 3), np.float32, -1, 1),
        "mask": Field((*size, 1), np.float32, -1, 1),
    }
    names = [name for part in config.conditioners for name in config_lib.FIELDS[part]]
    return {name: all_fields[name] for name in names}


def label_field(config: ConfigDict) -> Field:
    """Returns what a class must look like, which a classifier may need and no conditioner read."""
    return Field((), np.int32, 0, config.label.num_classes - 1)


def examples(config: ConfigDict, batch_size: int) -> dict[str, Array]:
    """Returns a batch of zeros with every field."""
    return {
        name: jnp.zeros((batch_size, *field.shape), field.dtype)
        for name, field in specify(config).items()
    }


def check(
    config: ConfigDict,
    given: Mapping[str, Any],
    count: int,
    size: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Checks the fields of `count` examples; returns them as arrays of the right type.

    `size` is that of `specify`.

    Raises:
        UserError: a field that the model does not take, a missing one, or a wrong shape or value.
    """
    known = specify(config, size)
    for name in given:
        if name not in known:
            takes = ", ".join(known) or "none: it is unconditional"
            raise UserError(f"unknown condition '{name}'; this model takes {takes}")
    checked = {}
    for name, field in known.items():
        if name not in given:
            raise UserError(f"the condition '{name}' is missing")
        checked[name] = check_field(name, field, given[name], count)
    return checked


def check_field(name: str, field: Field, value: Any, count: int) -> np.ndarray:
    """Checks one field of `count` examples; raises UserError as `check` does."""
    try:
        value = np.asarray(value)
    except ValueError:
        value = np.asarray(None)
    whole = field.dtype is np.int32
    if value.dtype.kind not in ("iu" if whole else "iuf"):
        what = "whole numbers" if whole else "numbers"
        raise UserError(f"{name} must be {what} from {field.low} to {field.high}")
    if value.ndim < 1 or len(value) != count:
        raise UserError(f"condition '{name}' must have one value per seed, {count}")
    if value.shape[1:] != field.shape:
        raise UserError(
            f"condition '{name}' has the shape {value.shape}, but must be {(count, *field.shape)}"
        )
    bad = value[~((value >= field.low) & (value <= field.high))]  # NaN is bad, too
    if bad.size:
        raise UserError(f"{name} {bad[0]} is out of range: choose from {field.low} to {field.high}")
    return value.astype(field.dtype)


def add_latents(batch: Mapping[str, Array], encode: Encode) -> dict[str, Array]:
    """Adds the latents that conditioners read, so that none of them knows the first stage.

    `masked_image` becomes `masked_latents` (B, h, w, C), not scaled, as in the published model.
    """
    if "masked_image" not in batch:
        return dict(batch)
    latents = jax.lax.stop_gradient(encode(batch["masked_image"]))
    return {name: x for name, x in batch.items() if name != "masked_image"} | {
        "masked_latents": latents
    }
