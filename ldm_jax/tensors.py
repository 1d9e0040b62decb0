"""Weights as safetensors files: nested trees of arrays under slash-separated names."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ldm_jax.errors import UserError


def save_tensors(path: str | os.PathLike[str], tree: dict[str, Any]) -> None:
    """Writes a nested dict of arrays to `path`, all or nothing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(jax.device_get(tree), sep="/")
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: np.ascontiguousarray(v) for k, v in flat.items()}, temporary)
    with open(temporary, "rb") as file:  # the name must not outlive a crash without its bytes
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_tensors(path: str | os.PathLike[str], like: dict[str, Any]) -> dict[str, Any]:
    """Reads a tree written by `save_tensors` that must match `like` in names, shapes and types.

    Raises:
        UserError: no such file, no safetensors file, or other names, shapes or types.
    """
    try:
        flat = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    wanted = traverse_util.flatten_dict(like, sep="/")
    for name in sorted(wanted.keys() ^ flat.keys()):
        state = "is missing from" if name in wanted else "is unexpected in"
        raise UserError(f"'{name}' {state} {path}: the weights belong to another architecture")
    for name, leaf in wanted.items():
        if flat[name].shape != leaf.shape or flat[name].dtype != leaf.dtype:
            raise UserError(
                f"'{name}' in {path} is {flat[name].dtype}{list(flat[name].shape)}, but the config "
                f"asks for {leaf.dtype}{list(leaf.shape)}"
            )
    return traverse_util.unflatten_dict(flat, sep="/")
