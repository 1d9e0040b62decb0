"""Tables of names: how each weight of ours is called, and laid out, in another code's files.

A table lists (their names, our path, kind); either direction only reads the table. A conversion is
strict: every weight of either side is used exactly once, with the right shape.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.errors import UserError
from ldm_jax.tensors import LazyArray

StateDict = Mapping[str, Any]  # arrays, or what stands for them until they are read
Path = tuple[str, ...]


class Row(NamedTuple):
    """One weight of ours: several names of theirs are joined along their outputs."""

    theirs: tuple[str, ...]
    ours: Path
    kind: str


class Layer(NamedTuple):
    """Their name, or names, of one of our layers inside a block and the kind of its kernel."""

    theirs: str | tuple[str, ...]
    kind: str = "same"


# How a kernel of theirs becomes ours, and back. Ours has the outputs last: (..., in, out).
TO_OURS = {
    "same": lambda w: w,
    "linear": lambda w: w.transpose(1, 0),
    "conv1d": lambda w: w[..., 0].transpose(1, 0),
    "conv1x1": lambda w: w[..., 0, 0].transpose(1, 0),
    "conv": lambda w: w.transpose(2, 3, 1, 0),
}
TO_THEIRS = {
    "same": lambda w: w,
    "linear": lambda w: w.transpose(1, 0),
    "conv1d": lambda w: w.transpose(1, 0)[..., None],
    "conv1x1": lambda w: w.transpose(1, 0)[..., None, None],
    "conv": lambda w: w.transpose(3, 2, 0, 1),
}
# Leaves of a layer; the last stands alone.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


_SHOWN = reprlib.Repr()  # which looks at no more of a nested value than it shows
_SHOWN.maxstring = _SHOWN.maxother = 80
_SHOWN.maxlevel = 2


def short(value: Any) -> str:
    """A foreign value for a message: in one line of ASCII, cut to 80 characters."""
    text = " ".join(_SHOWN.repr(value).split())
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Foreign names for a message: the first ones, each in ASCII and cut to 80 characters."""
    names = [ascii(name)[1:-1] for name in names]
    shown = ", ".join(n if len(n) <= 80 else n[:77] + "..." for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def within(ours: str, theirs: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Puts the layers of a block under its path ('a/b') and its name ('a.b'), if these are set."""
    found = {}
    for path, layer in layers.items():
        names = (layer.theirs,) if isinstance(layer.theirs, str) else layer.theirs
        names = tuple(f"{theirs}.{name}".strip(".") for name in names)
        found[f"{ours}/{path}".strip("/")] = Layer(names, layer.kind)
    return found


def make_table(layers: Mapping[str, Layer], paths: Iterable[Path]) -> list[Row]:
    """Looks up each of our parameters among the layers: a row for every path.

    A layer of which we have no parameters (a skip that is an identity, say) gives no row.
    """
    rows = []
    for path in paths:
        if "/".join(path) in layers:  # a parameter that is not inside a layer
            layer, suffix, kind = layers["/".join(path)], "", "same"
        else:
            layer, suffix = layers["/".join(path[:-1])], f".{LEAVES[path[-1]]}"
            kind = layer.kind if path[-1] == "kernel" else "same"
        rows.append(Row(tuple(name + suffix for name in layer.theirs), path, kind))
    return rows


def to_flax(state_dict: StateDict, table: list[Row], abstract: Mapping[Path, Any]) -> dict:
    """Their weights as a tree of ours, float32.

    Weights that are not read yet (LazyArray) give leaves that are not read yet.

    Args:
        state_dict: their names and weights; all of them are used.
        table: a row for each of our parameters.
        abstract: our paths and anything with the `shape` that is needed there.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    known = {name for row in table for name in row.theirs}
    missing = sorted(known - state_dict.keys())
    unexpected = sorted(state_dict.keys() - known)
    flat, wrong = {}, []
    for row in table:
        if any(name in missing for name in row.theirs):
            continue
        weights, want = [state_dict[name] for name in row.theirs], tuple(abstract[row.ours].shape)
        fitting = _join(row, [_stand_in(weight) for weight in weights])
        if fitting is None or fitting.shape != want:
            shapes = [f"{listed([name])} {np.shape(state_dict[name])}" for name in row.theirs]
            wrong.append(f"{', '.join(shapes)} (does not give {want})")
        else:
            read = functools.partial(_read, row, weights)
            lazy = any(isinstance(weight, LazyArray) for weight in weights)
            flat[row.ours] = LazyArray(want, np.dtype(np.float32), read) if lazy else read()
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    if any(problems.values()):
        found = "; ".join(f"{listed(names)} {what}" for what, names in problems.items() if names)
        raise UserError(f"these weights do not fit the model: {found}; check the model's config")
    return unflatten_dict(flat)


def _stand_in(weight: Any) -> np.ndarray:
    """An array of the same shape with no memory behind it."""
    return np.broadcast_to(np.float32(0), np.shape(weight))


def _read(row: Row, weights: list[Any]) -> np.ndarray:
    """The weight of ours that a row's weights of theirs make, float32."""
    joined = _join(row, [np.asarray(weight) for weight in weights])
    return joined.astype(np.float32, copy=False)


def _join(row: Row, weights: list[np.ndarray]) -> np.ndarray | None:
    """Transforms and joins the weights of a row; None where a weight has the wrong rank."""
    ranks = {"linear": 2, "conv1d": 3, "conv1x1": 4, "conv": 4}
    if any(w.ndim != ranks.get(row.kind, w.ndim) for w in weights):
        return None
    # A 1x1 kernel that is none would lose elements without a sound.
    if row.kind in ("conv1d", "conv1x1") and any(set(w.shape[2:]) != {1} for w in weights):
        return None
    weights = [TO_OURS[row.kind](w) for w in weights]
    if len(weights) == 1:
        return weights[0]
    if len({w.shape for w in weights}) > 1:
        return None
    return np.concatenate(weights, axis=-1)


def from_flax(params: Mapping[str, Any], table: list[Row]) -> dict[str, np.ndarray]:
    """Our tree as their names and weights: the inverse of `to_flax`, keeping the data type.

    The arrays are views in their layout and need not be contiguous in memory; a leaf that is not
    read yet (LazyArray) gives weights that are not read yet.
    """
    flat, state_dict = flatten_dict(params), {}
    for row in table:
        leaf = flat[row.ours]
        for i, name in enumerate(row.theirs):
            read = functools.partial(_split, row, leaf, i)
            if isinstance(leaf, LazyArray):
                state_dict[name] = LazyArray(
                    _split(row, _stand_in(leaf), i).shape, leaf.dtype, read
                )
            else:
                state_dict[name] = read()
    return state_dict


def _split(row: Row, leaf: Any, i: int) -> np.ndarray:
    """The i-th of the weights of theirs that make a leaf of ours."""
    weight = np.split(np.asarray(leaf), len(row.theirs), axis=-1)[i]
    return TO_THEIRS[row.kind](weight)
