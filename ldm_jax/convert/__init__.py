"""Models of other codes as ours, and ours as theirs.

`import_compvis` and `import_diffusers` make a `Pipeline`; `python -m ldm_jax.convert` goes from
files to files without holding more than one weight in memory.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from ldm_jax.convert.compvis_config import Yaml
from ldm_jax.convert.compvis_model import read_model
from ldm_jax.convert.diffusers import read_folder
from ldm_jax.convert.model import Model
from ldm_jax.convert.tables import StateDict
from ldm_jax.data.tokenizers import load_tokenizer
from ldm_jax.pipeline import Pipeline


def import_compvis(
    state_dict: StateDict, yaml_dict: Yaml, null_class: bool | None = None
) -> Pipeline:
    """Makes a pipeline of the original code's weights and parsed YAML.

    Args:
        state_dict: names and arrays, e.g. from `ldm_jax.convert.reader.open_checkpoint`.
        yaml_dict: the parsed YAML file, or its part under `model`.
        null_class: whether the last class is the null condition; None: where there are 1001.

    Raises:
        UserError: a model that we do not have, or weights that do not fit it; lists them.
    """
    return to_pipeline(read_model(state_dict, yaml_dict, null_class))


def import_diffusers(folder: str | os.PathLike[str]) -> Pipeline:
    """Makes a pipeline of a folder in the layout of `diffusers`; raises UserError likewise."""
    return to_pipeline(read_folder(folder))


def to_pipeline(model: Model) -> Pipeline:
    """Reads the weights of a converted model into a pipeline."""
    variables: dict[str, Any] = jax.tree.map(np.asarray, model.weights)
    tokenizer = None
    if model.tokenizer is not None and "text" in model.config.conditioners:
        c = model.config.text
        tokenizer = load_tokenizer(c.encoder, model.tokenizer, c.length)
    return Pipeline(model.config, variables, model.step, model.label_names, tokenizer)
