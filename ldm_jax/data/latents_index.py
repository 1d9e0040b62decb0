"""What lies in a folder of stored latents: an index, and examples as records of bytes.

folder/
  index.json             what there is and what it was made of, see `Index`
  shard-00000-of-00012.arrayrecord, ...
  first_stage/           that made the moments: its decoder and its scale are still needed
  null_text.safetensors  the text encoder's output for the empty caption, if outputs are stored

Shard i of S holds the examples floor(i N / S) to floor((i + 1) N / S) of N, in the order of the
data set. A record is the bytes of its arrays, one after the other, in the order of the index; one
whose number of rows differs between examples has that number, an unsigned 32-bit integer, before
it. All numbers are little-endian.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import flatten
from ldm_jax.errors import UserError

PREFIX = "latents:"
VERSION = 1
INDEX = "index.json"
NULL_TEXT = "null_text.safetensors"
TEXT_CONTEXT, TEXT_MASK = "text_context", "text_mask"  # the output of a text encoder
DTYPES = ("float16", "bfloat16", "float32")  # of moments and of text encoders' outputs
# Config keys that decide what is stored; of a field, if it is stored and used.
KEYS = ("data.split", "data.where", "data.resolution", "data.crop")
FIELD_KEYS = {
    "label": ("data.label",),
    "tokens": ("data.caption", "text.length"),
    "segmentation": ("segmentation.num_classes",),
    "low_res": ("data.low_res.factor", "data.low_res.degradation"),
}
_LENGTH = struct.Struct("<I")


class Spec(NamedTuple):
    """One array of an example.

    Attributes:
        name: such as 'moments'.
        shape: the first axis may be None, where examples differ.
        dtype: such as 'float16'.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Index:
    """What `index.json` says.

    Attributes:
        count: number of examples.
        shards: number of files.
        arrays: of every example.
        flips: 2 if the mirrored images are stored too, else 1.
        crops: random crops of each image; 1 where the crop is centred.
        fields: batch fields that can be made of them, as in config.data.fields.
        made_of: config keys and their values; `data.source` is where the images were.
        first_stage: `tensors.digest` of the parameters that made the moments.
        vocabulary: digest of the tokenizer's vocabulary; '' without captions.
        text_encoder: digest of its parameters; '' where its outputs are not stored.
        label_names: of the classes, or None.
        num_labels: number of classes, 0 without labels.
    """

    count: int
    shards: int
    arrays: tuple[Spec, ...]
    flips: int
    crops: int
    fields: tuple[str, ...]
    made_of: Mapping[str, Any]
    first_stage: str
    vocabulary: str = ""
    text_encoder: str = ""
    label_names: tuple[str, ...] | None = None
    num_labels: int = 0

    def rows(self, shard: int) -> range:
        """The examples of a shard."""
        first, end = (i * self.count // self.shards for i in (shard, shard + 1))
        return range(first, end)

    def file(self, shard: int) -> str:
        """The name of a shard."""
        return f"shard-{shard:05d}-of-{self.shards:05d}.arrayrecord"

    def bytes(self) -> int:
        """Size of an example, where None is one row; compression saves a few per cent of it."""
        sizes = (
            math.prod(n or 1 for n in s.shape) * jnp.dtype(s.dtype).itemsize for s in self.arrays
        )
        return sum(sizes)


def write_index(folder: pathlib.Path, index: Index, temporary_name: str = f"{INDEX}.tmp") -> None:
    """Writes `index.json`, all or nothing; processes that do at once need other temporary names."""
    path, temporary = folder / INDEX, folder / temporary_name
    content = {"version": VERSION} | dataclasses.asdict(index)
    content["arrays"] = [spec._asdict() for spec in index.arrays]
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_index(folder: pathlib.Path) -> Index:
    """Reads `index.json`.

    Raises:
        UserError: there is none, it is of a newer version, or it is damaged.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("version")
    except OSError as error:
        raise UserError(
            f"no stored latents in {folder} ({INDEX}: {error.strerror}): make them with "
            f"`python -m ldm_jax.encode --out={folder}`"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged: encode the data again") from error
    if version != VERSION:
        raise UserError(
            f"{path} has the version {version!r} of the format, but this ldm_jax reads {VERSION}: "
            "use the ldm_jax that wrote it, or encode the data again"
        )
    try:
        arrays = tuple(
            Spec(spec["name"], tuple(spec["shape"]), jnp.dtype(spec["dtype"]).name)
            for spec in content.pop("arrays")
        )
        names, fields = content.pop("label_names"), tuple(content.pop("fields"))
        names = None if names is None else tuple(names)
        return Index(arrays=arrays, fields=fields, label_names=names, **content)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: encode the data again") from error


def made_of(config: ConfigDict, fields: Sequence[str]) -> dict[str, Any]:
    """The keys of a config that decide what is stored of its data for these fields."""
    flat = flatten(config)
    keys = [*KEYS, *(key for field in fields for key in FIELD_KEYS.get(field, ()))]
    return {key: flat[key] for key in keys}


def check_index(index: Index, config: ConfigDict, folder: pathlib.Path) -> None:
    """Checks that what is stored is what a config asks to train on.

    Raises:
        UserError: another resolution, crop, part of the data or length of captions, or a field or
            the mirrored images are missing.
    """
    fields = config.data.fields
    for field in fields:
        if field not in index.fields:
            has = ", ".join(index.fields) or "none"
            raise UserError(
                f"the latents in {folder} lack the field '{field}'; they have: {has}. Encode the "
                "data again with it"
            )
    for key, value in made_of(config, fields).items():
        if index.made_of.get(key) != value:
            raise UserError(
                f"config.{key} is {value!r}, but the latents in {folder} were made with "
                f"{index.made_of.get(key)!r}: use that, or encode the data again"
            )
    if config.data.flip and index.flips == 1:
        raise UserError(
            f"the latents in {folder} have no mirrored images: set config.data.flip=False, or "
            "encode the data again with config.data.flip=True"
        )


def pack(example: Mapping[str, np.ndarray], specs: Sequence[Spec]) -> bytes:
    """The record of an example; ValueError if an array has not the shape that its spec says."""
    parts = []
    for name, shape, dtype in specs:
        array = np.ascontiguousarray(example[name], jnp.dtype(dtype)).reshape(
            np.shape(example[name])
        )
        known = zip(array.shape, shape, strict=True) if array.ndim == len(shape) else [(0, 1)]
        if any(wanted not in (None, size) for size, wanted in known):
            raise ValueError(f"'{name}' has the shape {array.shape}, but must have {shape}")
        if None in shape:
            parts.append(_LENGTH.pack(len(array)))
        parts.append(array.tobytes())
    return b"".join(parts)


def unpack(record: bytes, specs: Sequence[Spec]) -> dict[str, np.ndarray]:
    """The arrays of a record, read-only views of it; ValueError if it is not as long as they."""
    arrays, place = {}, 0
    for name, shape, dtype in specs:
        if None in shape:
            if len(record) < place + _LENGTH.size:
                raise ValueError(f"it ends within '{name}'")
            shape = (_LENGTH.unpack_from(record, place)[0], *shape[1:])
            place += _LENGTH.size
        count, dtype = math.prod(shape), jnp.dtype(dtype)
        end = place + count * dtype.itemsize
        if len(record) < end:
            raise ValueError(f"it ends within '{name}'")
        arrays[name] = np.frombuffer(record, dtype, count, place).reshape(shape)
        place = end
    if place != len(record):
        raise ValueError(f"it has {len(record) - place} bytes too many")
    return arrays
