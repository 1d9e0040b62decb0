"""Small valid checkpoints with seeded damage: bits, numbers, pieces and operations exchanged."""

import json
import pathlib
import pickle
import pickletools
import random
import struct
import tempfile

from convert.archives import (
    GOOD,
    NONE,
    OLD,
    TRAINING,
    archive,
    entry,
    legacy,
    mapping,
    pickled,
    safetensors,
    storage,
    tensor,
    text,
)

OPERATIONS = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
NUMBERS = [struct.pack("<q", n)[:size] for n in (0, 1, -1, 2**31 - 1, 2**62) for size in (1, 4, 8)]
PIECES = [b"[" * 3000, b'"', b"{}", b"1e999", b"9" * 5000, b"\xff\xfe", b"../", b"\0", b"\n", b"-"]
SIX = storage(6, rest=NONE)
OLD_BODIES = [
    OLD,
    mapping(text("state_dict"), mapping(text("a"), tensor((3, 2), (1, 3), where=SIX))),
    mapping(text("a"), tensor((2,), (3,), 1, SIX), text("b"), tensor((), (), where=SIX)),
]
VALUES = {"state_dict": {"w": 1.5, "n": 3}, 7: [b"x", (None, "y")]}
PICKLES = [
    GOOD,
    pickled(TRAINING, 4),
    pickled(mapping(text("a"), tensor((2,), (3,), 1), text("b"), tensor((), ()))),
    *(pickle.dumps(VALUES, protocol) for protocol in range(6)),
]
ENTRIES = {"w": entry(0, 16, (2, 2)), "n": entry(16, 24, (), "I64"), "__metadata__": {"a": "b"}}
HEADER = json.dumps(ENTRIES).encode()
INDEX = json.dumps({"metadata": {"total_size": 24}, "weight_map": {"w": "s.bin"}}).encode()


def zip_of(data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return archive(pathlib.Path(folder) / "m.ckpt", data).read_bytes()


ZIPS = [zip_of(data) for data in PICKLES]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to four changes, which may alter its length."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice((1, 1, 2, 4, 8, 30)))
        old, new = data[start:end], b""
        match chance.randrange(8):
            case 0:
                new = bytes(byte ^ 1 << chance.randrange(8) for byte in old)
            case 1:
                new = chance.randbytes(len(old))
            case 2:
                new, end = chance.choice(OPERATIONS), start + 1
            case 3:
                new, end = chance.choice(OPERATIONS), start
            case 4:
                new = chance.choice(NUMBERS)
                end = start + len(new)
            case 5:
                new, end = chance.choice(PIECES), start
            case 6:
                new = old * chance.choice((2, 100))
            case 7:
                other = chance.randrange(len(data) + 1)
                new = data[other : other + 30]
        data = data[:start] + new + data[end:]
    return data if chance.random() < 0.95 else data[: chance.randrange(len(data) + 1)]


def mutant(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """The file number `seed`: an archive, its pickle, a header or an index is damaged, or a file
    from before PyTorch 1.6.
    """
    chance = random.Random(seed)
    match chance.choice("zip pickle pickle legacy legacy header header index".split()):
        case "zip":
            path = folder / "m.ckpt"
            path.write_bytes(damaged(chance.choice(ZIPS), chance))
        case "pickle":
            path = archive(folder / "m.ckpt", damaged(chance.choice(PICKLES), chance))
        case "legacy":
            path = folder / "m.pth"
            path.write_bytes(damaged(legacy(path, chance.choice(OLD_BODIES)).read_bytes(), chance))
        case "header":
            path = safetensors(folder / "m.safetensors", damaged(HEADER, chance), bytes(24))
        case "index":
            path = folder / "m.index.json"
            archive(folder / "s.bin")
            path.write_bytes(damaged(INDEX, chance))
    return path
