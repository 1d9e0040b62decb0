"""Hostile and damaged files in the format of PyTorch before 1.6: see hostile_pickles.py."""

import pathlib
import struct

from convert.archives import (
    COUNT,
    DATA,
    MACHINE,
    MAGIC,
    NONE,
    VERSION,
    call,
    group,
    legacy,
    listed,
    mapping,
    name,
    number,
    pickled,
    storage,
    tensor,
    text,
)
from convert.hostile_pickles import SYSTEM, Case, touch


def old(message: str, **parts: bytes) -> Case:
    return Case(lambda folder: legacy(folder / "m.pth", **parts), message)


def weights(message: str, where: bytes, **parts: bytes) -> Case:
    """One tensor of six elements in the storage `where`."""
    return old(message, body=mapping(text("w"), tensor(where=where)), **parts)


def code(command: str) -> bytes:
    return pickled(call(SYSTEM, text(command)))


def running(part: str) -> Case:
    """Code in the place of one of the pickles."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        parts = {
            "magic": {"header": code(touch(folder)) + VERSION + pickled(MACHINE)},
            "version": {"header": MAGIC + code(touch(folder))},
            "machine": {"header": MAGIC + VERSION + code(touch(folder))},
            "object": {"body": code(touch(folder))[2:-1]},
            "keys": {"keys": code(touch(folder))},
        }
        return legacy(folder / "m.pth", **parts[part])

    message = "neither a zip archive nor" if part == "magic" else "asks for os.system"
    return Case(make, message, code)


def python_2(*pairs: bytes) -> bytes:
    """An OrderedDict of [key, value] lists."""
    return call(name("collections", "OrderedDict"), b"](" + b"".join(pairs) + b"e")


def pair(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


ENTRY = pair(text("w"), tensor(where=storage(6, rest=NONE)))
MACHINES = {
    "big-endian": mapping(text("little_endian"), b"\x89"),
    "unknown machine": mapping(text("little_endian"), text("yes")),
    "machine that is a list": b"]",
}

LEGACY = {
    **{
        f"code in the {part}": running(part) for part in "magic version machine object keys".split()
    },
    **{
        f"{title} before 1.6": old(
            "not written on a little", header=MAGIC + VERSION + pickled(body)
        )
        for title, body in MACHINES.items()
    },
    "tar file": Case(
        lambda folder: legacy(folder / "m.pth", header=b"storages".ljust(257, b"\0") + b"ustar"),
        "neither a zip archive nor",
    ),
    "web page": old("neither a zip archive nor", header=b"<!DOCTYPE html><html>"),
    "another magic number": old("neither a zip archive nor", header=pickled(number(7))),
    "another version": old("another version of its", header=MAGIC + pickled(number(1000))),
    "long header": old("is damaged", header=MAGIC + VERSION + pickled(b"N0" * 4000)),
    "huge text before 1.6": old("is damaged", header=MAGIC + b"X" + struct.pack("<I", 2**32 - 1)),
    "huge bytes before 1.6": old("is damaged", body=b"\x8e" + struct.pack("<Q", 2**62)),
    "line without an end": old("is damaged", body=b"I" + b"1" * 10**5, keys=b"", data=b""),
    "storage in the header": old("outside of its object", header=MAGIC + VERSION + pickled(b"NQ")),
    "storage in the keys": old("outside of its object", keys=pickled(text("0") + b"Q")),
    "keys that are no list": old("no list of its storages", keys=pickled(mapping(text("0"), b"N"))),
    "keys that are numbers": old("no list of its storages", keys=pickled(b"](" + number(0) + b"e")),
    "storage that is not listed": old("has no storage '0'", keys=listed()),
    "storage listed twice": old("lists a storage twice", keys=listed("0", "0")),
    "storage of no tensor": old("'1' belongs to no tensor", keys=listed("0", "1")),
    "another count": old(
        "storage '0' has 7 elements, not 6", data=struct.pack("<q", 7) + DATA + bytes(4)
    ),
    "negative count": old("storage '0' has -6 elements", data=struct.pack("<q", -6) + DATA),
    "count cut off": old("is truncated: its storage '0' goes on", data=COUNT[:-1]),
    "data cut off": old("is truncated: its storage '0' goes on", data=COUNT + DATA[:-1]),
    "data left over before 1.6": old("goes on after its last stor", data=COUNT + DATA + b"\0"),
    "immense storage": weights(
        "is truncated: its storage '0' goes on",
        storage(2**62, rest=NONE),
        data=struct.pack("<q", 2**62) + DATA,
    ),
    "negative storage": weights("else than a storage", storage(-6, rest=NONE)),
    "storage as in 1.6": weights("else than a storage", storage(6)),
    "view of a storage": weights(
        "has a view of the storage '0'", storage(6, rest=(group(text("1"), number(0), number(6)),))
    ),
    "quantised storage": weights(
        "asks for torch.QInt8Storage", storage(6, kind="QInt8Storage", rest=NONE)
    ),
    "storage of no type": weights(
        "has a storage of type torch.float32", storage(6, kind="float32", rest=NONE)
    ),
    "tensor longer than its storage": weights(
        "needs 6 elements of a storage that has 5",
        storage(5, rest=NONE),
        data=struct.pack("<q", 5) + DATA[:20],
    ),
    "storage of two types": old(
        "two descriptions of its storage '0'",
        body=mapping(
            *(text("a"), tensor(where=storage(6, rest=NONE))),
            *(text("b"), tensor((1,), (1,), where=storage(6, "0", "LongStorage", rest=NONE))),
        ),
    ),
    "storage of two counts": old(
        "two descriptions of its storage '0'",
        body=mapping(
            *(text("a"), tensor(where=storage(6, rest=NONE))),
            *(text("b"), tensor((1,), (1,), where=storage(7, rest=NONE))),
        ),
    ),
    "pairs with a key twice": old("sets the key 'w' twice", body=python_2(ENTRY, ENTRY)),
    "pair of three": old("OrderedDict with unusual", body=python_2(pair(text("a"), b"N", b"N"))),
    "pair of a number": old("OrderedDict with unusual", body=python_2(pair(number(1), b"N"))),
    "pairs that are a text": old(
        "OrderedDict with unusual", body=call(name("collections", "OrderedDict"), text("ab"))
    ),
    "path-like name before 1.6": old(
        "no plain name", body=mapping(text("../w"), tensor(where=storage(6, rest=NONE)))
    ),
}
