"""Features of many images in a folder, so that what is done need not be done again.

FOLDER/
  statistics.npz         how many images are done, running sums of their features, and what they are
  features_<first>.npz   the features that are kept, of the images done between two saves
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.metrics.features import Features
from ldm_jax.metrics.frechet import FeatureStatistics
from ldm_jax.metrics.image_archive import write_archive
from ldm_jax.metrics.references import Statistics

STATISTICS = "statistics.npz"
_ROWS = 1024  # features that are added at a time: a covariance costs as much for one as for all


class Kinds(NamedTuple):
    """What becomes of features, by their names.

    Attributes:
        widths: numbers per image of each.
        summed: of which running statistics are taken.
        kept: of which every image's is kept, as float32.
    """

    widths: dict[str, int]
    summed: tuple[str, ...]
    kept: tuple[str, ...]

    def holds(self, other: Kinds) -> bool:
        """Whether it has all that another one has."""
        return (
            self.widths.items() >= other.widths.items()
            and set(self.summed) >= set(other.summed)
            and set(self.kept) >= set(other.kept)
        )


class Collected(NamedTuple):
    """Features of a set of images, by their names.

    Attributes:
        count: number of images.
        statistics: mean and covariance of those that are summed.
        features: those that are kept, (N, D) float32; N may be less than `count`.
    """

    count: int
    statistics: dict[str, Statistics]
    features: dict[str, np.ndarray]


class FeatureStore:
    """Collects features of images 0, 1, 2, ... of one origin, and goes on where it was left.

    What lies in the folder is used if it is of the same origin and kinds, and else removed.

    Args:
        folder: for its files, which is made; one process at a time may use it.
        about: what the images follow from, in values that JSON can hold.
        kinds: what is collected.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: pathlib.Path, about: Mapping[str, Any], kinds: Kinds) -> None:
        self._folder, self._about = folder, json.loads(json.dumps(dict(about)))
        self.done, self.kinds = 0, kinds  # images that are done, and what is collected
        self._begin()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self._resume():
                self._begin()  # without what was read of a damaged one
            known = set(self._parts) | {folder / STATISTICS}
            for path in folder.glob("*.npz*"):  # of another origin, or not complete
                if path not in known or self.done == 0:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def _begin(self) -> None:
        self.done, self._parts = 0, []
        self._kept: dict[str, list[np.ndarray]] = {name: [] for name in self.kinds.kept}
        self._running = {
            name: FeatureStatistics(self.kinds.widths[name]) for name in self.kinds.summed
        }
        self._waiting: list[Features] = []
        self._saved = dict.fromkeys(self.kinds.kept, 0)  # arrays of `_kept` that are in files

    def _resume(self) -> bool:
        """Reads what lies in the folder; False where that is of no use."""
        try:
            with np.load(self._folder / STATISTICS, allow_pickle=False) as file:
                said = json.loads(str(file["about"]))
                if said["images"] != self._about or _kinds(said) != self.kinds:
                    return False
                for name, running in self._running.items():
                    running.count = int(file[f"{name}.count"])
                    running.mean = file[f"{name}.mean"]
                    running.products = file[f"{name}.products"]
            for part in said["parts"]:
                path = self._folder / part
                with np.load(path, allow_pickle=False) as file:
                    for name, arrays in self._kept.items():
                        arrays.append(file[name])
                self._parts.append(path)
            self._saved = {name: len(arrays) for name, arrays in self._kept.items()}
            self.done = int(said["done"])
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile):
            return False  # none yet, or damaged
        return True

    def add(self, features: Features, images: int, keep: np.ndarray | None = None) -> None:
        """Takes in the features of the next `images` images.

        Args:
            features: by name, (n, width) each.
            images: how many that is of the origin; n unless some had no features.
            keep: (n,) bool, whether those that are kept are kept of each; None keeps all.

        Raises:
            UserError: values that are not finite, or other widths.
        """
        for name, arrays in self._kept.items():
            part = np.asarray(features[name], np.float32)
            arrays.append(part if keep is None else part[keep])
        self._waiting.append({name: features[name] for name in self._running})
        self.done += images
        if self._running and sum(len(_first(part)) for part in self._waiting) >= _ROWS:
            self._sum()

    def _sum(self) -> None:
        for name, running in self._running.items():
            if self._waiting:
                running.add(np.concatenate([part[name] for part in self._waiting]))
        self._waiting = []

    def save(self) -> None:
        """Writes what is done, all or nothing.

        Raises:
            UserError: it cannot be written.
        """
        self._sum()
        fresh = {name: arrays[self._saved[name] :] for name, arrays in self._kept.items()}
        try:
            if any(fresh.values()):
                path = self._folder / f"features_{self.done:09d}.npz"
                empty = {n: np.zeros((0, self.kinds.widths[n]), np.float32) for n in fresh}
                write_archive(path, {n: np.concatenate([empty[n], *fresh[n]]) for n in fresh})
                self._parts.append(path)
            arrays: dict[str, np.ndarray] = {}
            for name, running in self._running.items():
                arrays[f"{name}.count"] = np.array(running.count)
                arrays[f"{name}.mean"], arrays[f"{name}.products"] = running.mean, running.products
            about = {"images": self._about, "done": self.done, **self.kinds._asdict()}
            about["parts"] = [path.name for path in self._parts]
            write_archive(
                self._folder / STATISTICS, arrays | {"about": np.array(json.dumps(about))}
            )
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        self._saved = {name: len(arrays) for name, arrays in self._kept.items()}

    def result(self) -> Collected:
        """What was collected.

        Raises:
            UserError: fewer than two images were given, where statistics are taken.
        """
        self._sum()
        return Collected(
            self.done,
            {name: Statistics(*running.result()) for name, running in self._running.items()},
            {name: np.concatenate(arrays) for name, arrays in self._kept.items()},
        )


def find_store(
    folder: pathlib.Path, about: Mapping[str, Any], kinds: Kinds, count: int
) -> tuple[pathlib.Path, Kinds]:
    """Where the store of so many images lies below a folder, and what it collects.

    It is one that has all that is wanted, and perhaps more, of all the images; else that of these
    kinds alone, which there may not be yet.
    """
    name = _short_digest(about)
    wanted = json.loads(json.dumps(dict(about)))
    for path in sorted(folder.glob(f"{name}-*/{STATISTICS}")):
        try:
            with np.load(path, allow_pickle=False) as file:
                said = json.loads(str(file["about"]))
            complete = said["images"] == wanted and said["done"] == count
            if complete and _kinds(said).holds(kinds):
                return path.parent, _kinds(said)
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile):
            continue  # damaged
    return folder / f"{name}-{_short_digest(kinds._asdict())}", kinds


def _kinds(said: Mapping[str, Any]) -> Kinds:
    widths = {str(name): int(width) for name, width in said["widths"].items()}
    return Kinds(widths, tuple(said["summed"]), tuple(said["kept"]))


def _short_digest(about: Mapping[str, Any]) -> str:
    """Eight hex digits that stand for values that JSON can hold."""
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:8]


def bytes_needed(kinds: Kinds, images: int, kept: int) -> int:
    """Bytes of memory for the features of `images` images, of which `kept` are kept, at most.

    Kept ones are there twice: while they are joined, and where metrics of nearest neighbours move
    them to another origin.
    """
    sums = sum(8 * kinds.widths[name] ** 2 for name in kinds.summed)
    # What waits is moved to float64.
    rows = sum(4 * kinds.widths[name] for name in kinds.kept)
    waiting = sum(12 * kinds.widths[name] for name in kinds.summed)
    return 2 * sums + 2 * rows * kept + waiting * min(images, _ROWS)


def shared_kinds(outputs: Mapping[str, int], summed: Sequence[str], kept: Sequence[str]) -> Kinds:
    """Kinds of those outputs that are summed or kept, in the order of `outputs`."""
    used = [name for name in outputs if name in summed or name in kept]
    return Kinds(
        {name: outputs[name] for name in used},
        tuple(name for name in used if name in summed),
        tuple(name for name in used if name in kept),
    )


def _first(features: Features) -> np.ndarray:
    return next(iter(features.values()))


def _unwritable(folder: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {folder} ({error.strerror or error}): choose another --out")
