"""Averages of the weights stored along a run, in WORKDIR/ema/, and mixes of them.

A file holds the average of one profile after one step, in float32 as mixes have weights of both
signs, which add to the rounding: as large as the weights of the denoiser and its conditioner.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import tensors
from ldm_jax.errors import Diverged, UserError
from ldm_jax.training.ema import Profile

_NAME = re.compile(r"(?:std|decay)_.+_step_(\d+)\.safetensors")


class Snapshot(NamedTuple):
    """A stored average: where, after how many updates, and of which profile."""

    path: pathlib.Path
    step: int
    profile: Profile


def write_snapshots(
    folder: pathlib.Path, averages: Mapping[str, Any], profiles: Sequence[Profile], step: int
) -> None:
    """Writes the average of each profile, each file all or nothing.

    A file of the same step is replaced.

    Raises:
        UserError: it cannot be written.
        Diverged: an average is not finite; nothing is written.
    """
    for name, tree in averages.items():
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)):
            raise Diverged(f"the average {name} at step {step} is not finite")
    if jax.process_index() != 0:  # every process holds all of them
        return
    for profile in profiles:
        path = folder / f"{profile.name}_step_{step:07d}.safetensors"
        metadata = {"step": str(step), profile.kind: str(profile.value)}
        try:
            tensors.save_tensors(path, averages[profile.name], metadata)
        except OSError as error:
            raise UserError(
                f"cannot write an averaged model to {folder} ({error.strerror}): make room, or "
                "raise config.ema_snapshots.every"
            ) from error


def remove_later(folder: pathlib.Path, step: int) -> None:
    """Removes what was stored after `step`, from where a run goes on, perhaps in another way.

    A mix of averages would else be one of two histories.

    Raises:
        UserError: a file cannot be removed.
    """
    if jax.process_index() != 0:
        return
    # By their names: a run must not fail for a file that it did not write.
    named = ((path, _NAME.fullmatch(path.name)) for path in sorted(folder.glob("*.safetensors")))
    later = [path for path, match in named if match and int(match[1]) > step]
    try:
        for path in later:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"cannot remove {path} ({error.strerror}), which is of a later step than {step}, from "
            "where the run goes on: remove it"
        ) from error
    if later:
        print(f"removed {len(later)} averages of steps after {step} from {folder}")


def find_snapshots(folder: pathlib.Path) -> list[Snapshot]:
    """Lists what is stored, by step.

    Raises:
        UserError: a file there is none that `write_snapshots` wrote.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        metadata = tensors.open_tensors(path)[1]
        kinds = [kind for kind in ("std", "decay") if kind in metadata]
        try:
            (kind,) = kinds
            step, value = int(metadata["step"]), float(metadata[kind])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} does not say of which average and step it is") from error
        if step < 1 or not 0 < value < 1:
            raise UserError(f"{path} is said to be of step {step} and {kind} {value}: neither is")
        found.append(Snapshot(path, step, Profile(kind, value)))
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.profile))


def open_mix(
    snapshots: Sequence[Snapshot], weights: Sequence[float], like: dict[str, Any]
) -> dict[str, Any]:
    """Opens the sum of stored averages times their weights; its leaves are LazyArrays.

    like: a tree with the names, shapes and types that they must have. The sum is made in float64,
    one array at a time; those of weight 0 are not opened.

    Raises:
        UserError: a file that cannot be read, or of another architecture.
    """
    used = [(s, w) for s, w in zip(snapshots, weights, strict=True) if w != 0]
    trees = [tensors.open_tree(snapshot.path, like) for snapshot, _ in used]
    factors = [weight for _, weight in used]

    def mixed(*leaves: tensors.LazyArray) -> tensors.LazyArray:
        first = leaves[0]
        read = functools.partial(_mixed, leaves, factors, first.dtype)
        return tensors.LazyArray(first.shape, first.dtype, read)

    return jax.tree.map(mixed, *trees)


def _mixed(
    leaves: Sequence[tensors.LazyArray], weights: Sequence[float], dtype: np.dtype
) -> np.ndarray:
    total = np.zeros(leaves[0].shape, np.float64)
    for leaf, weight in zip(leaves, weights, strict=True):
        total += weight * np.asarray(leaf, np.float64)
    return total.astype(dtype)
