"""Foreign checkpoints as data: only headers are read until an array is asked for, no code is run.

A .ckpt, .pt, .pth or .bin file of PyTorch 1.6 or later is a zip archive: `data.pkl` describes the
tensors, and the uncompressed members `data/0`, `data/1`, ... are the bytes of their storages.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.pickles import MAX_BYTES, Inert, Name, kind, read_pickle
from ldm_jax.errors import UserError
from ldm_jax.tensors import (
    LazyArray,
    check_name,
    check_shape,
    open_tensors,
    quote,
    read_array,
    unique,
)

ARCHIVES = (".ckpt", ".pt", ".pth", ".bin")
WAY_OUT = "re-save the weights as safetensors"
MAX_EXPANDED = 2**16  # elements that a tensor may have though its storage has fewer
MAX_NAME = 255  # characters of a file's name
LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # magic, flags, compression, lengths of name and extra
ENCRYPTED = 0x2041
# zipfile's ways to say that a file is no good archive
ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError)

STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
ORDERED_DICT = "collections.OrderedDict"
TENSOR_V2 = "torch._utils._rebuild_tensor_v2"
TENSOR = "torch._utils._rebuild_tensor"
PARAMETER = "torch._utils._rebuild_parameter"
# What training tools leave beside the weights. Nothing of it is imported: a name stays a name.
INERT = frozenset(
    """
    torch.float64 torch.float32 torch.float16 torch.bfloat16 torch.int64 torch.int32 torch.int16
    torch.int8 torch.uint8 torch.bool torch.device torch.Size torch.storage.TypedStorage
    pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
    pytorch_lightning.callbacks.early_stopping.EarlyStopping
    pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor
    pytorch_lightning.utilities.parsing.AttributeDict
    lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint
    lightning.fabric.utilities.data.AttributeDict
    lightning_fabric.utilities.data.AttributeDict
    omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
    omegaconf.base.Metadata omegaconf.base.ContainerMetadata
    omegaconf.nodes.AnyNode omegaconf.nodes.StringNode omegaconf.nodes.BooleanNode
    omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode
    numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct
    numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct
    numpy.dtype numpy.ndarray _codecs.encode
    builtins.set builtins.frozenset builtins.dict builtins.list builtins.tuple builtins.int
    builtins.float builtins.str builtins.bool builtins.bytearray builtins.complex builtins.object
    __builtin__.set __builtin__.frozenset __builtin__.dict __builtin__.list __builtin__.object
    copyreg._reconstructor copy_reg._reconstructor argparse.Namespace typing.Any
    collections.defaultdict collections.deque collections.Counter
    pathlib.Path pathlib.PosixPath pathlib.WindowsPath
    """.split()
)
ALLOWED = frozenset({ORDERED_DICT, TENSOR_V2, TENSOR, PARAMETER}) | STORAGES.keys() | INERT


@dataclass(frozen=True)
class Member:
    """A part of an archive: its bytes in the file, and their CRC-32.

    This is 0 if unknown: `torch.serialization.set_crc32_options(False)` has PyTorch write so.
    """

    offset: int
    size: int
    crc: int = 0


@dataclass(frozen=True, eq=False)
class Storage:
    """`count` elements of one type from byte `offset` of the file, with the CRC-32 `crc`."""

    offset: int
    count: int
    dtype: np.dtype
    crc: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; `start` and `strides` count elements."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements of the storage from the first to the last of the tensor."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)

    def read(self, path: pathlib.Path, name: str) -> np.ndarray:
        """Reads the tensor `name`; its checksum is compared if it takes all of its storage."""
        dtype = self.storage.dtype
        offset = self.storage.offset + self.start * dtype.itemsize
        crc = self.storage.crc if self.extent == self.storage.count else 0
        flat = read_array(path, offset, self.extent, dtype, crc, quote(name))
        # NumPy checks once more that the view stays within the elements read.
        steps = zip(self.shape, self.strides, strict=True)
        strides = [
            stride * dtype.itemsize if size > 1 and flat.size else 0 for size, stride in steps
        ]
        view = np.ndarray(self.shape, dtype, flat, 0, strides)
        return view if view.size == flat.size else view.copy()  # do not keep more than is used


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
        return _open_archive(path)
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


def _open_archive(path: pathlib.Path) -> dict[str, LazyArray]:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise UserError(
                    f"{path} is no zip archive: it is damaged, or PyTorch wrote it before 1.6; "
                    f"load it there and {WAY_OUT}"
                )
            members = _members(path, file)
            folder = _folder(path, members)
            order = _content(file, members, f"{folder}/byteorder", 16) or b"little"
            if order != b"little":
                raise UserError(f"{path} holds numbers in the order {quote(str(order))}: {WAY_OUT}")
            data = _content(file, members, f"{folder}/data.pkl", MAX_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    load = functools.partial(_storage, path, members, folder)
    value = read_pickle(data, str(path), ALLOWED, functools.partial(_call, path), load)
    return _state_dict(path, value)


def _members(path: pathlib.Path, file: Any) -> dict[str, Member]:
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


def _content(file: Any, members: dict[str, Member], name: str, most: int) -> bytes:
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
    if not isinstance(where, tuple) or len(where) != 5 or not isinstance(where[1], Name):
        _refuse(path, "refers to something else than a storage")
    _, name, key, _, count = where
    if name.text not in STORAGES:
        _refuse(path, f"has a storage of type {name.text}")
    if where[0] != "storage" or not isinstance(key, str) or not _is_size(count):
        _refuse(path, "refers to something else than a storage")
    dtype, member = STORAGES[name.text], members.get(f"{folder}/data/{key}")
    if member is None:
        raise UserError(f"{path} is truncated: it has no storage {quote(key)}")
    if member.size != count * dtype.itemsize:
        raise UserError(
            f"{path} is truncated or damaged: its storage {quote(key)} has {member.size} bytes, "
            f"not {count} elements of {dtype}"
        )
    return Storage(member.offset, count, dtype, member.crc)


def _call(path: pathlib.Path, name: str, values: tuple) -> Any:
    """What PyTorch's functions would make of these values."""
    if name in INERT:
        return Inert(name)
    if name == ORDERED_DICT and not values:
        return {}
    if name == PARAMETER and len(values) == 3 and isinstance(values[0], Tensor):
        return values[0]
    if name == TENSOR and len(values) == 4:
        return _tensor(path, *values)
    if name == TENSOR_V2 and len(values) in (6, 7):
        if len(values) == 7 and values[6]:
            _refuse(path, "has a tensor that is conjugated or negated on use")
        return _tensor(path, *values[:4])
    _refuse(path, f"calls {name} with unusual arguments")


def _tensor(path: pathlib.Path, storage: Any, start: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage):
        _refuse(path, f"makes a tensor of {kind(storage)}")
    sizes = [shape, strides] if isinstance(shape, tuple) and isinstance(strides, tuple) else []
    if not sizes or len(shape) != len(strides) or not all(map(_is_size, (start, *shape, *strides))):
        _refuse(path, "has a tensor with a negative or no size, stride or offset")
    check_shape(shape, f"a tensor in {path}")
    tensor = Tensor(storage, start, shape, strides)
    if start + tensor.extent > storage.count:
        raise UserError(
            f"{path} is truncated or damaged: a tensor of shape {list(shape)} needs "
            f"{start + tensor.extent} elements of a storage that has {storage.count}"
        )
    if math.prod(shape) > max(storage.count, MAX_EXPANDED):
        _refuse(path, f"has a tensor of shape {list(shape)} that repeats {storage.count} elements")
    return tensor


def _state_dict(path: pathlib.Path, value: Any) -> dict[str, LazyArray]:
    """The arrays of a state dict, or of the one in a training checkpoint."""
    if isinstance(value, dict):
        value = value.get("state_dict", value)
    if not isinstance(value, dict) or not value:
        found = "nothing" if isinstance(value, dict) else kind(value)
        raise UserError(f"{path} holds {found}, not the weights of a network by name")
    arrays = {}
    for name, entry in value.items():
        if not isinstance(name, str):
            raise UserError(f"{path} names a tensor by {kind(name)}: refused")
        check_name(name, path)
        if isinstance(entry, Tensor):
            read = functools.partial(entry.read, path, name)
            arrays[name] = LazyArray(entry.shape, entry.storage.dtype, read)
        elif isinstance(entry, bool | float) or (isinstance(entry, int) and abs(entry) < 2**63):
            number = np.asarray(entry)
            arrays[name] = LazyArray((), number.dtype, number.copy)
        else:
            raise UserError(
                f"{quote(name)} in {path} is {kind(entry)}, not a tensor: save the state dict alone"
            )
    return arrays


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _refuse(path: pathlib.Path, text: str) -> NoReturn:
    raise UserError(f"{path} {text}: refused; only plain tensors are read, so {WAY_OUT}")
