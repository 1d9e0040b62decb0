"""Hostile pickles in checkpoints: each is made in a folder and must be refused by name.

Those that carry code would make the file `marker` in that folder.
"""

import pathlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from convert.archives import (
    GOOD,
    ORDERED,
    archive,
    call,
    group,
    mapping,
    name,
    number,
    pickled,
    storage,
    tensor,
    text,
)


@dataclass(frozen=True)
class Case:
    """`make(folder)` gives the file to open; `message` is a part of the refusal."""

    make: Callable[[pathlib.Path], pathlib.Path]
    message: str
    code: Callable[[str], bytes] | None = None  # a whole pickle that runs a shell command


def touch(folder: pathlib.Path) -> str:
    return f"touch {folder / 'marker'}"


def beside(code: bytes) -> bytes:
    """A training checkpoint in which something stands beside good weights."""
    return mapping(text("state_dict"), mapping(text("w"), tensor()), text("callbacks"), code)


def runs(message: str, code: Callable[[str], bytes], protocol: int = 2) -> Case:
    """Code that runs when Python's own unpickler reads `data.pkl`."""
    return Case(
        lambda folder: archive(folder / "m.ckpt", pickled(beside(code(touch(folder))), protocol)),
        message,
        lambda command: pickled(code(command), protocol),
    )


def holds(message: str, body: bytes, protocol: int = 2) -> Case:
    """A pickle that describes something refused."""
    return Case(lambda folder: archive(folder / "m.ckpt", pickled(body, protocol)), message)


def weights(message: str, value: bytes, key: str = "w") -> Case:
    return holds(message, mapping(text(key), value))


def python(command: str) -> bytes:
    return text(f"__import__('os').system({command!r})")


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def dotted(module: str, attribute: str) -> bytes:
    """A name as protocol 4 has it, in which Python follows the dots."""
    return short(module) + short(attribute) + b"\x93"


def nested(command: str) -> bytes:
    inner = pickled(call(name("os", "system"), text(command)))
    return call(name("pickle", "loads"), b"B" + struct.pack("<I", len(inner)) + inner)


SYSTEM, EVAL = name("os", "system"), name("builtins", "eval")
GETITEM = name("operator", "getitem")
IMPORT_OS = call(name("builtins", "__import__"), text("os"))
GLOBALS = dotted("collections", "namedtuple.__globals__")

CODE = {
    "os.system": runs("asks for os.system", lambda c: call(SYSTEM, text(c))),
    "posix.system": runs("asks for posix.system", lambda c: call(name("posix", "system"), text(c))),
    "eval": runs("asks for builtins.eval", lambda c: call(EVAL, python(c))),
    "exec": runs("asks for builtins.exec", lambda c: call(name("builtins", "exec"), python(c))),
    "eval of Python 2": runs(
        "asks for __builtin__.eval", lambda c: call(name("__builtin__", "eval"), python(c))
    ),
    "getattr": runs(
        "asks for builtins.getattr",
        lambda c: call(call(name("builtins", "getattr"), IMPORT_OS, text("system")), text(c)),
    ),
    "subprocess": runs(
        "asks for subprocess.call",
        lambda c: call(name("subprocess", "call"), b"](" + b"".join(map(text, c.split())) + b"e"),
    ),
    "runpy": runs(
        "asks for runpy._run_code", lambda c: call(name("runpy", "_run_code"), python(c), mapping())
    ),
    "timeit": runs(
        "asks for timeit.timeit", lambda c: call(name("timeit", "timeit"), text("pass"), python(c))
    ),
    "nested pickle": runs("asks for pickle.loads", nested),
    "name as protocol 4 has it": runs(
        "asks for os.system", lambda c: call(dotted("os", "system"), text(c)), 4
    ),
    "attributes of an allowed module": runs(
        "asks for collections.namedtuple.__globals__",
        lambda c: (
            GLOBALS
            + b"q\x630"
            + call(
                call(GETITEM, call(GETITEM, b"h\x63", text("__builtins__")), text("eval")),
                python(c),
            )
        ),
        4,
    ),
    "INST": runs("asks for os.system", lambda c: b"(" + text(c) + b"ios\nsystem\n"),
    "OBJ": runs("asks for builtins.eval", lambda c: b"(" + EVAL + python(c) + b"o"),
    "function through the memo": runs(
        "asks for os.system", lambda c: SYSTEM + b"q\x01" + b"0" + call(b"h\x01", text(c))
    ),
    "code as a key": runs(
        "asks for os.system", lambda c: mapping(call(SYSTEM, text(c)), number(1))
    ),
    "partial": runs(
        "asks for functools.partial",
        lambda c: call(call(name("functools", "partial"), EVAL, python(c))),
    ),
}

CALLS = {
    "numpy.load": weights("asks for numpy.load", call(name("numpy", "load"), text("x.npy"))),
    "torch.load": weights("asks for torch.load", call(name("torch", "load"), text("x.pt"))),
    "NEWOBJ": weights("asks for subprocess.Popen", name("subprocess", "Popen") + group() + b"\x81"),
    "NEWOBJ_EX": weights(
        "asks for subprocess.Popen", name("subprocess", "Popen") + group() + b"}\x92"
    ),
    "a class of the author": weights(
        "asks for ldm.models.Net", name("ldm.models", "Net") + b")\x81"
    ),
    "globals of an allowed class": holds(
        "asks for collections.OrderedDict.__init__.__globals__",
        dotted("collections", "OrderedDict.__init__.__globals__"),
        4,
    ),
    "name from computed text": holds(
        "asks for os.system", text("os") + text("system") + b"\x93", 4
    ),
    "name that is no text": holds("whose name is no text", number(1) + text("system") + b"\x93", 4),
    "class with a line end": holds(r"asks for os\\nx.system", dotted("os\nx", "system"), 4),
    "lookalike name": holds(r"asks for torch\\xad._utils.", dotted("torch\xad._utils", "x"), 4),
    "extension code": holds("uses the pickle operation EXT1", b"\x82\x01"),
    "id as text": holds("uses the pickle operation PERSID", b"Pstorage\n"),
    "buffer outside": holds("uses the pickle operation NEXT_BUFFER", b"\x97", 5),
    "call of a text": weights("calls a str", call(text("os.system"), text("x"))),
    "call of a tensor": weights("calls a tensor", call(tensor(), text("x"))),
    "call of a storage class": weights(
        "calls torch.FloatStorage with", call(name("torch", "FloatStorage"), number(10**12))
    ),
    "OrderedDict of arguments": weights(
        "calls collections.OrderedDict with", call(name("collections", "OrderedDict"), b"](Ne")
    ),
    "arguments that are no tuple": weights(
        "calls collections.OrderedDict with", name("collections", "OrderedDict") + b"]R"
    ),
    "__setstate__": weights(
        "sets '__setstate__' of a dict", ORDERED + mapping(text("__setstate__"), text("x")) + b"b"
    ),
    "__dict__": weights(
        "sets '__class__' of a tensor", tensor() + mapping(text("__class__"), text("x")) + b"b"
    ),
    "items of a tensor": weights("sets items of a tensor", tensor() + text("a") + text("b") + b"s"),
    "append to a tensor": weights("adds items to a tensor", tensor() + text("a") + b"a"),
    "pickled array": weights(
        "is numpy._core.multiarray._reconstruct, not",
        call(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray")),
    ),
    "quantised tensor": weights(
        "asks for torch._utils._rebuild_qtensor", tensor(function="_rebuild_qtensor")
    ),
    "sparse tensor": weights(
        "asks for torch._utils._rebuild_sparse_tensor", tensor(function="_rebuild_sparse_tensor")
    ),
    "complex tensor": weights(
        "asks for torch.ComplexFloatStorage", tensor(where=storage(3, kind="ComplexFloatStorage"))
    ),
    "negated tensor": weights(
        "conjugated or negated", tensor(rest=(b"\x89", ORDERED, mapping(text("neg"), b"\x88")))
    ),
}

PRIME = 2**61 - 1  # Python's hash of its multiples is 0, and the same for each tuple of one
DEEP = b"(" * 50_000 + b"t" * 50_000
DAMAGE = {
    "deep tuple": weights("'w' in .* is a tuple", DEEP),
    "deep list": weights("'w' in .* is a list", b"]" * 50_000 + b"a" * 49_999),
    "deep key": weights("has a tuple as a key", mapping(DEEP, b"N")),
    "list as a key": weights("has a list as a key", mapping(b"]", b"N")),
    "short tuple as a key": weights("has a tuple as a key", mapping(group(number(1)), b"N")),
    "tuples of one hash": weights(
        "has a tuple as a key",
        mapping(*(part for n in range(8000) for part in (group(number(n * PRIME)), b"N"))),
    ),
    "numbers of one hash": weights(
        "'w' in .* is a dict, not a tensor",
        mapping(*(part for n in range(8000) for part in (number(n * PRIME), b"N"))),
    ),
    "tensors named by numbers": holds(
        "names a tensor by an int",
        mapping(*(part for n in range(2000) for part in (number(n * PRIME), tensor()))),
    ),
    "tensor as a key": weights("has a tensor as a key", mapping(tensor(), b"N")),
    "key twice": weights("sets the key 'a' twice", mapping(text("a"), b"N", text("a"), b"N")),
    "huge bytes": weights("is damaged: expected", b"\x8e" + struct.pack("<Q", 2**40)),
    "immense bytes": weights("is damaged", b"\x8e" + struct.pack("<Q", 2**64 - 1)),
    "huge text": weights("is damaged", b"X" + struct.pack("<I", 2**32 - 1)),
    "huge number": weights("is damaged", b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "number of negative length": weights("is damaged", b"\x8b" + struct.pack("<i", -1)),
    "number of many digits": weights("is damaged", b"L" + b"9" * 10_000 + b"L\n"),
    "no such operation": holds("is damaged", b"\xff"),
    "empty stack": holds("from an empty stack", b"0"),
    "below a mark": holds("from an empty stack", b"N((0a"),
    "no mark": holds("a mark that it never set", b"Nt"),
    "no memo": holds("recalls a value that it never stored", b"h\x09"),
    "odd items": holds("a key has no value", b"}(Nu"),
    "left-over values": holds("values left over", b"NN"),
    "goes on after its end": Case(
        lambda folder: archive(folder / "m.ckpt", GOOD + pickled(b"N")), "goes on after the end"
    ),
    "no end": Case(lambda folder: archive(folder / "m.ckpt", GOOD[:-1]), "is damaged"),
    "empty pickle": Case(lambda folder: archive(folder / "m.ckpt", b""), "is damaged"),
}

REBUILD = name("torch._utils", "_rebuild_tensor_v2")
TENSORS = {
    "id of another kind": weights(
        "something else than a storage",
        group(text("module"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(1))
        + b"Q",
    ),
    "id that is no tuple": weights("something else than a storage", text("storage") + b"Q"),
    "id of another type": weights(
        "has a storage of type torch.float32", tensor(where=storage(6, kind="float32"))
    ),
    "storage outside": weights(
        "has no storage '../../../etc/passwd'", tensor(where=storage(6, "../../../etc/passwd"))
    ),
    "storage missing": weights("has no storage '7'", tensor(where=storage(6, "7"))),
    "storage too short": weights("storage '0' has 24 bytes, not 7 el", tensor(where=storage(7))),
    "storage of another type": weights(
        "storage '0' has 24 bytes, not 6 elements of float64",
        tensor(where=storage(6, kind="DoubleStorage")),
    ),
    "storage of negative size": weights("something else than a stor", tensor(where=storage(-6))),
    "storage of immense size": weights("has 24 bytes, not 4611", tensor(where=storage(2**62))),
    "tensor of no storage": weights("makes a tensor of a str", tensor(where=text("x"))),
    "tensor too long": weights("needs 7 elements of a storage that has 6", tensor((7,), (1,))),
    "tensor after the end": weights("needs 7 elements of a", tensor((1,), (1,), start=6)),
    "stride too long": weights("needs 8 elements of a storage", tensor((2, 2), (6, 1))),
    "negative stride": weights("a negative or no size", tensor((3,), (-1,), start=5)),
    "negative offset": weights("a negative or no size", tensor((1,), (1,), start=-1)),
    "negative size": weights("a negative or no size", tensor((-1,), (1,))),
    "size that is no number": weights(
        "a negative or no size",
        call(REBUILD, storage(6), number(0), group(text("2")), group(number(1)), b"\x89", ORDERED),
    ),
    "tensor without its arguments": weights("_rebuild_tensor_v2 with unusual", call(REBUILD)),
    "fewer strides": weights("a negative or no size", tensor((2, 3), (1,))),
    "overflowing stride": weights("needs 9223372036854775808 el", tensor((2,), (2**63 - 1,))),
    "stride beyond 64 bits": weights("a negative or no size", tensor((2,), (2**64,))),
    "overflowing shape": weights("no array can have it", tensor((2**32, 2**32), (0, 0))),
    "immense empty shape": weights("no array can have it", tensor((0, 2**62), (0, 0))),
    "too many axes": weights("no array can have it", tensor((1,) * 65, (1,) * 65)),
    "repeated elements": weights("that repeats 6 elements", tensor((10**6, 10**6), (0, 0))),
}

NAMES = {
    f"name {title}": weights("it is no plain name", tensor(), key)
    for title, key in {
        "upwards": "../x",
        "upwards within": "a/../x",
        "absolute": "/x",
        "of a drive": "C:x",
        "with backslashes": "..\\x",
        "with NUL": "a\0b",
        "with a line end": "a\nb",
        "with a lone surrogate": "\ud800",
        "of the metadata": "__metadata__",
        "that is empty": "",
    }.items()
}

CONTENTS = {
    "nothing": holds("holds nothing, not the weights", b"}"),
    "a tensor alone": holds("holds a tensor, not the weights", tensor()),
    "a class alone": holds("holds torch.float32, not the weights", name("torch", "float32")),
    "state dict that is a list": holds("holds a list", mapping(text("state_dict"), b"]")),
    "name that is a number": holds("names a tensor by an int", mapping(number(1), tensor())),
    "mapping within": weights("'model' in .* is a dict, not a tensor", b"}", "model"),
    "text among the weights": weights("'w' in .* is a str, not a tensor", text("x")),
    "immense number": weights("'w' in .* is an int, not a tensor", number(2**70)),
}

PARTS = (CODE, CALLS, DAMAGE, TENSORS, NAMES, CONTENTS)
