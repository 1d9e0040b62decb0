"""What PyTorch's pickles say, as data: storages, tensors that are views of them, state dicts."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.pickles import Inert, Name, Stream, kind, read_pickle
from ldm_jax.errors import UserError
from ldm_jax.tensors import LazyArray, check_name, check_shape, quote, read_array

WAY_OUT = "re-save the weights as safetensors"
MAX_EXPANDED = 2**16  # elements that a tensor may have though its storage has fewer

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


@dataclass(eq=False)
class Storage:
    """`count` elements of one type from byte `offset` of the file, with the CRC-32 `crc`.

    A file may say only after its tensors where a storage begins, and it may have no checksum (0).
    """

    count: int
    dtype: np.dtype
    offset: int = 0
    crc: int = 0


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


def read_value(stream: Stream, path: pathlib.Path, load: Callable[[Any], Storage]) -> Any:
    """Returns the value of the next pickle, whose tensors are `Tensor`s.

    `load` gives the storage for a persistent id; `path` is the file, for messages.

    Raises:
        UserError: damaged, or it asks for anything but plain tensors.
    """
    return read_pickle(stream, str(path), ALLOWED, functools.partial(_call, path), load)


def storage_of(path: pathlib.Path, where: Any) -> tuple[str, Storage]:
    """Key and storage, whose place is not known yet, of a persistent id.

    The id begins with 'storage', its type, its key, the device and the number of elements.

    Raises:
        UserError: it is something else than the id of a storage of plain numbers.
    """
    if not isinstance(where, tuple) or len(where) < 5 or not isinstance(where[1], Name):
        refuse(path, "refers to something else than a storage")
    title, name, key, _, count = where[:5]
    if name.text not in STORAGES:
        refuse(path, f"has a storage of type {name.text}")
    if title != "storage" or not isinstance(key, str) or not _is_size(count):
        refuse(path, "refers to something else than a storage")
    return key, Storage(count, STORAGES[name.text])


def _call(path: pathlib.Path, name: str, values: tuple) -> Any:
    """What PyTorch's functions would make of these values."""
    if name in INERT:
        return Inert(name)
    if name == ORDERED_DICT and len(values) < 2:
        return _ordered(path, *values)
    if name == PARAMETER and len(values) == 3 and isinstance(values[0], Tensor):
        return values[0]
    if name == TENSOR and len(values) == 4:
        return _tensor(path, *values)
    if name == TENSOR_V2 and len(values) in (6, 7):
        if len(values) == 7 and values[6]:
            refuse(path, "has a tensor that is conjugated or negated on use")
        return _tensor(path, *values[:4])
    refuse(path, f"calls {name} with unusual arguments")


def _ordered(path: pathlib.Path, pairs: Any = ()) -> dict[str, Any]:
    """A dict of [key, value] lists, as which Python 2 describes it; Python 3 adds them later."""
    found: dict[str, Any] = {}
    for pair in pairs if isinstance(pairs, list | tuple) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            refuse(path, f"calls {ORDERED_DICT} with unusual arguments")
        if pair[0] in found:
            refuse(path, f"sets the key {quote(pair[0])} twice")
        found[pair[0]] = pair[1]
    return found


def _tensor(path: pathlib.Path, storage: Any, start: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage):
        refuse(path, f"makes a tensor of {kind(storage)}")
    sizes = [shape, strides] if isinstance(shape, tuple) and isinstance(strides, tuple) else []
    if not sizes or len(shape) != len(strides) or not all(map(_is_size, (start, *shape, *strides))):
        refuse(path, "has a tensor with a negative or no size, stride or offset")
    check_shape(shape, f"a tensor in {path}")
    tensor = Tensor(storage, start, shape, strides)
    if start + tensor.extent > storage.count:
        raise UserError(
            f"{path} is truncated or damaged: a tensor of shape {list(shape)} needs "
            f"{start + tensor.extent} elements of a storage that has {storage.count}"
        )
    if math.prod(shape) > max(storage.count, MAX_EXPANDED):
        refuse(path, f"has a tensor of shape {list(shape)} that repeats {storage.count} elements")
    return tensor


def state_dict(path: pathlib.Path, value: Any) -> dict[str, LazyArray]:
    """The arrays of a state dict, or of the one in a training checkpoint, not read yet.

    Raises:
        UserError: it is no mapping of plain names to tensors and numbers.
    """
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


def refuse(path: pathlib.Path, text: str) -> NoReturn:
    """Raises the UserError for what a file asks for beyond plain tensors."""
    raise UserError(f"{path} {text}: refused; only plain tensors are read, so {WAY_OUT}")
