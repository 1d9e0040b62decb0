"""Foreign checkpoints as data: only headers are read until an array is asked for, no code is run.

A .ckpt, .pt, .pth or .bin file of PyTorch 1.6 or later is a zip archive: `data.pkl` describes the
tensors, and the uncompressed members `data/0`, `data/1`, ... are the bytes of their storages. How
earlier files look is said in torch_legacy.py.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pathlib
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

from ldm_jax.convert.pickles import MAX_BYTES
from ldm_jax.convert.torch_legacy import read_legacy
from ldm_jax.convert.torch_values import WAY_OUT, Storage, read_value, state_dict, storage_of
from ldm_jax.errors import UserError
from ldm_jax.tensors import LazyArray, check_name, open_tensors, quote, unique

ARCHIVES = (".ckpt", ".pt", ".pth", ".bin")
MAX_NAME = 255  # characters of a file's name
LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # magic, flags, compression, lengths of name and extra
ENCRYPTED = 0x2041
# zipfile's ways to say that a file is no good archive
ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError)


@dataclass(frozen=True)
class Member:
    """A part of an archive: its bytes in the file, and their CRC-32.

    This is 0 if unknown: `torch.serialization.set_crc32_options(False)` has PyTorch write so.
    """

    offset: int
    size: int
    crc: int = 0


def open_checkpoint(path: str | os.PathLike[str]) -> dict[str, LazyArray]:
    """Returns the weights of a checkpoint by name, not read yet.

    An array of a PyTorch file that takes its whole storage is compared with the storage's CRC-32
    when it is read, if the file has one; UserError says which array is damaged.

    Args:
        path: a `.ckpt`, `.pt`, `.pth` or `.bin` file of PyTorch (the entry `state_dict` of a
            training checkpoint, else the whole mapping), a `.safetensors` file, or the
            `.index.json` of a checkpoint in several such files.

    Raises:
        UserError: missing, damaged, of another kind, or it asks for anything but plain tensors.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):  # which knows no errors: a name may be too long for a file
        raise UserError(f"no checkpoint at {path}")
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    if path.suffix == ".safetensors":
        return open_tensors(path)[0]
    if path.suffix in ARCHIVES:
        return _open_torch(path)
    raise UserError(
        f"{path} is no checkpoint by its name: {', '.join(ARCHIVES)}, .safetensors and .index.json "
        "are read"
    )


def _open_sharded(path: pathlib.Path) -> dict[str, LazyArray]:
    """All arrays of the files that an index names."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES} bytes: refused")
        text = path.read_text(encoding="utf-8")
        index = json.loads(text, object_pairs_hook=functools.partial(unique, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path} has no 'weight_map': it is no index of a checkpoint")
    files: dict[str, dict[str, LazyArray]] = {}
    for name, file in places.items():
        check_name(name, path)
        if not isinstance(file, str) or "/" in check_name(file, path):
            raise UserError(f"{path} puts {quote(name)} in another folder: refused")
        if file.endswith(".json") or len(file) > MAX_NAME:
            raise UserError(f"{path} names {quote(file)} as a file of weights: refused")
        if file not in files:
            files[file] = open_checkpoint(path.with_name(file))
        if name not in files[file]:
            raise UserError(f"{quote(name)} is missing from {path.with_name(file)}")
    for file, arrays in files.items():
        for name in arrays:
            if places.get(name) != file:
                raise UserError(f"{path.with_name(file)} has {quote(name)}, which {path} does not")
    return {name: files[file][name] for name, file in places.items()}


def _open_torch(path: pathlib.Path) -> dict[str, LazyArray]:
    """The arrays of a PyTorch file of either format."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            value = _read_archive(path, file) if zipped else read_legacy(path, file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return state_dict(path, value)


def _read_archive(path: pathlib.Path, file: BinaryIO) -> Any:
    """What `data.pkl` of a zip archive describes."""
    members = _members(path, file)
    folder = _folder(path, members)
    order = _content(file, members, f"{folder}/byteorder", 16) or b"little"
    if order != b"little":
        raise UserError(f"{path} holds numbers in the order {quote(str(order))}: {WAY_OUT}")
    data = io.BytesIO(_content(file, members, f"{folder}/data.pkl", MAX_BYTES))
    value = read_value(data, path, functools.partial(_storage, path, members, folder))
    if data.read(1):
        raise UserError(f"{path} goes on after the end of its pickle: refused")
    return value


def _members(path: pathlib.Path, file: BinaryIO) -> dict[str, Member]:
    """The parts of an archive, none of which is compressed, overlaps another or leaves the file."""
    try:
        archive = zipfile.ZipFile(file)
    except ZIP_ERRORS as error:
        raise UserError(f"{path} is a damaged or truncated zip archive: {error}") from error
    end = 0
    members = {}
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = quote(info.orig_filename)
        check_name(info.orig_filename.removesuffix("/"), path)
        if info.filename in members:
            raise UserError(f"{path} has two members {name}: refused")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UserError(f"{path} has the compressed member {name}: refused; {WAY_OUT}")
        if info.header_offset < end:
            raise UserError(f"{path} has the member {name} overlap another one: refused")
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER.size).ljust(LOCAL_HEADER.size)
        magic, flags, compression, name_length, extra_length = LOCAL_HEADER.unpack(header)
        if (flags | info.flag_bits) & ENCRYPTED:
            raise UserError(f"{path} has the encrypted member {name}: refused; {WAY_OUT}")
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        same = file.read(name_length) == info.orig_filename.encode(encoding, "replace")
        if magic != b"PK\x03\x04" or compression != zipfile.ZIP_STORED or not same:
            raise UserError(f"{path} has two descriptions of its member {name}: refused")
        offset = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        end = offset + info.file_size
        if end > archive.start_dir:
            raise UserError(f"{path} is truncated: its member {name} goes on after its end")
        members[info.filename] = Member(offset, info.file_size, info.CRC)
    return members


def _folder(path: pathlib.Path, members: dict[str, Member]) -> str:
    """The folder that all members are in; it has any name."""
    folders = {name.split("/")[0] for name in members}
    if len(folders) != 1 or f"{min(folders)}/data.pkl" not in members:
        raise UserError(f"{path} is no checkpoint of PyTorch: it has not one folder with data.pkl")
    folder = folders.pop()
    if any(re.match(r"(constants\.pkl$|code/)", name[len(folder) + 1 :]) for name in members):
        raise UserError(f"{path} is a TorchScript program: refused; {WAY_OUT}")
    return folder


def _content(file: BinaryIO, members: dict[str, Member], name: str, most: int) -> bytes:
    """The bytes of a member, or none if there is no such member."""
    member = members.get(name, Member(0, 0))
    if member.size > most:
        raise UserError(
            f"{file.name} has {member.size} bytes in {quote(name)}: refused, more than {most}"
        )
    file.seek(member.offset)
    content = file.read(member.size)
    if member.crc and zlib.crc32(content) != member.crc:
        raise UserError(
            f"{file.name} is damaged: {quote(name)} does not have its checksum; download it again"
        )
    return content


def _storage(path: pathlib.Path, members: dict[str, Member], folder: str, where: Any) -> Storage:
    """The storage of a persistent id: ('storage', type, key, device, number of elements)."""
    key, storage = storage_of(path, where)
    member = members.get(f"{folder}/data/{key}")
    if member is None:
        raise UserError(f"{path} is truncated: it has no storage {quote(key)}")
    if member.size != storage.count * storage.dtype.itemsize:
        raise UserError(
            f"{path} is truncated or damaged: its storage {quote(key)} has {member.size} bytes, "
            f"not {storage.count} elements of {storage.dtype}"
        )
    storage.offset, storage.crc = member.offset, member.crc
    return storage
