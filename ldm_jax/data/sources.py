"""Sources of images: a length, and random access to decoded examples with their metadata."""

from __future__ import annotations

import functools
import importlib.resources
import io
import pathlib
import zipfile
from typing import Protocol

import numpy as np

from ldm_jax.data.condition_files import read_classes
from ldm_jax.data.decode import ANY, WHITE, Limits, decode_image, image_size
from ldm_jax.data.folder import METADATA, list_folder, read_jsonl
from ldm_jax.data.latents_index import read_index
from ldm_jax.data.latents_source import latents_folder
from ldm_jax.data.scenes import EMOJI, open_scenes
from ldm_jax.data.table import TableSource, select_table
from ldm_jax.data.tar_source import open_tar
from ldm_jax.data.tfds_source import TfdsSource
from ldm_jax.errors import UserError

KINDS = ("emoji", "scenes", "folder:/path/to/images", "tar:/path/to/shard-{000..009}.tar")
KINDS += ("tfds:NAME",)


class Source(Protocol):
    """Random access to the examples of a data set; may be read from several threads.

    Attributes:
        columns: the metadata columns of an example, 'label' among them if there are labels.
        label_names: the name of each class, of 'label' or else of 'boxes'; or None.
        num_labels: number of classes, 0 without labels.

    It may also have `flippable`, False where images must not be mirrored, and `image_size(index)`,
    which tells an image's height and width without decoding it; see `size_of`.
    """

    columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    num_labels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """{'image': (H, W, 3) uint8, **metadata}; UserError if the image cannot be decoded."""
        ...

    def name(self, index: int) -> str:
        """What to call an example in a message."""
        ...


def open_source(
    spec: str,
    *,
    split: str = "train",
    where: str = "",
    label: str = "label",
    background: tuple[int, int, int] = WHITE,
    limits: Limits = ANY,
) -> Source:
    """Opens a data set by name.

    Args:
        spec: 'emoji', the embedded set of 1,852 images of 64x64 with captions and 9 classes;
            'scenes', composed of some of them, with boxes, maps and captions (see scenes.py);
            'folder:/path', any image folder (see `list_folder`); 'tar:/path/shard-{000..009}.tar',
            shards of the WebDataset layout (see `open_tar`); or 'tfds:NAME', a prepared set of
            tensorflow_datasets.
        split: such as 'train', 'test' or a slice 'train[:90%]' (see `split_rows`; tfds slices by
            its own order). The embedded set has only 'train'.
        where: 'column=value' keeps the examples with this metadata; '' keeps all. A slice is taken
            first, so an image is in the same slice whatever the filter.
        label: the metadata column that becomes 'label'; strings are numbered in sorted order, over
            what `where` keeps of all splits. '' for none.
        background: red, green and blue (0..255) that show through transparent pixels.
        limits: what image files must obey, those of the embedded sets excepted.

    Raises:
        UserError: there is no such data, or nothing is left of it.
    """
    kind, _, rest = spec.partition(":")
    if len(background) != 3 or not all(0 <= level <= 255 for level in background):
        raise UserError(f"background must be three levels from 0 to 255, not {background}")
    background = tuple(int(level) for level in background)
    choice = {"split": split, "where": where, "label": label}
    if spec == "emoji":
        return _open_emoji(background, **choice)
    if spec == "scenes":
        if where:
            raise UserError(f"scenes cannot be chosen by where='{where}': leave it empty")
        return open_scenes(split)
    if kind == "folder" and rest:
        return _open_folder(pathlib.Path(rest).expanduser(), background, limits, **choice)
    if kind == "tar" and rest:
        return open_tar(rest, background, limits, **choice)
    if kind == "tfds" and rest:
        return TfdsSource(rest, background=background, limits=limits, **choice)
    if folder := latents_folder(spec):
        images = read_index(folder).made_of.get("data.source")
        raise UserError(
            f"{spec} holds latents to train on, but images are needed: they are in '{images}'"
        )
    raise UserError(f"unknown data source '{spec}'; choose one of: {', '.join(KINDS)}")


def size_of(source: Source, index: int) -> tuple[int, int]:
    """Height and width of an image of a source, from its header where the source can tell."""
    measure = getattr(source, "image_size", None)
    return measure(index) if measure else source[index]["image"].shape[:2]


def _open_emoji(background: tuple[int, int, int], *, label: str, **choice: str) -> TableSource:
    asset = importlib.resources.files("ldm_jax.data").joinpath(EMOJI)
    archive = zipfile.ZipFile(io.BytesIO(asset.read_bytes()))
    rows = read_jsonl(archive.read(METADATA), EMOJI)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    names = columns["file_name"]

    @functools.cache  # the whole set is 23 MB decoded
    def read(name: str) -> np.ndarray:
        image = decode_image(archive.read(name), name, background)
        image.flags.writeable = False  # it is shared by all who ask for it
        return image

    source = select_table(
        names,
        columns,
        ["train"] * len(names),
        read,
        label=label,
        title="the emoji set",
        **choice,
    )
    if label == "label":  # numbered by category in the set itself
        source.label_names = tuple(sorted(set(columns["category"])))
        source.num_labels = len(source.label_names)
    return source


def _open_folder(
    root: pathlib.Path, background: tuple[int, int, int], limits: Limits, **choice: str
) -> TableSource:
    names, columns, splits = list_folder(root)

    def read(name: str) -> np.ndarray:
        return decode_image(root / name, str(root / name), background, limits)

    def read_map(name: str) -> np.ndarray:
        return read_classes(root / name)

    def measure(name: str) -> tuple[int, int]:
        return image_size(root / name, str(root / name), limits)

    return select_table(
        names,
        columns,
        splits,
        read,
        title=f"the folder {root}",
        loaders={"segmentation": read_map},
        measure=measure,
        **choice,
    )
