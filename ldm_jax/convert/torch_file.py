"""Writes checkpoints that `torch.load` reads, without torch: a zip of one pickle and raw data.

The pickle is put together from its opcodes, as pickling by name would need torch itself. Reading is
in reader.py.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.tensors import check_name

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
FOLDER = "archive"


def save_checkpoint(path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> None:
    """Writes {'state_dict': weights} to `path`, all or nothing and one weight at a time.

    Raises:
        UserError: a name is no plain name, or a weight is not float32, float16 or int64.
    """
    path = pathlib.Path(path)
    for name in state_dict:
        check_name(name, path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.writestr(f"{FOLDER}/data.pkl", b"".join(_pickle(state_dict)))
            archive.writestr(f"{FOLDER}/byteorder", "little")
            for number, weight in enumerate(state_dict.values()):
                data = np.ascontiguousarray(np.asarray(weight))
                with archive.open(f"{FOLDER}/data/{number}", "w", force_zip64=True) as member:
                    member.write(data.reshape(-1).view(np.uint8))
                del data  # before the next one is read
            archive.writestr(f"{FOLDER}/version", "3\n")
        with open(temporary, "rb") as file:  # the name must not outlive a crash without its bytes
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _pickle(state_dict: Mapping[str, Any]) -> Iterator[bytes]:
    """The opcodes (protocol 2) of {'state_dict': {name: tensor, ...}}."""
    yield pickle.PROTO + b"\x02"
    yield pickle.EMPTY_DICT + _text("state_dict") + pickle.EMPTY_DICT
    for number, (name, weight) in enumerate(state_dict.items()):
        yield _text(name) + b"".join(_tensor(number, name, weight)) + pickle.SETITEM
    yield pickle.SETITEM + pickle.STOP


def _tensor(number: int, name: str, weight: Any) -> Iterator[bytes]:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    shape, dtype = np.shape(weight), np.dtype(weight.dtype).name
    if dtype not in STORAGES:
        raise UserError(f"{name} is {dtype}, but only {', '.join(STORAGES)} can be written")
    size = int(np.prod(shape))
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    yield _name("torch._utils", "_rebuild_tensor_v2")
    yield pickle.MARK
    yield pickle.MARK + _text("storage") + _name("torch", STORAGES[dtype])
    yield _text(str(number)) + _text("cpu") + _integer(size) + pickle.TUPLE + pickle.BINPERSID
    yield _integer(0) + _integers(shape) + _integers(strides) + pickle.NEWFALSE
    yield _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    yield pickle.TUPLE + pickle.REDUCE


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    data = value.to_bytes(9, "little")
    return pickle.LONG1 + bytes([len(data)]) + data


def _integers(values: Any) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
