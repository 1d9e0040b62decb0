"""Statistics of reference images: made from features, written, and read from others' files."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.metrics.features import Extractor, Features
from ldm_jax.metrics.frechet import FeatureStatistics
from ldm_jax.metrics.image_archive import ImageArchive, open_images, write_archive

ABOUT = "about"  # an entry of our files: JSON of all that is no array
# What that has of a reference.
_SAID = ("count", "digest", "resize", "network", "resolution", "origin", "width", "made_of")
_ROWS = 1024  # features that are added to the statistics at a time


class Statistics(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Reference(NamedTuple):
    """What samples are compared to.

    Attributes:
        mean: of the features 'pool', (D,) float64.
        covariance: of these, (D, D) float64.
        spatial: statistics of the features 'spatial', for sFID; or None.
        features: (N, D) float32, for KID and the nearest-neighbour metrics; or None. N may be less
            than `count`: the ADM suite's files have statistics of all images, and 10,000 of these.
        count: the images that the statistics were made from; 0 if the file does not say.
        digest: that of the `Extractor`; '' if the file does not say.
        resize: its rule; '' if the file does not say.
        network: its name.
        resolution: height of the images, 0 if the file does not say.
        origin: what the images were, in words.
        width: of the images; 0 if they are square.
        made_of: digest of which images it is of, by `digest_of`; '' in files of others.
    """

    mean: np.ndarray
    covariance: np.ndarray
    spatial: Statistics | None
    features: np.ndarray | None
    count: int
    digest: str
    resize: str
    network: str
    resolution: int
    origin: str
    width: int = 0
    made_of: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images; zeros if the file does not say."""
        return self.resolution, self.width or self.resolution


def from_features(
    batches: Iterable[Features],
    extractor: Extractor,
    *,
    resolution: int,
    origin: str,
    keep: bool = False,
    width: int = 0,
    made_of: str = "",
) -> Reference:
    """Makes a reference of features.

    Args:
        batches: as `Extractor.extract` gives them: 'pool' (B, D) and, for sFID, 'spatial'. Nothing
            of them is kept but running sums.
        extractor: that made them.
        resolution: height of the images.
        origin: what the images were, in words.
        keep: whether the features 'pool' are kept: 8 KiB an image for Inception's.
        width: of the images; 0 if they are square.
        made_of: digest of which images these are, see `digest_of`.

    Raises:
        UserError: fewer than two images, or features that are not finite or of another width.
    """
    running = {
        name: FeatureStatistics(extractor.outputs[name])
        for name in ("pool", "spatial")
        if name in extractor.outputs
    }
    if "pool" not in running:
        raise UserError(f"a reference needs the output 'pool' of '{extractor.name}'")
    kept = []
    for batch in _joined(batches):
        for name, statistics in running.items():
            statistics.add(batch[name])
        if keep:
            kept.append(np.asarray(batch["pool"], np.float32))
    if running["pool"].count < 2:
        raise UserError(
            f"statistics of {origin} need at least 2 images, got {running['pool'].count}"
        )
    spatial = Statistics(*running["spatial"].result()) if "spatial" in running else None
    return Reference(
        *running["pool"].result(),
        spatial=spatial,
        features=np.concatenate(kept) if keep else None,
        count=running["pool"].count,
        digest=extractor.digest,
        resize=extractor.resize,
        network=extractor.name,
        resolution=resolution,
        origin=origin,
        width=width,
        made_of=made_of,
    )


def digest_of(about: Any) -> str:
    """SHA-256, in hex, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def fingerprint(reference: Reference) -> str:
    """SHA-256, in hex, of which images a reference is of and of the network that made it.

    Of a file that does not say which images it is of it is that of the statistics. These are no
    part of it otherwise: sums of the same features in batches of another size differ in the last
    digits. The same images in another folder may have another one.
    """
    if reference.made_of:
        return digest_of({"images": reference.made_of, "network": reference.digest})
    found = hashlib.sha256()
    arrays = (reference.mean, reference.covariance, *(reference.spatial or ()))
    for array in arrays:
        found.update(np.ascontiguousarray(array, np.float64))
    return found.hexdigest()


def save_reference(path: str | os.PathLike[str], reference: Reference) -> None:
    """Writes a reference as .npz, complete or not at all; makes the folder.

    The statistics have the names that pytorch-fid and the ADM suite read: mu, sigma, mu_s, sigma_s.

    Raises:
        UserError: the file's name does not end in .npz, or it cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path} must end in .npz")
    arrays = {"mu": reference.mean, "sigma": reference.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = np.asarray(reference.features, np.float32)
    about = {name: getattr(reference, name) for name in _SAID}
    arrays[ABOUT] = np.array(json.dumps(about))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_archive(path, arrays)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error})") from error


def load_reference(
    path: str | os.PathLike[str],
    extractor: Extractor,
    force: bool = False,
    *,
    features: bool = False,
    spatial: bool = False,
) -> Reference:
    """Reads a reference: ours, or another code's.

    - Ours, by `save_reference`.
    - The ADM suite's: mu, sigma, mu_s, sigma_s of all images, 10,000 of which may lie beside them
      (arr_0). It resizes as 'tensorflow'.
    - Images alone (arr_0): their features are extracted.
    - mu and sigma alone, by pytorch-fid and several other codes: nothing says which network or
      resize rule they are of, and `digest` and `resize` are ''.

    Args:
        path: an .npz file.
        extractor: that the samples' features are made by.
        force: whether a reference of another network or resize rule is taken all the same.
        features: whether features are needed, for KID and the nearest-neighbour metrics.
        spatial: whether statistics of 'spatial' are needed, for sFID.

    Raises:
        UserError: no such file, no reference, one of another network or resize rule or of another
            width, or without what is needed.
    """
    path = pathlib.Path(path)
    entries, images = _read_entries(path), open_images(path)
    if ABOUT in entries:
        reference = _ours(path, entries)
    elif "mu" in entries:
        reference = _foreign(path, entries)
        if images is not None:  # of the same size as those that the statistics are of
            reference = reference._replace(resolution=images.shape[1], width=images.shape[2])
    elif images is not None:
        reference = _of_images(images, extractor, keep=features)
    else:
        shown = ", ".join(sorted(entries)) or "nothing"
        raise UserError(
            f"{path} is no reference: it has {shown}, but neither statistics (mu, sigma) nor "
            "images (arr_0)"
        )
    _check_network(path, reference, extractor, force)
    _check_shapes(path, reference, extractor)
    if features and reference.features is None:
        if images is None:
            raise UserError(
                f"{path} has statistics only, but KID and the nearest-neighbour metrics need "
                "features: make it with these, or leave the metrics out"
            )
        reference = reference._replace(features=_of_images(images, extractor, keep=True).features)
    if spatial and reference.spatial is None:
        raise UserError(
            f"{path} has no statistics of spatial features (mu_s, sigma_s), which sFID needs: make "
            "it with these, or leave the metric out"
        )
    return reference


def _joined(batches: Iterable[Features]) -> Iterator[Features]:
    """Small batches together: a covariance costs as much for one example as for a thousand."""
    waiting: list[Features] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(part["pool"]) for part in waiting) >= _ROWS:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _join(parts: list[Features]) -> Features:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read_entries(path: pathlib.Path) -> Mapping[str, Any]:
    """The arrays of a file but its images, which are read piece by piece."""
    if not path.is_file():
        raise UserError(f"no reference at {path}")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise UserError(f"{path} is a single array, but must be an .npz file")
        with found as file:
            return {name: file[name] for name in file.files if not name.startswith("arr_")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as .npz: {reason}") from error


def _ours(path: pathlib.Path, entries: Mapping[str, Any]) -> Reference:
    try:
        about = json.loads(str(entries[ABOUT]))
        return Reference(
            np.asarray(entries["mu"], np.float64),
            np.asarray(entries["sigma"], np.float64),
            spatial=_spatial(entries),
            features=entries.get("features"),
            count=int(about["count"]),
            digest=str(about["digest"]),
            resize=str(about["resize"]),
            network=str(about["network"]),
            resolution=int(about["resolution"]),
            origin=str(about["origin"]),
            width=int(about.get("width", 0)),
            made_of=str(about.get("made_of", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: it does not say what it is of; make it again") from (
            error
        )


def _foreign(path: pathlib.Path, entries: Mapping[str, Any]) -> Reference:
    if "sigma" not in entries:
        raise UserError(f"{path} has a mean (mu) but no covariance (sigma)")
    adm = "mu_s" in entries and "sigma_s" in entries
    return Reference(
        np.asarray(entries["mu"], np.float64),
        np.asarray(entries["sigma"], np.float64),
        spatial=_spatial(entries),
        features=None,
        count=0,
        digest="",
        resize="tensorflow" if adm else "",
        network="inception",
        resolution=0,
        origin=f"{path.name} ({'the ADM suite' if adm else 'pytorch-fid or alike'})",
    )


def _spatial(entries: Mapping[str, Any]) -> Statistics | None:
    if "mu_s" not in entries or "sigma_s" not in entries:
        return None
    return Statistics(*(np.asarray(entries[name], np.float64) for name in ("mu_s", "sigma_s")))


def _of_images(images: ImageArchive, extractor: Extractor, keep: bool) -> Reference:
    seen = hashlib.sha256(str(images.shape).encode())

    def features() -> Iterator[Features]:
        for batch in images.batches():
            seen.update(np.ascontiguousarray(batch))
            yield extractor.extract(batch)

    reference = from_features(
        features(),
        extractor,
        resolution=images.shape[1],
        origin=images.path.name,
        keep=keep,
        width=images.shape[2],
    )
    return reference._replace(made_of=seen.hexdigest())


def _check_network(
    path: pathlib.Path, reference: Reference, extractor: Extractor, force: bool
) -> None:
    if force:
        return
    way_out = "make it again with these, or force its use where you know better"
    if reference.network != extractor.name:
        raise UserError(
            f"{path} is of the network '{reference.network}', but the samples' features are of "
            f"'{extractor.name}': {way_out}"
        )
    if reference.resize and reference.resize != extractor.resize:
        raise UserError(
            f"{path} was made with the resize rule '{reference.resize}', but the samples' features "
            f"with '{extractor.resize}': choose that rule, or force its use where you know better"
        )
    if reference.digest and reference.digest != extractor.digest:
        raise UserError(
            f"{path} was made with other weights of '{extractor.name}' (digest "
            f"{reference.digest[:12]}, here {extractor.digest[:12]}): {way_out}"
        )


def _check_shapes(path: pathlib.Path, reference: Reference, extractor: Extractor) -> None:
    parts = {"pool": Statistics(reference.mean, reference.covariance)}
    if reference.spatial is not None:
        parts["spatial"] = reference.spatial
    for name, part in parts.items():
        width = extractor.outputs.get(name, len(np.atleast_1d(part.mean)))
        if part.mean.shape != (width,) or part.covariance.shape != (width, width):
            raise UserError(
                f"{path} has a mean {part.mean.shape} and a covariance {part.covariance.shape} of "
                f"'{name}', but '{extractor.name}' has {width} such features: it was made with "
                "another network"
            )
        if not (np.isfinite(part.mean).all() and np.isfinite(part.covariance).all()):
            raise UserError(f"{path} is damaged: its statistics of '{name}' are not finite")
    found = reference.features
    if found is not None and (found.ndim != 2 or found.shape[1] != len(reference.mean)):
        raise UserError(
            f"{path} is damaged: features {found.shape} do not fit a mean of {len(reference.mean)}"
        )
