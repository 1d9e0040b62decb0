"""The real images that samples are compared to: the training data, a folder, or a file."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.data.order import permutation
from ldm_jax.errors import UserError
from ldm_jax.image_features import Origin, collect
from ldm_jax.image_origins import data_images
from ldm_jax.metrics.features import Extractor
from ldm_jax.metrics.references import Reference, digest_of, load_reference, save_reference
from ldm_jax.metrics.sets import Needed, RealCount
from ldm_jax.metrics.store import Kinds, shared_kinds

KEPT = 50_000  # real images of which features are kept at most, drawn from all; as published
# Networks whose references lie beside that of Inception: FILE_dino.npz beside FILE.npz.
_BESIDE = ("dino",)


class References(NamedTuple):
    """Real images that are opened, and not looked at yet, or references that are read.

    Attributes:
        networks: by name.
        needed: by network.
        origin: of the images, or None.
        read: references by network, where they are of files.
    """

    networks: Mapping[str, Extractor]
    needed: Mapping[str, Needed]
    origin: Origin | None
    read: dict[str, Reference]

    def count(self, network: str) -> RealCount:
        """How many real images a network's reference has."""
        if network not in self.networks:
            return RealCount(0, 0, 0)
        width = self.networks[network].outputs["pool"]
        if self.origin is not None:
            kept = min(KEPT, self.origin.count) if self.needed[network].features else 0
            return RealCount(self.origin.count, kept, width)
        reference = self.read[network]
        kept = 0 if reference.features is None else len(reference.features)
        return RealCount(reference.count, kept, width)

    def sets(self) -> list[tuple[str, int, int, Kinds]]:
        """What is still to be collected, as `foresee` takes it."""
        if self.origin is None:
            return []
        count = self.origin.count
        return [("real images", count, min(KEPT, count), self._kinds())]

    def _kinds(self) -> Kinds:
        widths, summed, kept = {}, [], []
        for name, network in self.networks.items():
            widths |= {f"{name}.{output}": width for output, width in network.outputs.items()}
            summed += [f"{name}.pool"] + [f"{name}.spatial"] * self.needed[name].spatial
            kept += [f"{name}.pool"] * self.needed[name].features
        return shared_kinds(widths, summed, kept)

    def collect(self, out: pathlib.Path) -> dict[str, Reference]:
        """The references by network, on process 0.

        What takes long is kept below `out`/features, where it is found again; reference.png shows
        images as the networks got them.

        Raises:
            UserError: images cannot be read, or the folder cannot be written.
        """
        if self.origin is None or not self.networks:
            return self.read
        keep = None
        if self.origin.count > KEPT:
            keep = np.zeros(self.origin.count, bool)
            keep[permutation(0, 0, self.origin.count)[:KEPT]] = True
        found = collect(
            self.origin,
            self.networks,
            self._kinds(),
            out / "features",
            out / "reference.png",
            keep,
        )
        if found is None:
            return {}
        made_of = digest_of({**self.origin.about, "count": found.count})
        return {
            name: Reference(
                *found.statistics[f"{name}.pool"],
                spatial=found.statistics[f"{name}.spatial"] if self.needed[name].spatial else None,
                features=found.features[f"{name}.pool"] if self.needed[name].features else None,
                count=found.count,
                digest=network.digest,
                resize=network.resize,
                network=name,
                resolution=self.origin.size[0],
                origin=self.origin.title,
                width=self.origin.size[1],
                made_of=made_of,
            )
            for name, network in self.networks.items()
        }


def open_references(
    given: str,
    networks: Mapping[str, Extractor],
    needed: Mapping[str, Needed],
    *,
    config: ConfigDict | None,
    size: tuple[int, int],
    split: str = "",
    count: int = 0,
    force: bool = False,
) -> References:
    """Opens what samples are compared to.

    Args:
        given: '' for the data of the config, as training sees them; a folder of images, which go
            the same way; or an .npz file, see `load_reference`. Of a network other than Inception
            the file FILE_NETWORK.npz is read, if it is there.
        networks: by name.
        needed: by network.
        config: with the data; None where there is no model.
        size: height and width of the samples.
        split: of a folder.
        count: of images, drawn evenly; 0 = all.
        force: see `load_reference`; it also takes a reference of images of another size.

    Raises:
        UserError: no such images or file, or a file that does not fit.
    """
    path = pathlib.Path(given).expanduser()
    if given and path.suffix == ".npz":
        if count:
            raise UserError(f"--num_images is of images, but --reference={given} is a file")
        read = {
            name: load_reference(
                _existing(path, name),
                network,
                force,
                features=needed[name].features,
                spatial=needed[name].spatial,
            )
            for name, network in networks.items()
        }
        for name, reference in read.items():
            _check_size(_existing(path, name), reference, size, force)
        return References(networks, needed, None, read)
    if not networks:
        return References(networks, needed, None, {})
    if given:
        if not path.is_dir():
            raise UserError(f"--reference={given} is neither a folder nor an .npz file")
        config = config_lib.get_config() if config is None else config
        config = ConfigDict(config).copy_and_resolve_references()
        config.data.update(source=f"folder:{path}", where="", split=split or "train")
    return References(networks, needed, data_images(config, size, count), {})


def write_references(given: str, references: Mapping[str, Reference]) -> list[pathlib.Path]:
    """Writes references for others: that of Inception to the file `given`, others beside it.

    Raises:
        UserError: they cannot be written.
    """
    paths = {name: _path(pathlib.Path(given).expanduser(), name) for name in references}
    for name, path in paths.items():
        save_reference(path, references[name])
        print(f"wrote the reference {path} ({references[name].count:,} images, '{name}')")
    return list(paths.values())


def _path(path: pathlib.Path, network: str) -> pathlib.Path:
    """Where the reference of a network lies: FILE.npz, or FILE_dino.npz."""
    if network not in _BESIDE or path.stem.endswith(f"_{network}"):
        return path
    return path.with_name(f"{path.stem}_{network}{path.suffix}")


def _existing(path: pathlib.Path, network: str) -> pathlib.Path:
    beside = _path(path, network)
    return beside if beside.is_file() else path


def _check_size(
    path: pathlib.Path, reference: Reference, size: tuple[int, int], force: bool
) -> None:
    if force or not reference.resolution or reference.size == tuple(size):
        return
    theirs, ours = (f"{height}x{width}" for height, width in (reference.size, size))
    raise UserError(
        f"{path} is of images of {theirs} (height x width), but the samples have {ours}: a "
        "distance between sets needs one size; make it again of this size, or add --force"
    )
