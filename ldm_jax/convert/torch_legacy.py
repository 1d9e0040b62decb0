"""Checkpoints as PyTorch wrote them before 1.6: five pickles in a row, then the storages.

The pickles are a magic number, the version of the format, facts about the writing machine, the
object itself, and the keys of its storages in the order of the file. Each storage is its number of
elements (int64) and its elements, both little-endian.
"""

from __future__ import annotations

import functools
import os
import pathlib
import struct
from typing import Any, BinaryIO

from ldm_jax.convert.pickles import MAX_BYTES, read_pickle
from ldm_jax.convert.torch_values import WAY_OUT, Storage, read_value, refuse, storage_of
from ldm_jax.errors import UserError
from ldm_jax.tensors import quote

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
HEADER_BYTES = 4096  # of the first three pickles, which have some 140
COUNT = struct.Struct("<q")


class _Part:
    """The next bytes of a file as a stream that gives no more, whatever length a pickle claims."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left = file, size, size

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise UserError(
                f"{self.file.name} is damaged, or its pickles have more than {self.size} bytes: "
                "refused"
            )
        return self._count(self.file.read(size))

    def readline(self) -> bytes:
        return self._count(self.file.readline(self.left))

    def _count(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


def read_legacy(path: pathlib.Path, file: BinaryIO) -> Any:
    """Returns what a file of this format describes, with `Tensor`s; their content is not read.

    Raises:
        UserError: another format, damaged, truncated, or it asks for anything but plain tensors.
    """
    file.seek(0)
    header = _Part(file, HEADER_BYTES)
    try:
        magic = _read_plain(header, path)
    except UserError:
        magic = None
    if magic != MAGIC:
        raise UserError(
            f"{path} is no checkpoint of PyTorch, or is damaged: it is neither a zip archive nor "
            "begins as files from before PyTorch 1.6 do"
        )
    if _read_plain(header, path) != VERSION:
        raise UserError(f"{path} has another version of its format than {VERSION}: {WAY_OUT}")
    machine = _read_plain(header, path)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UserError(f"{path} was not written on a little-endian machine: {WAY_OUT}")
    storages: dict[str, Storage] = {}
    rest = _Part(file, MAX_BYTES)
    value = read_value(rest, path, functools.partial(_storage, path, storages))
    _place(path, file, storages, _read_plain(rest, path))
    return value


def _read_plain(stream: _Part, path: pathlib.Path) -> Any:
    """The next pickle, of numbers, text, lists and dicts alone."""

    def load(*_: Any) -> Any:
        refuse(path, "refers to a storage outside of its object")

    return read_pickle(stream, str(path), (), load, load)


def _storage(path: pathlib.Path, storages: dict[str, Storage], where: Any) -> Storage:
    """The storage of a persistent id, which ends with None, or a view of another storage."""
    key, storage = storage_of(path, where)
    if len(where) != 6:
        refuse(path, "refers to something else than a storage")
    if where[5] is not None:
        refuse(path, f"has a view of the storage {quote(key)}")
    known = storages.setdefault(key, storage)
    if (known.count, known.dtype) != (storage.count, storage.dtype):
        refuse(path, f"has two descriptions of its storage {quote(key)}")
    return known


def _place(path: pathlib.Path, file: BinaryIO, storages: dict[str, Storage], keys: Any) -> None:
    """Finds where the storages begin; the first one does where the file was read to."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path} is damaged: it has no list of its storages")
    if len(set(keys)) != len(keys):
        raise UserError(f"{path} is damaged: it lists a storage twice")
    for key in sorted(storages.keys() ^ set(keys)):
        if key in storages:
            raise UserError(f"{path} is truncated: it has no storage {quote(key)}")
        raise UserError(f"{path} is damaged: its storage {quote(key)} belongs to no tensor")
    position, end = file.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        storage = storages[key]
        file.seek(position)
        storage.offset = position + COUNT.size
        position = storage.offset + storage.count * storage.dtype.itemsize
        if position > end:
            raise UserError(f"{path} is truncated: its storage {quote(key)} goes on after its end")
        (count,) = COUNT.unpack(file.read(COUNT.size))
        if count != storage.count:
            raise UserError(
                f"{path} is truncated or damaged: its storage {quote(key)} has {count} elements, "
                f"not {storage.count}"
            )
    if position != end:
        raise UserError(f"{path} goes on after its last storage: refused")
