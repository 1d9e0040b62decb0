"""Small writers of checkpoint files, byte by byte, so that tests need no PyTorch."""

import io
import json
import pathlib
import struct
import zipfile

import numpy as np

FLOAT = "FloatStorage"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def mapping(*items: bytes) -> bytes:
    """A dict of key, value, key, value ..."""
    return b"}(" + b"".join(items) + b"u"


ORDERED = name("collections", "OrderedDict") + b")R"


def storage(
    count: int, key: str = "0", kind: str = FLOAT, module: str = "torch", rest: tuple = ()
) -> bytes:
    """A reference to a storage; before 1.6 its end (`rest`) said of what it was a view: NONE."""
    parts = text("storage"), name(module, kind), text(key), text("cpu"), number(count), *rest
    return group(*parts) + b"Q"


def tensor(
    shape: tuple = (2, 3),
    strides: tuple = (3, 1),
    start: int = 0,
    where: bytes | None = None,
    count: int = 6,
    function: str = "_rebuild_tensor_v2",
    rest: tuple = (b"\x89", ORDERED),
) -> bytes:
    """A tensor as torch.save describes it; without `where`, in the way of 1.6 and later."""
    return call(
        name("torch._utils", function),
        storage(count) if where is None else where,
        number(start),
        group(*map(number, shape)),
        group(*map(number, strides)),
        *rest,
    )


def pickled(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


DATA = struct.pack("<6f", *range(6))
GOOD = pickled(mapping(text("w"), tensor()))


def training_checkpoint() -> bytes:
    """What training tools save, with weights of several kinds in its `state_dict`."""
    callback = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    scalar = call(name("numpy.core.multiarray", "scalar"), name("numpy", "dtype"), b"N")
    namespace = name("argparse", "Namespace") + b")\x81" + mapping(text("lr"), number(1)) + b"b"
    metadata = mapping(text("_metadata"), mapping(text(""), mapping())) + b"b"
    weights = ORDERED + b"(" + text("a.weight") + tensor()
    weights += text("a.old") + tensor(function="_rebuild_tensor", rest=())
    parameter = name("torch._utils", "_rebuild_parameter")
    weights += text("a.param") + call(parameter, tensor(), b"\x88", ORDERED)
    weights += text("num") + number(-3) + text("flag") + b"\x88" + text("rate") + b"G" + bytes(8)
    weights += b"u" + metadata
    moments = mapping(number(0), tensor(), number(1), tensor(), number(2**80), b"N", b"\x88", b"N")
    return mapping(
        *(text("epoch"), number(3), text("callbacks"), mapping(callback, scalar)),
        *(text("state_dict"), weights, text("hparams"), namespace, text("set"), b"\x8f(K\x01\x90"),
        *(text("optimizer_states"), mapping(text("state"), moments)),
    )


TRAINING = training_checkpoint()


def archive(path: pathlib.Path, data: bytes = GOOD, **members: bytes) -> pathlib.Path:
    """A .ckpt with the pickle `data` and one storage of six floats.

    Keywords replace or add members of its folder; '__' in them stands for '/', '_' for '.'.
    """
    parts = {"data.pkl": data, "data/0": DATA, "version": b"3\n"}
    parts |= {k.replace("__", "/").replace("_", "."): v for k, v in members.items()}
    return archive_of(path, {f"archive/{k}": v for k, v in parts.items()})


def archive_of(path: pathlib.Path, members: dict[str, bytes], compression: int = 0):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for member, content in members.items():
            file.writestr(zipfile.ZipInfo(member), content, compression)
    path.write_bytes(buffer.getvalue())
    return path


# The first three pickles of every file from before 1.6, as PyTorch 1.5 writes them.
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
VERSION = b"\x80\x02M\xe9\x03."
MACHINE = mapping(text("protocol_version"), number(1001), text("little_endian"), b"\x88")
HEADER = MAGIC + VERSION + pickled(MACHINE)
NONE = (b"N",)
OLD = mapping(text("w"), tensor(where=storage(6, rest=NONE)))
COUNT = struct.pack("<q", 6)


def listed(*keys: str) -> bytes:
    """The last of the five pickles."""
    return pickled(b"](" + b"".join(map(text, keys)) + b"e")


def legacy(
    path: pathlib.Path,
    body: bytes = OLD,
    header: bytes = HEADER,
    keys: bytes = listed("0"),
    data: bytes = COUNT + DATA,
    protocol: int = 2,
) -> pathlib.Path:
    """A file from before 1.6 with one storage of six floats."""
    path.write_bytes(header + pickled(body, protocol) + keys + data)
    return path


def legacy_of(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    """A state dict of float32 arrays as PyTorch before 1.6 writes it."""
    body, data = b"", b""
    for key, array in arrays.items():
        array = np.ascontiguousarray(array)
        strides = tuple(stride // 4 for stride in array.strides)
        where = storage(array.size, key, rest=NONE)
        body += text(key) + tensor(array.shape, strides, where=where)
        data += struct.pack("<q", array.size) + array.tobytes()
    return legacy(path, mapping(body), keys=listed(*arrays), data=data)


def patched(path: pathlib.Path, old: bytes, new: bytes, count: int = -1) -> pathlib.Path:
    """Replaces bytes of a file, of the same number, from its end on."""
    data = path.read_bytes()
    assert len(old) == len(new) and old in data
    parts = data.rsplit(old, count)
    path.write_bytes(new.join(parts))
    return path


def safetensors(path: pathlib.Path, header: object, data: bytes = b"", length: int | None = None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + content + data)
    return path


def entry(start: int, end: int, shape: tuple = (1,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
