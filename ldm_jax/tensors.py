"""Weights as safetensors files: nested trees of arrays under slash-separated names."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from ldm_jax.errors import UserError

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 32 * 2**20  # bytes; the longest published header has less than one MiB
MAX_AXES = 32
METADATA = "__metadata__"
# In the metadata of files of ours: CRC-32 of each array's bytes, in hex, in the header's order.
CHECKSUMS = "crc32"


@dataclass(frozen=True, eq=False)
class LazyArray:
    """An array of which only shape and type are known until NumPy asks for it.

    `read` is called for each use and its result is not kept.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a LazyArray cannot be had without a copy: it is read on each use")
        array = self.read()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"a LazyArray promised {self.dtype}{list(self.shape)}, but its read gave "
                f"{array.dtype}{list(array.shape)}"
            )
        return array if dtype is None else array.astype(dtype, copy=False)


def read_array(
    path: str | os.PathLike[str],
    offset: int,
    count: int,
    dtype: np.dtype,
    crc: int = 0,
    name: str = "the content",
) -> np.ndarray:
    """Reads `count` elements from byte `offset` of a file: (count,) of `dtype`.

    No mapping of the file, whose pages would count as this process's memory. `crc` is the CRC-32
    that these bytes must have, or 0 if it is not known, and `name` what they are, for messages.

    Raises:
        UserError: the file is gone or ends earlier, or its bytes are not those once written.
    """
    size = count * dtype.itemsize
    try:
        data = np.fromfile(path, np.uint8, count=size, offset=offset)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if data.size != size:
        raise UserError(f"{path} ends within {name}: it was changed or is truncated")
    if crc and zlib.crc32(data) != crc:
        raise UserError(
            f"{path} is damaged: {name} does not have its checksum; get or make it again"
        )
    if dtype == np.bool_:
        return data != 0  # a byte other than 0 and 1 is no valid bool
    return data.view(dtype)


def quote(name: str) -> str:
    """A foreign name for a message: in quotes, in one line of ASCII, cut to 80 characters."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def check_name(name: str, path: str | os.PathLike[str]) -> str:
    """Returns a name found in `path` unless it could be mistaken for a path out of a folder.

    Raises:
        UserError: empty, absolute, with '..', backslashes, control characters or a drive letter.
    """
    parts = name.split("/")
    if (
        name == METADATA
        or not name.isprintable()  # neither are NUL, line ends and surrogates
        or "\\" in name
        or re.match("[A-Za-z]:", name)
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise UserError(f"{path} holds the name {quote(name)}: refused, it is no plain name")
    return name


def check_shape(shape: tuple[int, ...], what: str) -> None:
    """Refuses the shape of `what` if no array can have it.

    Raises:
        UserError: too many axes, or more elements than can be addressed.
    """
    if len(shape) > MAX_AXES or math.prod(max(size, 1) for size in shape) >= 2**59:
        text = str(list(shape[:4]))[:60] + (" and more axes" if len(shape) > 4 else "")
        raise UserError(f"{what} has the shape {text}: no array can have it")


def unique(path: str | os.PathLike[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the entries of a JSON object: an `object_pairs_hook` that minds its names.

    Raises:
        UserError: two entries have the same name.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UserError(f"{path} has two entries named {quote(name)}: refused")
        found[name] = value
    return found


def save_tensors(
    path: str | os.PathLike[str],
    tree: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a nested dict of arrays to `path`, one after the other, all or nothing.

    Arrays may be NumPy's, JAX's or `LazyArray`s; no more than one of these is in memory at a time.
    Their checksums are stored in the metadata; whoever reads the file by `open_tensors` is told of
    any damage.

    Raises:
        UserError: a name is no plain name.
        ValueError: safetensors files have no such type, or a LazyArray is not what it promised.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    flat = {
        check_name(name, path): leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for name, leaf in flat.items()
    }
    # The widest types first: then each array is aligned to its own type.
    names = sorted(flat, key=lambda name: (-np.dtype(flat[name].dtype).itemsize, name))
    sums = ["0" * 8] * len(names)  # of this length whatever they are
    ours = {name: str(value) for name, value in (metadata or {}).items()}
    header: dict[str, Any] = {METADATA: ours | {CHECKSUMS: " ".join(sums)}}
    end = 0
    for name in names:
        shape, dtype = list(flat[name].shape), np.dtype(flat[name].dtype)
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"'{name}' is {dtype}, which a safetensors file cannot hold")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}

    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_header_bytes(header))
            for i, name in enumerate(names):
                array = np.ascontiguousarray(flat[name]).reshape(-1).view(np.uint8)
                file.write(array)
                sums[i] = f"{zlib.crc32(array):08x}"
                del array  # before the next one is read
            header[METADATA][CHECKSUMS] = " ".join(sums)
            file.seek(0)
            file.write(_header_bytes(header))
            file.flush()
            os.fsync(file.fileno())  # the name must not outlive a crash without its bytes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Returns the arrays of a safetensors file by name, not read yet, and its metadata.

    Where the file was written by `save_tensors`, each array is compared with its checksum whenever
    it is read, which raises UserError if it does not have it.

    Raises:
        UserError: no such file, no valid safetensors file, a type or a name that is not taken.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(MAX_HEADER, os.path.getsize(path) - 8):
                raise UserError(
                    f"{path} is not a readable safetensors file: its header is cut off or too long"
                )
            text = file.read(length)
        # The library checks offsets against shapes, types and the file's size.
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = "".join(c if c.isprintable() else "?" for c in str(error)[:300])
        raise UserError(f"{path} is not a readable safetensors file: {reason}") from error

    try:
        header = json.loads(text.decode(), object_pairs_hook=functools.partial(unique, path))
    except (ValueError, RecursionError) as error:  # the library passes over unknown fields
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    metadata = header.pop(METADATA, None) or {}
    sums = _checksums(path, metadata.pop(CHECKSUMS, None), len(header))
    flat = {}
    for (name, entry), crc in zip(header.items(), sums, strict=True):
        check_name(name, path)
        if not isinstance(entry, dict) or entry["dtype"] not in DTYPES:
            dtype = entry["dtype"] if isinstance(entry, dict) else "of a list"
            raise UserError(f"{quote(name)} in {path} has the type {dtype}: not supported")
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        check_shape(shape, f"{quote(name)} in {path}")
        offset = 8 + length + entry["data_offsets"][0]
        read = functools.partial(_read, path, offset, shape, dtype, crc, quote(name))
        flat[name] = LazyArray(shape, dtype, read)
    return flat, metadata


def check_file(path: str | os.PathLike[str]) -> tuple[int, bool]:
    """Reads all arrays of a file; returns their bytes, and whether they have checksums.

    Raises:
        UserError: as `open_tensors`, or an array that does not have its checksum.
    """
    size = sum(np.asarray(array).nbytes for array in open_tensors(path)[0].values())
    with safe_open(path, framework="numpy") as file:
        return size, CHECKSUMS in (file.metadata() or {})


def load_tensors(path: str | os.PathLike[str], like: dict[str, Any]) -> dict[str, Any]:
    """Reads a tree as `open_tree` opens it; raises UserError likewise."""
    return jax.tree.map(np.asarray, open_tree(path, like))


def open_tree(path: str | os.PathLike[str], like: dict[str, Any]) -> dict[str, Any]:
    """Opens a tree written by `save_tensors` that must match `like` in names, shapes and types.

    Its leaves are LazyArrays.

    Raises:
        UserError: no such file, no safetensors file, or other names, shapes or types.
    """
    flat, _ = open_tensors(path)
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
    tree = traverse_util.unflatten_dict(flat, sep="/")
    # An empty part, such as the weights of no conditioner, has no names.
    return {name: {} for name in like} | tree


def digest(tree: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the names, types, shapes and values of a nested dict of arrays."""
    flat, found = traverse_util.flatten_dict(dict(tree), sep="/"), hashlib.sha256()
    for name in sorted(flat):
        array = np.asarray(flat[name])
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.hexdigest()


def _read(
    path: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype, crc: int, name: str
) -> np.ndarray:
    return read_array(path, offset, math.prod(shape), dtype, crc, name).reshape(shape)


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _checksums(path: Any, text: str | None, count: int) -> list[int]:
    """The checksums of a file's arrays, in its order; 0 for each where it has none.

    Raises:
        UserError: they are no checksums of so many arrays.
    """
    if text is None:
        return [0] * count
    try:
        sums = [int(word, 16) for word in text.split(" ")] if text else []
    except ValueError:
        sums = []
    if len(sums) != count:
        raise UserError(
            f"{path} is damaged: its checksums were changed; get or make the file again"
        )
    return sums
