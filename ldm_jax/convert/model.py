"""What a conversion gives and takes: a whole model, whatever files it came from."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib


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
