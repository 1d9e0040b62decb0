"""The corpus of hostile files: pickles, and archives, safetensors files and indices around them."""

import json
import pathlib
import struct
import zipfile

from convert import hostile_legacy, hostile_pickles
from convert.archives import (
    DATA,
    GOOD,
    archive,
    archive_of,
    call,
    entry,
    patched,
    pickled,
    safetensors,
    text,
)
from convert.hostile_pickles import SYSTEM, Case, beside, touch


def member(message: str, **members: bytes) -> Case:
    return Case(lambda folder: archive(folder / "m.ckpt", **members), message)


def named(message: str, member_name: str) -> Case:
    parts = {"archive/data.pkl": GOOD, "archive/data/0": DATA, member_name: b"x"}
    return Case(lambda folder: archive_of(folder / "m.ckpt", parts), message)


def changed(message: str, old: bytes, new: bytes, count: int = -1) -> Case:
    return Case(lambda folder: patched(archive(folder / "m.ckpt"), old, new, count), message)


def compressed(folder: pathlib.Path) -> pathlib.Path:
    parts = {"archive/data.pkl": GOOD, "archive/data/0": DATA * 100}
    return archive_of(folder / "m.ckpt", parts, zipfile.ZIP_DEFLATED)


def central(path: pathlib.Path, suffix: bytes, offset: int, value: bytes) -> pathlib.Path:
    """Changes bytes of the central description of the member whose name ends so."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02", data.rindex(b"PK\x01\x02", 0, data.rindex(suffix)))
    data[start + offset : start + offset + len(value)] = value
    path.write_bytes(data)
    return path


def described(message: str, offset: int, value: bytes) -> Case:
    """Another central description of the storage than its own."""
    return Case(
        lambda folder: central(archive(folder / "m.ckpt"), b"archive/data/0", offset, value),
        message,
    )


def cut(folder: pathlib.Path, end: int) -> pathlib.Path:
    path = archive(folder / "m.ckpt")
    path.write_bytes(path.read_bytes()[:end])
    return path


ZIPS = {
    "member upwards": named(r"the name '\.\./evil'", "../evil"),
    "member upwards within": named("no plain name", "archive/../../evil"),
    "absolute member": named("the name '/etc/cron.d/evil'", "/etc/cron.d/evil"),
    "member of a drive": named("the name 'C:/evil'", "C:/evil"),
    "member with backslashes": changed(
        r"the name 'archive\\\\version'", b"archive/version", b"archive\\version"
    ),
    "member with NUL": changed("no plain name", b"archive/version", b"archive/ver\0ion"),
    "member twice": Case(
        lambda folder: patched(
            archive(folder / "m.ckpt", data__1=DATA), b"archive/data/1", b"archive/data/0"
        ),
        "two members 'archive/data/0'",
    ),
    "compressed member": Case(compressed, "the compressed member 'archive/data.pkl'"),
    "encrypted member": described("the encrypted member 'archive/data/0'", 8, b"\x01\x00"),
    "overlapping members": described("overlap another one", 42, struct.pack("<I", 10)),
    "member beyond the file": described(
        "truncated: its member 'archive/data/0'", 20, struct.pack("<II", 10**9, 10**9)
    ),
    "member of two sizes": described("the compressed member", 24, struct.pack("<I", 10**9)),
    "member described twice": Case(
        lambda folder: patched(archive(folder / "m.ckpt"), b"archive/data/0", b"archive/data/1", 1),
        "two descriptions of its member 'archive/data/1'",
    ),
    "flipped bit in the pickle": changed(
        "'archive/data.pkl' does not have its checksum", GOOD, GOOD.replace(b"w", b"v")
    ),
    "truncated archive": Case(lambda folder: cut(folder, -100), "damaged or truncated"),
    "truncated to a header": Case(lambda folder: cut(folder, 10), "damaged or truncated"),
    "empty file": Case(lambda folder: cut(folder, 0), "neither a zip archive nor"),
    "two folders": named("has not one folder", "other/data.pkl"),
    "no pickle": Case(
        lambda folder: archive_of(folder / "m.pth", {"archive/data/0": DATA}), "has not one folder"
    ),
    "big-endian": member("in the order .*big", byteorder=b"big"),
    "TorchScript": member("is a TorchScript program", constants_pkl=GOOD),
    "TorchScript code": named("is a TorchScript program", "archive/code/__torch__.py"),
}


def header(message: str, content: object, data: bytes = b"", length: int | None = None) -> Case:
    return Case(
        lambda folder: safetensors(folder / "m.safetensors", content, data, length), message
    )


ONE = entry(0, 4)


def stub(folder: pathlib.Path) -> pathlib.Path:
    (folder / "m.safetensors").write_bytes(b"12345")
    return folder / "m.safetensors"


SAFETENSORS = {
    "header beyond the file": header("header is cut off or too long", {"w": ONE}, b"1234", 1000),
    "immense header": header("header is cut off or too long", {}, b"", 2**64 - 1),
    "shorter than a length": Case(stub, "header is cut off or too long"),
    "header that is no JSON": header("invalid JSON", b"{'w'}"),
    "deep header": header("invalid JSON", b'{"w":' + b"[" * 10_000),
    "header in another encoding": header("not a readable", '{"w":1}'.encode("utf-16")),
    "deep unknown field": header(
        "not a readable safetensors file: .*recursion",
        json.dumps({"w": ONE}).encode()[:-2] + b',"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}}",
        b"1234",
    ),
    "unknown number of many digits": header(
        "not a readable safetensors file",
        json.dumps({"w": ONE}).encode()[:-2] + b',"x":' + b"9" * 10_000 + b"}}",
        b"1234",
    ),
    "header that is no UTF-8": header("not a readable", b'{"\xff":{}}'),
    "overlapping ranges": header("invalid offset", {"a": ONE, "b": entry(2, 6)}, b"123456"),
    "the same range twice": header("invalid offset", {"a": ONE, "b": ONE}, b"1234"),
    "gap": header("invalid offset", {"a": ONE, "b": entry(8, 12)}, b"123456789012"),
    "data missing": header("not a readable", {"a": entry(0, 8, (2,))}, b"1234"),
    "data left over": header("not a readable", {"a": ONE}, b"12345678"),
    "wrong type": header("not a readable", {"a": entry(0, 4, (1,), "I64")}, b"1234"),
    "unknown type": header("unknown variant `F99`", {"a": entry(0, 4, (1,), "F99")}, b"1234"),
    "unsupported type": header(
        "'a' in .* has the type F8_E4M3", {"a": entry(0, 1, (1,), "F8_E4M3")}, b"1"
    ),
    "wrong shape": header("not a readable", {"a": entry(0, 4, (2,))}, b"1234"),
    "negative shape": header("not a readable", {"a": entry(0, 4, (-1,))}, b"1234"),
    "overflowing shape in safetensors": header(
        "not a readable", {"a": entry(0, 0, (2**62, 2**62))}
    ),
    "immense empty shape in safetensors": header("no array can", {"a": entry(0, 0, (0, 2**62))}),
    "many axes": header("no array can have it", {"a": entry(0, 4, (1,) * 100)}, b"1234"),
    "entry that is a list": header("has the type of a list", {"a": ["F32", [1], [0, 4]]}, b"1234"),
    "names twice": header(
        "two entries named 'a'",
        (json.dumps({"a": ONE})[:-1] + "," + json.dumps({"a": ONE})[1:]).encode(),
        b"1234",
    ),
    "name upwards in safetensors": header("the name '../x'", {"../x": ONE}, b"1234"),
    "absolute name in safetensors": header("the name '/x'", {"/x": ONE}, b"1234"),
    "name with NUL in safetensors": header("no plain name", {"a\0": ONE}, b"1234"),
}


def index(message: str, places: object) -> Case:
    def make(folder: pathlib.Path) -> pathlib.Path:
        safetensors(folder / "good.safetensors", {"w": ONE}, b"1234")
        archive(folder / "evil.bin", pickled(beside(call(SYSTEM, text(touch(folder))))))
        path = folder / "model.safetensors.index.json"
        content = places if isinstance(places, str | bytes) else json.dumps(places)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return Case(make, message)


def weight_map(**places: object) -> dict:
    return {"weight_map": places}


def extra_name(folder: pathlib.Path) -> pathlib.Path:
    safetensors(folder / "good.safetensors", {"w": ONE, "extra": entry(4, 8)}, b"12345678")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(weight_map(w="good.safetensors")))
    return path


INDICES = {
    "index to a file outside": index("the name '../x.safet", weight_map(w="../x.safetensors")),
    "index to another folder": index("another folder", weight_map(w="a/x.safetensors")),
    "index to an absolute file": index("the name '/x.safetensors'", weight_map(w="/x.safetensors")),
    "index to no file": index("another folder", weight_map(w=1)),
    "index to an index": index(
        "as a file of weights", weight_map(w="model.safetensors.index.json")
    ),
    "index to a missing file": index("no checkpoint at", weight_map(w="x.safetensors")),
    "index to a hostile file": index("asks for os.system", weight_map(w="evil.bin")),
    "index to a file of a long name": index("'xxx.*' as a file of w", weight_map(w="x" * 3000)),
    "index to a file of a wide name": index("no checkpoint at", weight_map(w="\u1234" * 200)),
    "index to a missing name": index("'v' is missing from", weight_map(v="good.safetensors")),
    "index without a name": Case(extra_name, "good.safetensors has 'extra', which"),
    "index with a name upwards": index(
        "the name '../w'", {"weight_map": {"../w": "good.safetensors"}}
    ),
    "index that is no JSON": index("is no JSON file", "{"),
    "deep index": index("is no JSON file", "[" * 100_000),
    "deep index with an end": index("is no JSON file", "[" * 200_000 + "]" * 200_000),
    "index of many digits": index("is no JSON file", '{"weight_map": ' + "9" * 10_000 + "}"),
    "index that is no UTF-8": index("is no JSON file", b'{"weight_map": "\xff"}'),
    "index of nothing": index("has no 'weight_map'", "[]"),
    "index with a name twice": index(
        "two entries named 'w'", '{"weight_map": {"w": "good.safetensors", "w": "evil.bin"}}'
    ),
}


PARTS = (*hostile_pickles.PARTS, hostile_legacy.LEGACY, ZIPS, SAFETENSORS, INDICES)
CASES = {title: case for part in PARTS for title, case in part.items()}
assert len(CASES) == sum(map(len, PARTS)), "two cases have the same title"
